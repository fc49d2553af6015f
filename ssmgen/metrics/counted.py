"""Counts of a metric by image, so that results do not depend on batches or processes."""

import functools
import hashlib
from collections.abc import Sequence, Set
from typing import Any, Self

import torch.distributed as dist


class Counted:
    """A metric that keeps its counts by the id of an image or mask.

    Attributes:
        counted: the counts by id.
    """

    counted: dict[str, Any]

    def merge(self, other: Self) -> None:
        """Add the counts of another instance.

        Raises:
            ValueError: an id is in both.
        """
        self.counted = _joined(self.counted, other.counted)

    def list_hash(self) -> str:
        """SHA-256 over the sorted ids, which identifies the set of images."""
        return hashlib.sha256("\n".join(sorted(self.counted)).encode()).hexdigest()

    def _check_ids(self, ids: Sequence[str], images: int) -> None:
        if len(ids) != images:
            raise ValueError(f"one id an image: got {len(ids)} ids and {images} images")
        _reject({id for id in ids if id in self.counted or ids.count(id) > 1})


def gather(metric: Counted) -> None:
    """Give the metric of every torch.distributed process the counts of all; does nothing in a single process.

    Raises:
        ValueError: two processes have counted the same image.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, metric.counted)
    metric.counted = functools.reduce(_joined, parts)


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    _reject(one.keys() & other.keys())
    return one | other


def _reject(repeated: Set[str]) -> None:
    if repeated:
        raise ValueError(f"images given twice: {', '.join(sorted(repeated)[:5])}")
