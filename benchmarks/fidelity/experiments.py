"""The experiments: what is compared, at which settings. A new one costs one entry."""

from __future__ import annotations

from benchmarks.fidelity.experiment import Experiment
from benchmarks.fidelity.ways_in import COARSE, DEEPER, FINE, LARGE, SIDES, WAYS


def variant(second: str, ffn_ratio: float, mask_input: str = "none") -> tuple[str, ...]:
    """Words for a `benchmarks.fidelity.variants.SISMAVariant`; ``ffn_ratio`` gives it the parameters of SISMA."""
    return (
        "model=sisma-variant",
        f"model_args.second={second}",
        f"model_args.ffn_ratio={ffn_ratio}",
        f"model_args.mask_input={mask_input}",
    )


def of_dit(mixer: str, depth: int, *words: str) -> tuple[str, ...]:
    """Words for a stack of 96 wide tokens to which those of the mask are added, with this mixer in every block."""
    stack = ("model=dit-s", f"model_args.mixer={mixer}", "model_args.dim=96", f"model_args.depth={depth}")
    return (*stack, "model_args.gates=false", *words)


# A model of sixteen states a channel and with gates, as the larger sizes have.
SIXTEEN = ("model=sisma-s", "model_args.dim=96", "model_args.depth=3")

# Widths of the feed-forward that give the rivals the parameters of the quick preset's SISMA.
_SMALL = ("model_args.dim=96", "model_args.num_heads=6", "model_args.gates=false")
ATTENTION = ("model=sisma-attn-s", *_SMALL, "model_args.depth=3", "model_args.ffn_ratio=7.73")
DIT = ("model=dit-s", *_SMALL, "model_args.depth=5", "model_args.ffn_ratio=4.84")

HEADS = "model_args.num_heads=6"
SDM = (
    *("model=sdm-variant", "model_args.channels=32", "model_args.multipliers=[1,2]", "model_args.blocks_per_level=1"),
    *("model_args.attention_levels=[1]", "model_args.head_dim=16"),
)

SOLVERS = (
    *(("euler", steps) for steps in (6, 11, 24, 48)),
    *(("midpoint", steps) for steps in (3, 6, 12)),
    ("heun", 6),
    *(("ab3", steps) for steps in (6, 11, 24)),
    ("deis2", 11),
)

#: Early stages tell apart what later ends level.
STARTING = (100, 200, 350, 1300)

EXPERIMENTS = {
    "mask-entry": Experiment(
        "Where should the mask enter? Cross-Mamba against other ways, at equal parameters and steps.",
        {
            "cross-mamba": ("model_args.mask_input=none",),
            "added": variant("none", 5.0, "add"),
            "cross-mamba+added": ("model_args.mask_input=add",),
            "cross-attention": variant("cross-attention", 6.74),
            "concatenated": variant("concat", 4.0),
            "spade": variant("spade", 2.75),
        },
        base=("guidance_scale=1", *SIXTEEN),
        finding=(
            "Cross-Mamba shows no advantage here. At equal parameters and steps it is level with mask tokens added "
            "to the image tokens before Self-Mamba: seed by seed +0.021, -0.007 and +0.004. Both together and "
            "concatenation are level too. A first trial at 32 pixels had found a late lead of 0.02 to 0.03 (two "
            "seeds), which is not confirmed. SPADE is clearly lower, by 0.017 to 0.030 in every seed. "
            "Cross-attention alone is far lower, even though its keys carry positions. Our guess is that in a "
            "thousand steps it barely learns where to look, while a scan visits mask and image in the same order "
            "and need not learn it. All this is for one small size and drawn faces; the paper's advantage at full "
            "size is neither shown nor refuted. The sizes `sisma-*` therefore keep the paper's default "
            "(`mask_input=none`); `quick` uses both, and `sisma2-*`, as in `faces`, add it and have no cross layer."
        ),
    ),
    "ways-in": Experiment(
        "How fast does a mask take effect, by the way it enters? Equal parameters and steps, without guidance.",
        WAYS,
        FINE,
        stages=STARTING,
        detailed=True,
        finding=(
            "Five seeds of the four finalists and one of the other fourteen ways, to 350 steps, before the learning "
            "rate decays; two went on to the end.\n\n"
            "- The early stages tell ways apart that end level in `mask-entry`. At 200 steps cross-attention, scanning "
            "the image (*u=image*) and SPADE are far below adding, and Cross-Mamba alone is below it by 0.038, several "
            "times the spread.\n"
            "- At equal steps adding to two Self-Mambas a block, to one (*added-alone*, which takes 0.80 of the time) "
            "and to one beside region attention are level at 350 steps. So is Cross-Mamba alone.\n"
            "- At 200 steps the best single seed, *u=sum+added*, is 0.023 above the mean of adding and 0.012 above its "
            "own seed of it. The layers in which the mask takes part in the image's own scan (*conditioned*, "
            "*class-ordered*) are mostly ahead at 100 steps and behind at 350. *joint*, which reads both in turn, is "
            "far behind.\n"
            "- *regions+added*, where the second layer of a block is attention between the means of regions, is level "
            "in agreement, and its hair is more of one colour: half the variance of adding's at 350 steps. The "
            "variants without that layer have 2.1 to 5.3 times the variance of real hair.\n"
            "- So no way beats adding in agreement by more than seeds differ. What the presets take: see `simplest`."
        ),
    ),
    "ways-in-time": Experiment(
        "The same at equal time: as many steps as the first variant takes in those named.",
        WAYS,
        FINE,
        stages=STARTING,
        timed_by="ways-in",
        detailed=True,
        finding=(
            "Not finished: one seed of three variants; *added* is its run of `ways-in`. A block of one Self-Mamba, to "
            "which the mask is added (*added-alone*), is level with blocks of two. *regions+added*, which takes 0.81 "
            "of the time of *added*, is ahead of it in the first stages, by 0.097 in the time of 100 steps, and level "
            "at the end, with irises, brows and hair that agree more."
        ),
    ),
    "ways-in-coarse": Experiment(
        "Equal time with tokens of 16 x 16 pixels, which hold several parts of a face: placing them is harder.",
        WAYS,
        COARSE,
        stages=STARTING,
        timed_by="ways-in-coarse",
        detailed=True,
        finding=(
            "Not finished: one seed of four ways, to the time of 350 steps, and the step times were measured while the "
            "machine did other work. Coarse tokens are harder indeed: at the time of 200 steps nothing follows the "
            "mask yet, where fine tokens have a mIoU of 0.6. At 350, *added-alone* and "
            "Cross-Mamba alone are ahead of adding beside two Self-Mambas and beside region attention, all far from "
            "their end."
        ),
    ),
    "ways-in-large": Experiment(
        "Equal time in a network twice as wide and twice as deep.",
        DEEPER,
        LARGE,
        stages=(200, 600),
        timed_by="ways-in-large",
        detailed=True,
    ),
    "simplest": Experiment(
        "Is the simplest network as good in the preset `quick`, guided and with shared noise? Equal time.",
        {
            "cross-mamba+added": ("model=sisma-mini", "model_args.mask_input=add"),
            "added-alone": ("model=sisma2-mini",),
        },
        base=(),
        earlier=False,
        stages=(1300,),
        paces={"added-alone": 245 / 214},
        detailed=True,
        finding=(
            "Two seeds each, of one thread, are level, but for brows, which agree a little less. In `ways-in` a step "
            "of such a network (*added-alone*, a slightly narrower feed-forward) takes 214 ms where the other takes "
            "245, so it gets 1,488 steps for 1,300. `make demo` with it was then run twice, on two threads: 0.833 "
            "(1,490 steps, commit `95f363c`) and 0.833 (2,000 steps, commit `dea2224`), where Cross-Mamba and adding "
            "have 0.838 with 1,300 steps (the README). So `quick` keeps both, and `faces`, where the two were not "
            "compared, has the simplest."
        ),
    ),
    "sides": Experiment(
        "What makes both eyes of one colour? A layer that compares regions, and a loss that counts the difference "
        "between left and right. Equal parameters and steps, without guidance.",
        SIDES,
        FINE,
        stages=(1300,),
        detailed=True,
        finding=(
            "Not finished: one seed, and some variants are missing. So far, the more the loss counts the difference, "
            "the more the irises are alike. Agreement is level at a weighting of 0.01 and lower by less than 0.01 at "
            "0.1. In `ways-in`, without it, the irises have 3.0 times the distance of real ones both with and without "
            "the layer that compares regions.\n\n"
            "A long training brings all three together: the packaged model has mirrored regions, a weighting of 0.05, "
            "7,000 steps and shared noise, and its irises have 1.19 times the distance of real ones at a mIoU of 0.850 "
            "(one seed; its card has command and commit)."
        ),
    ),
    "alike": Experiment(
        "What does it do to the preset `quick` that left and right start from the same noise?",
        {
            "quick": (),
            "independent-noise": ("shared_noise=false",),
            "unguided": ("guidance_scale=1",),
            "unguided-independent-noise": ("guidance_scale=1", "shared_noise=false"),
        },
        base=(),
        earlier=False,
        stages=(1300,),
        detailed=True,
        sampled=True,
        finding=(
            "Irises and brows differ less, and nothing else changes: agreement differs by less than 0.001, guided or "
            "not. The irises of real faces still agree more. One trained model and one seed. Where the middles "
            "of two eyes are not whole cells apart, their noise is off by up to half a cell, which may be what is left."
        ),
    ),
    "design": Experiment(
        "Which of our choices and the paper's matter? Each variant changes one setting; attention and DiT replace "
        "the scans at equal parameters.",
        {
            "quick": (),
            "gates": ("model_args.gates=true",),
            "sisma-attn": ATTENTION,
            "dit": DIT,
            "adamw": ("optimizer=adamw", "lr=0.004"),
            "u=image": ("model_args.u=image",),
            "uniform-t": ("t_sampling=uniform",),
            "d_state=16": ("model_args.d_state=16",),
            "all-alike": ("balance=0", "class_weighting=0"),
            "balance=0.5": ("balance=0.5",),
            "lr=0.006": ("lr=0.006",),
            "lr=0.024": ("lr=0.024",),
            "raster": ("model_args.orders=[row]",),
            "bidirectional": ("model_args.orders=[row,row-reversed]",),
            "sisma-attn-equal-time": ATTENTION,
            "dit-equal-time": DIT,
        },
        base=(),
        stages=(350,),
        paces={"sisma-attn-equal-time": 1 / 1.66, "dit-equal-time": 1 / 1.46},
        finding=(
            "- **Optimizer**: Muon gains most, compared with AdamW at one learning rate. Half of Muon's rate is "
            "lower in every seed, twice the rate in two of three.\n"
            "- **Gates** that start at zero may slow the blocks down at first: every seed is lower with them. The "
            "sizes from `sisma-s` on keep their gates, as the paper's parameter count requires. In `faces`, with a "
            "small version of `sisma-s`, both are level (one seed).\n"
            "- **Time**: uniform t is lower than logit-normal t in every seed, by 0.007 to 0.023; the means are "
            "within the spread.\n"
            "- **Rare classes**: without balancing in data and loss (`all-alike`), every seed is lower, by 0.003 to "
            "0.018; the means are within the spread. Half of the balancing is neither better nor worse.\n"
            "- **Scans**: the scan order makes no difference here. One order for all three layers, two opposite "
            "orders and the first three of the cycle are level; all eight need eight layers and were not tried. "
            "Four and sixteen states per channel are nearly level, -0.003 to 0.013 for a fifth more time. The "
            "sequence that Cross-Mamba scans (`u`) matters little if the mask is also added at the input, 0.001 to "
            "0.014.\n"
            "- **Attention and DiT** are lower than the scans in every seed at equal parameters and steps. At equal "
            "time, which is 211 and 240 of their steps, they are lower still: forward and backward take 1.66 and "
            "1.46 times as long on this CPU (within about 5 %, without the optimizer; a GPU will have other "
            "ratios). They also ran without gates and at the learning rate of SISMA.\n\n"
            "All this is for one small size and about a quarter of the steps of `quick`."
        ),
    ),
    "toolkit": Experiment(
        "Every mixer and every family of the library at equal time: as many steps as the first variant takes in 350.",
        {
            "self-mamba": of_dit("self-mamba", 5),
            "bidirectional-mamba": of_dit("bidirectional-mamba", 5),
            "cross-scan-mamba": of_dit("cross-scan-mamba", 4),
            "mamba2": of_dit("mamba2", 5),
            "gated-delta": of_dit("gated-delta", 5),
            "self-attention": of_dit("self-attention", 6, HEADS),
            "rotary-attention": of_dit("rotary-attention", 6, HEADS),
            "convolution": of_dit("convolution", 5),
            "hybrid": of_dit("[self-mamba,self-mamba,rotary-attention]", 6, HEADS),
            "sisma": (*SIXTEEN, "model_args.gates=false"),
            "sisma-attn": ATTENTION,
            "zigma": ("model=zigma-b", "model_args.dim=96", "model_args.depth=9"),
            "usm": ("model=usm-s", "model_args.dim=96", "model_args.depth=7"),
            "dim": ("model=dim-l", "model_args.dim=112", "model_args.depth=7"),
            "sdm": SDM,
        },
        base=("guidance_scale=1", "evaluate_masks=64"),
        stages=(350,),
        timed_by="toolkit",
        finding=(
            "Equal time is a minute and a half of one core here. So this says which model follows masks soonest on "
            "such a processor, not what each would reach, nor how they rank on a GPU, whose step times differ.\n\n"
            "- SISMA, the gated convolution and Self-Mamba in one direction lead, level within the spread. The "
            "convolution takes the most steps in the time and has the most diverse samples. U-Shape Mamba, whose "
            "inner levels have a quarter of the tokens, is close.\n"
            "- Two and four directions, Mamba-2 and the gated delta rule are lower. Their steps take 1.4 to 1.7 times "
            "as long, so part or all of this is the number of steps. One attention layer in three (*hybrid*) costs as "
            "much.\n"
            "- Attention alone is far lower, with rotary positions too, at 1.7 to 2 times the time of a step.\n"
            "- ZigMa, DiM and SDM take 202, 148 and 95 steps, which is too few to say more than that they are slow "
            "here: DiM's images are still noise. SDM also has 3.3 million parameters; the others have 0.94 to 1.18."
        ),
    ),
    "training-time": Experiment(
        "What does longer training gain? Each run has a cosine of its own length.",
        {"a-third": (), "quick": (), "thrice": ()},
        base=(),
        stages=(1400,),
        paces={"a-third": 1 / 3, "thrice": 3.0},
        finding=(
            "Agreement still rises where `make demo` stops (`quick` has since been limited to fewer steps, see the "
            "README): by 0.012 for three times the steps. By eye, hair is smoother and both irises have one colour. "
            "One seed."
        ),
    ),
    "sampling": Experiment(
        "How do solver, evaluations and guidance trade agreement against diversity?",
        {
            **{f"{solver}-{steps}": (f"solver={solver}", f"steps={steps}") for solver, steps in SOLVERS},
            **{f"guidance-{scale:g}": (f"guidance_scale={scale:g}",) for scale in (1.0, 1.5, 3.0)},
            **{f"guidance-from-{start:g}": (f"guidance_start={start:g}",) for start in (0.0, 0.4)},
        },
        base=(),
        stages=(1400,),
        sampled=True,
        finding=(
            "One trained model (`quick` at 1,400 steps) and one noise, so small differences mean nothing.\n\n"
            "- **Guidance** of 2 gains 0.036 over none. At 3, agreement falls back to that without guidance, and "
            "the skin has specks. The start of guidance changes agreement little. A start at 0.2 costs less than "
            "one at 0, and samples differ less in colour and contrast, which `diversity` counts too.\n"
            "- **Solver**: agreement does not follow accuracy. Euler with six steps is level with the best, and "
            "`ab3` with six loses 0.042. By eye, Euler's colours are muted and its samples of a mask alike "
            "(diversity 0.42, and 0.57 with 48 steps), while outlines stay. `ab3` with 11 steps has the colours of "
            "Euler with 48; with 6 it leaves specks on the skin."
        ),
    ),
    "faces": Experiment(
        "Real faces at 128 pixels: gates, balancing of rare classes, and the cross layer.",
        {
            "gates": ("model_args.gates=true",),
            "no-gates": ("model_args.gates=false",),
            "no-gates-no-cross": (*variant("none", 5.0, "add"), "model_args.gates=false"),
            "no-gates-balance=1": ("model_args.gates=false", "balance=1"),
        },
        base=("evaluate_masks=75",),
        preset="faces",
        stages=(2000,),
        finding=(
            "One seed, so small differences mean nothing. *gates* is the preset as it was then. Without gates "
            "agreement is level, unlike in `design`. Full balancing of rare classes gives no gain. Without the cross "
            "layer agreement is level too, and the proxy distance is lower, as it "
            "was in an earlier pair (commit `d3b0dab`). The proxy distances are over 75 images, fewer than the "
            "number of features, and the halves of the real images are smaller still, so compare them only with one "
            "another. An earlier preset, with guidance throughout and an earlier optimizer, had 0.585 and a proxy "
            "of 2475 (run at `b8bb3e676354`, its row at `d3b0dab`).\n\n"
            "All variants agree with their masks better than the real faces do after the autoencoder. Guidance is a "
            "likely reason, because it exaggerates the features of a class. So agreement shows that images follow "
            "their masks, not that the faces are good. The parser was trained on the training faces with `python -m "
            "recipes.sisma.parser data=PREPARED steps=1000`; its held-out mIoU is the ceiling."
        ),
    ),
    "faces-128": Experiment(
        "The preset `faces`: real faces at 128 pixels. One trained model, sampled in several ways.",
        {
            "faces": (),
            **{f"noise-{seed}": (f"seed={seed}",) for seed in (1, 2, 3)},
            "guidance-1.5": ("guidance_scale=1.5",),
            "independent-noise": ("shared_noise=false",),
        },
        base=("evaluate_masks=75",),
        preset="faces",
        earlier=False,
        stages=(4000,),
        detailed=True,
        sampled=True,
        finding=(
            "One training (`--seeds 0`), on 733 pairs whose crossed sides were mended (`prepare sides=fix`); the "
            "network was trained under its other name, `model=dit-s model_args.mixer=self-mamba`, at commit "
            "`aae8724`. The figures of four noises (*faces* and *noise-1* to *noise-3*) have a mean proxy distance of "
            "1,777, and single ones differ by 250, so nothing less than that means anything. Against the earlier "
            "preset (`faces`), whose parser was trained on unmended masks, only the proxy can be compared: 1,845 to "
            "1,997 there, one noise each. Faces agree with their masks better than real ones do, for the reason given "
            "there. Both eyes are found as often as in real faces after the autoencoder (0.943), and irises, brows "
            "and hair agree as they do.\n\n"
            "TAESD's four channels do not hold an eye at this size: after a round trip, the 75 real test faces have a "
            "mean squared error of 226 (of 255 x 255) and with TAESD3's sixteen 72. Of 20 faces, one of each of the "
            "first 20 masks, seen at thumbnail size, we doubted four: a shouting mouth, two with unlike eyes, one "
            "with a smeared mouth. An earlier run in TAESD's latents had about half."
        ),
    ),
    "faces-256": Experiment(
        "The same at 256 pixels, four latents a token.",
        {"faces": (), "noise-1": ("seed=1",)},
        base=("evaluate_masks=75", "image_size=256", "model_args.patch_size=2"),
        preset="faces",
        earlier=False,
        stages=(2000,),
        detailed=True,
        sampled=True,
        finding=(
            "Begun: 2,000 steps, half of those at 128 pixels, and one noise. The parser is that of 128 pixels and "
            "sees the images at that size. Agreement is level with real faces, both eyes are as often there, and none "
            "of the 75 is suspiciously near a training image (median cosine distance to the nearest one 1.05 times "
            "that of real unseen faces; 3 % are nearer than 95 % of those). By eye they are faces with grain on skin "
            "and hair; we doubted about half of 20 at thumbnail size."
        ),
    ),
}
