"""The presets of the recipe."""

from recipes.sisma.presets import Config, Presets, muon_training
from ssmgen import Sampling


def clothes() -> Config:
    """Photographs cropped to a person, 192 pixels high and 64 to 112 wide, TAESD latents."""
    return Config(
        recipe="recipes.clothes",
        preset="clothes",
        run="runs/clothes",
        data="",
        image_size="192x64,192x80,192x96,192x112",  # with the nearest one, 95 % of a photograph is kept on average
        flip=True,  # no label has a side
        autoencoder_source="madebyollin/taesd",
        model_args={"dim": 128, "depth": 4, "patch_size": 1, "mask_input": "add", "mask_dropout": 0.1},
        balance=0.5,
        class_weighting=0.5,
        t_sampling="logit-normal",
        train=muon_training(steps=5000, ema_decay=0.998),
        sampling=Sampling(steps=11, guidance_scale=2.0, guidance_start=0.2),
        sample_every=None,
        evaluate_masks=64,
        parser="none",
    )


PRESETS: Presets = {"clothes": clothes}
