"""Masks in, images out: a trained model with its autoencoder, labels and settings as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen import model_folder
from ssmgen.data.images import from_pil, read_image, to_pil
from ssmgen.data.labels import LabelSet, check_labels
from ssmgen.data.mask_input import to_labels
from ssmgen.model_card import NAME, model_card
from ssmgen.model_folder import SAMPLING, SAVED_DTYPES, Recipe, check_sampling, packaged
from ssmgen.precision import sampling_dtype
from ssmgen.registry import explained
from ssmgen.sampling import Sampler, image_seeds, in_dtype, initial_noise
from ssmgen.solvers import Solver

__all__ = ["SAVED_DTYPES", "MaskToImage", "Recipe", "packaged"]

_OUTPUTS = ("pil", "np", "pt", "uint8", "latent")
_PARAMETERS = inspect.signature(Sampler.__call__).parameters
_SAMPLER_DEFAULTS = {name: _PARAMETERS[name].default for name in SAMPLING}


class MaskToImage:
    """Images from semantic masks.

        pipe = MaskToImage.from_pretrained("folder")
        pipe("mask.png", seed=0)[0].save("face.png")

    Args:
        model: a mask-conditioned model, such as `ssmgen.models.SISMA`, with trained weights.
        autoencoder: of its latents, see `ssmgen.latents`.
        recipe: what they are.
        card: Markdown that tells people of it, its README on disk and on the hub; a plain one where empty.

    Raises:
        ValueError: model, autoencoder, labels and image size do not fit each other.
    """

    def __init__(self, model: Any, autoencoder: Any, recipe: Recipe, *, card: str = "") -> None:
        _check_fit(model, autoencoder, recipe)
        self.model = model.eval().requires_grad_(False)
        self.autoencoder = autoencoder
        self.recipe = recipe
        self.card = card or model_card(
            f"{recipe.model}, {recipe.image_size} x {recipe.image_size}", recipe.about, recipe.labels
        )
        self.sampler = Sampler(self.model)

    def __repr__(self) -> str:
        size = f"{self.recipe.image_size} x {self.recipe.image_size}"
        return f"MaskToImage({self.recipe.model}, {size}, {len(self.recipe.labels)} classes, {self.device})"

    @classmethod
    @explained()
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> MaskToImage:
        """Load a folder that `save_pretrained` wrote, a model that comes with the package, or a repository on the hub.

        Args:
            source: the folder; a name of `packaged`; or ``owner/name`` of a repository, which is downloaded once. They
                are looked for in this order, and a `pathlib.Path` is a folder only.
            revision: branch, tag or commit on the hub.
            local_files_only: use what was downloaded before and stay off the network.

        Raises:
            FileNotFoundError: no such folder, model or repository, or a file of it is missing.
            ValueError: a file is damaged, of a newer format, or its weights do not fit its model.
        """
        folder = model_folder.locate(source, revision, local_files_only)
        model, autoencoder, recipe, card = model_folder.read(folder)
        try:
            return cls(model, autoencoder, recipe, card=card)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json``, ``model.safetensors``, ``autoencoder/`` and ``README.md``, for `from_pretrained`.

        In a folder that is there its files of these names are replaced, when the new ones are complete, and others
        stay as they are.

        Args:
            folder: where to.
            dtype: that of the weights in the file; 16 bits halve it. They are read back as float32.
        """
        model = self.model if dtype is None else in_dtype(self.model, dtype)
        model_folder.write(Path(folder).expanduser(), model, self.autoencoder, self.recipe, self.card)

    def push_to_hub(
        self, repository: str, *, card: str = "", private: bool = False, dtype: torch.dtype | None = None
    ) -> str:
        """Upload it to a repository on the hub, made where it is not there; needs the token of ``hf auth login``.

        Args:
            repository: ``owner/name``.
            card: its README; its own where empty. ``OWNER/NAME`` in it becomes the repository's name.
            private: make it one that others do not see.
            dtype: see `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: ``repository`` is no ``owner/name``.
            OSError: it could not be written, or not be uploaded: no token, no permission, no network.
        """
        from tempfile import TemporaryDirectory

        import huggingface_hub

        if not model_folder.HUB_ID.fullmatch(repository):
            raise ValueError(f"repository must be of the form owner/name, got {repository!r}")
        with TemporaryDirectory() as name:
            self.save_pretrained(name, dtype=dtype)
            Path(name, "README.md").write_text((card or self.card).replace(NAME, repository), encoding="utf-8")
            try:
                huggingface_hub.create_repo(repository, private=private, exist_ok=True)
                return str(huggingface_hub.upload_folder(repo_id=repository, folder_path=name))
            except Exception as error:  # the hub, the HTTP library and the file system each have their own
                raise OSError(f"{repository}: could not be uploaded to the hub: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.model.parameters())).device

    def to(self, *where: Any, device: Any = None, dtype: torch.dtype | str | None = None) -> MaskToImage:
        """Move it, or set what it samples in: ``to("cuda")``, ``to(torch.bfloat16)``, ``to("cuda", torch.bfloat16)``.

        The dtype is that of the model's weights while sampling, see `Sampler`; the model itself and its autoencoder
        stay in float32, so that nothing is lost by going back. ``"auto"`` is bfloat16 where that is faster on the
        device, and float32 otherwise.

        Raises:
            TypeError: neither a device nor a floating-point dtype.
            ValueError: torch has no such device here, or another word as ``dtype``.
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
            raise TypeError(f"dtype must be a floating-point one, got {dtype}")
        if device is not None:
            self.model.to(place)
            self.autoencoder.to(place)
        dtype = dtype or self.sampler.dtype
        self.sampler = Sampler(self.model, dtype=None if dtype == torch.float32 else dtype)
        return self

    @explained()
    def __call__(
        self,
        mask: Any,
        *,
        steps: int | None = None,
        solver: str | Solver | None = None,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        shift: float | None = None,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        noise: Tensor | None = None,
        output_type: str = "pil",
        palette: str | LabelSet = "",
        remap: str | LabelSet = "",
        batch_size: int = 16,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Any:
        """Make images.

        Args:
            mask: a path to a PNG, a PIL image, an array or a tensor, or a list of these; of square shape and any size,
                brought to the model's by nearest neighbour. See `to_labels`. Or a tensor of many, see `label_maps`.
            steps, solver, guidance_scale, guidance_start, shift: see `Sampler`; the model's own where None.
            seed: of the first image, from 0 to 2**64 - 1; the next ones count up, mask by mask. Or one seed per image.
            num_images: images of each mask.
            noise: the noise itself ``(n, c, h, w)``, one for each image, instead of seeds.
            output_type: ``"pil"``, a list of images; ``"np"`` ``(n, size, size, 3)`` and ``"pt"`` ``(n, 3, size,
                size)``, float32 in [0, 1]; ``"uint8"`` ``(n, 3, size, size)``; ``"latent"`` the model's latents ``(n,
                c, h, w)``.
            palette: the label set whose colours an RGB mask has: ``celebamask19``, ``bisenet19`` or a `LabelSet`.
            remap: the label set whose ids the mask has, where it is not the model's; they are renamed by class.
            batch_size: images in a call of the model; changes them by rounding only.
            callback: called as ``callback(step, x)`` after each step, 1 to ``steps``, of each batch with its latents so
                far, which `decode` shows. Adaptive solvers do not call it.

        Returns:
            ``len(masks) * num_images`` images, those of a mask side by side.

        Raises:
            FileNotFoundError, TypeError, ValueError: a mask that is none (see `to_labels`), or settings that are none.

        Warns:
            UserWarning: a mask looks like one of the other order of the same classes, see ``remap``.
        """
        check_output_type(output_type)
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")
        masks = self.label_maps(mask, palette=palette, remap=remap)
        count = len(masks) * num_images
        x0 = initial_noise(image_seeds(seed, count), self.latent_size) if noise is None else noise
        if tuple(x0.shape) != (count, *self.latent_size):
            raise ValueError(f"noise must be {(count, *self.latent_size)}, one for each image, got {tuple(x0.shape)}")
        settings = self.sampling(
            steps=steps, solver=solver, guidance_scale=guidance_scale, guidance_start=guidance_start, shift=shift
        )
        every = masks.repeat_interleave(num_images, dim=0)
        parts = []
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            labels = every[part] if len(masks) > 1 else every[:1]
            latents = self.sampler(x0[part], labels.to(self.device), progress=callback, **settings)
            parts.append(latents if output_type == "latent" else self.decode(latents))
        return to_output(torch.cat(parts), output_type)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        side = self.recipe.image_size // self.autoencoder.factor
        return self.autoencoder.channels, side, side

    def sampling(self, **given: Any) -> dict[str, Any]:
        """All settings of a call: `Sampler`'s, replaced by the model's own, and those by what is given and not None.

        Raises:
            ValueError: another setting, a value out of range, or no such solver.
        """
        chosen = {key: value for key, value in given.items() if value is not None}
        settings = _SAMPLER_DEFAULTS | self.recipe.sampling | chosen
        check_sampling(settings)
        return settings

    def labels_of(
        self, mask: Any, *, palette: str | LabelSet = "", remap: str | LabelSet = "", name: str = "the mask"
    ) -> Tensor:
        """A mask as the model takes it: ids ``(image_size, image_size)`` uint8, see `to_labels`."""
        labels = to_labels(mask, self.recipe.labels, palette=palette, order=remap, name=name)
        return self._resized(labels[None], str(mask) if isinstance(mask, str | Path) else name)[0]

    def label_maps(self, masks: Any, *, palette: str | LabelSet = "", remap: str | LabelSet = "") -> Tensor:
        """One mask or several as the model takes them: ids ``(n, image_size, image_size)`` uint8.

        Args:
            masks: what `labels_of` takes, a list of these, or one integer tensor ``(n, height, width)`` of ids. A
                tensor in the model's own ids is checked as a whole, and the order of its classes is not questioned. A
                uint8 tensor whose first or last size is 3 is one mask of colours: convert ids to int64.
            palette, remap: see `__call__`.
        """
        if _is_stack(masks) and not palette and not remap:
            check_labels(masks, len(self.recipe.labels), where="the masks")
            return self._resized(masks.cpu().to(torch.uint8), "each mask")
        listed = _listed(list(masks) if _is_stack(masks) else masks)
        return torch.stack([self.labels_of(one, palette=palette, remap=remap, name=name) for name, one in listed])

    def _resized(self, labels: Tensor, name: str) -> Tensor:
        height, width = labels.shape[1:]
        if height != width:
            raise ValueError(f"{name} is {height} x {width} (height x width): crop it to a square")
        size = self.recipe.image_size
        return nn.functional.interpolate(labels[:, None], (size, size), mode="nearest-exact")[:, 0]

    def encode(self, image: Any) -> Tensor:
        """Latents ``(1, c, h, w)`` of an image.

        Args:
            image: a path, a PIL image, or an array or tensor of uint8, ``(3, size, size)`` or ``(size, size, 3)``.

        Raises:
            FileNotFoundError, ValueError, TypeError: no image, or not of the model's size.
        """
        return self.autoencoder.encode(self.pixels_of(image).to(self.device).float() / 127.5 - 1)

    def pixels_of(self, image: Any) -> Tensor:
        """An image as `encode` takes it, uint8 ``(1, 3, size, size)``."""
        pixels: Any = read_image(image) if isinstance(image, str | Path) else image
        if hasattr(pixels, "convert"):
            pixels = from_pil(pixels.convert("RGB"))
        elif hasattr(pixels, "__array_interface__"):
            pixels = torch.from_numpy(pixels.copy())
        if not isinstance(pixels, Tensor):
            raise TypeError(f"an image is a path, a PIL image, an array or a tensor, got {type(image).__name__}")
        size = self.recipe.image_size
        if tuple(pixels.shape) == (size, size, 3) and size != 3:
            pixels = pixels.movedim(-1, 0)
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != (3, size, size):
            raise ValueError(
                f"the image must be uint8 (3, {size}, {size}), got {pixels.dtype} {tuple(pixels.shape)}: crop it to a "
                f"square and resize it to {size} x {size} pixels, with its mask"
            )
        return pixels[None]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images ``(n, 3, size, size)`` in [0, 1]."""
        return (self.autoencoder.decode(latents.float()) / 2 + 0.5).clamp(0, 1)


def _listed(mask: Any) -> list[tuple[str, Any]]:
    """Each mask with what errors call it."""
    if not isinstance(mask, list | tuple):
        return [("the mask", mask)]
    if not mask:
        raise ValueError("the list of masks is empty: give at least one mask")
    return [(f"mask {i} of {len(mask)}", one) for i, one in enumerate(mask, 1)]


def _is_stack(masks: Any) -> bool:
    """Whether these are ids of several masks in one tensor, and not the colours of one mask."""
    if not isinstance(masks, Tensor) or masks.dim() != 3 or not masks.numel():
        return False
    ids = not (masks.is_floating_point() or masks.is_complex() or masks.dtype == torch.bool)
    return ids and not (masks.dtype == torch.uint8 and 3 in (masks.shape[0], masks.shape[-1]))


def _check_fit(model: Any, autoencoder: Any, recipe: Recipe) -> None:
    """Refuse parts that do not belong together; a model of another family may lack an attribute."""
    wanted = {"in_channels": autoencoder.channels, "mask_scale": autoencoder.factor, "num_classes": len(recipe.labels)}
    words = {
        "in_channels": "channels of the autoencoder's latents",
        "mask_scale": "image pixels per latent pixel of the autoencoder",
        "num_classes": f"classes of {recipe.labels.name}",
    }
    for name, value in wanted.items():
        if getattr(model, name, value) != value:
            raise ValueError(f"the model has {name}={getattr(model, name)}, and there are {value} {words[name]}")
    side = autoencoder.factor * getattr(model, "patch_size", 1)
    if recipe.image_size % side:
        raise ValueError(f"image_size must be a multiple of {side} (autoencoder and patches), got {recipe.image_size}")


def check_device(device: Any) -> None:
    """Refuse a device that torch cannot use here, before a part of a model is moved.

    Raises:
        ValueError: names it, and gives torch's reason.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:  # which of them depends on how torch was built
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].partition(". ")[0]
        raise ValueError(
            f"device {str(device)!r}: torch cannot use it here ({reason}); 'ssmgen doctor' lists the devices it sees"
        ) from error


def check_output_type(output_type: str, outputs: Sequence[str] = _OUTPUTS) -> None:
    """Refuse an ``output_type`` that is none."""
    if output_type not in outputs:
        raise ValueError(f"output_type must be one of {', '.join(outputs)}, got {output_type!r}")


def to_output(images: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return images
    images = images.float().cpu()
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.movedim(1, -1).numpy()
    images = (images * 255).round().to(torch.uint8)
    return images if output_type == "uint8" else [to_pil(image) for image in images]
