"""What a metric has counted, by image: whatever batches and processes the images came in, the sum is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Counting(Protocol):
    """A metric: what it has ``counted`` lies under the id of each image or mask."""

    counted: dict[str, Any]


def join(mine: dict[str, T], theirs: Mapping[str, T]) -> None:
    """Take over what another process has counted.

    Raises:
        ValueError: both have an image.
    """
    both = sorted(mine.keys() & theirs.keys())
    if both:
        raise ValueError(f"images given twice: {', '.join(both[:5])}")
    mine |= theirs


def gather(metric: Counting) -> None:
    """Give the metric of every process of torch.distributed what all of them have counted; alone, nothing happens.

    Raises:
        ValueError: two processes have counted the same image.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, metric.counted)
    whole: dict[str, Any] = {}
    for part in parts:
        join(whole, part)
    metric.counted = whole


def check_new(ids: list[str], counted: Mapping[str, Any]) -> None:
    """Refuse an id that occurs twice or was counted before, with a ValueError that names it."""
    twice = sorted({id for id in ids if id in counted or ids.count(id) > 1})
    if twice:
        raise ValueError(f"images given twice: {', '.join(twice[:5])}")


def list_hash(ids: Iterable[str]) -> str:
    """SHA-256 over the sorted ids: which images these are."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
