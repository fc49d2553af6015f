"""Train the tiny autoencoder of drawn faces that ships in ``assets/drawn-autoencoder``.

    python -m recipes.sisma.autoencoder out=runs/drawn-autoencoder

It is a diffusers `AutoencoderTiny`, narrow enough for a file under 1.5 MB, with most blocks on the coarse grids, where
they cost little. Small parts weigh more in its loss, since eyes and earrings are few pixels but matter most in a face.
Latents are pushed towards zero mean and unit variance (the rest becomes scale and shift in the configuration), and
noise is added to them, so that a generator's errors stay small in the picture.

Training takes an hour on two cores. Run again, the command continues from the last checkpoint in ``OUT-checkpoints``.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.sisma.arguments import command_line, from_command_line, run_command
from recipes.sisma.pairs import held_out_pairs, in_memory, training_pairs
from recipes.sisma.presets import Config
from ssmgen.atomic import write_text
from ssmgen.data import CELEBAMASK19, Pairs
from ssmgen.latents import save_network
from ssmgen.precision import Choice, choose_precision
from ssmgen.training import (
    StepOrder,
    checkpoints,
    derived_seed,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        out: folder to write the autoencoder to.
        faces: drawn faces to train on.
        steps: optimiser steps.
        batch_size: faces per step.
        lr: peak learning rate; it decays to zero.
        width: channels of the convolutions at full resolution.
        factor: image pixels per latent pixel along a side.
        latent_channels: channels of a latent.
        noise: largest deviation of the noise that is added to latents in training.
        image_size: side of the images in pixels.
        precision: ``bf16`` autocast, ``no`` (float32), or ``auto``: bf16 if it is faster on this machine.
        held_out: unseen faces to measure the round trip on.
        seed: of weights and order.
    """

    out: str = "runs/drawn-autoencoder"
    faces: int = 8192
    steps: int = 8000
    batch_size: int = 8
    lr: float = 2e-3
    width: int = 32
    factor: int = 4
    latent_channels: int = 4
    noise: float = 0.15
    image_size: int = 128
    precision: str = "auto"
    held_out: int = 256
    seed: int = 0


def main(argv: list[str]) -> None:
    """Train the autoencoder, score it on held-out drawn faces and save it."""
    settings = from_command_line(Settings(), argv)
    choice = _precision(settings)
    print(choice, file=sys.stderr)
    settings.precision = choice.precision
    torch.manual_seed(settings.seed)
    network = new_autoencoder(settings.width, settings.latent_channels, settings.factor)
    network = network.to(memory_format=torch.channels_last)  # faster for convolutions on a CPU
    data = Config(image_size=settings.image_size, drawn_count=settings.faces)
    _train(network, settings, training_pairs(data))
    score, mean, std = measure(network, in_memory(held_out_pairs(data, settings.held_out))[0])
    network.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    save_network(network.half(), Path(settings.out))  # float16 for a small file
    command = command_line("autoencoder", *argv)
    card = {"command": command, "steps": settings.steps, "precision": settings.precision, "held_out_psnr": score}
    write_text(Path(settings.out) / "card.json", json.dumps(card, indent=2) + "\n")
    print(f"held-out round trip {score:.2f} dB; saved {settings.out}")


def new_autoencoder(width: int, latent_channels: int, factor: int) -> Any:
    """Build an untrained `diffusers.AutoencoderTiny` that divides the side by ``factor``: 2, 4 or 8."""
    if factor not in (2, 4, 8):
        raise ValueError(f"factor must be 2, 4 or 8, got {factor}")
    import diffusers

    stages = factor.bit_length()
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(width,) * stages,
        decoder_block_out_channels=(width,) * stages,
        latent_channels=latent_channels,
        num_encoder_blocks=(0, 2, 3, 4)[:stages],
        num_decoder_blocks=(5, 4, 2, 1)[-stages:],
    )


def _train(network: nn.Module, settings: Settings, pairs: Pairs) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=0.0)
    first = _resume(network, optimizer, settings)
    started = time.monotonic()
    pool, masks = in_memory(pairs)
    weights = rarity_weights(masks)
    order = StepOrder(len(pool), settings.batch_size, settings.seed)
    for step in range(first, settings.steps):
        chosen = [index for index, _ in order.batch(step)]
        images, importance = _as_input(pool[chosen]), _importance(masks[chosen], weights)
        torch.manual_seed(derived_seed(settings.seed, "step", step))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            latents = network.encode(images).latents.float()
            noise = settings.noise * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
            decoded = network.decode(latents + noise).sample.float()
        loss = _reconstruction(decoded, images, importance) + 0.01 * _unit_moments(latents)
        optimizer.param_groups[0]["lr"] = settings.lr * _lr_factor(step / settings.steps)
        take_step(network, optimizer, loss, step, started)
        if step % 1000 == 999:
            _checkpoint(network, optimizer, settings, step + 1)


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int, started: float) -> None:
    """Take an optimiser step with clipped gradients; every hundredth prints its loss and the time since ``started``.

    Raises:
        FloatingPointError: the loss is not finite, from which training cannot recover.
    """
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"step {step}: the loss is {loss.item()}; lower lr or check the data")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _lr_factor(progress: float) -> float:
    """The learning rate relative to its peak: linear warm-up over the first twentieth, then a cosine to zero."""
    warm_up = 0.05
    return min(progress / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, progress - warm_up) / (1 - warm_up)))


def _checkpoint(network: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, step: int) -> None:
    folder, state = Path(f"{settings.out}-checkpoints"), {"settings": asdict(settings)}
    save_checkpoint(folder, step, model=network, ema=network, optimizer=optimizer, state=state)
    prune_checkpoints(folder, keep=1)


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> int:
    """Load the newest checkpoint, if any; return its step."""
    for path in checkpoints(Path(f"{settings.out}-checkpoints"))[-1:]:
        if verify_checkpoint(path)["settings"] != asdict(settings):
            raise ValueError(f"{path} was written with other settings; delete it or give another out=")
        return load_checkpoint(path, model=network, optimizer=optimizer)["step"]
    return 0


def _precision(settings: Settings) -> Choice:
    """The precision of the newest checkpoint with ``precision=auto``, otherwise the one in the settings."""
    for path in checkpoints(Path(f"{settings.out}-checkpoints"))[-1:]:
        recorded = read_state(path).get("settings", {}).get("precision")  # `_resume` reports its faults
        if settings.precision == "auto" and recorded:
            return Choice(recorded, f"as {path.name} was made")
    return choose_precision(settings.precision)


def _as_input(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def rarity_weights(masks: Tensor, classes: int = len(CELEBAMASK19)) -> Tensor:
    """Loss weights ``(classes,)`` by the root of each class's rarity: a necklace is seven pixels in one mask of twelve.

    Relative to the median class, unlike `ssmgen.data.class_weights`: the shipped networks were trained with them.
    """
    pixels = torch.bincount(masks.flatten(), minlength=classes).float().clamp(min=1)
    return (pixels.median() / pixels).sqrt().clamp(0.3, 10)


def _importance(masks: Tensor, weights: Tensor) -> Tensor:
    """Weight of each pixel, ``(batch, 1, height, width)`` with mean 1; a part's weight extends one pixel beyond it."""
    importance = F.max_pool2d(weights[masks.long()].unsqueeze(1), 3, stride=1, padding=1)
    return importance / importance.mean()


def _reconstruction(decoded: Tensor, images: Tensor, importance: Tensor) -> Tensor:
    """Absolute and squared error, plus the error of differences between neighbours, which keeps edges sharp."""
    error = decoded - images
    across, down = error.diff(dim=-1).abs() * importance[..., 1:], error.diff(dim=-2).abs() * importance[..., 1:, :]
    return ((error.abs() + 2 * error.square()) * importance).mean() + across.mean() + down.mean()


def _unit_moments(latents: Tensor) -> Tensor:
    mean, variance = latents.mean(dim=(0, 2, 3)), latents.var(dim=(0, 2, 3))
    return (mean.square() + (variance - 1).square()).mean()


@torch.no_grad()
def measure(network: Any, faces: Tensor) -> tuple[float, float, float]:
    """Round-trip PSNR in dB of uint8 images, and mean and deviation of their latents."""
    network.eval()
    errors, latents = [], []
    for part in faces.split(16):
        images = _as_input(part)
        latents.append(network.encode(images).latents)
        errors.append(F.mse_loss(network.decode(latents[-1]).sample.clamp(-1, 1), images).item())
    error, values = torch.tensor(errors).mean(), torch.cat(latents)
    return -10 * torch.log10(error / 4).item(), values.mean().item(), values.std().item()


if __name__ == "__main__":
    run_command(main)
