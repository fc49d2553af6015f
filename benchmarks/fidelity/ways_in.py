"""Ways in which a mask may enter a network, each with the words that make it, at equal parameters.

The widths of the feed-forwards (``ffn_ratio``) make up for what a way costs or saves.
"""

from __future__ import annotations

_VARIANT = "model=sisma-variant"
#: The network of the preset ``quick``, and one of coarser tokens, 16 x 16 pixels each, that is wide enough for them.
FINE = ("guidance_scale=1", "model_args.dim=96", "model_args.depth=3", "model_args.d_state=4", "model_args.gates=false")
COARSE = (*FINE, "model_args.dim=128", "model_args.patch_size=4")
#: Twice as wide and twice as deep.
LARGE = (*FINE, "model_args.dim=192", "model_args.depth=6", "evaluate_masks=64")


def way(second: str, ffn_ratio: float, *words: str, mask_input: str = "none") -> tuple[str, ...]:
    """Words for a `benchmarks.fidelity.variants.sisma_variant` with the layer ``second``."""
    known = _VARIANT, f"model_args.second={second}", f"model_args.ffn_ratio={ffn_ratio}"
    return (*known, f"model_args.mask_input={mask_input}", *words)


_PER_TOKEN = "model_args.modulate.mask=token-modulation"
#: Left and right eyes, brows and ears are one region each.
_MIRRORED = "model_args.mirrored=[[4,5],[6,7],[8,9]]"
#: In place of a mixer and a cross layer: one layer that does both.
_ALONE = "model_args.mixer=null"

KNOWN = {
    "added": way("none", 4.65, mask_input="add"),
    "added-alone": way("no-layer", 5.67, "model_args.depth=4", mask_input="add"),
    "cross-mamba": way("cross-mamba", 4.0),
    "u=image": way("cross-mamba", 4.0, "model_args.u=image"),
    "cross-mamba+added": way("cross-mamba", 4.0, mask_input="add"),
    "cross-attention": way("cross-attention", 6.33),
    "concatenated": way("concat", 3.65),
    "spade": way("spade", 2.4),
}

CANDIDATES = {
    "u=sum": way("cross-mamba", 4.0, "model_args.u=sum"),
    "u=sum+added": way("cross-mamba", 4.0, "model_args.u=sum", mask_input="add"),
    "conditioned": way("conditioned-mamba", 7.3, _ALONE),
    "conditioned+added": way("conditioned-mamba", 7.3, _ALONE, mask_input="add"),
    "conditioned-deep": way("conditioned-mamba", 3.6, _ALONE, "model_args.depth=4"),
    "conditioned-two-way": way("conditioned-mamba", 6.95, _ALONE, "model_args.directions=2"),
    "class-ordered": way("class-ordered-mamba", 7.0, _ALONE),
    "joint": way("joint-mamba", 8.25, _ALONE),
    "modulated": way("none", 3.35, _PER_TOKEN),
    "modulated+added": way("none", 3.35, _PER_TOKEN, mask_input="add"),
    "conditioned+modulated": way("conditioned-mamba", 6.4, _ALONE, _PER_TOKEN),
    "self+conditioned": way("conditioned-mamba", 2.94),
    "regions+added": way("region-attention", 5.75, mask_input="add"),
    "mirrored-regions+added": way("region-attention", 5.75, _MIRRORED, mask_input="add"),
    "conditioned+regions": way("[conditioned-mamba,region-attention]", 3.7, _ALONE),
}

WAYS = KNOWN | CANDIDATES

#: What is level among them, in a network twice as deep.
DEEPER = {
    "added": WAYS["added"],
    "added-alone": (*WAYS["added-alone"], "model_args.depth=8"),
    "cross-mamba": WAYS["cross-mamba"],
    "regions+added": WAYS["regions+added"],
}

#: What makes left and right of one colour: a layer that compares regions, and a loss that counts the difference.
SIDES = {
    "added": WAYS["added"],
    "added-weighting-0.03": (*WAYS["added"], "mirrored_weighting=0.03"),
    "added-weighting-0.1": (*WAYS["added"], "mirrored_weighting=0.1"),
    "regions": WAYS["regions+added"],
    "regions-weighting-0.03": (*WAYS["regions+added"], "mirrored_weighting=0.03"),
    "mirrored": WAYS["mirrored-regions+added"],
    "mirrored-weighting-0.01": (*WAYS["mirrored-regions+added"], "mirrored_weighting=0.01"),
    "mirrored-weighting-0.03": (*WAYS["mirrored-regions+added"], "mirrored_weighting=0.03"),
    "mirrored-weighting-0.1": (*WAYS["mirrored-regions+added"], "mirrored_weighting=0.1"),
}
