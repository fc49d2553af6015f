"""What all conditions with a value per pixel share: the size of the latent that a map belongs to."""

from typing import Any, ClassVar

from torch import Tensor

from ssmgen.conditions.condition import Condition


class MapCondition(Condition):
    """Maps at ``scale`` pixels per latent pixel along a side, or at the latent's own size and then repeated.

    Attributes:
        scale: pixels of the map per latent pixel along a side.
    """

    #: What messages call the map, and how it is brought to another size.
    noun: ClassVar[str] = "mask"
    resizing: ClassVar[str] = "resize the labels by nearest"
    scale: int

    def size_of(self, given: Any) -> tuple[int, int] | None:
        """Its own size over the scale, where that is whole."""
        if given.dim() < 3:
            return None
        height, width = given.shape[-2:]
        return (height // self.scale, width // self.scale) if not (height % self.scale or width % self.scale) else None

    def at_full_size(self, given: Tensor, size: tuple[int, int] | None) -> Tensor:
        """A map ``(b, ..., h, w)`` of the latent's size repeated to ``(b, ..., scale h, scale w)``; others as they are.

        Raises:
            ValueError: neither of these sizes.
        """
        scale, own = self.scale, tuple(given.shape[-2:])
        if size is None or own == (size[0] * scale, size[1] * scale):
            return given
        if own == tuple(size):
            return given.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
        raise ValueError(
            f"a latent of {size[0]} x {size[1]} takes a {self.noun} of {size[0] * scale} x {size[1] * scale} "
            f"(scale {scale}) or of its own size, got {' x '.join(map(str, own))}: {self.resizing}"
        )
