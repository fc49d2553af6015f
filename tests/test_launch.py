"""What a launcher, the environment and the machine change of a training: devices, processes and memory, no number."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import digests, run

from ssmgen.precision import Choice
from ssmgen.training import (
    CheckpointError,
    TrainSettings,
    checkpoints,
    loader_processes,
    on_cpu,
    resume,
    verify_checkpoint,
)
from ssmgen.training.launch import keep_freed_memory, make_accelerator

pytest.importorskip("accelerate", reason="training needs accelerate")


def forget_accelerate():
    """So that the next training reads the environment, as the first one of a process does."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def environment_free():
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate=2 of the run decides"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision=no of the run decides"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", "compile=False of the run decides"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.001", ""),
    ],
)
def test_the_environment_changes_no_weight(tmp_path, environment_free, monkeypatch, capsys, variable, value, said):
    """accelerate would scale the gradients, round or compile by it, and no record would tell."""
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
        # Plain gradient descent in effect: Adam would hide a factor, clipping too.
        run(tmp_path / name, steps=2, accumulate=2, clip=0)
        monkeypatch.setenv(variable, value)
        forget_accelerate()
    assert (f"{variable}={value} has no effect: {said}" in capsys.readouterr().err) == bool(said)
    first, second = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("without", "with"))
    assert digests(first) == digests(second)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines()[-1] for name in ("without", "with")]
    assert len({json.loads(line)["grad_norm"] for line in logs}) == 1


@pytest.mark.parametrize("variable", ["USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"])
def test_an_environment_that_would_shard_the_model_is_refused(folder, monkeypatch, variable):
    monkeypatch.setenv(f"ACCELERATE_{variable}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_{variable}=true: .* of the launcher is not supported"):
        run(folder)
    assert not list(folder.iterdir())


def test_the_cpu_may_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not on_cpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert on_cpu()


def test_no_more_loader_processes_than_cores():
    assert loader_processes(0) == 0 and loader_processes(1) == 1
    assert 1 <= loader_processes(10_000) <= (os.cpu_count() or 1)


def test_two_processes_train_as_one(tmp_path):
    """Under torchrun: one checkpoint, one precision, and a stop asked of one stops both at the same step."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, torch; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "import toy_training as t; from ssmgen.precision import Choice; from ssmgen.training import loop, resume\n"
        "stop = lambda step, ema: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None\n"
        "found = Choice(('bf16', 'no')[int(os.environ['RANK'])], 'each by itself')\n"
        "resume.choose_precision = lambda *_: found\n"
        "taken, step = set(), loop.training_step\n"
        "loop.training_step = lambda *args: (taken.add(args[3].precision), step(*args))[1]\n"
        "_, result = t.run(Path(sys.argv[1]), steps=1000, checkpoint_every=500, on_step=stop, precision='auto')\n"
        "timeout = torch.distributed.group.WORLD._get_backend(torch.device('cpu')).options._timeout\n"
        "said = f'{result.step} {result.interrupted} {timeout.days} {int(result.signal)} {taken}'\n"
        "(Path(sys.argv[1]).parent / ('rank' + os.environ['RANK'])).write_text(said)\n"
    )
    (tmp_path / "run").mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / f"rank{rank}" for rank in range(2))
    assert first.read_text() == second.read_text()
    step, interrupted, days, number, taken = first.read_text().split()
    newest = verify_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert interrupted == "True" and newest["step"] == int(step)
    assert int(number) == signal.SIGTERM, "the second process knows the signal that the first one got"
    assert days == "1", "a save, or samples, may take more than half an hour"
    assert taken == "{'bf16'}" and newest["record"]["precision"] == "bf16", "the first process decides"


def test_two_runs_of_one_process_may_differ_in_precision(tmp_path):
    last = {}
    for precision in ("bf16", "no"):
        (tmp_path / precision).mkdir()
        run(tmp_path / precision, precision=precision)
        last[precision] = json.loads((tmp_path / precision / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert last["bf16"] != last["no"] and abs(last["bf16"] - last["no"]) < 0.05 * last["no"]


@pytest.fixture
def found(monkeypatch):
    """Say what measuring finds."""

    def find(precision):
        monkeypatch.setattr(resume, "choose_precision", lambda asked, device: Choice(precision, "it was measured"))

    return find


def test_a_resumed_run_keeps_the_precision_it_began_with(tmp_path, found, capsys):
    def said():
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("precision")]

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", precision="bf16", optimizer="muon")
    assert not said()
    found("bf16")
    run(tmp_path / "cut", steps=3, precision="auto", optimizer="muon")
    assert said() == ["precision bf16: it was measured"]
    found("no")
    run(tmp_path / "cut", resume="auto", precision="auto", optimizer="muon")
    assert said() == ["precision bf16: as step-00000003 was made"]
    whole, cut = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "cut"))
    assert digests(whole) == digests(cut) and verify_checkpoint(cut)["record"] == {"precision": "bf16"}
    with pytest.raises(CheckpointError, match="precision: 'bf16' there, 'no' now"):
        run(tmp_path / "cut", steps=9, resume="auto", precision="no", optimizer="muon")


def test_the_products_are_measured_as_the_run_rounds_them(folder, monkeypatch):
    rounding = []
    choice = Choice("no", "")
    monkeypatch.setattr(
        resume, "choose_precision", lambda *_: rounding.append(torch.get_float32_matmul_precision()) or choice
    )
    settings = TrainSettings(steps=1, batch_size=1, precision="auto", matmul_precision="medium")
    accelerator = make_accelerator(settings)
    assert resume.settle_precision(settings, folder, None, accelerator).precision == "no"
    assert rounding == ["medium"] and torch.get_float32_matmul_precision() == "highest"


FREED = """
import ctypes
from ssmgen.training.launch import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_int) for name in names.split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo.restype = Info

def kept():
    blocks = [libc.malloc(2**20) for _ in range(64)]
    for block in blocks:
        libc.free(block)
    return libc.mallinfo().fordblks  # free bytes that were not given back

kept()
before, done, after = kept(), keep_freed_memory(), kept()
print(done, before, after)
"""


def test_freed_memory_is_kept_for_the_next_step():
    if platform.libc_ver()[0] != "glibc":
        assert keep_freed_memory() is False, "another C library is left as it is"
        return
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    printed = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, check=True)
    done, before, after = printed.stdout.split()
    assert done == "True" and int(before) < 32 * 2**20 and int(after) >= 60 * 2**20, printed.stdout


def test_training_on_a_cpu_keeps_freed_memory(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("ssmgen.training.launch.keep_freed_memory", lambda: calls.append(True))
    run(tmp_path, steps=1)
    assert calls == [True]
