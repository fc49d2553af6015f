"""Mask agreement: do parsed images have the labels they were generated from?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class MaskAgreement:
    """Mean intersection over union and pixel accuracy from one confusion matrix over all images.

    One matrix over the whole set, as segmentation benchmarks do it: the result does not depend on batches. Classes that
    occur in no true mask are left out of the mean.

    Args:
        classes: their names; the position is the id.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Count a batch of label maps, both integer ``(batch, height, width)``.

        Raises:
            ValueError: the shapes differ or a label is no class.
        """
        if predicted.shape != true.shape:
            raise ValueError(
                f"predicted and true must have one shape, got {tuple(predicted.shape)} and {tuple(true.shape)}"
            )
        count = len(self.classes)
        if any(int(labels.max()) >= count or int(labels.min()) < 0 for labels in (predicted, true)):
            raise ValueError(f"labels must be in 0..{count - 1}: parser and masks must have the same {count} classes")
        pairs = true.long().flatten() * count + predicted.long().flatten()
        self.confusion += torch.bincount(pairs.cpu(), minlength=count**2).view(count, count)

    def result(self) -> dict[str, Any]:
        """``miou``, ``pixel_accuracy``, and ``iou`` by class name (present classes only), all in [0, 1].

        Raises:
            ValueError: nothing was counted.
        """
        matrix = self.confusion.double()
        if matrix.sum() == 0:
            raise ValueError("no images were counted: call update first")
        hits, present = matrix.diag(), matrix.sum(1) > 0
        iou = hits / (matrix.sum(0) + matrix.sum(1) - hits).clamp(min=1)
        by_class = {name: iou[i].item() for i, name in enumerate(self.classes) if present[i]}
        return {
            "miou": iou[present].mean().item(),
            "pixel_accuracy": (hits.sum() / matrix.sum()).item(),
            "iou": by_class,
        }
