"""Whether bfloat16 products are worth their rounding here: measured in this process, not looked up by processor."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

PRECISIONS = ("auto", "no", "bf16")

# bfloat16 keeps 8 of the 24 bits of float32, so its products must be faster by a tenth at least. Where products take as
# long in both, so does a step, nearly: what conversions cost is saved again by moving half the memory.
_WORTH_IT = 1.1
# A layer of `quick` on a quarter of a batch: small enough for a processor that takes 20 ms for one product in bfloat16.
_TOKENS, _WIDTH, _WIDER = 1024, 96, 384
_SECONDS = 0.1


class Choice(NamedTuple):
    """A precision, ``"no"`` (float32) or ``"bf16"``, and the reason in a few words. As a string, a line to print."""

    precision: str
    reason: str

    def __str__(self) -> str:
        return f"precision {'no (float32)' if self.precision == 'no' else self.precision}: {self.reason}"


class ProductTimes(NamedTuple):
    """Seconds that the products of one small layer take, forward and backward."""

    float32: float
    bfloat16: float


def choose_precision(asked: str, device: torch.device | str = "cpu") -> Choice:
    """What to compute in: what is asked for, or for ``"auto"`` what pays on this machine.

    On a CPU, ``"auto"`` is bfloat16 where its products are at least a tenth faster than those of float32, see
    `product_times`. On CUDA it is bfloat16 where the device has instructions for it. It is float32 on other devices.

    Args:
        asked: ``"auto"``, ``"no"`` or ``"bf16"``.
        device: where the products will run.

    Raises:
        ValueError: another word.
    """
    if asked not in PRECISIONS:
        raise ValueError(f"precision must be 'auto', 'no' (float32) or 'bf16', got {asked!r}")
    if asked != "auto":
        return Choice(asked, "as asked")
    device = torch.device(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
        return Choice("bf16", f"{name} computes in it") if native else Choice("no", f"{name} has no bfloat16 products")
    if device.type != "cpu":
        return Choice("no", f"bfloat16 is not tried on {device.type}")
    times = product_times()
    precision = "bf16" if times.float32 > _WORTH_IT * times.bfloat16 else "no"
    float32, bfloat16 = (f"{1e3 * seconds:.{1 if seconds < 0.01 else 0}f} ms" for seconds in times)
    return Choice(precision, f"a layer's products take {float32} in float32, {bfloat16} in bfloat16")


def set_product_precision(rounding: str) -> None:
    """Set how this process rounds the factors of float32 matrix products, and on CUDA of convolutions.

    torch by itself lets cuDNN round to TensorFloat32 whatever matrix products do.

    Args:
        rounding: ``"highest"`` (not at all), ``"high"`` or ``"medium"``, as `torch.set_float32_matmul_precision` takes
            it; on CUDA both are TensorFloat32.
    """
    torch.set_float32_matmul_precision(rounding)
    torch.backends.cudnn.allow_tf32 = rounding != "highest"


def sampling_dtype(asked: torch.dtype | str | None, device: torch.device | str) -> torch.dtype | None:
    """The dtype of a model's weights while sampling; None leaves them as they are.

    Args:
        asked: a dtype, None, or ``"auto"``: bfloat16 where `choose_precision` takes it, otherwise None.
        device: where the model is.

    Raises:
        ValueError: another word.
    """
    if not isinstance(asked, str):
        return asked
    if asked != "auto":
        raise ValueError(f"dtype must be a torch.dtype, 'auto' or None, got {asked!r}")
    return torch.bfloat16 if choose_precision("auto", device).precision == "bf16" else None


def product_times() -> ProductTimes:
    """Time products on the CPU in float32 and in bfloat16, in turn, for about a tenth of a second.

    The fastest of each counts: what else runs on the machine can only add. They are measured once in a process for its
    number of threads and `torch.get_float32_matmul_precision`.
    """
    return _product_times(torch.get_num_threads(), torch.get_float32_matmul_precision())


@functools.cache
def _product_times(threads: int, rounding: str) -> ProductTimes:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        layers = [_layer(torch.float32), _layer(torch.bfloat16)]
        for layer in layers:
            layer()
        rounds: list[list[float]] = []
        started = time.perf_counter()
        while len(rounds) < 4 or time.perf_counter() - started < _SECONDS:
            rounds.append([_seconds(layer) for layer in layers])
    return ProductTimes(*map(min, zip(*rounds, strict=True)))


def _layer(dtype: torch.dtype) -> Callable[[], None]:
    """The products of a linear layer, forward and backward, and in their share of a step those of Muon.

    They write where they wrote before: a step keeps its memory, and a new page costs as much as a product.
    """

    def filled(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device="cpu")

    x, weight, up, pair = filled(_TOKENS, _WIDTH), filled(_WIDER, _WIDTH), filled(_TOKENS, _WIDER), filled(2, 96, 384)
    y, dx, dweight, gram = torch.empty_like(up), torch.empty_like(x), torch.empty_like(weight), filled(2, 96, 96)

    def products() -> None:
        torch.mm(x, weight.mT, out=y)
        torch.mm(up, weight, out=dx)
        torch.mm(up.mT, x, out=dweight)
        torch.bmm(pair, pair.mT, out=gram)

    return products


def _seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
