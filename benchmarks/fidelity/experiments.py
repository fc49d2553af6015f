"""The experiments: what is compared, at which settings. A new one costs one entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        question: what is asked, in a sentence.
        variants: name to the ``key=value`` words of recipes.sisma.train that make it.
        base: the words all variants share.
        stages: training steps after which each run is measured; the learning rate decays to zero over the last.
        finding: what the results say, for the page.
    """

    question: str
    variants: dict[str, tuple[str, ...]]
    base: tuple[str, ...] = ("guidance_scale=1",)
    stages: tuple[int, ...] = (350, 1050)
    finding: str = ""


def variant(second: str, ffn_ratio: float, mask_input: str = "none") -> tuple[str, ...]:
    """Words for a `benchmarks.fidelity.variants.SISMAVariant`; ``ffn_ratio`` gives it the parameters of SISMA."""
    return (
        "model=sisma-variant",
        f"model_args.second={second}",
        f"model_args.ffn_ratio={ffn_ratio}",
        f"model_args.mask_input={mask_input}",
    )


EXPERIMENTS = {
    "mask-entry": Experiment(
        "Where should the mask enter? Cross-Mamba against simpler and other ways, at equal parameters and steps.",
        {
            "cross-mamba": ("model_args.mask_input=none",),
            "added": variant("none", 5.0, "add"),
            "cross-mamba+added": ("model_args.mask_input=add",),
            "cross-attention": variant("cross-attention", 6.74),
            "concatenated": variant("concat", 4.0),
            "spade": variant("spade", 2.75),
        },
    ),
}
