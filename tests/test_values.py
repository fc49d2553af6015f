"""Values of several tensors, from a data set to a layer."""

import pytest
import torch

import ssmgen
from ssmgen.conditions import Condition
from ssmgen.nn import Signal
from ssmgen.objectives import GaussianObjective
from ssmgen.training.step import split
from ssmgen.values import as_value, batch_of_value, mapped


class Scaled(Condition):
    """A vector times a factor, one of each per image."""

    gives = ("vector",)
    fields = ("vector", "factor")

    def __init__(self, dim, dropout=0.0):
        super().__init__(dropout)
        self.map = torch.nn.Linear(2, dim)

    def null(self, size, device):
        return {"vector": torch.zeros(1, 2, device=device), "factor": torch.zeros(1, device=device)}

    def signal(self, given, size, keep):
        factor = given.get("factor", torch.ones(1)).view(-1, 1)
        kept = 1 if keep is None else keep.view(-1, 1)
        return Signal(vector=self.map(given["vector"]) * factor * kept)


@pytest.fixture
def model():
    if "test-scaled" not in ssmgen.names("condition"):
        ssmgen.register("condition", "test-scaled")(Scaled)
    torch.manual_seed(0)
    conditions = {"mask": "label-map", "tint": {"name": "test-scaled", "dropout": 0.5}}
    model = ssmgen.build("sisma-debug", conditions=conditions, mask_dropout=0.1)
    for parameter in model.parameters():  # zero at the start: the output would not depend on the conditions
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def tint(*factors):
    return {"vector": torch.randn(len(factors), 2), "factor": torch.tensor(factors)}


def test_a_value_is_one_tensor_or_several_of_equal_batch():
    assert as_value(3).shape == (1,) and batch_of_value(as_value([1, 2])) == 2
    assert batch_of_value(as_value(tint(1.0, 2.0))) == 2
    assert as_value({"a": [1.0], "b": None}).keys() == {"a"}
    assert mapped(lambda each: each[:1], tint(1.0, 2.0))["vector"].shape == (1, 2)
    with pytest.raises(ValueError, match="here a has 1, b has 2"):
        as_value({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="empty mapping"):
        as_value({})


def test_several_tensors_reach_the_condition_and_one_alone_is_the_first(model):
    mask, x, t = torch.zeros(2, 8, 12, dtype=torch.long), torch.randn(2, 3, 8, 12), torch.tensor([0.3])
    both = tint(1.0, 1.0)
    model.eval()
    out = model(x, t, mask, tint=both)
    assert torch.equal(out, model(x, t, cond=model.condition(mask, tint=both)))
    assert torch.equal(out, model(x, t, mask, tint=both["vector"]))
    assert not torch.allclose(out, model(x, t, mask, tint=both | {"factor": torch.tensor([2.0, 3.0])}), atol=1e-4)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"mask": {"labels": torch.zeros(1, 8, 8)}}, TypeError, "'mask'.*one tensor, got a mapping of 'labels'"),
        ({"tint": {"vectr": torch.zeros(1, 2)}}, TypeError, "'tint'.*'vectr'. Did you mean 'vector'"),
        ({"tint": {"vector": torch.zeros(1, 2), "factor": torch.zeros(3)}}, ValueError, "'tint'.*vector has 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_condition(model, given, error, message):
    with pytest.raises(error, match=message):
        model(torch.randn(1, 3, 8, 8), torch.tensor([0.5]), **given)


@pytest.mark.parametrize("text", ["black hair", ["black hair", "hat"], {"tokens": "black hair"}])
def test_text_has_to_be_encoded(model, text):
    message = r"tint: a value is tensors, got text: encode it first, build\('word-vectors'\).encode\(\['black hair'"
    with pytest.raises(TypeError, match=message):
        ssmgen.sample(model, torch.randn(2, 3, 8, 8), tint=text)
    with pytest.raises(TypeError, match="'tint'.*encode it first"):
        model(torch.randn(2, 3, 8, 8), torch.tensor([0.5]), tint=text)
    with pytest.raises(ValueError, match="tint: the tensors of a value .* vector has 1, factor has 2"):
        ssmgen.sample(model, torch.randn(2, 3, 8, 8), tint={"vector": torch.zeros(1, 2), "factor": torch.zeros(2)})


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_each_image_is_sampled_with_its_own_value_and_scale(model, solver):
    x0, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 19, (2, 8, 8))
    values, settings = tint(1.0, 3.0), {"solver": solver, "steps": 3, "guidance_scale": {"mask": 2, "tint": 4}}
    both = ssmgen.sample(model, x0, mask, tint=values, **settings)
    alone = []
    for i in range(2):
        own = {name: each[i : i + 1] for name, each in values.items()}
        alone.append(ssmgen.sample(model, x0[i : i + 1], mask[i : i + 1], tint=own, **settings))
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="got 3 values for 2 images"):
        ssmgen.sample(model, x0, mask, tint=tint(1.0, 1.0, 1.0))


def test_a_batch_with_several_tensors_is_split_and_trained_on(model):
    batch = {"data": torch.randn(4, 3, 8, 8), "mask": torch.zeros(4, 8, 8, dtype=torch.long), "tint": tint(1, 2, 3, 4)}
    first, second = split(batch, 2)
    assert first["tint"]["factor"].tolist() == [1, 2] and second["tint"]["factor"].tolist() == [3, 4]
    GaussianObjective().loss(model.train(), **second).backward()
    assert model.conditions["tint"].map.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="'tint' has 3 items and 'data' 4"):
        split(batch | {"tint": tint(1, 2, 3)}, 2)
