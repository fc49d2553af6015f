"""Whole models side by side, sampling and training: ``python -m benchmarks.models``.

On a GPU: ``sisma-xl``, ``sisma-attn-xl``, ``dit-xl`` (latents 32 x 32) and ``sdm`` (256 x 256 pixels), bfloat16 weights
and a captured step for all, and SISMA in eager float32 beside them. On a CPU a dry run of the same code at the smallest
sizes, whose figures say nothing about the large ones. What is compiled is timed from its second call; the first, which
compiles, is given apart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.timing import arguments, measure, medians, show, write
from ssmgen import Sampler, build
from ssmgen.models.summary import summarize
from ssmgen.precision import choose_precision

STEPS = 200
#: Dense bfloat16 matrix rate by device name, for the share of it that training reaches.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}


@dataclass
class Case:
    """A model at a size, and how it is run."""

    name: str
    model: str
    side: int
    dtype: torch.dtype | None
    compile: bool


def cases(gpu: bool) -> list[Case]:
    """What is compared."""
    names = ("sisma-xl", "sisma-attn-xl", "dit-xl", "sdm") if gpu else ("sisma-debug", "sisma-attn-debug", "dit-debug")
    side = 32 if gpu else 16
    tuned = [Case(n, n, 256 if n == "sdm" else side, torch.bfloat16 if gpu else None, gpu) for n in names]
    return [*tuned, Case(f"{names[0]}, eager float32", names[0], side, None, False)]


def main() -> None:
    """Print the tables; write JSON if asked."""
    given = arguments(__doc__, rounds=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = STEPS if device == "cuda" else 4
    sampling = [
        sample_row(case, batch, device, steps, given.rounds) for case in cases(device == "cuda") for batch in (1, 8)
    ]
    training = [train_row(case, device, given.rounds) for case in cases(device == "cuda")[:-1]]
    write(given.json, "models", {"steps": steps, "sampling": sampling, "training": training})


def sample_row(case: Case, batch: int, device: str, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of ``steps`` Euler steps, the first call apart, and the memory they take."""
    model = _model(case, device)
    sampler = Sampler(model, dtype=case.dtype, compile=case.compile)
    x0 = torch.randn(batch, model.in_channels, case.side, case.side)
    mask = torch.randint(0, 19, (1, case.side * model.mask_scale, case.side * model.mask_scale))
    call = partial(sampler, x0, mask, solver="euler", steps=steps)
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = measure({case.name: call}, rounds)
    show(f"{steps} Euler steps, batch {batch} (first call {first:.1f} s)", times, case.name)
    median = medians(times)[case.name]
    return {
        "case": case.name,
        "batch": batch,
        "first_seconds": first,
        "milliseconds": times[case.name],
        "milliseconds_per_step": median / steps,
        "seconds_per_image": median / 1e3 / batch,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def train_row(case: Case, device: str, rounds: int, batch: int = 8) -> dict[str, Any]:
    """Images a second of forward, backward and AdamW in the precision that pays, and the share of the matrix rate."""
    model = _model(case, device).train()
    choice = choose_precision("auto", device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    objective = build("flow-matching")
    x = torch.randn(batch, model.in_channels, case.side, case.side, device=device)
    mask = torch.randint(0, 19, (batch, case.side * model.mask_scale, case.side * model.mask_scale), device=device)
    step_model = torch.compile(model) if case.compile else model

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=choice.precision == "bf16"):
            loss = objective.loss(step_model, x, mask=mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = measure({case.name: step}, rounds)
    seconds = medians(times)[case.name] / 1e3
    summary = summarize(case.model, case.side)
    used = 3 * (summary.matrix_flops + summary.scan_flops) * batch / seconds
    peak = next(
        (rate for name, rate in PEAK_FLOPS.items() if device == "cuda" and name in torch.cuda.get_device_name()), None
    )
    share = used / peak if peak else None
    print(
        f"training {case.name}, {choice}: {batch / seconds:.1f} images a second"
        + (f", {share:.0%} of the peak" if share else "")
    )
    return {
        "case": case.name,
        "precision": choice.precision,
        "milliseconds": times[case.name],
        "images_per_second": batch / seconds,
        "mfu": share,
    }


def _model(case: Case, device: str) -> Any:
    torch.manual_seed(0)
    return build(case.model).eval().to(device)


if __name__ == "__main__":
    main()
