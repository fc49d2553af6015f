"""Small runs for the tests of the recipe."""

import hashlib
from pathlib import Path

from ssmgen.training import checkpoints

SMALL = [
    *("image_size=64", "drawn_count=24", "batch_size=4", "model_args.dim=64", "model_args.depth=1", "log_every=1"),
    *("sample_every=0", "evaluate_masks=4", "solver_steps=2", "checkpoint_every=5", "warmup=2", "lr_decay_steps=1300"),
]


def words(tmp_path: Path, *more: str) -> list[str]:
    return [f"run={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}", *SMALL, *more]


def digests(run: Path) -> dict[str, str]:
    newest = checkpoints(run / "checkpoints")[-1]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in newest.glob("*.safetensors")}
