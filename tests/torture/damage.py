"""Damaged checkpoints and latent caches: none loads in silence, hangs, or ends in an unexpected exception."""

import contextlib
import io
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen import build
from ssmgen.data import LabelSet
from ssmgen.data.latent_cache import LatentCache, cache_record, write_latent_cache
from ssmgen.training import find_checkpoint, load_checkpoint, moving_average, save_checkpoint
from torture.campaign import Campaign, Case, Failed, named
from torture.injuries import injure, injure_folder

LABELS = LabelSet("toy", ("a", "l", "r"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), ((1, 2),))
RECORD = {"lr": 0.001, "model": "toy"}
#: What damaged content may end in: CheckpointError and UsageError are ValueErrors.
_EXPECTED = (ValueError, OSError)
_MEMORY = 2 * 2**30  # an allocation beyond this is an unexpected MemoryError


class ToyPairs:
    """A few images of two shapes, masks and texts that are drawn from their index."""

    labels = LABELS

    def __len__(self) -> int:
        return 5

    def bucket_of(self, index: int) -> int:
        return index % 2

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        g = torch.Generator().manual_seed(index)
        shape = ((8, 8), (12, 4))[index % 2]
        image = torch.randint(0, 256, (3, *shape), generator=g, dtype=torch.uint8)
        mask = torch.randint(0, 3, shape, generator=g, dtype=torch.uint8)
        return image, mask, {"text": torch.randn(index, 3, generator=g)}

    def fingerprint(self) -> str:
        return "toy-2"


def prepare(shared: Path) -> None:
    """A run with two checkpoints of a small network, and a latent cache."""
    torch.manual_seed(0)
    parts = _network()
    for step in (3, 6):
        parts["model"](torch.randn(8, 4)).square().mean().backward()
        parts["optimizer"].step()
        parts["ema"].update_parameters(parts["model"])
        state = {
            "record": RECORD,
            "seconds": 1.5,
            "pending": [0.25, None],
            "schedule": [{"step": 0, "lr_decay_steps": 0}],
        }
        save_checkpoint(shared / "run" / "checkpoints", step, **parts, state=state)
    write_latent_cache(ToyPairs(), build("identity"), shared / "cache", flip=True)


def damaged(case: Case) -> str:
    """Damage one file of a checkpoint or a cache and try to use it."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (used + _MEMORY, resource.RLIM_INFINITY))
    return _damaged_cache(case) if case.random.random() < 0.3 else _damaged_checkpoint(case)


def _damaged_checkpoint(case: Case) -> str:
    draw = case.random
    run = shutil.copytree(case.shared / "run", case.folder / "run")
    older, newer = sorted((run / "checkpoints").iterdir())
    if draw.random() < 0.03:
        victim, kind = newer, injure_folder(newer, draw)
    else:
        victim = draw.choice(sorted(newer.iterdir()))
        kind = injure(victim, draw, older / victim.name)
    both = draw.random() < 0.2
    if both:
        other = draw.choice(sorted(older.iterdir()))
        other_kind = injure(other, draw, case.shared / "run" / "checkpoints" / newer.name / other.name)
    found = _harmless_or_named(lambda: _loaded(newer), lambda: _loaded(_original(case, newer)), victim, kind)
    other_found = "harmless"
    if both:
        other_found = _harmless_or_named(
            lambda: _loaded(older), lambda: _loaded(_original(case, older)), other, other_kind
        )
    _auto(run, older, newer, victim, kind, good=(other_found == "harmless", found == "harmless"))
    return f"checkpoint, {found}"


def _original(case: Case, checkpoint: Path) -> Path:
    return case.shared / "run" / "checkpoints" / checkpoint.name


def _auto(run: Path, older: Path, newer: Path, victim: Path, kind: str, good: tuple[bool, bool]) -> None:
    """``resume="auto"`` takes what is whole, says why, and never starts afresh."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = find_checkpoint(run, "auto", RECORD)
    except _EXPECTED as error:
        if any(good):
            raise Failed(
                f"{kind} {victim.name}: resume=auto finds nothing beside a good checkpoint: {error}"
            ) from error
        named(str(error), "step-")
        return
    if found is None:
        raise Failed(f"{kind} {victim.name}: resume=auto would start afresh")
    if not any(good):
        raise Failed(f"{kind} {victim.name}: resume=auto takes {found.name}, though both are damaged")
    expected = newer if good[1] else older
    if found.name != expected.name:
        raise Failed(f"{kind} {victim.name}: resume=auto takes {found.name}, not {expected.name}: {said.getvalue()}")
    if not good[1]:
        named(said.getvalue() or "nothing was said", _shown(victim, kind))


def _damaged_cache(case: Case) -> str:
    cache = shutil.copytree(case.shared / "cache", case.folder / "cache")
    victim = case.random.choice(sorted(cache.iterdir()))
    other = case.random.choice(sorted(cache.iterdir()))
    kind = injure(victim, case.random, case.shared / "cache" / other.name)
    found = _harmless_or_named(lambda: _read(cache), lambda: _read(case.shared / "cache"), victim, kind)
    return f"cache, {found}"


def _harmless_or_named(damaged: Callable[[], Any], whole: Callable[[], Any], victim: Path, kind: str) -> str:
    """Require the same content as that of the undamaged folder, or an expected error that names the file."""
    try:
        content = damaged()
    except _EXPECTED as error:
        named(f"{type(error).__name__}: {error}", _shown(victim, kind))
        return "refused by name"
    except Exception as error:
        raise Failed(f"{kind} {victim.name}: {type(error).__name__}: {error}") from error
    if not _equal(content, whole()):
        raise Failed(f"{kind} {victim.name}: loads in silence as something else")
    return "harmless"


def _shown(victim: Path, kind: str) -> str:
    """What a message must name. A whole manifest of another checkpoint may also be beside altered files."""
    return victim.parent.name if "another file" in kind and victim.name == "MANIFEST.json" else victim.name


def _network() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    return {"model": model, "ema": moving_average(model, 0.9), "optimizer": torch.optim.AdamW(model.parameters())}


def _loaded(checkpoint: Path) -> list[Any]:
    """Everything a checkpoint gives to a training."""
    parts = _network()
    state = load_checkpoint(checkpoint, **parts)
    slots = [parts["optimizer"].state[each] for each in parts["model"].parameters()]
    return [parts["model"].state_dict(), parts["ema"].state_dict(), slots, state]


def _read(folder: Path) -> list[Any]:
    """Everything a cache gives to a training."""
    expected = cache_record(ToyPairs(), build("identity"), True)
    cache = LatentCache(folder, LABELS, expected)
    return [len(cache), [cache[index] for index in range(5)], [cache.flipped(index) for index in range(5)]]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and (one == other or one != one and other != other)


CAMPAIGN = Campaign(
    "damage",
    "A damaged checkpoint, manifest or latent cache is an error that names the file, or has the same content; "
    "`resume=auto` takes the checkpoint before it, and says why",
    damaged,
    10_000,
    prepare,
    limit=10,
)
