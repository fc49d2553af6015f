"""The cost of safety: what the loop does beyond a bare step, and a save, as shares of a realistic step."""

import contextlib
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen import build
from ssmgen.training import (
    StepOrder,
    TrainSettings,
    make_optimizer,
    moving_average,
    prune_checkpoints,
    save_checkpoint,
    seconds_per_step,
    train,
)
from torture.campaign import Campaign, Case, Failed

_ROUNDS, _FEW, _MANY, _BATCH = 5, 50, 250, 16
_ALLOWED = 0.01  # of a step


class _Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random latents and masks, all alike: reading them costs nothing."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        g = torch.Generator().manual_seed(0)
        self.example = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        if "mask" in self.example:
            self.example["mask"] = torch.randint(0, 19, shapes["mask"], generator=g, dtype=torch.uint8)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: Any) -> dict[str, Tensor]:
        return self.example


class _Square:
    """The cheapest objective, so that what is around it shows."""

    def loss(self, model: nn.Module, data: Tensor) -> Tensor:
        return model(data).square().mean()


def measured(case: Case) -> str:
    """Measure in turn, take medians, and compare."""
    seconds, step = _step_of_quick()
    rounds = [(_in_the_loop(case.folder / str(number)), _bare()) for number in range(_ROUNDS)]
    loop, bare = (statistics.median(times) for times in zip(*rounds, strict=True))
    save, size = _save(case.folder / "saved", step)
    interval = step["checkpoint_every"]
    found = {
        "a step of quick, ms": round(1e3 * seconds, 1),
        "the loop beyond a bare step, ms": round(1e3 * (loop - bare), 3),
        "the same as a share of a step": round((loop - bare) / seconds, 5),
        "a save and a prune, ms": round(1e3 * save, 1),
        "a checkpoint, MB": round(size / 1e6, 2),
        "the same, ms per MB": round(1e3 * save / (size / 1e6), 2),
        f"saves as a share of training, every {interval} steps": round(save / (seconds * interval), 5),
    }
    (case.shared / "found.json").write_text(json.dumps(found))
    if (loop - bare) / seconds > _ALLOWED:
        raise Failed(f"safety costs more than {_ALLOWED:.0%} of a step: {found}")
    return "measured"


def _step_of_quick() -> tuple[float, dict[str, Any]]:
    """Seconds of a step of the quick preset's network on random latents, and what a save of it needs."""
    from recipes.sisma.pairs import load_autoencoder
    from recipes.sisma.presets import quick
    from recipes.sisma.runs import new_model

    config = quick()
    autoencoder = load_autoencoder(config)
    model = new_model(config, autoencoder)
    side = config.image_size // autoencoder.factor
    examples = _Examples(data=(autoencoder.channels, side, side), mask=(config.image_size, config.image_size))
    settings = TrainSettings(steps=1, batch_size=_BATCH, optimizer=config.train.optimizer, lr=1e-3)
    seconds = seconds_per_step(model, build(config.objective), examples, settings)
    optimizer = make_optimizer(model, settings.optimizer, settings.lr, 0.0, "no")
    model(
        torch.zeros(1, *examples.example["data"].shape), torch.zeros(1), mask=examples.example["mask"][None]
    ).sum().backward()
    optimizer.step()
    parts = {"model": model, "ema": moving_average(model, 0.99), "optimizer": optimizer}
    return seconds, {"parts": parts, "checkpoint_every": config.train.checkpoint_every}


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def _in_the_loop(folder: Path) -> float:
    """Seconds of a step of `train` with a network that costs nothing: a long run minus a short one."""

    def run(steps: int) -> float:
        settings = TrainSettings(steps=steps, batch_size=_BATCH, lr=1e-3, checkpoint_every=10_000)
        started = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            train(_network(), _Square(), _Examples(data=(8,)), settings, folder / str(steps))
        return time.perf_counter() - started

    return (run(_MANY) - run(_FEW)) / (_MANY - _FEW)


def _bare() -> float:
    """Seconds of the same step with nothing around it: batch, loss, gradient, clipping, optimiser, average."""
    model, objective = _network(), _Square()
    optimizer, ema = make_optimizer(model, "adamw", 1e-3, 0.0, "no"), moving_average(model, 0.9999)
    order = StepOrder(64, _BATCH, seed=0)
    batches = iter(torch.utils.data.DataLoader(_Examples(data=(8,)), batch_sampler=order))
    for step in range(_MANY):
        if step == _FEW:
            started = time.perf_counter()
        objective.loss(model, **next(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        optimizer.zero_grad()
    return (time.perf_counter() - started) / (_MANY - _FEW)


def _save(folder: Path, step: dict[str, Any]) -> tuple[float, int]:
    """Seconds of a save with its prune, the median of several, and the bytes of a checkpoint."""
    times, state = [], {"record": {}, "seconds": 0.0, "pending": [], "schedule": [{"step": 0, "lr_decay_steps": 0}]}
    for number in range(1, 2 * _ROUNDS):
        started = time.perf_counter()
        path = save_checkpoint(folder, number, **step["parts"], state=state)
        prune_checkpoints(folder, 2)
        times.append(time.perf_counter() - started)
    return statistics.median(times), sum(file.stat().st_size for file in path.iterdir())


def _figures(shared: Path) -> dict[str, Any]:
    file = shared / "found.json"
    return json.loads(file.read_text()) if file.exists() else {}


CAMPAIGN = Campaign(
    "cost",
    "What the loop does beyond a bare step (finite checks, seeds, log, signals, lock, watchdog) costs less than 1 % of "
    "a step of the quick preset",
    measured,
    1,
    limit=300,
    jobs=1,
    figures=_figures,
)
