"""Masks in, images out: a trained model with its autoencoder, labels and settings as one object and one folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmgen.data.images import from_pil, read_image, to_pil
from ssmgen.data.labels import LabelSet
from ssmgen.data.mask_input import to_labels
from ssmgen.extras import require
from ssmgen.registry import build, find
from ssmgen.sampling import Sampler, initial_noise

_FORMAT = 1
_CONFIG, _WEIGHTS, _AUTOENCODER = "config.json", "model.safetensors", "autoencoder"
_OUTPUTS = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Recipe:
    """What a model is beside its weights; ``config.json`` of its folder.

    Attributes:
        model: its registered name.
        model_args: what it is built with.
        autoencoder: the registered name of its autoencoder.
        image_size: side of the square images in pixels.
        labels: classes of its masks.
        sampling: ``solver``, ``steps``, ``shift`` and ``guidance_scale`` where a call names none.
        about: a line on what it was trained on and can do.
    """

    model: str
    model_args: dict[str, Any]
    autoencoder: str
    image_size: int
    labels: LabelSet
    sampling: dict[str, Any] = field(default_factory=dict)
    about: str = ""


class MaskToImage:
    """Images from semantic masks.

        pipe = MaskToImage.from_pretrained("folder")
        pipe("mask.png", seed=0)[0].save("face.png")

    Args:
        model: a mask-conditioned model, such as `ssmgen.models.SISMA`, with trained weights.
        autoencoder: of its latents, see `ssmgen.latents`.
        recipe: what they are.
    """

    def __init__(self, model: Any, autoencoder: Any, recipe: Recipe) -> None:
        self.model = model.eval().requires_grad_(False)
        self.autoencoder = autoencoder
        self.recipe = recipe
        self.sampler = Sampler(self.model)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> MaskToImage:
        """Load a folder that `save_pretrained` wrote, or a repository on the hub that holds one.

        Args:
            source: the folder, or ``owner/name`` of the repository, which is downloaded once.
            revision: branch, tag or commit on the hub.
            local_files_only: use what was downloaded before and stay off the network.

        Raises:
            FileNotFoundError: no such folder or repository, or a file of it is missing.
            ValueError: a file is damaged, of a newer format, or its weights do not fit its model.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _downloaded(str(source), revision, local_files_only)
        recipe = _read_recipe(folder / _CONFIG)
        autoencoder: Any
        if recipe.autoencoder == "identity":
            autoencoder = build("identity")
        else:
            autoencoder = build(recipe.autoencoder, source=str(folder / _AUTOENCODER))
        model = build(recipe.model, **recipe.model_args)
        model.load_state_dict(_read_weights(folder / _WEIGHTS, model))
        return cls(model, autoencoder, recipe)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``autoencoder/``, for `from_pretrained`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
        save_file(weights, folder / _WEIGHTS)
        if self.recipe.autoencoder != "identity":
            self.autoencoder.save(folder / _AUTOENCODER)
        content = {"format": _FORMAT, **asdict(self.recipe)}
        folder.joinpath(_CONFIG).write_text(json.dumps(content, indent=2) + "\n")

    def push_to_hub(self, repository: str, *, card: str = "", private: bool = False) -> str:
        """Upload to ``owner/name`` on the hub, with ``card`` as its README; returns the address of the commit."""
        from tempfile import TemporaryDirectory

        hub = require("huggingface_hub", extra="latents")
        hub.create_repo(repository, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if card:
                Path(folder, "README.md").write_text(card)
            return str(hub.upload_folder(repo_id=repository, folder_path=folder))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.model.parameters())).device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> MaskToImage:
        """Move model and autoencoder; ``dtype`` is that of the model's weights while sampling, see `Sampler`."""
        if device is not None:
            self.model.to(device)
            self.autoencoder.to(device)
        self.sampler = Sampler(self.model, dtype=dtype or self.sampler.dtype)
        return self

    def __call__(
        self,
        mask: Any,
        *,
        steps: int | None = None,
        solver: str | None = None,
        guidance_scale: float | None = None,
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
                brought to the model's by nearest neighbour.
            steps, solver, guidance_scale, shift: see `Sampler`; the model's own where None.
            seed: of the first image; the next ones count up, mask by mask. Or one seed per image.
            num_images: images of each mask.
            noise: the noise itself ``(n, c, h, w)``, one for each image, instead of seeds.
            output_type: ``"pil"``, a list of images; ``"np"`` ``(n, size, size, 3)`` and ``"pt"`` ``(n, 3, size,
                size)``, float32 in [0, 1]; ``"latent"`` the model's latents ``(n, c, h, w)``.
            palette: the label set whose colours an RGB mask has: ``celebamask19``, ``bisenet19`` or a `LabelSet`.
            remap: the label set whose ids the mask has, where it is not the model's.
            batch_size: images in a call of the model; changes them by rounding only.
            callback: called as ``callback(step, x)`` after each step with the latents so far.

        Returns:
            ``len(masks) * num_images`` images, those of a mask side by side.

        Raises:
            FileNotFoundError, TypeError, ValueError: a mask that is none (see `to_labels`), or settings that are none.
        """
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(_OUTPUTS)}, got {output_type!r}")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")
        masks = [self.labels_of(one, palette=palette, remap=remap) for one in listed(mask)]
        count = len(masks) * num_images
        x0 = initial_noise(_seeds(seed, count), self.latent_size) if noise is None else noise
        if tuple(x0.shape) != (count, *self.latent_size):
            raise ValueError(f"noise must be {(count, *self.latent_size)}, one for each image, got {tuple(x0.shape)}")
        settings = self.sampling(steps=steps, solver=solver, guidance_scale=guidance_scale, shift=shift)
        every = torch.stack(masks).repeat_interleave(num_images, dim=0)
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
        """The settings of a call: the model's own, replaced by those given that are not None.

        Raises:
            ValueError: steps, shift or guidance_scale out of range, or no such solver.
        """
        settings = self.recipe.sampling | {key: value for key, value in given.items() if value is not None}
        _check_sampling(settings)
        return settings

    def labels_of(self, mask: Any, *, palette: str | LabelSet = "", remap: str | LabelSet = "") -> Tensor:
        """A mask as the model takes it: ids ``(image_size, image_size)`` uint8, see `to_labels`."""
        labels = to_labels(mask, self.recipe.labels, palette=palette, order=remap)
        if labels.shape[0] != labels.shape[1]:
            raise ValueError(f"the mask is {labels.shape[0]} x {labels.shape[1]} (height x width): crop it to a square")
        size = self.recipe.image_size
        return nn.functional.interpolate(labels[None, None], (size, size), mode="nearest-exact")[0, 0]

    def encode(self, image: Any) -> Tensor:
        """Latents ``(1, c, h, w)`` of a square image: a path, a PIL image, or a uint8 tensor ``(3, size, size)``.

        Raises:
            FileNotFoundError, ValueError, TypeError: no image, or not of the model's size.
        """
        return self.autoencoder.encode(self.pixels_of(image).to(self.device).float() / 127.5 - 1)

    def pixels_of(self, image: Any) -> Tensor:
        """An image as `encode` takes it, uint8 ``(1, 3, size, size)``."""
        pixels = read_image(image) if isinstance(image, str | Path) else image
        if not isinstance(pixels, Tensor):
            if not hasattr(pixels, "convert"):
                raise TypeError(f"an image is a path, a PIL image or a tensor, got {type(image).__name__}")
            pixels = from_pil(pixels.convert("RGB"))
        size = self.recipe.image_size
        if pixels.dtype != torch.uint8 or tuple(pixels.shape) != (3, size, size):
            raise ValueError(f"the image must be uint8 (3, {size}, {size}), got {pixels.dtype} {tuple(pixels.shape)}")
        return pixels[None]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images ``(n, 3, size, size)`` in [0, 1]."""
        return (self.autoencoder.decode(latents.float()) / 2 + 0.5).clamp(0, 1)


def listed(mask: Any) -> list[Any]:
    masks = list(mask) if isinstance(mask, list | tuple) else [mask]
    if not masks:
        raise ValueError("the list of masks is empty: give at least one mask")
    return masks


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"give one seed, or one per image: got {len(seed)} seeds for {count} image(s)")
    return [int(one) for one in seed]


def _check_sampling(settings: dict[str, Any]) -> None:
    if "solver" in settings and find(settings["solver"]).kind != "solver":
        raise ValueError(f"{settings['solver']!r} is no solver: see 'ssmgen list'")
    for name in ("steps", "shift", "guidance_scale"):
        value = settings.get(name, 1)
        if not math.isfinite(value) or value < 0 or (name != "guidance_scale" and value == 0):
            raise ValueError(f"{name} must be positive, got {value}")


def to_output(images: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return images
    images = images.float().cpu()
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.movedim(1, -1).numpy()
    return [to_pil(image) for image in (images * 255).round().to(torch.uint8)]


def _downloaded(source: str, revision: str | None, local_files_only: bool) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: no such folder, and not a hub id of the form owner/name")
    hub = require("huggingface_hub", extra="latents")
    try:
        return Path(hub.snapshot_download(source, revision=revision, local_files_only=local_files_only))
    except Exception as error:  # the hub, the HTTP library and the file system each have their own
        raise FileNotFoundError(f"{source}: could not be fetched from the hub: {error}") from error


def _read_recipe(file: Path) -> Recipe:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; {file.parent} was not written by MaskToImage.save_pretrained")
    try:
        content = json.loads(file.read_text())
        if content.pop("format") > _FORMAT:
            raise ValueError("it was written by a newer ssmgen: pip install --upgrade ssmgen")
        labels = content.pop("labels")
        for key in ("classes", "palette", "mirrored"):
            labels[key] = tuple(tuple(item) if isinstance(item, list) else item for item in labels[key])
        return Recipe(labels=LabelSet(**labels), **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: is no configuration of a MaskToImage ({error})") from error


def _read_weights(file: Path, model: nn.Module) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found")
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is no safetensors file, or damaged ({error})") from error
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{file}: {len(wrong)} tensor(s) do not fit the model of {_CONFIG}, the first {key}: the file has "
            f"{found.get(key)}, the model {wanted.get(key)}"
        )
    return weights
