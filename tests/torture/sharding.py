"""Trainings sharded by FSDP2: the weights of DDP after 20 steps, and checkpoints that resume in other numbers."""

import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any

from parallel_runs import difference

from torture.campaign import Campaign, Case, Failed, status_name
from torture.process import end, fork
from torture.ranks import free_port

_TOLERANCE = 1e-5
_CASES = list(itertools.product(("adamw", "muon"), (2, 4), (1, 2), (False, True)))


def sharded(case: Case) -> str:
    """Train under DDP and sharded, compare; resume the sharded checkpoint of step 10 on one and two processes."""
    optimizer, processes, accumulate, activations = _CASES[case.number]
    options = {
        "optimizer": optimizer,
        "accumulate": accumulate,
        "batch_size": 8,
        "clip": case.random.choice((0.0, 1.0)),
        "seed": case.random.randrange(2**31),
    }
    whole, parts = case.folder / "whole", case.folder / "sharded"
    trained(whole, processes, None, options)
    trained(parts, processes, None, options | {"shard": True, "checkpoint_activations": activations})
    worst = {f"sharded on {processes}": max(difference(whole, parts))}
    for fewer, shard in ((1, False), (2, True)):
        run = case.folder / f"resumed-{fewer}"
        trained(run, fewer, parts / "checkpoints" / "step-00000010", options | {"shard": shard})
        worst[f"saved on {processes}, resumed on {fewer}"] = max(difference(whole, run))
    with (case.shared / "worst").open("a") as stream:
        stream.writelines(f"{value:.3e} {name}\n" for name, value in worst.items())
    if max(worst.values()) > _TOLERANCE:
        raise Failed(f"weights differ by more than {_TOLERANCE:g}: {worst}, {options}")
    return f"{optimizer}, {processes} processes"


def trained(run: Path, processes: int, resume: Path | None, options: dict[str, Any]) -> None:
    """Train 20 steps in forked processes."""
    from parallel_runs import one_process

    run.mkdir()
    port = free_port()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    outputs = [run.with_name(f"{run.name}-{rank}.txt") for rank in range(processes)]
    ranks = [
        fork(partial(one_process, rank, processes, port, run, resume, options), outputs[rank])
        for rank in range(processes)
    ]
    statuses = [end(rank, 120) for rank in ranks]
    if any(status != 0 for status in statuses):
        said = " | ".join(file.read_text()[-1500:] for file in outputs)
        raise Failed(f"{run.name} ended with {', '.join(map(status_name, statuses))}: {said}")


def _figures(shared: Path) -> dict[str, Any]:
    """The largest difference of a weight, an average or a state, by kind."""
    worst: dict[str, float] = {}
    for line in shared.joinpath("worst").read_text().splitlines() if shared.joinpath("worst").exists() else []:
        value, name = line.split(" ", 1)
        worst[name] = max(worst.get(name, 0.0), float(value))
    return {f"largest difference, {name}": value for name, value in sorted(worst.items())}


CAMPAIGN = Campaign(
    "sharding",
    f"FSDP2 on 2 and 4 gloo processes has the weights of DDP after 20 steps to {_TOLERANCE:g}, saved there and resumed "
    "on 1 and 2 as well",
    sharded,
    len(_CASES),
    limit=600,
    jobs=1,
    figures=_figures,
)
