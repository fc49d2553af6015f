"""Counts of a metric by image, so that results do not depend on batches or processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Counting(Protocol):
    """A metric with its counts by the id of an image or mask."""

    counted: dict[str, Any]


def join(mine: dict[str, T], theirs: Mapping[str, T]) -> None:
    """Add the counts of another process.

    Raises:
        ValueError: an image is in both.
    """
    both = sorted(mine.keys() & theirs.keys())
    if both:
        raise ValueError(f"images given twice: {', '.join(both[:5])}")
    mine |= theirs


def gather(metric: Counting) -> None:
    """Give the metric of every torch.distributed process the counts of all; does nothing in a single process.

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
    """Raise ValueError if an id occurs twice or was counted before."""
    twice = sorted({id for id in ids if id in counted or ids.count(id) > 1})
    if twice:
        raise ValueError(f"images given twice: {', '.join(twice[:5])}")


def list_hash(ids: Iterable[str]) -> str:
    """SHA-256 over the sorted ids, which identifies the set of images."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
