"""The settings of a run, and the named sets of them.

A preset is a function that returns a whole `Config`. What the paper (arXiv 2509.17651) does not print is marked
"assumed" here and listed with its reason in docs/paper.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from recipes.sisma.arguments import UsageError
from ssmgen import Sampling
from ssmgen.registry import closest
from ssmgen.training import TrainSettings

ASSETS = Path(__file__).parent / "assets"


def _small_training(steps: int = 1500, lr: float = 2e-3, ema_decay: float = 0.995, **more: Any) -> TrainSettings:
    small = {"batch_size": 16, "warmup": 50, "checkpoint_every": 500, "tracker": "tensorboard"}
    return TrainSettings(steps=steps, lr=lr, ema_decay=ema_decay, **small, **more)


def muon_training(steps: int, ema_decay: float = 0.995) -> TrainSettings:
    """Training of a small network on a few thousand pictures; its cosine ends with its steps."""
    return _small_training(steps, 0.012, ema_decay, optimizer="muon", precision="auto", lr_decay_steps=None)


#: A side, (height, width), or a list of (height, width).
Size = int | tuple[int, int] | list[tuple[int, int]]


def checked_size(image_size: int | str) -> int | str:
    """An ``image_size`` as it is recorded: a square's side, another ``HEIGHTxWIDTH``, or several with commas.

    Raises:
        UsageError: it is none of these, or names a size twice.
    """
    words = str(image_size).replace(" ", "").split(",")
    if len(words) == 1:
        return _checked_size(words[0])
    several = [f"{height}x{width}" for height, width in (sides_of(size_of(_checked_size(word))) for word in words)]
    if len(set(several)) < len(several):
        raise UsageError(f"image_size={image_size}: names a size twice")
    return ",".join(several)


def checked_style(style: bool | str) -> bool | str:
    """A ``style`` as it is recorded: ``True`` (by regions), ``"whole"`` or ``False``; a `UsageError` for others."""
    known = {"whole": ("whole",), True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}
    found = [meant for meant, words in known.items() if str(style).lower() in words]
    if not found:
        raise UsageError(f"style={style}: expected true (by regions), whole or false")
    return found[0]


def _checked_size(image_size: str) -> int | str:
    sides = [int(side) if side.isdecimal() else 0 for side in image_size.split("x")]
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise UsageError(f"image_size={image_size}: expected a side such as 128, or height x width such as 192x96")
    return sides[0] if len(set(sides)) == 1 else f"{sides[0]}x{sides[1]}"


def size_of(image_size: int | str) -> Any:
    """The `Size` of an ``image_size`` that `checked_size` returned."""
    if isinstance(image_size, int):
        return image_size
    sizes = [(int(height), int(width)) for height, _, width in (word.partition("x") for word in image_size.split(","))]
    return sizes if len(sizes) > 1 else sizes[0]


def sides_of(size: Size) -> tuple[int, ...]:
    """All heights and widths of a size."""
    if isinstance(size, int):
        return size, size
    return size if isinstance(size, tuple) else tuple(side for one in size for side in one)


@dataclass
class Config:
    """Everything a run is made of; each field is a key of ``python -m recipes.sisma.train``.

    Attributes:
        recipe: the package whose ``prepare`` and ``train`` it is made with; each has one value.
        preset: the preset it came from.
        run: the run's folder.
        resume: ``no``, ``auto`` (the newest checkpoint of the run, if any) or a checkpoint's folder.
        data: ``drawn``, or a folder made by recipes.sisma.prepare.
        image_size: side of the square images in pixels, or height x width such as ``192x96``. Several, separated by
            commas, are buckets: each pair of a prepared folder gets the one with the nearest aspect ratio.
        drawn_count: drawn faces to train on.
        flip: train on mirrored pairs too, left and right labels swapped.
        crops: crops of every prepared pair to train on: the centre, and others of at least 80 % of its side.
        balance: classes that fewer than this share of the masks contain are shown more often (`ssmgen.data.repeats`).
        class_weighting: how strongly the loss counts rare classes, the power of their rarity; 0 counts all alike.
        mirrored_weighting: how strongly the loss counts the difference between left and right, of eyes, brows and ears,
            see `ssmgen.data.mirrored_contrasts`; 0 leaves it out, and labels without a left and a right have nothing
            to count.
        cache: folder for encoded images.
        rebuild_cache: encode damaged or missing files of the cache again, instead of stopping there.
        autoencoder: ``auto`` (the one that ``autoencoder_source`` holds), ``identity``, ``autoencoder-tiny`` or
            ``autoencoder-kl``.
        autoencoder_source: ``drawn`` (shipped), a folder, or a hub id.
        model: a registered model, see ``ssmgen list``.
        style: the model is also told the style of a picture: ``true`` by regions of its mask, ``whole`` of all of it,
            see `recipes.sisma.told`.
        words: the model is also told words, of drawn faces.
        model_args: overrides of the model, e.g. ``model_args.depth=6``.
        objective: a registered objective, see ``ssmgen list``.
        t_sampling: distribution of training times, ``uniform`` or ``logit-normal``.
        steps: optimiser steps in all; 0 takes as many as fit in ``minutes``.
        minutes: time to train in, where ``steps`` is 0: as many steps as a measurement says will fit, 400 to 1,300. A
            continued run keeps the number it began with.
        train: see `ssmgen.training.TrainSettings`.
        sampling: how samples are drawn, in grids and in the evaluation, see `ssmgen.Sampling`.
        sample_every: steps between grids of samples; 0 makes none, None one halfway and one at the end.
        evaluate: measure the run when training is done.
        evaluate_masks: unseen masks it is measured on.
        parser: ``drawn`` (shipped), a file made by recipes.sisma.parser, or ``none``.
    """

    short_names: ClassVar[dict[str, str]] = {"steps": "train.steps", "solver_steps": "sampling.steps"}

    recipe: str = "recipes.sisma"
    preset: str = "quick"
    run: str = "runs/quick"
    resume: str = "no"
    data: str = "drawn"
    image_size: int | str = 128
    drawn_count: int = 3072
    flip: bool = False
    crops: int = 1
    balance: float = 0.0
    class_weighting: float = 0.0
    mirrored_weighting: float = 0.0
    cache: str = "runs/cache"
    rebuild_cache: bool = False
    autoencoder: str = "auto"
    autoencoder_source: str = "drawn"
    model: str = "sisma-s"
    style: bool | str = False
    words: bool = False
    model_args: dict[str, Any] = field(default_factory=dict)
    objective: str = "flow-matching"
    t_sampling: str = "uniform"
    minutes: float = 0.0
    train: TrainSettings = field(default_factory=_small_training)
    sampling: Sampling = Sampling()
    sample_every: int | None = 500
    evaluate: bool = True
    evaluate_masks: int = 128
    parser: str = "drawn"

    def __post_init__(self) -> None:
        self.image_size = checked_size(self.image_size)
        self.style = checked_style(self.style)

    @property
    def size(self) -> Size:
        """The images' side, (height, width), or a list of these, in pixels."""
        return size_of(self.image_size)

    def with_steps(self, steps: int) -> Self:
        """A copy with this number of steps and the settings that follow from it."""
        train = replace(self.train, steps=steps)
        every = max(1, (steps + 1) // 2) if self.sample_every is None else self.sample_every
        return replace(self, train=replace(train, lr_decay_steps=train.decay_steps), sample_every=every)


def quick() -> Config:
    """Drawn faces at 128 pixels through the shipped f4 autoencoder: minutes on two cores."""
    return Config(
        # 256 tokens of 8 x 8 pixels, 16 values each: with fewer, eyes and earrings share one with their surroundings.
        model="sisma-mini",
        model_args={"patch_size": 2, "mask_input": "add", "mask_dropout": 0.1},
        balance=1.0,
        class_weighting=0.5,
        t_sampling="logit-normal",
        # With drawing, encoding and evaluating, `make demo` then ends within nine minutes on two AVX2 cores.
        minutes=6.0,
        train=muon_training(steps=0),
        sampling=Sampling(steps=11, guidance_scale=2.0, guidance_start=0.2, shared_noise=True),
        sample_every=None,
    )


def faces() -> Config:
    """Real faces from a small prepared folder, TAESD3 latents at 128 pixels: mirrored pairs, crops, a small network."""
    return Config(
        preset="faces",
        run="runs/faces",
        data="",
        flip=True,
        crops=2,
        autoencoder_source="madebyollin/taesd3",  # 16 channels: eyes and mouths survive it at this size
        model="sisma2-s",
        # One token per latent: 8 x 8 pixels, as in `quick`.
        model_args={
            **{"dim": 192, "depth": 6, "ffn_ratio": 4, "gates": False},
            **{"patch_size": 1, "mask_input": "add", "mask_dropout": 0.1},
        },
        balance=0.5,
        class_weighting=0.5,
        mirrored_weighting=0.05,
        t_sampling="logit-normal",
        train=muon_training(steps=4000, ema_decay=0.999),
        sampling=Sampling(steps=11, guidance_scale=2.0, guidance_start=0.2, shared_noise=True),
        sample_every=None,
        evaluate_masks=64,
        parser="none",
    )


def paper() -> Config:
    """The paper as printed: 24 x 1024, batch 8, lr 0.004, AdamW without weight decay, EMA 0.9999, 150k steps."""
    return Config(
        preset="paper",
        run="runs/paper",
        data="",
        image_size=256,  # assumed: the number is not readable in the text at hand
        autoencoder="autoencoder-kl",
        autoencoder_source="stabilityai/sd-vae-ft-ema",  # assumed: the variant is not named
        model="sisma-xl",
        t_sampling="uniform",  # assumed
        train=TrainSettings(
            steps=150_000,
            batch_size=8,
            lr=4e-3,
            clip=0.0,  # none is mentioned
            ema_decay=0.9999,
            checkpoint_every=5000,
            log_every=50,
            num_workers=4,
            tracker="tensorboard",
        ),
        sampling=Sampling(solver="euler", steps=200),  # the solver is assumed: only the 200 steps are printed
        sample_every=5000,
        evaluate_masks=2000,
        parser="none",
    )


def stable() -> Config:
    """`paper` with the learning rate its authors use in their other work."""
    config = paper()
    return replace(config, preset="stable", run="runs/stable", train=replace(config.train, lr=1e-4))


#: The presets of a recipe by name; the first one is its default.
Presets = Mapping[str, Callable[[], Config]]
PRESETS: Presets = {"quick": quick, "faces": faces, "paper": paper, "stable": stable}


def preset(name: str, presets: Presets = PRESETS) -> Config:
    """The settings behind a name; an unknown one is a `UsageError` with the closest."""
    if name not in presets:
        raise UsageError(f"unknown preset {name!r}{closest(name, presets)} The presets are {', '.join(presets)}.")
    return presets[name]()
