"""Runs whose model is told more than a mask: the style of a picture, and words."""

import pytest
import torch

pytest.importorskip("accelerate", reason="the recipe trains, which needs ssmgen[train]")

from recipe_runs import digests, words
from safetensors.torch import load_file

from recipes.sisma import train
from recipes.sisma.arguments import UsageError
from recipes.sisma.pairs import check_pairs, encoded_pairs, load_autoencoder
from recipes.sisma.runs import load_run, model_arguments, new_model
from recipes.sisma.told import style_of, training_words, unknown_words, words_of_sentences
from ssmgen.data import DrawnFaces
from ssmgen.data.drawn_faces import draw_face, sentence, words_of

BOTH = ("style=true", "words=true", "balance=0")


@pytest.mark.parametrize("name", ["sisma-mini", "dit-s", "sisma-attn-s"])
def test_a_model_keeps_what_it_had(name):
    config = train.parse(["quick", f"model={name}", "model_args.dim=48", "model_args.num_heads=6", *BOTH])
    if name == "sisma-mini":
        config.model_args.pop("num_heads")
    plain = train.parse(["quick", f"model={name}"])
    autoencoder = load_autoencoder(config)
    model, before = new_model(config, autoencoder), model_arguments(plain, autoencoder)
    assert list(model.conditions) == ["mask", "style", "words"] and "cross" not in before
    assert ("cross_mamba" in model.blocks[0].condition_of) == (name == "sisma-mini")
    assert set(model.add) == {"mask", "style", "words"}
    assert model.conditions["style"].dropout == 0.5 and model.conditions["style"].classes == 19


def test_the_style_of_whole_pictures(tmp_path):
    """One vector, whose every weight is trained, and which needs no mask of the picture."""
    config = train.parse(["quick", *words(tmp_path, "drawn_count=3", "style=whole", "balance=0")])
    autoencoder = load_autoencoder(config)
    data, model = encoded_pairs(config, autoencoder), new_model(config, autoencoder)
    example = data[0, 0]
    assert example["style"].keys() == {"latents"} and example["style"]["latents"] is example["data"]
    assert set(model.add) == {"mask"} and model.conditions["style"].dropout == 0.1
    pictures = torch.stack([draw_face(i, size=64)[0] for i in range(2)])
    style = style_of(autoencoder, pictures, None)
    mask, x, t = example["mask"].expand(2, -1, -1), torch.randn(2, *example["data"].shape), torch.rand(2)
    for parameter in model.parameters():  # AdaLN starts at zero
        torch.nn.init.normal_(parameter, std=0.05)
    out = model(x, t, mask, style=style)
    assert not torch.allclose(out, model(x, t, mask), atol=1e-4)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.conditions["style"].parameters())
    with pytest.raises(UsageError, match=r"style=part: expected true \(by regions\), whole or false"):
        train.main(["quick", "style=part", f"run={tmp_path / 'none'}"])


def test_words_outside_the_training_sentences_are_found():
    assert unknown_words("A face, long Black hair; sunglasses, a cap, pale skin, purple background") == []
    assert unknown_words("a lady with purple-black hair") == ["lady", "with", "purple-black"]
    assert not any(unknown_words(words_of(i)) for i in range(200))


def test_an_example_has_its_own_style_and_words(tmp_path):
    config = train.parse(["quick", *words(tmp_path, "drawn_count=3", *BOTH)])
    data = encoded_pairs(config, load_autoencoder(config))
    faces = DrawnFaces(3, size=64)
    told = set()
    for index in range(3):
        example = data[index, 0]
        assert example["style"]["latents"] is example["data"] and example["style"]["mask"] is example["mask"]
        for draw in range(8):
            again = data[index, draw]["words"]
            torch.testing.assert_close(again, training_words(faces.attributes(index), 0, index, draw))
            told.add(int(again["lengths"]))
    whole = words_of_sentences([sentence(faces.attributes(0))])
    assert whole["tokens"].shape == (1, *data[0, 0]["words"]["tokens"].shape)
    assert len(told) > 4, "in some draws a sentence tells a part of the attributes alone"


def test_words_need_drawn_faces():
    with pytest.raises(UsageError, match="words=true is for drawn faces.* and not for data=folder"):
        check_pairs(train.parse(["faces", "data=folder", "words=true"]))


def test_a_run_with_style_and_words_continues_exactly_and_is_sampled(tmp_path):
    more = (*BOTH, "evaluate=false", "drawn_count=8")
    train.main(["quick", *words(tmp_path / "once", *more, "steps=4")])
    train.main(["quick", *words(tmp_path / "twice", *more, "steps=2", "checkpoint_every=2")])
    train.main(["quick", *words(tmp_path / "twice", *more, "steps=4", "resume=auto", "checkpoint_every=2")])
    once, twice = tmp_path / "once/run", tmp_path / "twice/run"
    assert digests(once)["model.safetensors"] == digests(twice)["model.safetensors"]
    changed = load_file(next((once / "checkpoints").glob("*4/model.safetensors")))
    assert changed["conditions.style.nothing"].any() or changed["conditions.words.nothing"].any()
    pipe, _ = load_run(once)
    images, masks = zip(*(DrawnFaces(2, size=64)[i] for i in range(2)), strict=True)
    style = style_of(pipe.autoencoder, torch.stack(images), torch.stack(masks))
    values = {"style": style, "words": words_of_sentences(["a face, black hair", "grey background"])}
    noise = torch.randn(2, *pipe.latent_size)

    def drawn(**given):
        return pipe.sampler(noise, mask=masks[0][None], steps=2, guidance_scale=1, objective=pipe.objective, **given)

    plain = drawn()
    assert plain.isfinite().all()
    for name, value in values.items():
        assert not torch.equal(drawn(**{name: value}), plain), name
