"""The recipe under torchrun, on a CPU: several processes are one run."""

import os
import subprocess
import sys
from pathlib import Path

from ssmgen.training import checkpoints

ROOT = Path(__file__).parents[1]


def test_two_processes_are_one_run(tmp_path):
    words = [f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", "image_size=64", "drawn_count=8"]
    words += ["batch_size=4", "lr_decay_steps=2", "warmup=0", "sample_every=2", "log_every=1", "evaluate=false"]
    words += ["model_args.dim=64", "model_args.depth=1", "precision=no", "shard=true"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "recipes.sisma.train", "quick", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Both measure, and agree.
    assert done.stderr.count("s a step: 2 steps, as many as the cosine of the learning rate has") == 1
    assert done.stderr.count("encoding 8 images once") == 1 and done.stdout.count("to step 2 in") == 1
    assert len(checkpoints(tmp_path / "run/checkpoints")) == 1
    assert [file.name for file in (tmp_path / "run/samples").iterdir()] == ["step-000002.png"]
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 2
