"""The health of a training: steps that were skipped, and spikes of the loss."""

import math
from dataclasses import dataclass
from typing import Literal

#: Consecutive steps with a non-finite loss or gradient after which training gives up.
MAX_SKIPPED = 10
#: A loss of more than this many times its running mean is a spike.
SPIKE = 3.0
# The running mean covers about a hundred steps; before the twentieth it is not trusted.
_WEIGHT, _TRUSTED = 0.01, 20

Event = Literal["skipped", "spike"]


@dataclass
class Health:
    """Counts over the whole run; a checkpoint keeps them, so a resumed run counts on.

    Attributes:
        skipped: steps that changed no weight because the loss or the gradient was not finite.
        skipped_in_a_row: those since the last step that did.
        spikes: steps whose loss was above `SPIKE` times its running mean; they count as steps like any other.
        judged: steps with a finite loss.
        mean: the running mean of the loss. A spike enters it as `SPIKE` times the mean.
    """

    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    judged: int = 0
    mean: float = 0.0

    def count(self, loss: float, norm: float) -> Event | None:
        """Count a step by its loss and gradient norm; returns what was unusual about it, if anything."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return "skipped"
        self.skipped_in_a_row = 0
        spike = self.judged >= _TRUSTED and loss > SPIKE * self.mean
        self.spikes += spike
        self.judged += 1
        capped = SPIKE * self.mean if spike else loss
        self.mean += max(_WEIGHT, 1 / self.judged) * (capped - self.mean)
        return "spike" if spike else None

    def check(self, step: int) -> None:
        """Raise `FloatingPointError` if too many steps up to ``step`` were skipped one after the other."""
        if self.skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} steps in a row were not finite, the last is step {step}: lower lr or look at "
                "the data; log.jsonl names the examples of each. The checkpoints before are intact."
            )
