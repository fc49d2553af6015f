"""An experiment: one question, and what is compared to answer it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.timing import RESULTS

#: What makes the presets what they were when most experiments began.
EARLIER = {
    "quick": ("shared_noise=false",),
    "faces": (
        *("shared_noise=false", "mirrored_weighting=0", "model=sisma-s"),
        *("model_args.dim=128", "model_args.depth=4", "model_args.gates=true", "ema_decay=0.998"),
        "autoencoder_source=madebyollin/taesd",
    ),
}


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        question: what is asked, in a sentence.
        variants: name to the ``key=value`` words of recipes.sisma.train that make it.
        base: the words all variants share.
        preset: what they are changes of.
        earlier: of that preset as it was when most experiments began, see `EARLIER`.
        stages: training steps after which each run is measured; the learning rate decays to zero over the last. What is
            measured are averages of the weights over about the last ninth of the steps until then (the ramp of
            `ssmgen.training.optimizers.moving_average`), which stands in for the decay at the stages before the last.
        paces: how many times these steps a variant takes, where it is given equal time and not equal steps.
        timed_by: experiment whose measured step times are the paces instead, see `benchmarks.fidelity.step_time`.
        detailed: the page also tables small classes, eyes and consistency.
        sampled: the variants are words of recipes.sisma.evaluate instead: one run a seed is sampled in each way.
        finding: what the results say, for the page.
    """

    question: str
    variants: dict[str, tuple[str, ...]]
    base: tuple[str, ...] = ("guidance_scale=1",)
    preset: str = "quick"
    earlier: bool = True
    stages: tuple[int, ...] = (350, 1050)
    paces: dict[str, float] = field(default_factory=dict)
    timed_by: str = ""
    detailed: bool = False
    sampled: bool = False
    finding: str = ""

    def training(self, words: Iterable[str] = ()) -> list[str]:
        """The words of recipes.sisma.train for a variant of these ``words``; of a setting, the last word counts."""
        return [self.preset, *(EARLIER[self.preset] if self.earlier else ()), *self.base, *words]

    def stages_of(self, name: str) -> tuple[int, ...]:
        """Training steps after which a variant is measured."""
        paces = measured_paces(self.timed_by) if self.timed_by else self.paces
        return tuple(round(steps * paces.get(name, 1.0)) for steps in self.stages)

    @property
    def equal_time(self) -> bool:
        """Whether variants take different numbers of steps."""
        return bool(self.paces or self.timed_by)

    def untimed(self, names: Iterable[str]) -> list[str]:
        """Those of the variants that need a measured step time and have none."""
        return [name for name in names if self.timed_by and name not in measured_paces(self.timed_by)]


def measured_paces(experiment: str) -> dict[str, float]:
    """Steps that each variant takes in the time of one step of the first, as `benchmarks.fidelity.step_time` found."""
    file = RESULTS / "fidelity" / f"step-time-{experiment}.json"
    if not file.exists():
        return {}
    return {name: 1 / ratio for name, ratio in json.loads(file.read_text())["ratios"].items()}
