"""Trainings in several processes of this machine: ``python tests/parallel_runs.py '[{"run": FOLDER, ...}, ...]'``.

The processes are forked from one that has imported torch, which saves seconds for each.
"""

import json
import math
import os
import signal
import socket
import sys
from pathlib import Path

import accelerate  # noqa: F401  imported here and not in every process
import torch
from toy_training import Rectangles, Toy

from ssmgen import build
from ssmgen.training import TrainSettings, checkpoints, step, train
from ssmgen.weights import read_weights, tensors_of


class Poisoned(Toy):
    """No numbers in the second epoch, which is steps 3 to 5 of four examples each."""

    def __getitem__(self, key):
        example = super().__getitem__(key)
        return example | {"data": example["data"] * (math.nan if key[1] == 1 else 1.0)}


class Warned(Toy):
    """The second process is asked to stop while it reads the batch of its third step."""

    def __getitem__(self, key):
        if key[1] == 1 and os.environ["RANK"] == "1" and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().__getitem__(key)

    told = False


class Sheets:
    """Keeps the weights it is called with, every tenth step."""

    def __init__(self, run):
        self.run = run

    def due(self, step):
        return step > 0 and step % 10 == 0

    def __call__(self, step, model):
        torch.save({name: tensor.clone() for name, tensor in tensors_of(model).items()}, self.run / f"sheet-{step}.pt")


def small_model(rank):
    torch.manual_seed(rank)  # all processes must train the weights of the first
    model = build("sisma-debug", dim=24, depth=2, mask_dropout=0.3)
    with torch.no_grad():  # gates and head begin at zero: without this, most gradients would be zero
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def one_process(rank, processes, port, run, resume, changes):
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    options = dict(steps=20, batch_size=4, lr=1e-3, weight_decay=0.1, ema_decay=0.9, log_every=1)
    data = {"buckets": Rectangles, "poisoned": Poisoned, "warned": Warned}.get(changes.pop("data", ""), Toy)()
    if changes.pop("late", False):
        step.reads_late = lambda device: True
    settings = TrainSettings(**options | {"checkpoint_every": 10} | changes)
    done = train(small_model(rank), build("flow-matching"), data, settings, run, resume=resume, on_step=Sheets(run))
    if rank == 0:
        torch.save(dict(done.ema.state_dict()), run / "returned.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def training(run, processes=1, resume=None, **changes):
    """Train into the folder ``run`` in forked processes; raises what one of them raised."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (processes, port, run, resume, changes)
    torch.multiprocessing.start_processes(one_process, given, nprocs=processes, start_method="fork")


def difference(first, second):
    """The largest difference of a weight, an averaged weight and a state between the ends of two runs."""
    worst = []
    for name in ("model", "ema", "optimizer"):
        ends = (checkpoints(Path(run) / "checkpoints")[-1] for run in (first, second))
        one, other = (read_weights(end / f"{name}.safetensors") for end in ends)
        assert one.keys() == other.keys() and one
        worst.append(max((one[key] - other[key]).abs().max().item() for key in one))
    return worst


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for each in json.loads(sys.argv[1]):
        training(**each)
