"""What changes the weights: optimisers by name, and the moving average."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ssmgen.training.muon import muon_step
from ssmgen.weights import local_shard

OPTIMIZERS = ("adamw", "muon")
_ADAMW_SHARE = 1 / 3  # of the learning rate, where Muon takes the matrices
_MOMENTUM = 0.95


def make_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float, precision: str = "no"
) -> torch.optim.Optimizer:
    """The optimiser of the trainable parameters of ``model``.

    Args:
        model: what is trained. ``"muon"`` takes the matrices in ``model.blocks``, or all if there are no blocks.
        name: ``"adamw"``, or ``"muon"`` (`MuonAdamW`).
        lr, weight_decay: learning rate, and decay as in `parameter_groups`.
        precision: precision of Muon's products, ``"no"`` (float32) or ``"bf16"``.

    Raises:
        ValueError: an unknown optimiser.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "muon":
        inside = {id(p) for p in getattr(model, "blocks", model).parameters()}
        matrices = [p for p in groups[0]["params"] if p.dim() == 2 and id(p) in inside]
        return MuonAdamW(matrices, groups, lr=lr, bfloat16=precision == "bf16")
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; vectors, and parameters marked ``no_weight_decay`` (A_log and D), without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    exempt = [p for p in parameters if p.dim() < 2 or getattr(p, "no_weight_decay", False)]
    held = {id(p) for p in exempt}
    return [
        {"params": [p for p in parameters if id(p) not in held], "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024) for some matrices, and AdamW for the other parameters at a third of the learning rate.

    See `ssmgen.training.muon`. At the full rate of Muon, AdamW sometimes disturbed the time embedding, and the loss
    rose a hundredfold for a step or two; hence the third, and a shorter memory of the second moment (0.95).

    Args:
        matrices: parameters ``(rows, columns)`` for Muon.
        groups: parameter groups as in `parameter_groups`, ``matrices`` among those of the first.
        lr: learning rate of Muon. Groups of AdamW carry ``lr_scale``, a factor for whoever sets their rate.
        bfloat16: compute Muon's products in bfloat16 instead of float32.
    """

    def __init__(self, matrices: list[Tensor], groups: list[dict[str, Any]], lr: float, bfloat16: bool = False) -> None:
        held = {id(p) for p in matrices}
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in held]} for group in groups]
        muon = {"params": matrices, "weight_decay": groups[0]["weight_decay"], "momentum": _MOMENTUM}
        scaled = [{**group, "lr_scale": _ADAMW_SHARE} for group in rest if group["params"]]
        self._dtype = torch.bfloat16 if bfloat16 else torch.float32
        self._adamw = torch.optim.AdamW(scaled, lr=lr * _ADAMW_SHARE, betas=(0.9, 0.95), fused=True)
        super().__init__([muon, *self._adamw.param_groups], {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both. State and groups are kept here, so that saving and loading see one optimiser.

        If the attribute ``found_inf`` is set, a float on the device that is not 0 makes the step change nothing but
        missing state, as in torch's fused optimisers.
        """
        self._adamw.state, self._adamw.param_groups = self.state, self.param_groups[1:]
        found = getattr(self, "found_inf", None)
        self._adamw.found_inf = found  # type: ignore[attr-defined]
        muon_step(self.param_groups[0], self.state, self._dtype, None if found is None else found.bool())
        self._adamw.step()


class MovingAverage(AveragedModel):
    """torch's `AveragedModel`, which counts its updates on the host: to read the count from a GPU would wait for it.

    Args:
        model: what is averaged; a copy of it is ``module``.
        decay: of the average once many updates were made, see `moving_average`.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=False)
        self.decay = decay

    def _apply(self, *given: Any, **options: Any) -> "MovingAverage":
        """Move everything to a device but the count."""
        count = self.n_averaged
        super()._apply(*given, **options)
        self.n_averaged = count
        return self

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, skipped: Tensor | None = None) -> None:
        """Take the parameters at the first update, and move towards them at later ones. Buffers are always taken.

        Args:
            model: the model that was copied.
            skipped: a bool, scalar, on the device, True to change nothing. The count is then kept there too,
                and the host reads neither.
        """
        if skipped is not None:
            self._update_unless(skipped, model)
            return
        n = int(self.n_averaged)
        averaged = [local_shard(p) for p in self.module.parameters()]
        current = [local_shard(p).to(own.device) for p, own in zip(model.parameters(), averaged, strict=True)]
        if n == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)
        self.n_averaged += 1

    def _update_unless(self, skipped: Tensor, model: nn.Module) -> None:
        """`update_parameters` to the same bits, by one `lerp_` for each tensor: foreach takes no weight of a device."""
        self.n_averaged = n = self.n_averaged.to(skipped.device)
        weight = 1 - ((1 + n).double() / (10 + n)).clamp(max=self.decay)
        weight = torch.where(n == 0, 1.0, weight).masked_fill(skipped, 0.0)
        weights: dict[torch.dtype, Tensor] = {}
        for averaged, current in zip(self.module.parameters(), model.parameters(), strict=True):
            own = local_shard(averaged)
            if own.dtype not in weights:
                weights[own.dtype] = weight.to(own.dtype)
            own.lerp_(local_shard(current), weights[own.dtype])
        for kept, other in zip(self.module.buffers(), model.buffers(), strict=True):
            kept.copy_(torch.where(skipped, kept, other))
        self.n_averaged = n + ~skipped


def moving_average(model: nn.Module, decay: float) -> MovingAverage:
    """An `AveragedModel` of ``model`` with decay ``min(decay, (1 + n) / (10 + n))`` at its n-th update.

    The ramp, that of TensorFlow's ``ExponentialMovingAverage``, lets short runs forget their initial weights. Call
    ``update_parameters(model)`` after each step; ``.module`` is the averaged model.

    Raises:
        ValueError: ``decay`` outside [0, 1), or weights that are not float32 (16-bit averages lose their updates).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
    low = next((name for name, p in model.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    if low is not None:
        raise ValueError(
            f"{low} is 16-bit: a moving average at decay {decay} would lose its updates; keep float32 weights"
        )

    return MovingAverage(model, decay)
