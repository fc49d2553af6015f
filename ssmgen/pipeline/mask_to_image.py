"""Images from masks: a trained model with its autoencoder, labels and settings as one object."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ssmgen.data.buckets import nearest_bucket
from ssmgen.data.images import to_pil
from ssmgen.data.labels import LabelSet, check_labels
from ssmgen.data.mask_input import to_labels
from ssmgen.hub import HUB_ID
from ssmgen.noise import image_seeds, initial_noise
from ssmgen.pipeline.card import NAME, model_card
from ssmgen.pipeline.checks import (
    as_size,
    check_counts,
    check_device,
    check_fit,
    check_noise,
    check_same_size,
    check_shape,
    checked_sampling,
    crop_to,
    is_stack,
)
from ssmgen.pipeline.folder import Recipe, locate, read_folder, upload, write_folder
from ssmgen.pipeline.values import (
    Context,
    divided_keywords,
    examples_of,
    prepared_values,
    started,
    text_encoder_of,
    to_pixels,
)
from ssmgen.precision import sampling_dtype
from ssmgen.registry import explained, keywords, make
from ssmgen.sampling import SETTINGS, Sampler, Sampling, in_dtype
from ssmgen.solvers.base import Progress
from ssmgen.text import TextEncoder
from ssmgen.values import Value, part_of


class MaskToImage:
    """Images from semantic masks.

        pipe = MaskToImage.from_pretrained("folder")
        pipe("mask.png", seed=0)[0].save("face.png")

    A model with more conditions than the mask takes their values by name, from what a user has:

        pipe("mask.png", words="black hair", style="other.png", style_mask="other-mask.png")

    Args:
        model: a mask-conditioned model, such as `ssmgen.models.TokenModel`, with trained weights.
        autoencoder: that of its latents, see `ssmgen.latents`.
        recipe: the model's name and arguments, its labels, image size and sampling settings.
        card: Markdown for the README on disk and on the hub; generated from the recipe if empty.

    Raises:
        ValueError: model, autoencoder, labels and image size do not fit together.
    """

    def __init__(self, model: Any, autoencoder: Any, recipe: Recipe, *, card: str = "") -> None:
        check_fit(model, autoencoder, recipe)
        self.model = model.eval().requires_grad_(False)
        self.autoencoder = autoencoder
        self.recipe = recipe
        self.objective = make(recipe.objective)
        self.sampler = Sampler(self.model)
        told = examples_of(self.sampler.conditions)
        self.card = card or model_card(recipe.title, recipe.about, recipe.labels, told=told)
        self._text_encoders: dict[str, TextEncoder] = {}

    def __repr__(self) -> str:
        return f"MaskToImage({self.recipe.title}, {len(self.recipe.labels)} classes, {self.device})"

    @classmethod
    @explained()
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> Self:
        """Load a folder that `save_pretrained` wrote, a model shipped with the package, or a repository on the hub.

        Args:
            source: a folder, a name that `packaged` lists, or ``owner/name`` of a repository, which is downloaded
                once; tried in this order. A `pathlib.Path` is always a folder.
            revision: branch, tag or commit on the hub.
            local_files_only: use earlier downloads only and stay off the network.

        Raises:
            FileNotFoundError: no such folder, model or repository, or one of its files is missing.
            ValueError: a file is damaged or of a newer format, or the weights do not fit the model.
        """
        folder = locate(source, revision, local_files_only)
        model, autoencoder, recipe, card = read_folder(folder)
        try:
            return cls(model, autoencoder, recipe, card=card)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json``, ``model.safetensors``, ``autoencoder/`` and ``README.md``, for `from_pretrained`.

        In an existing folder, files of these names are replaced once the new ones are complete; other files stay.

        Args:
            folder: the folder to write.
            dtype: dtype of the saved weights; a 16-bit one halves the file. They are loaded as float32.
        """
        model = self.model if dtype is None else in_dtype(self.model, dtype)
        write_folder(Path(folder).expanduser(), model, self.autoencoder, self.recipe, self.card)

    def push_to_hub(
        self, repository: str, *, card: str = "", private: bool = False, dtype: torch.dtype | None = None
    ) -> str:
        """Upload to a repository on the hub, which is created if it does not exist; needs ``hf auth login``.

        Args:
            repository: ``owner/name``.
            card: the README; the pipeline's card if empty. ``OWNER/NAME`` in it is replaced by ``repository``.
            private: create a private repository.
            dtype: see `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: ``repository`` is not of the form ``owner/name``.
            OSError: writing or uploading failed: no token, no permission, no network.
        """
        from tempfile import TemporaryDirectory

        if not HUB_ID.fullmatch(repository):
            raise ValueError(f"repository must be of the form owner/name, got {repository!r}")
        with TemporaryDirectory() as name:
            self.save_pretrained(name, dtype=dtype)
            Path(name, "README.md").write_text((card or self.card).replace(NAME, repository), encoding="utf-8")
            return upload(Path(name), repository, private)

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(iter(self.model.parameters())).device

    def to(self, *where: Any, device: Any = None, dtype: torch.dtype | str | None = None) -> Self:
        """Set device or sampling dtype: ``to("cuda")``, ``to(torch.bfloat16)``, ``to("cuda", torch.bfloat16)``.

        The dtype is that of the weights while sampling, see `Sampler`. The model and the autoencoder stay in float32,
        so the change loses no precision. ``"auto"`` is bfloat16 if that is faster on the device, else float32.

        Raises:
            TypeError: neither a device nor a floating-point dtype.
            ValueError: torch cannot use the device here, or ``dtype`` is an unknown word.
        """
        for one in where:
            if isinstance(one, torch.dtype) or one == "auto":
                dtype = one
            else:
                device = one
        if device is not None:
            check_device(device)
        place = self.device if device is None else torch.device(device)
        if isinstance(dtype, str):
            dtype = sampling_dtype(dtype, place) or torch.float32
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
        if device is not None:
            self.model.to(place)
            self.autoencoder.to(place)
        dtype = dtype or self.sampler.dtype
        self.sampler = Sampler(self.model, dtype=None if dtype == torch.float32 else dtype)
        return self

    def __call__(
        self,
        mask: Any,
        *,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        size: int | tuple[int, int] | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
        palette: str | LabelSet = "",
        remap: str | LabelSet = "",
        batch_size: int = 16,
        callback: Progress | None = None,
        sampling: Sampling | None = None,
        **settings: Any,
    ) -> Any:
        """Generate ``num_images`` images of each mask; those of one mask are adjacent.

        Args:
            mask: a path, PIL image, array or tensor, see `to_labels`, a list of them, or a tensor of many, see
                `label_maps`; resized by nearest neighbour.
            seed: seed of the first image, from 0 to 2**64 - 1; later images count up, mask by mask. Or one per image.
            num_images: images per mask.
            size: side or (height, width) of the images if not the recipe's, see `resized`.
            noise: initial noise ``(n, c, h, w)``, one per image, instead of seeds; ``shared_noise`` changes it too.
            output_type: ``"pil"`` for a list; ``"np"`` ``(n, H, W, 3)`` and ``"pt"`` ``(n, 3, H, W)`` for float32 in
                [0, 1]; ``"uint8"`` ``(n, 3, H, W)``; ``"latent"`` for latents ``(n, c, h, w)``.
            palette: the label set of an RGB mask's colours: a registered name such as ``bisenet19``, or a `LabelSet`.
            remap: the label set of the mask's ids if it is not the model's; ids are converted by class name.
            batch_size: images per call of the model; affects the result by rounding only.
            callback: called as ``callback(step, x)`` with the latents after each step of each batch, from step 1 on;
                adaptive solvers do not call it.
            sampling: settings of sampling; the recipe's if None.
            **settings: single settings: ``steps``, ``solver``, ``guidance_scale``, ``guidance_start``, ``shift``,
                ``shared_noise``; and values of the model's other conditions, see `values_of`.

        Raises:
            FileNotFoundError, TypeError, ValueError: an invalid mask (see `to_labels`), setting or value, or a
                condition that the model does not have.

        Warns:
            UserWarning: the ids of a mask look like another order of the same classes, see ``remap``.
        """
        check_counts(output_type, num_images, batch_size)
        settings, told = divided_keywords("MaskToImage", settings, [*_KEYWORDS, *SETTINGS], self.sampler.conditions)
        sampling = checked_sampling(self.recipe.sampling, sampling, settings, told, self.sampler.conditions)
        masks = self.resized(size).label_maps(mask, palette=palette, remap=remap)
        pipe = self.resized(masks.shape[-2:])
        count = len(masks) * num_images
        x0 = initial_noise(image_seeds(seed, count), pipe.latent_size) if noise is None else noise
        check_noise(x0, (count, *pipe.latent_size))
        values: dict[str, Any] = {"mask": masks.repeat_interleave(num_images, dim=0) if len(masks) > 1 else masks}
        values |= pipe.values_of(told, count, palette=palette, remap=remap)
        x0, sampling = started(x0, values["mask"], sampling, self.recipe.labels)
        how = {"sampling": sampling, "objective": self.objective, "progress": callback}
        return self._images(x0, values, how, batch_size, output_type)

    def _images(
        self, x0: Tensor, values: Mapping[str, Value], how: Mapping[str, Any], batch_size: int, output_type: str
    ) -> Any:
        """Images of noise ``(n, c, h, w)``, in batches."""
        parts = []
        for start in range(0, len(x0), batch_size):
            part = slice(start, start + batch_size)
            given: dict[str, Any] = {name: part_of(value, part) for name, value in values.items()}
            latents = self.sampler(x0[part], **given, **how)
            parts.append(latents if output_type == "latent" else self.decode(latents))
        return to_output(torch.cat(parts), output_type)

    def resized(self, size: int | Sequence[int] | None) -> Self:
        """This pipeline for images of another size, which shares the model.

        A model is best at the sizes it was trained in. It can make others, if their number of pixels is similar.

        Args:
            size: side or (height, width) in pixels; None keeps the recipe's size or sizes.

        Raises:
            ValueError: a size that is not a multiple of the autoencoder's factor times the patch size.
        """
        if size is None or self.recipe.image_size == as_size(size):
            return self
        other = copy.copy(self)
        other.recipe = replace(self.recipe, image_size=as_size(size))
        check_fit(self.model, self.autoencoder, other.recipe)
        return other

    def fitted(self, mask: Any, *, palette: str | LabelSet = "", remap: str | LabelSet = "") -> Self:
        """This pipeline for the size that a mask gets, if the recipe has several; arguments as of `labels_of`."""
        if len(self.recipe.sizes) == 1:
            return self
        return self.resized(self.labels_of(mask, palette=palette, remap=remap).shape)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent; of a recipe with several sizes, of the first."""
        height, width = (side // self.autoencoder.factor for side in self.recipe.size)
        return self.autoencoder.channels, height, width

    def values_of(
        self, given: Mapping[str, Any], images: int, *, palette: str | LabelSet = "", remap: str | LabelSet = ""
    ) -> dict[str, Value]:
        """Values of conditions besides the mask, for `Sampler`: each one for all images, or one per image.

        Args:
            given: by the name of the condition. For a ``token-sequence``: a text, or a list of them, which the recipe's
                text encoder encodes. For a ``style-image``: a picture, see `to_pixels`, or several, and by regions
                their masks as ``NAME_mask``; of any size. For a ``class-label``: whole numbers. For a ``dense-map``: a
                tensor or array ``(channels, height, width)``, or ``(images, ...)``, which is scaled to the images'
                size. Or any value of the condition itself.
            images: the number of images.
            palette, remap: of the masks of pictures, see `__call__`.

        Raises:
            FileNotFoundError, TypeError, ValueError: what does not suit its condition; names it.
        """
        context = Context(
            *(self.sampler.conditions, self.recipe.size, self.autoencoder, self.recipe.labels, self.text_encoder),
            {"palette": palette, "remap": remap},
        )
        return prepared_values(given, images, context)

    def text_encoder(self, name: str) -> TextEncoder:
        """The text encoder of a condition, which the recipe names; loaded at the first call.

        Raises:
            ValueError: the recipe names none.
        """
        if name not in self.recipe.text_encoders:
            raise ValueError(
                f"{name}: this model's folder records no text encoder for it: give the vectors themselves, or a recipe "
                f"with text_encoders={{{name!r}: ...}}"
            )
        if name not in self._text_encoders:
            self._text_encoders[name] = text_encoder_of(self.recipe.text_encoders[name])
        return self._text_encoders[name]

    def labels_of(
        self, mask: Any, *, palette: str | LabelSet = "", remap: str | LabelSet = "", name: str = "the mask"
    ) -> Tensor:
        """A mask as class ids ``(height, width)`` of the model's images, uint8, see `to_labels`."""
        labels = to_labels(mask, self.recipe.labels, palette=palette, order=remap, name=name)
        return self._resized(labels[None], str(mask) if isinstance(mask, str | Path) else name)[0]

    def label_maps(self, masks: Any, *, palette: str | LabelSet = "", remap: str | LabelSet = "") -> Tensor:
        """One mask or several as class ids ``(n, height, width)`` of the model's images, uint8.

        Args:
            masks: what `labels_of` takes, a list of these, or one integer tensor ``(n, height, width)`` of ids. A
                tensor in the model's own ids is checked as a whole, and the order of its classes is not questioned. A
                uint8 tensor whose first or last size is 3 is one mask of colours: convert ids to int64.
            palette, remap: see `__call__`.
        """
        if is_stack(masks) and not palette and not remap:
            check_labels(masks, len(self.recipe.labels), where="the masks")
            return self._resized(masks.cpu().to(torch.uint8), "each mask")
        if not isinstance(masks, list | tuple) and not is_stack(masks):
            return self.labels_of(masks, palette=palette, remap=remap)[None]
        if not len(masks):
            raise ValueError("the list of masks is empty: give at least one mask")
        listed = [(f"mask {i} of {len(masks)}", one) for i, one in enumerate(masks, 1)]
        maps = [self.labels_of(one, palette=palette, remap=remap, name=name) for name, one in listed]
        check_same_size(maps)
        return torch.stack(maps)

    def _resized(self, labels: Tensor, name: str) -> Tensor:
        """Labels ``(n, h, w)`` in the recipe's size, or in the one of several that has the nearest aspect ratio."""
        sizes, own = self.recipe.sizes, (int(labels.shape[-2]), int(labels.shape[-1]))
        size = own if own in sizes else sizes[nearest_bucket(own, sizes)]
        several = {"most": 0.1} if len(sizes) > 1 else {}
        check_shape(labels, size, name, hint=", or give size= of its shape", **several)
        return nn.functional.interpolate(labels[:, None], size, mode="nearest-exact")[:, 0]

    def encode(self, image: Any) -> Tensor:
        """Encode an image to latents ``(1, c, h, w)``.

        Args:
            image: a path, a PIL image, or an array or tensor of uint8, ``(3, height, width)`` or ``(height, width,
                3)``.

        Raises:
            FileNotFoundError, ValueError, TypeError: not an image, or not of the model's size.
        """
        return self.autoencoder.encode(self.pixels_of(image).to(self.device).float() / 127.5 - 1)

    def pixels_of(self, image: Any) -> Tensor:
        """An image, see `encode`, as a uint8 tensor ``(1, 3, height, width)``."""
        pixels = to_pixels(image)
        height, width = size = self.recipe.size
        if tuple(pixels.shape) != (3, *size):
            raise ValueError(
                f"the image must be uint8 (3, {height}, {width}), got {pixels.dtype} {tuple(pixels.shape)}: "
                f"{crop_to(size)} and resize it to {height} x {width} pixels, with its mask"
            )
        return pixels[None]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(n, c, h, w)`` to images ``(n, 3, height, width)`` in [0, 1]."""
        return (self.autoencoder.decode(latents.float()) / 2 + 0.5).clamp(0, 1)


#: What a call takes by name besides settings of sampling and values of conditions.
_KEYWORDS = tuple(keywords(MaskToImage.__call__))


def to_output(images: Tensor, output_type: str) -> Any:
    """Images ``(n, 3, h, w)`` in [0, 1], or latents, as the requested type."""
    if output_type == "latent":
        return images
    images = images.float().cpu()
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.movedim(1, -1).numpy()
    images = (images * 255).round().to(torch.uint8)
    return images if output_type == "uint8" else [to_pil(image) for image in images]
