"""The presets of the recipe."""

from recipes.sisma.presets import Config, Presets, muon_training
from ssmgen import Sampling


def clothes() -> Config:
    """Photographs cropped to a person at 192 x 96 pixels, TAESD latents, about an hour on one core."""
    return Config(
        recipe="recipes.clothes",
        preset="clothes",
        run="runs/clothes",
        data="",
        image_size="192x96",
        flip=True,  # no label has a side
        autoencoder_source="madebyollin/taesd",
        model_args={"dim": 128, "depth": 4, "patch_size": 1, "mask_input": "add", "mask_dropout": 0.1},
        balance=0.5,
        class_weighting=0.5,
        t_sampling="logit-normal",
        train=muon_training(steps=4000, ema_decay=0.998),
        sampling=Sampling(steps=11, guidance_scale=2.0, guidance_start=0.2),
        sample_every=None,
        evaluate_masks=64,
        parser="none",
    )


PRESETS: Presets = {"clothes": clothes}
