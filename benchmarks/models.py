"""Whole models side by side, sampling and training: ``python -m benchmarks.models``.

On a GPU: ``sisma-xl``, ``sisma-attn-xl``, ``dit-xl`` (latents 32 x 32) and ``sdm`` (256 x 256 pixels), bfloat16 weights
and a captured step for all, and SISMA in eager float32 with TF32 products beside them. On a CPU a dry run of the same
code at the smallest sizes, whose figures say nothing about the large ones. What is compiled is timed from its second
call; the first, which compiles, is given apart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpus import halved_until_it_fits, limits
from benchmarks.rows import run
from benchmarks.timing import arguments, measure, medians, show
from ssmgen import Sampler, build
from ssmgen.models.summary import summarize
from ssmgen.precision import Choice, choose_precision

STEPS = 200
#: Images in a training step on a GPU. Of few images the optimizer's work and the casts of weights are a large part.
TRAINING_BATCH = 64
#: Rounds of a row that samples take about so long together at most.
_MOST_SECONDS = 120
#: Of float32 products on a GPU: TF32, or the float32 model beside the others would be slower than it need be.
MATMUL_PRECISION = "high"


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
    given = arguments(__doc__, rounds=5, rows=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps, batch = (STEPS, TRAINING_BATCH) if device == "cuda" else (4, 8)
    if device == "cuda":
        torch.set_float32_matmul_precision(MATMUL_PRECISION)
    compared = cases(device == "cuda")
    sampling = {
        f"sample {case.name}, batch {count}": partial(sample_row, case, count, device, steps, given.rounds)
        for case in compared
        for count in (1, 8)
    }
    training = {f"train {case.name}": partial(train_row, case, device, given.rounds, batch) for case in compared[:-1]}
    sections = {"sampling": sampling, "training": training}
    run(given, "models", sections, steps=steps, float32_matmul_precision=torch.get_float32_matmul_precision())


def sample_row(case: Case, batch: int, device: str, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of ``steps`` Euler steps, the first call apart, and the memory they take."""
    torch.compiler.reset()
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
    started = time.perf_counter()
    call()  # the warm-up, which also tells how many rounds there is time for
    rounds = max(1, min(rounds, int(_MOST_SECONDS / (time.perf_counter() - started))))
    times = measure({case.name: call}, rounds, warm=False)
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


def train_row(case: Case, device: str, rounds: int, batch: int) -> dict[str, Any]:
    """Images a second of forward, backward and AdamW in the precision that pays, and the share of the matrix rate.

    The batch is halved until it fits into memory.
    """
    choice = choose_precision("auto", device)
    times, batch = halved_until_it_fits(lambda count: _trained(case, device, choice, rounds, count), batch)
    seconds = medians({case.name: times})[case.name] / 1e3
    summary = summarize(case.model, case.side)
    used = 3 * (summary.matrix_flops + summary.scan_flops) * batch / seconds
    found = limits() if device == "cuda" else None
    share = used / found.bfloat16 if found else None
    print(
        f"training {case.name}, {choice}: {batch / seconds:.1f} images a second, batch {batch}"
        + (f", {share:.0%} of the peak" if share else "")
    )
    return {
        "case": case.name,
        "batch": batch,
        "precision": choice.precision,
        "milliseconds": times,
        "images_per_second": batch / seconds,
        "mfu": share,
    }


def _trained(case: Case, device: str, choice: Choice, rounds: int, batch: int) -> list[float]:
    """Milliseconds of training steps."""
    torch.compiler.reset()  # torch compiles a function for eight models and runs the ninth as it is
    model = _model(case, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    objective = build("flow-matching")
    x = torch.randn(batch, model.in_channels, case.side, case.side, device=device)
    mask = torch.randint(0, 19, (batch, case.side * model.mask_scale, case.side * model.mask_scale), device=device)
    step_model = torch.compile(model, fullgraph=True, dynamic=False) if case.compile else model

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=choice.precision == "bf16"):
            loss = objective.loss(step_model, x, mask=mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return measure({case.name: step}, rounds)[case.name]


def _model(case: Case, device: str) -> Any:
    torch.manual_seed(0)
    return build(case.model).eval().to(device)


if __name__ == "__main__":
    main()
