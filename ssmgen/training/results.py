"""The values of training steps, and when the host reads them.

A GPU computes what the host has launched before. A host that reads the loss in every step waits for the GPU, and then
the GPU waits for the host to launch the next step. On CUDA, therefore, the device itself leaves out a step that is not
finite, every step's values are copied to the host in the background, and the host reads those of a step when it has
launched the next one (`LAG`). On other devices it reads them at once.
"""

import math
import time
from collections import deque
from functools import cached_property

import torch
from torch import Tensor

#: Launched steps whose values the host has not read, where it reads late: enough for the device never to run dry.
LAG = 1


def reads_late(device: torch.device) -> bool:
    """Whether reading a value would hold up the host and then the device."""
    return device.type == "cuda"


class StepResult:
    """Mean loss, gradient norm, and whether any process was asked to stop; the same in every process.

    A norm that is not finite in one process alone is finite in none. On CUDA the first value that is read waits until
    the device has computed the gradients of the step, but not for what was launched after that.

    Args:
        found: ``(3,)``, on any device: loss, norm, and the share of the processes that were asked to stop.

    Attributes:
        known: when the host had read its values, in seconds of `time.monotonic`.
    """

    known: float

    def __init__(self, found: Tensor) -> None:
        self._device_values, self._copied = found, None
        # On CUDA into pinned memory. Other devices may not be asked when such a copy is complete.
        self._values = found.to("cpu", non_blocking=found.is_cuda)
        if found.is_cuda:
            self._copied = torch.cuda.Event(blocking=True)  # the waiting host leaves its core to the loader
            self._copied.record(torch.cuda.current_stream(found.device))

    @property
    def skipped(self) -> Tensor:
        """Whether the step must change no weight: a bool, scalar, on the device."""
        return ~self._device_values[:2].isfinite().all()

    @cached_property
    def _read(self) -> tuple[float, float, float]:
        if self._copied is not None:
            self._copied.synchronize()
        loss, norm, stops = self._values.tolist()
        return loss, norm, stops

    @property
    def loss(self) -> float:
        """The loss."""
        return self._read[0]

    @property
    def norm(self) -> float:
        """The norm of the gradient before clipping."""
        return self._read[1]

    @property
    def finite(self) -> bool:
        """Whether the step changed the weights."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def stop(self) -> bool:
        """Whether any process was asked to stop before it launched this step."""
        return self._read[2] > 0


class Unread:
    """Steps that were launched, in order, until they are read.

    Args:
        first: steps before them.
        late: whether the device may be `LAG` steps behind.
    """

    def __init__(self, first: int, late: bool) -> None:
        self._results: deque[StepResult] = deque()
        self._read = self._first = first
        self._lag = LAG if late else 0

    def add(self, result: StepResult) -> None:
        """Take the result of the next step."""
        self._results.append(result)

    def read(self, everything: bool) -> list[tuple[int, StepResult]]:
        """The results that are to be read now, each with the number of its step, counted from 1 as in the log.

        All processes read the same steps at the same time, so they agree on the step at which all stop. If one of the
        results asks for a stop, the others are read too: what is saved then counts every step. So is the first step,
        which tells the watchdog how long one takes.

        Args:
            everything: leave none unread, as before a checkpoint.
        """
        found: list[tuple[int, StepResult]] = []
        lag = 0 if everything or self._read == self._first else self._lag
        while len(self._results) > lag:
            self._read += 1
            result = self._results.popleft()
            lag = 0 if result.stop else lag
            result.known = time.monotonic()
            found.append((self._read, result))
        return found
