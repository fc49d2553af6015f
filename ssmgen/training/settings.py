"""The settings of a training, checked on construction."""

import math
from dataclasses import dataclass

from ssmgen.precision import PRECISIONS
from ssmgen.training.optimizers import OPTIMIZERS
from ssmgen.training.trackers import check_tracker

_POSITIVE = ("batch_size", "accumulate", "lr", "checkpoint_every", "keep_checkpoints", "log_every")
_NOT_NEGATIVE = ("steps", "warmup", "lr_decay_steps", "weight_decay", "clip", "num_workers")


@dataclass
class TrainSettings:
    """How to train.

    Attributes:
        steps: optimiser steps in total; 0 leaves them undecided, which `train` rejects.
        batch_size: examples per optimiser step, over all processes and accumulated parts.
        accumulate: parts each batch is cut into, to save memory.
        shard: divide weights, gradients, optimiser state and moving average among the processes (FSDP2), instead of
            keeping all of them in each. Without effect in a single process.
        checkpoint_activations: keep only the inputs of the blocks for the backward pass and compute the rest again.
        compile: pass the model's forward and backward through `torch.compile`, as one graph for each shape of the data,
            up to eight. The first step of a shape takes a minute or so, and results differ from those without by
            rounding. Not with ``shard``.
        optimizer: ``"adamw"``, or ``"muon"``, which takes the blocks' matrices and leaves the rest to AdamW at a third
            of ``lr``.
        lr: learning rate after the warm-up.
        warmup: steps of linear warm-up.
        lr_decay_steps: step at which a cosine from ``lr`` reaches zero; 0 keeps ``lr``, None is the last step. A run
            that continues may have another, but no shorter cosine: from there on the rate follows the new one.
        weight_decay: for matrices only (never for A_log, D, norms and biases).
        clip: largest gradient norm; 0 disables clipping.
        ema_decay: decay of the moving average of the weights.
        precision: ``"no"`` (float32), ``"bf16"`` autocast, or ``"auto"``: bf16 where its products are faster on this
            machine, see `ssmgen.precision`. The run records which; Muon's products follow it.
        matmul_precision: how products of float32 matrices are rounded, torch's ``"highest"`` (float32), ``"high"``
            (TensorFloat32 on a GPU) or ``"medium"`` (the same on a GPU, bfloat16 on a CPU that has it; sums stay
            float32). On a GPU, convolutions follow it too.
        seed: seed of everything random.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: number of checkpoints kept.
        log_every: steps between lines of the log.
        num_workers: loader processes; no more than there are cores are started.
        tracker: where curves and samples go besides ``log.jsonl``: ``"tensorboard"``, ``"trackio"``, ``"wandb"`` or
            ``"none"``, see `ssmgen.training.trackers`.

    Raises:
        ValueError: a value out of range, an unknown name, or a cosine that ends before ``steps``.
        ImportError: the tracker's package is missing; names the extra.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    shard: bool = False
    checkpoint_activations: bool = False
    compile: bool = False
    optimizer: str = "adamw"
    lr: float = 1e-4
    warmup: int = 0
    lr_decay_steps: int | None = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.9999
    precision: str = "no"
    matmul_precision: str = "highest"
    seed: int = 0
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    num_workers: int = 0
    tracker: str = "none"

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self._check_names()
        if 0 < self.decay_steps < self.steps:
            raise ValueError(
                f"lr_decay_steps={self.decay_steps} ends before steps={self.steps}: the rest would train at a "
                f"learning rate of zero. Set lr_decay_steps={self.steps}, or 0 for a constant rate."
            )
        if self.compile and self.shard:
            raise ValueError("compile=True does not work with shard=True: leave one of them out")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size}")
        check_tracker(self.tracker)

    @property
    def decay_steps(self) -> int:
        """``lr_decay_steps``, with None resolved to the last step."""
        return self.steps if self.lr_decay_steps is None else self.lr_decay_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up times a cosine (SGDR, arXiv 1608.03983, eq. 5)."""
        lr = self.lr * min(1.0, (step + 1) / (self.warmup + 1))
        if self.decay_steps:
            lr *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.decay_steps)))
        return lr

    def _check_names(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be 'auto', 'no' (float32) or 'bf16', got {self.precision!r}")
        if self.matmul_precision not in ("highest", "high", "medium"):
            raise ValueError(f"matmul_precision must be 'highest', 'high' or 'medium', got {self.matmul_precision!r}")
