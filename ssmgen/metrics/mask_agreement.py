"""Mask agreement: whether the parsed labels of generated images match their masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmgen.metrics.counted import Counted


class MaskAgreement(Counted):
    """Mean intersection over union and pixel accuracy from one confusion matrix over all images.

    As in segmentation (arXiv 1411.4038), one matrix covers the whole set, so the result does not depend on batches
    or processes. The mean leaves out classes that occur in no true mask.

    Args:
        classes: class names; the position is the id.
        parser: name of the parser that predicts the labels, for the protocol string.
        weights: SHA-256 of the parser's weights.

    Attributes:
        counted: confusion matrices ``(classes, classes)``, true by predicted, by image id.
    """

    def __init__(self, classes: Sequence[str], parser: str = "", weights: str = "") -> None:
        self.classes = tuple(classes)
        self.parser, self.weights = parser, weights
        self.counted: dict[str, Tensor] = {}

    def update(self, predicted: Tensor, true: Tensor, ids: Sequence[str] | None = None) -> None:
        """Count label maps, both integer ``(batch, height, width)``, under ``ids`` or consecutive numbers if None.

        Raises:
            ValueError: the shapes differ, a label is out of range, or an id is repeated.
        """
        if predicted.shape != true.shape:
            raise ValueError(
                f"predicted and true must have one shape, got {tuple(predicted.shape)} and {tuple(true.shape)}"
            )
        names = [f"{len(self.counted) + i:08d}" for i in range(len(true))] if ids is None else list(ids)
        self._check_ids(names, len(true))
        count = len(self.classes)
        if any(int(labels.max()) >= count or int(labels.min()) < 0 for labels in (predicted, true)):
            raise ValueError(f"labels must be in 0..{count - 1}: parser and masks must have the same {count} classes")
        pairs = (true.long() * count + predicted.to(true.device).long()).flatten(1).cpu()
        for name, row in zip(names, pairs, strict=True):
            self.counted[name] = torch.bincount(row, minlength=count**2).view(count, count)

    def result(self) -> dict[str, Any]:
        """``miou``, ``pixel_accuracy`` and ``iou`` by class name (present classes only), all in [0, 1].

        Also ``n``, the ``protocol``, the parser's ``weights`` and the hash of the ``list`` of images.

        Raises:
            ValueError: nothing was counted.
        """
        if not self.counted:
            raise ValueError("no images were counted: call update first")
        matrix = torch.stack(list(self.counted.values())).sum(0).double()
        hits, present = matrix.diag(), matrix.sum(1) > 0
        iou = hits / (matrix.sum(0) + matrix.sum(1) - hits).clamp(min=1)
        by_class = {name: iou[i].item() for i, name in enumerate(self.classes) if present[i]}
        return {
            "miou": iou[present].mean().item(),
            "pixel_accuracy": (hits.sum() / matrix.sum()).item(),
            "iou": by_class,
            "n": len(self.counted),
            "protocol": f"agreement[parser={self.parser or 'not named'},classes={len(by_class)} of {len(self.classes)},"
            f"n={len(self.counted)}]",
            "weights": self.weights,
            "list": self.list_hash(),
        }
