"""``ssmgen plan``: what a training would take on GPUs you do not have."""

import argparse
from dataclasses import replace
from typing import Any

import torch

from ssmgen.cli.command import Answer, add_command
from ssmgen.planning import DEVICES, Plan, device_named, make_plan
from ssmgen.planning.check import Checked, check_here, check_reduce
from ssmgen.planning.plan import OPTIMIZERS, OVERLAP, PRECISIONS, SHARDINGS, Job, basis
from ssmgen.registry import find

_GB, _ROUNDS = 1e9, 9


def add(commands: Any) -> None:
    """Add the command."""
    about = (
        "Predict memory, step time, communication and cost of a training. Operations and bytes are counted on tensors\n"
        "without values, and divided by stated shares of a GPU's published figures. Nothing is measured on that GPU.\n"
        "'cpu' is this machine, whose rates are measured for a moment. --check compares predictions with training\n"
        "steps on this machine."
    )
    help = "predict memory, time and cost of a training on many GPUs"
    shown = (
        "sisma-xl --gpus 64 --gpu h100 --batch 1024",
        "sisma-xl --gpus 8 --gpu l40s --batch 256 --sharding fsdp --checkpoint-activations",
        "--check",
    )
    command = add_command(commands, "plan", _plan, help, about, *shown)
    command.add_argument("name", nargs="?", help="a model's name, see 'ssmgen list'")
    command.add_argument("--gpus", type=int, default=1, help="number of GPUs (default 1)")
    command.add_argument("--gpu", default="h100", help=f"{', '.join(DEVICES)}, or cpu (default h100)")
    command.add_argument("--batch", type=int, help="examples of a step over all GPUs (default: one a GPU and part)")
    command.add_argument("--accumulate", type=int, default=1, help="parts of a GPU's share of the batch (default 1)")
    command.add_argument("--size", type=int, help="side of the latent (default: that of a 256 pixel image)")
    command.add_argument("--precision", default="bf16", help=f"{' or '.join(PRECISIONS)} (float32); default bf16")
    command.add_argument("--optimizer", default="adamw", help=f"{' or '.join(OPTIMIZERS)} (default adamw)")
    command.add_argument("--sharding", default="ddp", help=f"{' or '.join(SHARDINGS)} (default ddp)")
    command.add_argument("--checkpoint-activations", action="store_true", help="compute blocks again in the backward")
    command.add_argument("--network", type=float, help="GB/s that a GPU sends to other nodes, instead of the table's")
    command.add_argument(
        "--steps", type=int, default=1000, help="optimiser steps, for days and GPU-hours (default 1000)"
    )
    command.add_argument("--price", type=float, help="money per GPU and hour, for the cost")
    command.add_argument("--check", action="store_true", help="compare predictions with steps on this machine")


def _plan(arguments: argparse.Namespace) -> Answer:
    if arguments.check:
        return _check()
    if arguments.name is None:
        raise ValueError("plan takes a model's name, or --check; 'ssmgen list' shows the names")
    find(arguments.name, "model")
    options = ("gpus", "accumulate", "size", "precision", "optimizer", "sharding", "steps", "price")
    given = {name: getattr(arguments, name) for name in options}
    batch = arguments.gpus * arguments.accumulate if arguments.batch is None else arguments.batch
    job = Job(arguments.name, batch=batch, checkpointed=arguments.checkpoint_activations, **given)
    device = device_named(arguments.gpu)
    if arguments.network is not None:
        if arguments.network <= 0:
            raise ValueError(f"--network must be positive, in GB/s per GPU, got {arguments.network:g}")
        device = replace(device, network=arguments.network * _GB)
    plan = make_plan(job, device)
    return plan.facts(), _lines(plan)


def _lines(plan: Plan) -> list[str]:
    job, facts = plan.job, plan.facts()
    parts = f", in {job.accumulate} parts" if job.accumulate > 1 else ""
    extras = ", activations checkpointed" if job.checkpointed else ""
    return [
        f"{job.model} on {job.gpus} x {plan.device.name}, batch {job.batch} ({job.batch // job.gpus} each{parts}), "
        f"{job.optimizer}, {job.sharding}, precision {job.precision}{extras}",
        basis(plan.device),
        f"memory per {'process' if plan.device.name == 'cpu' else 'GPU'}, GB",
        *(f"  {name:<18}{size / _GB:>9.2f}" for name, size in plan.memory.items()),
        f"  {'peak':<18}{plan.peak / _GB:>9.2f}  of {plan.usable / _GB:.1f}: {_verdict(plan)}",
        "step, seconds",
        *(f"  {name:<18}{seconds:>9.4f}" for name, seconds in plan.seconds.items()),
        f"  {'all':<18}{plan.step:>9.4f}  {facts['examples_per_second']:,.1f} images a second",
        *_totals(facts, job),
        f"latents and masks: {plan.example_bytes:,} bytes an image, {facts['cache_bytes_per_second'] / 1e6:,.1f} MB/s",
        *_assumptions(plan),
    ]


def _verdict(plan: Plan) -> str:
    if plan.fits:
        largest = plan.largest_part * plan.job.gpus * plan.job.accumulate
        return f"fits; the largest batch that does is {largest:,}"
    return f"does not fit; {plan.suggestion}. The figures below leave that out of account"


def _totals(facts: dict[str, Any], job: Job) -> list[str]:
    cost = "" if facts["cost"] is None else f", {facts['cost']:,.0f} at {job.price:g} an hour"
    return [f"{job.steps:,} steps: {facts['days']:,.2g} days, {facts['gpu_hours']:,.3g} GPU-hours{cost}"]


def _assumptions(plan: Plan) -> list[str]:
    device, job = plan.device, plan.job
    rate, bandwidth = device.matrix(job.precision) / 1e12, device.bandwidth * device.bandwidth_share / _GB
    lines = [
        f"assumes: products at {rate:,.3g} TFLOP/s ({device.matrix_share:.0%} of the peak),",
        f"  other bytes at {bandwidth:,.4g} GB/s ({device.bandwidth_share:.0%}),",
        f"  {device.call * 1e6:.2g} us of the host per operation, no compilation, {device.memory_share:.0%} of memory",
    ]
    if not device.waits:
        lines += ["  the scan as an instruction model of its compiled kernel has it (about 40 % uncertain)"]
    if job.gpus > 1:
        lines += [
            f"  links at {device.link_share:.0%}; {plan.transfer:.4f} s of communication, hidden behind up to "
            f"{OVERLAP:.0%} of the backward pass"
        ]
    return lines


def _check() -> Answer:
    found = check_here(_ROUNDS) | {"seconds of an all-reduce, two processes": check_reduce()}
    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": _ROUNDS}
    facts |= {what: [vars(row) | {"error": row.error} for row in rows] for what, rows in found.items()}
    lines = [f"float32 on this machine's CPU, {facts['threads']} threads, torch {facts['torch']}, medians of {_ROUNDS}"]
    for what, rows in found.items():
        unit, scale = ("ms", 1e3) if "seconds" in what else ("MB", 1e-6)
        lines += ["", f"{what:<44}{'predicted':>12}{'measured':>12}{'error':>9}"]
        lines += [_row(row, unit, scale) for row in rows]
    return facts, lines


def _row(row: Checked, unit: str, scale: float) -> str:
    return f"  {row.what:<42}{row.predicted * scale:>9.1f} {unit}{row.measured * scale:>9.1f} {unit}{row.error:>+9.0%}"
