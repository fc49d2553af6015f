"""Selective scan on a GPU in Triton: states in registers, one warp a program, and its own backward.

A program holds the states of a few channels of one image and walks along the length; nothing of size (batch, length,
dim, d_state) is ever written. It loads the rows of the next steps before it works on these. Batch and channels alone
mostly fill the chip. Where they do not, the length is cut in chunks: the product of the decays over a chunk is
exp(A sum(delta)), so a first pass needs only what each chunk adds to the state and its sum of step sizes, and each
program of the last pass combines those of the chunks before its own. Backward does the same from the end. Forward
saves the state before every 32nd step for it, from which it computes the states in between again.

The gate is part of the kernels: forward multiplies the output by SiLU(z) before it rounds it, and backward computes the
output again for the gradient of z.

Sums over channels are partial sums per program, added in a fixed order: results repeat to the bit. Strides along the
length, ``dim`` and ``d_state`` are constants of the compiled kernels, so that most addresses are too; the batch and the
length are not. Registers, spills and a model's cycles are in `docs/performance.md`; no GPU has been timed.
"""

import importlib.metadata
import importlib.util
import math
import os
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ssmgen.ops.backend import FLOATS_UP_TO_32
from ssmgen.ops.launch import launch
from ssmgen.ops.operator import dense_rows
from ssmgen.ops.scan.fused import define_scan, run_scan
from ssmgen.ops.scan.inputs import SEQUENCES, ScanInputs

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then runs its kernels in Python, for tests
name, takes_order = "triton", True
devices: tuple[str, ...] | None = None if _INTERPRETED else ("cuda",)
dtypes = FLOATS_UP_TO_32
auto_for: tuple[str, ...] | None = ("cuda",)
# Looked up once, since Dynamo of torch 2.11 refuses to trace the look-up.
_INSTALLED = importlib.util.find_spec("triton") is not None
# Steps of a round of the loop, and steps from one saved state to the next.
_ROUND, _SEGMENT = 8, 32
# Of the forward kernel. Without the limit, Nvidia's compiler keeps a third warp on the chip by spilling registers.
_FORWARD_LAUNCH: dict[str, Any] = {} if torch.version.hip else {"maxnreg": 255}
# Warps that a chip holds at once, two for each quarter of 132 multiprocessors, as far as the registers go.
_ENOUGH_PROGRAMS = 1024


def unavailable() -> str | None:
    if not _INSTALLED:
        return "triton is not installed: pip install triton (it comes with PyTorch's CUDA builds)"
    if not (torch.cuda.is_available() or _INTERPRETED):
        return "Triton's kernels need a CUDA device and none is visible (TRITON_INTERPRET=1 runs them on a CPU, slowly)"
    return None


def describe() -> str:
    return f"fused Triton {importlib.metadata.version('triton')} kernel" + (", interpreted" if _INTERPRETED else "")


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """SISMA eq. 5 for float32 and 16-bit inputs, the gate included: y ``(batch, length, dim)`` and the last state."""
    return run_scan("triton_scan", inputs)


def _kernels() -> Any:
    from ssmgen.ops.scan import triton_kernels

    return triton_kernels


def _words(rows: Tensor) -> Tensor:
    """Rows of bfloat16 as words of two, where they lie so: the halves of a word are the upper ones of two float32."""
    places = *rows.stride()[:-1], rows.shape[-1], rows.storage_offset(), rows.data_ptr() // 2
    paired = rows.dtype == torch.bfloat16 and not any(place % 2 for place in places)
    return rows.view(torch.int32) if paired else rows


class _Tile(NamedTuple):
    """The states of a program: see `ssmgen.ops.scan.triton_kernels`."""

    CHANNELS: int
    WIDTH: int
    STATES: int
    STEPS: int

    @classmethod
    def forward(cls, n: int, whole: bool) -> Self:
        """Up to 32 states per lane, of one channel or two: a number of B or C that is read then serves several.

        With masks in every group, four steps of 64 states would need more registers than there are.
        """
        states = _padded(n)
        channels = max(1, min(16, 1024 // states))
        width = min(max(128 // channels, 16 if states > 16 else 8), states)
        steps = _ROUND if states <= 16 else 2 if states == 64 and not whole else 4
        return cls(channels, width, states, steps)

    @classmethod
    def backward(cls, n: int) -> Self:
        """Up to 32 states of a channel side by side: sums over channels are then mostly within a lane."""
        states = _padded(n)
        return cls(max(1, min(16, 512 // states)), min(32, states), states, 4 if states <= 16 else 2)


def _padded(n: int) -> int:
    return max(4, 1 << (n - 1).bit_length())


def _whole(inputs: ScanInputs) -> bool:
    """Whether the length is made of whole rounds, so that no step is masked."""
    return inputs.u.shape[1] % _ROUND == 0


class _Plan:
    """How a call is divided among programs, and the arguments that all its kernels share."""

    def __init__(self, inputs: ScanInputs, tile: _Tile) -> None:
        inputs = inputs.apply(dense_rows, *SEQUENCES)
        inputs = inputs.apply(_words, "B", "C")
        inputs = inputs.apply(Tensor.contiguous, "A", "D", "delta_bias", "initial_state", "order")
        self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias = inputs[:8]
        self.initial, self.order, softplus = inputs[8:]
        self.batch, self.length, self.dim = self.u.shape
        self.n = self.A.shape[1]
        self.blocks = -(-self.dim // tile.CHANNELS)
        segments = -(-self.length // _SEGMENT)
        pieces = _ENOUGH_PROGRAMS // (self.batch * self.blocks)
        # Two passes over half the length each take as long as one over all of it.
        self.chunk_length = -(-segments // min(pieces, segments)) * _SEGMENT if pieces > 2 else segments * _SEGMENT
        self.chunks = -(-self.length // self.chunk_length)
        self.programs = self.blocks, self.chunks, self.batch
        self.flags: dict[str, Any] = {
            "SOFTPLUS": softplus,
            "WHOLE": _whole(inputs),
            "dim": self.dim,
            "n": self.n,
            **tile._asdict(),
            "num_warps": 1,
        }

    def layout(self, *rows: Tensor) -> tuple[Any, ...]:
        """Where the rows of tensors and the gate lie: distances between images, sizes, distances between tokens."""
        order_batch = self.length if self.order is not None and self.order.dim() == 2 else 0
        sizes = order_batch, self.length, self.chunk_length, self.chunks
        images, steps = ([0 if x is None else x.stride(axis) for x in (*rows, self.z)] for axis in (0, 1))
        return *images, *sizes, *steps

    def states(self, *count: int) -> Tensor:
        """An uninitialised float32 tensor of states, ``(batch, *count, dim, n)``."""
        return self.A.new_empty(self.batch, *count, self.dim, self.n)

    def carried(self, x: Tensor, maps: Tensor, backward: bool) -> tuple[Tensor | None, Tensor | None]:
        """What each chunk adds to the state or to its gradient, and its sum of step sizes; None for one chunk."""
        if self.chunks == 1:
            return None, None
        end, total = self.states(self.chunks), self.A.new_empty(self.batch, self.chunks, self.dim)
        launch(
            *(_kernels().carry_kernel, (self.blocks, self.chunks - 1, self.batch)),
            *(x, self.delta, self.A, maps, self.z, self.bias, self.order, end, total),
            *self.layout(x, self.delta, maps),
            BACKWARD=backward,
            **self.flags,
        )
        return end, total


def _saved_shape(u: Tensor, A: Tensor) -> tuple[int, ...]:
    """The states before every segment of steps."""
    return u.shape[0], -(-u.shape[1] // _SEGMENT), *A.shape


def _forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    plan = _Plan(inputs, _Tile.forward(inputs.A.shape[1], _whole(inputs)))
    y, last = plan.u.new_empty(plan.u.shape), plan.states()
    saved = plan.A.new_empty(_saved_shape(plan.u, plan.A)) if save else None
    end, total = plan.carried(plan.u, plan.B, backward=False)
    launch(
        *(_kernels().forward_kernel, plan.programs),
        *(plan.u, plan.delta, plan.A, plan.B, plan.C, plan.D, plan.z, plan.bias, plan.order, plan.initial),
        *(y, end, total, last, saved),
        *plan.layout(plan.u, plan.delta, plan.B, plan.C),
        ROUND=_ROUND,
        SEGMENT=_SEGMENT,
        **(plan.flags | _FORWARD_LAUNCH),
    )
    return y, last, plan.A.new_empty(0) if saved is None else saved


def _backward(dy: Tensor, dlast: Tensor, saved: Tensor, inputs: ScanInputs) -> tuple[Tensor | None, ...]:
    plan = _Plan(inputs, _Tile.backward(inputs.A.shape[1]))
    dy, dlast = dy.contiguous(), dlast.contiguous()
    end, total = plan.carried(dy, plan.C, backward=True)
    du, ddelta = (x.new_empty(x.shape) for x in (plan.u, plan.delta))
    dz = None if plan.z is None else plan.u.new_empty(plan.u.shape)
    dA, dinitial = plan.states(plan.chunks), plan.states()
    dB, dC = (plan.A.new_empty(plan.batch, plan.blocks, plan.length, plan.n) for _ in range(2))
    dD, dbias = (plan.A.new_empty(plan.batch, plan.chunks, plan.dim) for _ in range(2))
    tile = plan.flags["CHANNELS"] * plan.flags["STATES"]
    starts = plan.A.new_empty(math.prod(plan.programs), _SEGMENT // plan.flags["STEPS"], tile)
    launch(
        *(_kernels().backward_kernel, plan.programs),
        *(plan.u, plan.delta, plan.A, plan.B, plan.C, plan.D, plan.z, plan.bias, plan.order),
        *(dy, dlast, saved, end, total, starts, du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial),
        *plan.layout(plan.u, plan.delta, plan.B, plan.C),
        SEGMENT=_SEGMENT,
        **plan.flags,
    )
    maps = (sums.sum(1).to(plan.u.dtype) for sums in (dB, dC))
    return du, ddelta, dA.sum((0, 1)), *maps, dD.sum((0, 1)), dz, dbias.sum((0, 1)), dinitial


define_scan("triton_scan", name, _forward, _backward, _saved_shape, "CompositeExplicitAutograd")
