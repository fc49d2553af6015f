"""A small model, random examples and a run of the loop, for the tests of training."""

import hashlib
from pathlib import Path

import torch

from ssmgen import build
from ssmgen.training import TrainSettings, derived_seed, train


class Toy(torch.utils.data.Dataset):
    """Ten examples, other ones in each epoch."""

    def __len__(self):
        return 10

    def __getitem__(self, key):
        index, draw = key
        g = torch.Generator().manual_seed(derived_seed(index, draw))
        data = torch.randn(3, 4, 4, generator=g)
        return {"data": data, "mask": torch.randint(0, 19, (4, 4), generator=g, dtype=torch.uint8)}


class Rectangles(Toy):
    """Ten examples of three shapes."""

    shapes = ((4, 4), (2, 6), (6, 2))

    def bucket_of(self, index):
        return (index * 3 + 1) % 4 % 3

    def __getitem__(self, key):
        g = torch.Generator().manual_seed(derived_seed(*key))
        shape = self.shapes[self.bucket_of(key[0])]
        mask = torch.randint(0, 19, shape, generator=g, dtype=torch.uint8)
        return {"data": torch.randn(3, *shape, generator=g), "mask": mask}


def run(folder: Path, *, resume=None, record=None, on_step=None, data=None, **changes):
    torch.manual_seed(0)
    model = build("sisma-debug", dim=24, depth=1, mask_dropout=0.2)
    options = dict(steps=6, batch_size=4, lr=1e-3, warmup=2, ema_decay=0.9, checkpoint_every=3, log_every=1) | changes
    result = train(
        model,
        build("flow-matching"),
        Toy() if data is None else data,
        TrainSettings(**options),
        folder,
        record=record,
        resume=resume,
        on_step=on_step,
    )
    return model, result


def digests(checkpoint: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in checkpoint.glob("*.safetensors")}
