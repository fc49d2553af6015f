"""Autoencoders: identity, and diffusers' AutoencoderTiny and AutoencoderKL with their scale and shift.

Images are ``(batch, 3, height, width)`` in [-1, 1]. A latent is ``(encoder output - shift) * scale``, of about unit
variance like the noise. Scale and shift are saved with the weights and recorded in every cache and checkpoint.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ssmgen.atomic import write_text
from ssmgen.data.files import files_with
from ssmgen.hub import download_file, hub_library, local_folder
from ssmgen.reading import read_json
from ssmgen.registry import register
from ssmgen.weights import (
    check_inside,
    conversion_hint,
    count_values,
    hash_of_weights,
    limit_parameters,
    load_weights,
    read_weights,
    tensors_of,
    unwrapped,
    write_weights,
)

# Pixels that a CPU encodes or decodes at a time, four images of 128 x 128: the output of one layer is then still in the
# processor's cache when the next layer reads it.
_PIXELS_AT_ONCE = 4 * 128 * 128

_NAMES = {"AutoencoderTiny": "autoencoder-tiny", "AutoencoderKL": "autoencoder-kl"}  # by class of diffusers


class Autoencoder(Protocol):
    """The interface of an autoencoder.

    Attributes:
        name: the registered name.
        channels: channels of a latent.
        factor: image pixels per latent pixel along a side.
        scale, shift: normalisation of the encoder's output.
    """

    name: str
    channels: int
    factor: int
    scale: float
    shift: float

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...

    def to(self, device: torch.device | str) -> Any: ...


@register("autoencoder", "identity")
class Identity(nn.Module):
    """The autoencoder of a pixel-space model: latents are the images."""

    name = "identity"
    channels = 3
    factor = 1
    scale = 1.0
    shift = 0.0

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves, ``(batch, 3, height, width)``."""
        _check_images(images, self.factor)
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves, ``(batch, 3, height, width)``."""
        return latents

    def describe(self) -> dict[str, Any]:
        """The record for a cache or checkpoint, by which a mismatch is detected."""
        return {"name": self.name, "weights": None, "scale": self.scale, "shift": self.shift}


class _DiffusersAutoencoder(nn.Module):
    """A frozen diffusers autoencoder as an `Autoencoder`.

    On a CPU the network runs channels last and a few images at a time, so an image depends on its batch by rounding at
    most. The results are contiguous.
    """

    name: str
    network: Any

    def __init__(self, network: Any, scale: float | None, shift: float | None) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        config = network.config
        self.channels: int = config.latent_channels
        stages = "encoder_block_out_channels" if "encoder_block_out_channels" in config else "block_out_channels"
        self.factor = 2 ** (len(config[stages]) - 1)
        self.scale = float(config.scaling_factor if scale is None else scale)
        self.shift = float((config.shift_factor or 0.0) if shift is None else shift)
        self._lay_out()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images ``(batch, 3, h, w)`` in [-1, 1] to latents ``(batch, channels, h/factor, w/factor)``."""
        _check_images(images, self.factor)
        return (self._in_parts(self._encode, images, images[0, 0].numel()) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(batch, channels, h, w)`` to images ``(batch, 3, h*factor, w*factor)`` in [-1, 1]."""
        if latents.dim() != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be (batch, {self.channels}, height, width), got {tuple(latents.shape)}")
        pixels = latents.shape[2] * latents.shape[3] * self.factor**2
        return self._in_parts(self._decode, latents / self.scale + self.shift, pixels).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        """Name, hash of the weights, scale and shift, as a cache or checkpoint records them to detect a mismatch."""
        return {"name": self.name, "weights": hash_of_weights(self), "scale": self.scale, "shift": self.shift}

    def save(self, folder: Path) -> None:
        """Write a folder that can be the ``source`` of an autoencoder, see `save_network`."""
        self.network.register_to_config(scaling_factor=self.scale, shift_factor=self.shift)
        save_network(self.network, folder)

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).sample

    def _in_parts(self, run: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        """``run(x)`` in the fastest layout and batches for the device; ``pixels`` is the size of one image."""
        if x.device.type != "cpu":
            return run(x).contiguous()
        parts = x.contiguous(memory_format=torch.channels_last).split(max(1, _PIXELS_AT_ONCE // max(1, pixels)))
        return torch.cat([run(part) for part in parts]).contiguous()

    def _lay_out(self) -> None:
        """Store weights channels last on a CPU, which spares convolutions a reordering; other devices are untimed."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.network.parameters())
        self.network.to(memory_format=torch.channels_last if on_cpu else torch.contiguous_format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let the layout follow the device; ``to``, ``cuda`` and the like call this."""
        super()._apply(fn, recurse)
        self._lay_out()
        return self


@register("autoencoder", "autoencoder-tiny")
class TinyAutoencoder(_DiffusersAutoencoder):
    """diffusers' `AutoencoderTiny`, such as TAESD.

    Args:
        source: a folder in diffusers' layout (``config.json`` and safetensors), a folder with TAESD's own pair of files
            (``*_encoder.safetensors`` and ``*_decoder.safetensors``), or a hub id ``owner/name``.
        scale, shift: replace those of the configuration.

    Raises:
        FileNotFoundError: a local path lacks the files; names the expected ones.
        ValueError: another class of autoencoder, or a weight is missing, unknown or of another shape; names the file.
    """

    name = "autoencoder-tiny"

    def __init__(self, source: str, scale: float | None = None, shift: float | None = None) -> None:
        pair = _taesd_files(source)
        network = _from_taesd_files(*pair) if pair else _from_pretrained("AutoencoderTiny", source)
        super().__init__(network, scale, shift)

    def _encode(self, images: Tensor) -> Tensor:
        return self.network.encode(images).latents


@register("autoencoder", "autoencoder-kl")
class KLAutoencoder(_DiffusersAutoencoder):
    """diffusers' `AutoencoderKL`, such as Stable Diffusion's; images are encoded to the mean of their posterior.

    Args:
        source: a folder in diffusers' layout, or a hub id ``owner/name`` such as ``stabilityai/sd-vae-ft-ema``.
        scale, shift: replace those of the configuration (0.18215 for Stable Diffusion 1's).

    Raises:
        FileNotFoundError, ValueError: see `TinyAutoencoder`.
    """

    name = "autoencoder-kl"

    def __init__(self, source: str, scale: float | None = None, shift: float | None = None) -> None:
        super().__init__(_from_pretrained("AutoencoderKL", source), scale, shift)

    def _encode(self, images: Tensor) -> Tensor:
        return self.network.encode(images).latent_dist.mode()


def _check_images(images: Tensor, factor: int) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be (batch, 3, height, width) floats in [-1, 1], got {tuple(images.shape)} {images.dtype}"
        )
    if images.shape[2] % factor or images.shape[3] % factor or 0 in images.shape:
        raise ValueError(f"image sides must be positive multiples of {factor}, got {tuple(images.shape)}")


def autoencoder_at(source: str) -> str:
    """The registered name of the autoencoder in a source, for `ssmgen.build`.

    Args:
        source: a folder or hub id, as `TinyAutoencoder` and `KLAutoencoder` take it.

    Raises:
        FileNotFoundError: a local path lacks the files; names the expected ones.
        ValueError: the class is none of those supported here.
    """
    if _taesd_files(source):
        return TinyAutoencoder.name
    kind = _class_at(source)
    if kind is None:
        choices = " or ".join(_NAMES.values())
        raise ValueError(f"{source}: its config.json names no class: choose one with autoencoder={choices}")
    if kind not in _NAMES:
        known = ", ".join(_NAMES)
        raise ValueError(f"{source}: its config.json names the class {kind}; there are autoencoders for {known}")
    return _NAMES[kind]


def save_network(network: Any, folder: Path) -> None:
    """Write a diffusers autoencoder in diffusers' layout, without the path it was loaded from.

    Raises:
        OSError: the disk is full or not writable; names the file.
    """
    network = unwrapped(network)
    config = json.loads(network.to_json_string())
    config.pop("_name_or_path", None)
    if config["_class_name"] == "AutoencoderTiny":
        config.pop("block_out_channels", None)  # diffusers writes it and warns when it reads it
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors_of(network), {"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _from_pretrained(kind: str, source: str) -> Any:
    """The network of a source, of a class of diffusers, with every weight read from it."""
    hub_library()  # switches telemetry off before diffusers reads the setting
    import diffusers

    found, name = _class_at(source), _NAMES[kind]
    if found not in (kind, None):
        fix = f"give autoencoder={_NAMES[found]}" if found in _NAMES else f"{name} cannot read it"
        raise ValueError(f"{source}: its config.json names the class {found}, and {name} reads {kind}: {fix}")
    folder = local_folder(source)
    if folder is not None:
        _check_index(folder)
    # low_cpu_mem_usage=True would need accelerate.
    settings = {"use_safetensors": True, "output_loading_info": True, "low_cpu_mem_usage": False}
    if folder is not None:
        settings["local_files_only"] = True
    try:
        if folder is not None:
            _check_size(getattr(diffusers, kind), folder)
        network, report = getattr(diffusers, kind).from_pretrained(folder or source, **settings)
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{_weights_at(source)}: cannot be loaded into {kind} ({reason})") from error
    for key, value in (
        ("scaling_factor", network.config.scaling_factor),
        ("shift_factor", network.config.shift_factor or 0),
    ):
        if not isinstance(value, int | float):
            raise ValueError(f"{source}: {key} in its config.json must be a number, got {str(value)[:80]!r}")
    # diffusers would initialise missing weights and drop unknown ones.
    lacking, unknown = report["missing_keys"], report["unexpected_keys"]
    if lacking or unknown:
        fault = f"lacks {len(lacking)} weight(s) of {kind}" if lacking else f"holds {len(unknown)} weight(s) too many"
        raise ValueError(
            f"{_weights_at(source)}: {fault}, the first {min(lacking or unknown)}: it is damaged, or "
            "its config.json is another's"
        )
    return network


def _check_size(network: Any, folder: Path) -> None:
    """Reject a configuration with more parameters than the folder's weights have values, before it takes memory."""
    held = sum(map(count_values, files_with(folder, {".safetensors"})))
    too_large = f"it has more parameters than the {held:,} values in its weights"
    # Weights that are lacking are named one by one later.
    with limit_parameters(2 * held + 10**6, too_large), torch.device("meta"):
        network.from_config(network.load_config(folder, local_files_only=True))


def _class_at(source: str) -> str | None:
    """The class that a source's config.json names, or None."""
    folder = local_folder(source)
    file = folder / "config.json" if folder else download_file(source, "config.json")
    if folder and not (file.is_file() and files_with(folder, {".safetensors"})):
        raise FileNotFoundError(
            f"{folder}: expected config.json and *.safetensors as diffusers saves them, or TAESD's own pair of "
            f"*_encoder.safetensors and *_decoder.safetensors{conversion_hint(folder)}"
        )
    if folder:
        check_inside(folder, "config.json")
    try:
        name = read_json(file).get("_class_name")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a configuration of an autoencoder ({error})") from error
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{file}: _class_name must be the name of a class, got {str(name)[:80]!r}")
    return name


def _check_index(folder: Path) -> None:
    """Check that the index of weights in several files names safetensors files of its own folder."""
    for file in folder.glob("*.index.json"):
        try:
            names = set(json.loads(file.read_text(encoding="utf-8-sig"))["weight_map"].values())
            fits = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not an index of weights ({error})") from error
        if not fits:
            raise ValueError(f"{file}: may name *.safetensors files of its own folder only")


def _weights_at(source: str) -> Path | str:
    """The name of a source's weights for messages: their file if there is only one."""
    folder = local_folder(source)
    files = files_with(folder, {".safetensors"}) if folder else []
    return files[0] if len(files) == 1 else source


def _taesd_files(source: str) -> tuple[Path, Path] | None:
    """TAESD's own pair of files in a folder, or None."""
    folder = local_folder(source)
    files = {file.stem: file for file in files_with(folder, {".safetensors"})} if folder else {}
    names = [stem.removesuffix("_encoder") for stem in files if stem.endswith("_encoder")]
    pairs = [(files[f"{name}_encoder"], files[f"{name}_decoder"]) for name in names if f"{name}_decoder" in files]
    if len(pairs) > 1:
        found = ", ".join(encoder.name for encoder, _ in pairs)
        raise ValueError(f"{source}: holds {len(pairs)} autoencoders ({found}): give each its own folder")
    return pairs[0] if pairs else None


def _from_taesd_files(encoder: Path, decoder: Path) -> Any:
    """TAESD's ``nn.Sequential`` weights in diffusers' class, whose numbering leaves out the decoder's clamp."""
    import diffusers

    encoder_weights, decoder_weights = _taesd_weights(encoder, 0), _taesd_weights(decoder, -1)
    last = max((int(name.split(".")[1]) for name in encoder_weights), default=0)
    bias = encoder_weights.get(f"layers.{last}.bias")
    if bias is None:
        raise ValueError(f"{encoder}: its last layer has no bias, unlike that of TAESD's encoder")
    network: Any = diffusers.AutoencoderTiny(latent_channels=len(bias))
    load_weights(network.encoder, encoder, encoder_weights)
    load_weights(network.decoder, decoder, decoder_weights)
    return network


def _taesd_weights(file: Path, offset: int) -> dict[str, Tensor]:
    weights = {}
    for name, value in read_weights(file).items():
        index, _, rest = name.partition(".")
        if not index.isdecimal():
            raise ValueError(f"{file}: holds {name!r}; TAESD's own files hold names such as '0.weight'")
        weights[f"layers.{int(index) + offset}.{rest}"] = value
    return weights
