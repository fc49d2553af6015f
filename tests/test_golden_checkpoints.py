"""Checkpoints of every format there has been, written by the code of their time, load and are resumed.

``tests/golden/first`` was written at commit 269c7db: the average under its wrapper's names with its count among the
weights, a manifest without a checksum. ``second``, at 0970720, has plain names and the count in the state; ``third``
has a manifest of format 2. Each is a run of `train_small` over three steps.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import digests

from ssmgen import build
from ssmgen.training import (
    TrainSettings,
    checkpoints,
    load_checkpoint,
    make_optimizer,
    moving_average,
    read_manifest,
    train,
    verify_checkpoint,
)

pytest.importorskip("accelerate", reason="training needs accelerate")
GOLDEN = Path(__file__).parent / "golden"
FORMATS = {"first": 1, "second": 1, "third": 2}


class Small(torch.nn.Module):
    """Two kilobytes of checkpoint."""

    def __init__(self):
        super().__init__()
        self.classes = torch.nn.Embedding(4, 3)
        self.mix = torch.nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x, t, mask):
        x = x + self.classes(mask.long()).movedim(-1, 1)
        return self.mix(x.movedim(1, -1) * self.scale).movedim(-1, 1)


class Ten(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, key):
        g = torch.Generator().manual_seed(100 * key[1] + key[0])
        return {"data": torch.randn(3, 4, 4, generator=g), "mask": torch.randint(0, 4, (4, 4), generator=g)}


def train_small(run, steps, resume=None):
    settings = TrainSettings(steps=steps, batch_size=4, lr=1e-2, ema_decay=0.9, log_every=2)
    torch.manual_seed(0)
    return train(Small(), build("flow-matching"), Ten(), settings, run, record={"lr": 0.01}, resume=resume)


@pytest.mark.parametrize("name", FORMATS)
def test_a_golden_checkpoint_loads(name):
    path = checkpoints(GOLDEN / name / "checkpoints")[-1]
    model = Small()
    average, optimizer = moving_average(model, 0.9), make_optimizer(model, "adamw", 1e-2, 0.0)
    state = load_checkpoint(path, model=model, ema=average, optimizer=optimizer)
    assert (state["step"], int(average.n_averaged), read_manifest(path).format) == (3, 3, FORMATS[name])
    stored = [load_file(path / f"{part}.safetensors") for part in ("model", "ema", "optimizer")]
    assert torch.equal(model.mix.weight, stored[0]["mix.weight"])
    assert torch.equal(average.module.mix.weight, stored[1]["module.mix.weight" if name == "first" else "mix.weight"])
    assert torch.equal(optimizer.state[model.mix.weight]["exp_avg"], stored[2]["mix.weight:exp_avg"])


@pytest.mark.parametrize("name", FORMATS)
def test_training_resumes_from_a_golden_checkpoint_as_if_it_were_new(tmp_path, name):
    shutil.copytree(GOLDEN / name, tmp_path / "run")
    assert train_small(tmp_path / "run", 5, "auto").step == 5
    train_small(tmp_path / "new", 3)
    train_small(tmp_path / "new", 5, "auto")
    found, expected = (checkpoints(tmp_path / run / "checkpoints")[-1] for run in ("run", "new"))
    for file in digests(found):
        for key, value in load_file(found / file).items():
            torch.testing.assert_close(value, load_file(expected / file)[key], rtol=1e-4, atol=1e-6)
    assert read_manifest(found).format == 2
    assert {key: verify_checkpoint(found)[key] for key in ("step", "averaged")} == {"step": 5, "averaged": 5}
