"""What computing nothing twice saves while sampling: ``python -m benchmarks.sampling``.

The plain path asks the model for its condition and its AdaLN modulations at every step; `Sampler` makes both once. Same
weights, same noise; the outputs are compared. Then the parts of one step at width 1024, one by one.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import arguments, measure, medians, show, write
from recipes.sisma.presets import preset
from ssmgen import Sampler, build

STEPS, IMAGES = 25, 8


class EveryStep:
    """A model without ``modulation``, whose condition is the mask itself: everything is computed at every step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.parameters, self.train, self.training = model.parameters, model.train, model.training

    def condition(self, mask: Tensor, size: tuple[int, int]) -> Tensor:
        """The mask."""
        return mask

    def __call__(self, x: Tensor, t: Tensor, mask: None = None, *, cond: Tensor) -> Tensor:
        """One evaluation from scratch."""
        return self.model(x, t, cond)


def quick_model() -> torch.nn.Module:
    """An untrained ``sisma-s`` with the arguments of the ``quick`` preset, its zero weights made random."""
    torch.manual_seed(0)
    model = build("sisma-s", **preset("quick").model_args, in_channels=12).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def main() -> None:
    """Print the tables; write JSON if asked."""
    given = arguments(__doc__, rounds=5)
    model = quick_model()
    x0, mask = torch.randn(IMAGES, 12, 16, 16), torch.randint(0, 19, (1, 128, 128))
    masks = mask.expand(IMAGES, -1, -1)
    paths = {
        "Sampler, one mask": partial(Sampler(model), x0, mask, steps=STEPS, solver="euler"),  # type: ignore[arg-type]
        "plain path": partial(Sampler(EveryStep(model)), x0, masks, steps=STEPS, solver="euler"),
    }
    first, second = (call() for call in paths.values())
    difference = ((first - second).abs().max() / second.abs().max()).item()
    times = measure(paths, given.rounds)
    show(f"{IMAGES} images of one mask, {STEPS} Euler steps, quick model", times, "plain path")
    print(f"  largest difference, relative to the largest value: {difference:.1e}")
    parts = layer_parts(given.rounds)
    write(given.json, "sampling", {"milliseconds": times, "medians": medians(times), "difference": difference, **parts})


def layer_parts(rounds: int) -> dict[str, object]:
    """Milliseconds of the parts of one block of ``sisma-xl`` at 256 tokens, one image."""
    block = build("sisma-block", dim=1024).eval()
    x, c, tokens, size = torch.randn(1, 256, 1024), torch.randn(1, 1024), torch.randn(1, 256, 1024), (16, 16)

    def without_gradient(call: object, *inputs: object) -> object:
        with torch.no_grad():
            return call(*inputs)  # type: ignore[operator]

    with torch.no_grad():
        condition, modulations = block.condition(tokens, size), block.adaln(c)
    calls = {
        "all, from mask tokens and time": partial(without_gradient, block, x, c, tokens, size),
        "all, with both made beforehand": partial(without_gradient, block, x, modulations, [condition], size),
        "adaln": partial(without_gradient, block.adaln, c),
        "cross-mamba's condition": partial(without_gradient, block.condition, tokens, size),
        "self-mamba": partial(without_gradient, block.self_mamba, x, size),
        "cross-mamba": partial(without_gradient, block.cross_mamba, x, condition, size),
        "feed-forward": partial(without_gradient, block.ffn, x),
    }
    times = measure(calls, rounds)
    show("one block of sisma-xl, 256 tokens, batch 1", times, "all, from mask tokens and time")
    return {"block_milliseconds": times, "block_medians": medians(times)}


if __name__ == "__main__":
    main()
