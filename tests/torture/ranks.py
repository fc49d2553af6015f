"""Trainings of two processes of which one is killed, raises or stalls: the job ends in time, its checkpoints verify."""

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy_training import Toy

from ssmgen import build
from ssmgen.training import TrainSettings, checkpoints, train
from torture.campaign import Campaign, Case, Failed, named, without_traceback
from torture.process import end, end_session, fork
from torture.trainings import step_of, verifies

_STEPS, _EVERY = 8, 2
_LIMIT = 30.0  # seconds from the fault to the end of the job, for steps of milliseconds
_START = 60.0  # seconds to reach the fault
_RANKS = 2


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("a fault on purpose")


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep() -> None:
    time.sleep(3600)


def _spin() -> None:
    while True:
        pass


_FAULTS: dict[str, Callable[[], None]] = {
    "killed": _kill,
    "raises": _raise,
    "stopped": _stop,
    "sleeps": _sleep,
    "spins": _spin,
}
_PLACES = ("forward", "backward", "data", "loader process", "callback", "save")


class _Plan:
    """One fault, at one place of one step; it says when it happens."""

    def __init__(self, fault: str, place: str, step: int, happened: Path) -> None:
        self.fault, self.place, self.step, self.happened = fault, place, step, happened
        self.process, self.seen = os.getpid(), 0

    @property
    def ends_itself(self) -> bool:
        """Whether the rank itself can end after the fault."""
        return self.fault in ("killed", "raises") or self.place == "loader process"

    def at(self, place: str, step: int) -> None:
        if place == self.place and step == self.step and not self.happened.exists():
            self.happened.write_text(str(time.monotonic()))
            _FAULTS[self.fault]()


class _Data(Toy):
    """Toy examples; reading one of a step's fails."""

    def __init__(self, plan: _Plan | None) -> None:
        self.plan, self.read, self.owner = plan, 0, os.getpid()

    def __getitem__(self, key: Any) -> dict[str, Tensor]:
        self.read += 1
        if self.plan is not None:  # two examples of four are this rank's
            self.plan.at("data" if os.getpid() == self.owner else "loader process", (self.read + 1) // 2)
        return super().__getitem__(key)


class _Fails(torch.autograd.Function):
    """Nothing, but its backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.call()
        return gradients[0], None


class _Objective:
    """An objective of which one step fails."""

    def __init__(self, plan: _Plan | None) -> None:
        self.plan, self.inner, self.step = plan, build("flow-matching"), 0

    def loss(self, *args: Any, **others: Any) -> Tensor:
        self.step += 1
        loss = self.inner.loss(*args, **others)
        if self.plan is None:
            return loss
        self.plan.at("forward", self.step)
        step = self.step
        return _Fails.apply(loss, lambda: self.plan.at("backward", step))


def trained(run: Path, rank: int, ranks: int, port: int, plan: _Plan | None, workers: int) -> None:
    """One rank of a small training, which may fail as planned."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as under torchrun, the first rank does not serve the store

    def on_step(step: int, model: torch.nn.Module) -> None:
        if plan is not None:
            plan.at("callback", step)

    if plan is not None and plan.place == "save":
        _failing_save(plan)
    torch.manual_seed(0)
    model = build("sisma-debug", dim=24, depth=1, mask_dropout=0.2)
    settings = TrainSettings(
        steps=_STEPS, batch_size=4, lr=1e-3, checkpoint_every=_EVERY, log_every=1, num_workers=workers
    )
    train(model, _Objective(plan), _Data(plan), settings, run, resume="auto", on_step=on_step)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _command(call: Callable[[], None]) -> None:
    """End as the commands do: a sentence instead of a traceback."""
    from recipes.sisma.arguments import run_command

    run_command(lambda argv: call())


def _failing_save(plan: _Plan) -> None:
    """Let the first flush to disk of a save fail."""
    flush = os.fsync

    def fsync(descriptor: Any) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) else ""
        if f"step-{plan.step:08d}" in target:
            plan.at("save", plan.step)
        flush(descriptor)

    os.fsync = fsync


def faulty(case: Case) -> str:
    """Train in two processes, let one fail, and look at the end of the job."""
    draw = case.random
    fault = list(_FAULTS)[(0, 0, 1, 1, 2, 3, 4)[case.number % 7]]
    # A save or a callback may take any time, so that only silence tells that one has stalled.
    place = draw.choice(_PLACES[:4] if fault in ("sleeps", "spins") else _PLACES)
    # The first rank alone saves and calls back.
    rank = 0 if place in ("callback", "save") else draw.randrange(_RANKS)
    # The first step may compile; loader processes read two batches ahead.
    first = 4 if place == "loader process" else 2
    step = draw.randrange(_EVERY, _STEPS, _EVERY) if place == "save" else draw.randint(first, _STEPS - 1)
    happened, run = case.folder / "happened", case.folder / "run"
    run.mkdir()
    plan = _Plan(fault, place, step, happened)
    workers = 1 if place == "loader process" else 0
    outputs = [case.folder / f"rank-{number}.txt" for number in range(_RANKS)]
    what = f"rank {rank} {fault} in the {place} of step {step}"
    try:
        took = _job(run, outputs, rank, plan, workers)
        _look_at(run, outputs, rank, fault)
        _continued(run, case)
    except AssertionError as error:
        raise Failed(f"{what}: {error}") from error
    with (case.shared / "seconds").open("a") as stream:
        stream.write(f"{fault} {took:.2f}\n")
    return f"{fault} in the {place}"


def _job(run: Path, outputs: list[Path], rank: int, plan: _Plan | None, workers: int) -> float:
    """Run all ranks, which have to end by themselves; seconds from the fault to the end of the last."""
    port = free_port()
    server = fork(partial(_serve, port), run.with_name("store.txt"))
    try:
        return _watched_job(run, outputs, rank, plan, workers, port)
    finally:
        end(server, 0)


def _serve(port: int) -> None:
    """The store of torch.distributed, which a launcher serves."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(60)


def _watched_job(run: Path, outputs: list[Path], rank: int, plan: _Plan | None, workers: int, port: int) -> float:
    ranks = [
        fork(
            partial(_command, partial(trained, run, n, _RANKS, port, plan if n == rank else None, workers)), outputs[n]
        )
        for n in range(_RANKS)
    ]
    started, statuses = time.monotonic(), dict.fromkeys(ranks)
    # A stalled rank cannot end by itself: its launcher kills it when the others have failed.
    awaited = [each for n, each in enumerate(ranks) if plan is None or n != rank or plan.ends_itself]
    while any(statuses[process] is None for process in awaited):
        for process in [each for each in ranks if statuses[each] is None]:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                statuses[process] = os.waitstatus_to_exitcode(status)
                end_session(process)
        since = float(plan.happened.read_text() or "inf") if plan and plan.happened.exists() else None
        late = time.monotonic() - since > _LIMIT if since else time.monotonic() - started > _START
        if late:
            _end_all(statuses)
            raise Failed(f"hangs: has not ended {_LIMIT:.0f} s after the fault: {_texts(outputs)}")
        time.sleep(0.01)
    ended = time.monotonic()
    _end_all(statuses)
    if plan is None:
        if any(statuses.values()):
            raise Failed(f"ended with {list(statuses.values())}: {_texts(outputs)}")
        return ended - started
    if not plan.happened.exists():
        raise Failed(f"the fault did not happen, ended with {list(statuses.values())}: {_texts(outputs)}")
    if 0 in statuses.values():
        raise Failed(f"a rank ended with status 0 in spite of the fault: {_texts(outputs)}")
    return ended - float(plan.happened.read_text())


def _end_all(statuses: dict[int, int | None]) -> None:
    """Kill what still runs."""
    for process in [each for each, status in statuses.items() if status is None]:
        statuses[process] = end(process, 0)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _texts(outputs: list[Path]) -> str:
    return " | ".join(file.read_text()[-1500:] for file in outputs if file.exists())


def _look_at(run: Path, outputs: list[Path], rank: int, fault: str) -> None:
    text = "\n".join(file.read_text() for file in outputs)
    # The last message of each process; that of a loader process has several lines.
    last = [file.read_text().rpartition("error:")[2] for file in outputs]
    named(" | ".join(last), f"rank {rank}")
    if fault == "raises":
        named(text, "a fault on purpose")
    without_traceback(text)
    broken = [path.name for path in checkpoints(run / "checkpoints") if not verifies(path)]
    if broken:
        raise Failed(f"{', '.join(broken)} do not verify")


def _continued(run: Path, case: Case) -> None:
    """Every fourth job is resumed, and ends."""
    if case.number % 4:
        return
    outputs = [case.folder / f"resumed-{number}.txt" for number in range(_RANKS)]
    _job(run, outputs, 0, None, 0)
    if step_of(checkpoints(run / "checkpoints")[-1]) != _STEPS:
        raise Failed("the resumed job did not reach the end")


def _figures(shared: Path) -> dict[str, Any]:
    """The longest time from each kind of fault to the end of the job."""
    longest: dict[str, float] = {}
    for line in shared.joinpath("seconds").read_text().splitlines() if shared.joinpath("seconds").exists() else []:
        fault, seconds = line.split()
        longest[fault] = max(longest.get(fault, 0.0), float(seconds))
    return {f"seconds until the job ended, at most, {fault}": value for fault, value in sorted(longest.items())}


CAMPAIGN = Campaign(
    "ranks",
    "A training of two processes of which one is killed, raises, is stopped, sleeps or spins in a drawn place ends "
    "within 30 s with the rank named; its checkpoints verify, and it resumes",
    faulty,
    100,
    limit=180,
    jobs=6,
    figures=_figures,
)
