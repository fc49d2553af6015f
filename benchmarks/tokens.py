"""Time and memory per token, scan against attention, as the sequence grows: ``python -m benchmarks.tokens``.

One block of each kind without gradients, at equal width: SISMA's with its two scans, its twin with self- and
cross-attention, and DiT's. On a CPU width 256 and up to 16,384 tokens in float32, on a GPU width 1024
and up to 65,536 in bfloat16; memory is the peak above the weights, measured on a GPU only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.rows import run
from benchmarks.timing import arguments, measure, medians, show
from ssmgen import build
from ssmgen.nn import Block
from ssmgen.sampling import in_dtype

ATTENTION = ("self_attention", "self-attention", None)
CROSS = ("cross_attention", {"name": "cross-attention", "position": True}, "mask")
FFN = ("ffn", "feed-forward", None)


def main() -> None:
    """Print a table per length; write JSON if asked."""
    given = arguments(__doc__, rounds=3, rows=True)
    gpu = torch.cuda.is_available()
    device, dtype, width, longest = ("cuda", torch.bfloat16, 1024, 256) if gpu else ("cpu", torch.float32, 256, 128)
    blocks = {
        "sisma-block": build("sisma-block", dim=width),
        "attention in its place": Block(width, [ATTENTION, CROSS, FFN], num_heads=width // 64),
        "dit-block": Block(width, [ATTENTION, FFN], num_heads=width // 64),
    }
    blocks = {name: in_dtype(block.to(device).eval(), dtype) for name, block in blocks.items()}
    sides = [side for side in (16, 32, 64, 128, 256) if side <= longest]
    rows = {f"{side * side} tokens": partial(_row, blocks, side, width, device, given.rounds) for side in sides}
    run(given, "tokens", {"rows": rows}, width=width)


def _row(blocks: dict[str, Any], side: int, width: int, device: str, rounds: int) -> dict[str, Any]:
    calls = {name: partial(_call, block, side, width, device) for name, block in blocks.items()}
    times = measure(calls, rounds)
    memory = {name: _peak(call) for name, call in calls.items()} if device == "cuda" else None
    show(f"{side * side} tokens, width {width}, batch 1", times, "sisma-block")
    return {"tokens": side * side, "milliseconds": times, "medians": medians(times), "peak_bytes": memory}


def _call(block: Any, side: int, width: int, device: str) -> None:
    dtype = block.ffn.up.weight.dtype
    size = (side, side)
    x = torch.zeros(1, side * side, width, device=device, dtype=dtype)
    with torch.no_grad():
        block(x, block.adaln(x[:, 0]), [block.condition({"mask": x}, size)], size)


def _peak(call: Any) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
