"""Images to latents and back: identity, and diffusers' AutoencoderTiny and AutoencoderKL, with their scale and shift.

Images are ``(batch, 3, height, width)`` in [-1, 1]. A latent is ``(encoder output - shift) * scale``, about unit size,
so that it fits noise of unit variance. Scale and shift travel with the weights and into every cache and checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from ssmgen.registry import register

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Pixels that a CPU encodes or decodes at a time, four images of 128 x 128: what one layer writes is then still in the
# processor's cache when the next layer reads it.
_PIXELS_AT_ONCE = 4 * 128 * 128

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Autoencoder(Protocol):
    """What the rest of the library asks of an autoencoder.

    Attributes:
        name: the registered name.
        channels: channels of a latent.
        factor: image pixels per latent pixel along a side.
        scale, shift: what the encoder's output is normalised with.
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
    """Pixels are the latents: what a pixel-space model uses."""

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
        """The latents themselves."""
        return latents

    def describe(self) -> dict[str, Any]:
        """What a cache or checkpoint records, so that a mismatch is found."""
        return {"name": self.name, "weights": None, "scale": self.scale, "shift": self.shift}


class _DiffusersAutoencoder(nn.Module):
    """Frozen weights of a diffusers autoencoder behind one pair of calls.

    On a CPU the network computes channels last and a few images at a time, so that an image differs by rounding at most
    from the same image in another batch. What both calls return is contiguous.
    """

    name: str
    network: Any

    def __init__(self, network: Any, scale: float | None, shift: float | None) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        config = network.config
        self.channels: int = config.latent_channels
        self.factor = 2 ** (len(_stages(config)) - 1)
        self.scale = float(config.scaling_factor if scale is None else scale)
        self.shift = float((config.shift_factor or 0.0) if shift is None else shift)
        self._lay_out()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images ``(batch, 3, h, w)`` in [-1, 1] to latents ``(batch, channels, h / factor, w / factor)``."""
        _check_images(images, self.factor)
        return (self._in_parts(self._encode, images, images[0, 0].numel()) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to images in [-1, 1]."""
        if latents.dim() != 4 or latents.shape[1] != self.channels:
            raise ValueError(f"latents must be (batch, {self.channels}, height, width), got {tuple(latents.shape)}")
        pixels = latents.shape[2] * latents.shape[3] * self.factor**2
        return self._in_parts(self._decode, latents / self.scale + self.shift, pixels).clamp(-1, 1)

    def describe(self) -> dict[str, Any]:
        """Name, hash of the weights, scale and shift: what a cache or checkpoint records to find a mismatch."""
        return {"name": self.name, "weights": _hash_weights(self), "scale": self.scale, "shift": self.shift}

    def save(self, folder: Path) -> None:
        """Write it in diffusers' layout, with scale and shift, to be read back as ``source``."""
        self.network.register_to_config(scaling_factor=self.scale, shift_factor=self.shift)
        self.network.save_pretrained(folder, safe_serialization=True)
        file = Path(folder, "config.json")
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where it lay on the machine that saved it
        if self.name == "autoencoder-tiny":
            config.pop("block_out_channels", None)  # diffusers writes it, and warns of it when it reads it back
        file.write_text(json.dumps(config, indent=2) + "\n")

    def _encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).sample

    def _in_parts(self, run: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
        """``run(x)``, in the layout and batches that the device computes fastest; ``pixels`` are those of one image."""
        if x.device.type != "cpu":
            return run(x).contiguous()
        parts = x.contiguous(memory_format=torch.channels_last).split(max(1, _PIXELS_AT_ONCE // max(1, pixels)))
        return torch.cat([run(part) for part in parts]).contiguous()

    def _lay_out(self) -> None:
        """Weights channels last on a CPU: each convolution would otherwise copy its input and output to reorder them.

        Other devices have not been timed and keep torch's own layout.
        """
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.network.parameters())
        self.network.to(memory_format=torch.channels_last if on_cpu else torch.contiguous_format)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``to``, ``cuda`` and the like are made of: the layout follows the device."""
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
        FileNotFoundError: a local path without the files, naming what was looked for.
    """

    name = "autoencoder-tiny"

    def __init__(self, source: str, scale: float | None = None, shift: float | None = None) -> None:
        import diffusers

        folder = _local_folder(source)
        pair = _taesd_files(folder) if folder is not None else None
        if pair is not None:
            network = _from_taesd_files(diffusers.AutoencoderTiny, *pair)
        else:
            network = _from_pretrained(diffusers.AutoencoderTiny, source, folder)
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
        FileNotFoundError: a local path without the files, naming what was looked for.
    """

    name = "autoencoder-kl"

    def __init__(self, source: str, scale: float | None = None, shift: float | None = None) -> None:
        import diffusers

        network = _from_pretrained(diffusers.AutoencoderKL, source, _local_folder(source))
        super().__init__(network, scale, shift)

    def _encode(self, images: Tensor) -> Tensor:
        return self.network.encode(images).latent_dist.mode()


def _stages(config: Any) -> Sequence[int]:
    return config.encoder_block_out_channels if "encoder_block_out_channels" in config else config.block_out_channels


def _check_images(images: Tensor, factor: int) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be (batch, 3, height, width) floats in [-1, 1], got {tuple(images.shape)} {images.dtype}"
        )
    if images.shape[2] % factor or images.shape[3] % factor or 0 in images.shape:
        raise ValueError(f"image sides must be positive multiples of {factor}, got {tuple(images.shape)}")


def _local_folder(source: str) -> Path | None:
    """The folder a source names, or None where it is a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(source) or source.startswith("."):
        raise FileNotFoundError(f"{source}: no such folder, and not a hub id of the form owner/name")
    return None


def _from_pretrained(cls: Any, source: str, folder: Path | None) -> Any:
    settings = {"use_safetensors": True, "low_cpu_mem_usage": False}  # the latter needs accelerate, for little here
    if folder is None:
        print(f"loading {source} from the hub (or its local cache)", file=sys.stderr)
        return cls.from_pretrained(source, **settings)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder}: expected config.json and *.safetensors as diffusers saves them"
            + (", or *_encoder.safetensors and *_decoder.safetensors" if cls.__name__ == "AutoencoderTiny" else "")
        )
    return cls.from_pretrained(folder, local_files_only=True, **settings)


def _taesd_files(folder: Path) -> tuple[Path, Path] | None:
    encoders, decoders = sorted(folder.glob("*_encoder.safetensors")), sorted(folder.glob("*_decoder.safetensors"))
    return (encoders[0], decoders[0]) if encoders and decoders else None


def _from_taesd_files(cls: Any, encoder: Path, decoder: Path) -> Any:
    """TAESD's bare ``nn.Sequential`` weights in diffusers' class, which does not count the decoder's clamp."""
    from safetensors.torch import load_file

    encoder_weights, decoder_weights = load_file(encoder), load_file(decoder)
    weights = {f"encoder.layers.{key}": value for key, value in encoder_weights.items()}
    for key, value in decoder_weights.items():
        index, _, rest = key.partition(".")
        weights[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    last = max(int(key.partition(".")[0]) for key in encoder_weights)
    network = cls(latent_channels=encoder_weights[f"{last}.weight"].shape[0])
    network.load_state_dict({key: value.float() for key, value in weights.items()})
    return network


def _hash_weights(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(json.dumps([key, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
