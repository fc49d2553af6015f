"""Signals at random moments in the commands: a documented status, one sentence, and nothing half-made."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipe_runs import SMALL

from torture.campaign import Campaign, Case, Failed, import_listed, list_modules, status_name, without_traceback
from torture.process import end, fork, wait_for
from torture.trainings import contents, no_leftovers, verifies

_MODULES = {
    "train": "recipes.sisma.train",
    "evaluate": "recipes.sisma.evaluate",
    "sample": "recipes.sisma.sample",
    "prepare": "recipes.sisma.prepare.command",
    "export": "recipes.sisma.export",
}
_READING = ("evaluate", "sample", "export")  # commands that need a run
_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
_TRAINING = [*SMALL, "steps=12", "precision=no", "tracker=none", "model_args.mask_dropout=0.1"]
_PATIENCE = 20.0  # seconds from the signal to the end
_REAL = 0.1  # share of cases that start Python, so that signals reach its imports too
_IMPORTS = 4.0  # seconds that they take, about


def words_of(command: str, folder: Path, shared: Path) -> list[str]:
    """The command's words; what it writes goes below ``folder``."""
    run = shared / "run"
    if command in _READING and folder != shared:
        run = folder / "run"
    return {
        "train": [f"run={folder / 'run'}", f"cache={folder / 'cache'}", *_TRAINING],
        "evaluate": [f"run={run}", "masks=4", "steps=2"],
        "sample": [f"run={run}", f"mask={shared / 'masks'}", f"out={folder / 'out'}", "num_images=4", "steps=4"],
        "prepare": ["source=drawn", f"target={folder / 'prepared'}", "count=24", "size=64"],
        "export": [f"run={run}", f"out={folder / 'exported'}"],
    }[command]


def called(command: str, words: list[str]) -> None:
    """What ``python -m`` does with a command, in this process."""
    from recipes.sisma.arguments import run_command

    sys.argv = [command, *words]
    run_command(importlib.import_module(_MODULES[command]).main)


def _listing(command: str, shared: Path) -> None:
    try:
        called(command, words_of(command, shared, shared))
    finally:
        list_modules(shared / "modules.json")


def prepare(shared: Path) -> None:
    """A finished run, masks to sample from, and the seconds that each command takes."""
    from ssmgen.data import draw_face, write_png

    (shared / "masks").mkdir()
    for index in range(4):
        write_png(shared / "masks" / f"face-{index}.png", draw_face(index, 64)[1])
    for command in _MODULES:
        _finished(lambda command=command: _listing(command, shared), shared / f"{command}.txt")
    import_listed(shared / "modules.json")
    seconds = {}
    for command in _MODULES:
        again = shared / "again"
        shutil.copytree(shared / "run", again / "run") if command in _READING else again.mkdir()
        _unevaluated(again / "run")
        words, started = words_of(command, again, shared), time.monotonic()
        _finished(lambda command=command, words=words: called(command, words), shared / f"{command}.txt")
        seconds[command] = time.monotonic() - started
        shutil.rmtree(again)
    for name in ("exported", "out", "prepared"):
        shutil.rmtree(shared / name)
    (shared / "seconds.json").write_text(json.dumps(seconds))


def _finished(call: Callable[[], None], output: Path) -> None:
    status = end(fork(call, output), 120)
    assert status == 0, f"ended with {status_name(status)}: {output.read_text()[-2000:]}"


@lru_cache
def _seconds(shared: Path) -> dict[str, float]:
    return json.loads((shared / "seconds.json").read_text())


def signalled(case: Case) -> str:
    """Start a command, send a signal at a random moment, and look at its status and what is left."""
    draw = case.random
    command = list(_MODULES)[case.number % len(_MODULES)]
    number, real = draw.choice(list(_STATUS)), draw.random() < _REAL
    seconds = _seconds(case.shared)[command] + (_IMPORTS if real else 0)
    if command in _READING:
        shutil.copytree(case.shared / "run", case.folder / "run")
        _unevaluated(case.folder / "run")
    words, output = words_of(command, case.folder, case.shared), case.folder / "output.txt"
    process = _started(command, words, output, real)
    time.sleep(draw.uniform(0, seconds))
    os.kill(process, number)
    sent = time.monotonic()
    status, took = end(process, _PATIENCE), time.monotonic() - sent
    text = output.read_text()
    if status is None:
        raise Failed(f"{command} has not ended {took:.0f} s after {number.name}: {text[-1000:]}")
    try:
        _judge(case, command, number, status, text)
    except AssertionError as error:
        how = "started" if real else "forked"
        raise Failed(f"{command} ({how}), {number.name}, {status_name(status)}: {error}") from error
    return f"{command}, {'finished' if status == 0 else 'stopped'}"


def _started(command: str, words: list[str], output: Path, real: bool) -> int:
    if not real:
        process = fork(lambda: called(command, words), output)
        wait_for(lambda: _handles_signals(process), 10)
        return process
    module = _MODULES[command].removesuffix(".command")
    with output.open("w") as stream:
        command_line = [sys.executable, "-m", module, *words]
        process = subprocess.Popen(command_line, stdout=stream, stderr=stream, start_new_session=True).pid
    wait_for(lambda: _handles_signals(process), 10)
    return process


def _handles_signals(process: int) -> bool:
    """Whether a process has a handler for SIGTERM: before Python reads the command's first line, the system ends it."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True  # it has ended
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def _unevaluated(run: Path) -> None:
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    for name in ("result.json", "result.png", "report.html"):
        (run / name).unlink(missing_ok=True)


def _judge(case: Case, command: str, number: signal.Signals, status: int, text: str) -> None:
    without_traceback(text)
    if status not in (0, _STATUS[number]):
        raise Failed(f"expected status {_STATUS[number]}: {text[-1000:]}")
    no_leftovers(case.folder)
    if status == 0:
        return
    if not text:
        raise Failed("ended without a sentence")
    _whole(case.folder)
    if command == "train":
        _continued(case)


def _whole(folder: Path) -> None:
    """Require that all that was written can be used."""
    from ssmgen import MaskToImage
    from ssmgen.data.images import read_image

    for checkpoint in folder.glob("run/checkpoints/step-*"):
        if not verifies(checkpoint):
            raise Failed(f"{checkpoint.name} does not verify")
    for file in folder.rglob("*.json"):
        json.loads(file.read_text())
    for file in folder.rglob("*.png"):
        read_image(file)
    if (folder / "exported").exists():
        MaskToImage.from_pretrained(str(folder / "exported"))
    if (folder / "prepared").exists() and not (folder / "prepared" / "prepared.json").is_file():
        raise Failed("a prepared folder without its record")


def _continued(case: Case) -> None:
    """Require that a stopped training resumes and ends with the weights of an uncut one."""
    words, output = words_of("train", case.folder, case.shared), case.folder / "resumed.txt"
    status = end(fork(lambda: called("train", [*words, "resume=auto", "evaluate=false"]), output), 60)
    if status != 0:
        raise Failed(f"resuming ended with {status_name(status)}: {output.read_text()[-1500:]}")
    ends: list[Any] = [contents(next(iter(sorted(f.glob("run/checkpoints/step-00000012"))))) for f in _both(case)]
    if any(ends[0][name] != ends[1][name] for name in ends[0] if name.endswith(".safetensors")):
        raise Failed("the resumed training ends with other weights than an uncut one")


def _both(case: Case) -> tuple[Path, Path]:
    return case.shared, case.folder


CAMPAIGN = Campaign(
    "signals",
    "SIGINT, SIGTERM and SIGUSR1 at a random moment of train, evaluate, sample, prepare and export: status 130, 143 "
    "and 138, no traceback, nothing half-made, and a stopped training resumes to the bit",
    signalled,
    200,
    prepare,
    limit=120,
)
