"""A toy training in which a rank or a loader process fails: ``ranks_script.py RUN WHAT STEP [RANK]``.

It runs alone or under a launcher. WHAT is one of `FAULTS`, STEP the number of steps before it (3 or more for those of
loader processes), RANK the rank it happens to: 1 by default, or 0 when alone. ``save`` kills RANK before the next save.
``lock``: another process owns the folder. ``interrupt``: RANK gets SIGTERM after the training, where the others wait.
``warn``: it gets SIGUSR1. ``GRACE`` in the environment replaces the watchdog's 20 seconds.
"""

import json
import os
import signal
import time
from pathlib import Path

import torch
import toy_training as toy

from ssmgen.signals import exit_status
from ssmgen.training import lock, loop, watchdog

IN_STEP = ("kill", "stop", "raise", "loop", "sleep", "warn")
LOADER = ("loader-stop", "loader-loop", "loader-kill", "loader-raise", "loader-sleep")
FAULTS = (*IN_STEP, *LOADER, "save", "lock", "interrupt", "none")


class Faulty(toy.Toy):
    """Its loader process fails once, in the batch of a step."""

    def __init__(self, what, step):
        self.what, self.step, self.read = what, step, 0

    def __getitem__(self, key):
        self.read += 1
        # Batches before it have left the process by then, because it reads no more than two ahead.
        if self.read > self.step * 4 // int(os.environ.get("WORLD_SIZE", 1)) and self.what.startswith("loader"):
            fail(self.what.removeprefix("loader-"))
        return super().__getitem__(key)


def fail(what):
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "raise":
        raise ValueError("a fault on purpose")
    if what == "warn":
        os.kill(os.getpid(), signal.SIGUSR1)
    if what == "interrupt":
        os.kill(os.getpid(), signal.SIGTERM)
    while what == "loop":
        pass
    if what == "sleep":
        time.sleep(3600)


def main(run, what, step, rank=None):
    alone = "RANK" not in os.environ
    watchdog.GRACE = float(os.environ.get("GRACE", watchdog.GRACE))
    mine = os.environ.get("RANK", "0") == (rank or ("0" if alone else "1"))
    loop_step, save = loop.training_step, loop.Saver.save

    def training_step(*args, **kwargs):
        if mine and args[4] == int(step) and what in IN_STEP:
            fail(what)
        return loop_step(*args, **kwargs)

    def saving(self, reached, *args, **kwargs):
        if what == "save" and reached > int(step):
            fail("kill")
        return save(self, reached, *args, **kwargs)

    loop.training_step, loop.Saver.save = training_step, saving
    Path(run).mkdir(exist_ok=True)
    data = Faulty(what if mine else "none", int(step))
    if what == "lock" and not mine:
        let_another_own(Path(run))
    _, result = toy.run(Path(run), steps=12, checkpoint_every=2, num_workers=1, data=data, resume="auto")
    print("done", result.step, flush=True)
    if what == "interrupt":
        if mine:
            fail(what)
        torch.distributed.barrier()
    return exit_status(result.signal) if result.signal else 0


def let_another_own(run):
    """Lock a folder as a process that runs on, this one's parent, would."""
    owner = lock._this_process() | {"pid": str(os.getppid()), "started": lock._start_of(os.getppid()), "id": "another"}
    (run / "lock.json").write_text(json.dumps(owner))


if __name__ == "__main__":
    from recipes.sisma.arguments import run_command

    run_command(lambda argv: main(*argv))
