"""Files of weights, and all that is written: whole or absent, under the model's own names, faults said by file name."""

import resource
from contextlib import contextmanager

import pytest
import torch
from networks import tiny_network
from safetensors import SafetensorError
from safetensors.torch import load_file

from ssmgen import MaskToImage, build
from ssmgen.atomic import whole_file, whole_folder, write_text
from ssmgen.data import CELEBAMASK19, write_png
from ssmgen.data.drawn_faces import DrawnFaces
from ssmgen.data.latent_cache import write_latent_cache
from ssmgen.latents import save_network
from ssmgen.metrics.backbones import SqueezeNetTrunk
from ssmgen.pipeline import Recipe
from ssmgen.training import load_checkpoint, moving_average, save_checkpoint
from ssmgen.weights import load_weights, open_weights, read_weights, tensors_of, write_weights


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_part(model):
    model[0] = compiled(model[0])
    return model


WRAPPERS = {
    "compiled": compiled,
    "compiled part": compiled_part,
    "averaged": lambda model: moving_average(model, 0.9),
    "parallel": torch.nn.DataParallel,
    "parallel, compiled": lambda model: torch.nn.DataParallel(compiled(model)),
    "averaged, compiled": lambda model: moving_average(compiled(model), 0.9),
}


def network():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_written_and_read_under_its_own_names(tmp_path, wrap):
    plain, file = network(), tmp_path / "w.safetensors"
    write_weights(file, tensors_of(wrap(plain)))
    bare = network()
    assert load_file(file).keys() == bare.state_dict().keys()
    load_weights(bare, file)
    again = wrap(network())
    load_weights(again, file)
    for name, value in tensors_of(again).items():
        assert torch.equal(value, bare.state_dict()[name]), name


def test_any_layout_and_shared_memory_are_written(tmp_path):
    image, one = torch.randn(2, 3, 4, 5), torch.randn(4)
    tensors = {
        "channels last": image.to(memory_format=torch.channels_last),
        "transposed": image.movedim(0, -1),
        "same": one,
        "same again": one,
        "part": one[1:],
    }
    write_weights(tmp_path / "w.safetensors", tensors, {"card": "x"})
    found = read_weights(tmp_path / "w.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], value) for name, value in tensors.items())
    assert open_weights(tmp_path / "w.safetensors").metadata() == {"card": "x"}
    write_text(tmp_path / "text", "")
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read the other files may read the weights"


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    file, model = tmp_path / "w.safetensors", network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_weights(file, tensors_of(torch.nn.Sequential(torch.nn.Linear(3, 2))))
    with pytest.raises(
        ValueError, match=r"w.safetensors: 7 tensor\(s\) do not fit the model, the first 0.bias: the file"
    ):
        load_weights(model, file)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Pairs(DrawnFaces):
    def __init__(self):
        super().__init__(2, size=32)


def pipe():
    args = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "dim": 32, "depth": 1}
    return MaskToImage(
        build("sisma-debug", **args), build("identity"), Recipe("sisma-debug", args, "identity", 32, CELEBAMASK19)
    )


def checkpoint(folder):
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(folder / "checkpoints", 1, model=model, ema=model, optimizer=optimizer, state={})


WRITERS = {
    "checkpoints/step-00000001": checkpoint,
    "new": lambda folder: pipe().save_pretrained(folder / "new"),
    "cache": lambda folder: write_latent_cache(Pairs(), build("identity"), folder / "cache"),
    "diffusion_pytorch_model.safetensors": lambda folder: save_network(tiny_network(), folder),
    "w.safetensors": lambda folder: write_weights(folder / "w.safetensors", {"a": torch.zeros(9999)}),
    "p.png": lambda folder: write_png(folder / "p.png", torch.randint(0, 256, (3, 64, 64)).to(torch.uint8)),
}


@contextmanager
def little_space(limit=4096):
    """No file may grow beyond ``limit`` bytes: the system refuses the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_by_name_and_leaves_nothing_in_the_way(tmp_path, name):
    with little_space(), pytest.raises(OSError, match=r": .*[Ff]ile too large") as raised:
        WRITERS[name](tmp_path)
    assert str(raised.value).startswith(str(tmp_path / name)) and ".tmp-" not in str(raised.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()] and not (tmp_path / name).exists()
    WRITERS[name](tmp_path)
    assert (tmp_path / name).exists()


def test_saving_over_a_model_on_a_full_disk_leaves_the_old_one(tmp_path):
    saved = pipe()
    saved.save_pretrained(tmp_path / "saved")
    before = (tmp_path / "saved/model.safetensors").read_bytes()
    with little_space(), pytest.raises(OSError, match=r"saved/model.safetensors: writing failed"):
        pipe().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_what_safetensors_raises_becomes_an_oserror(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"w.safetensors: .*No space left on device"):
        write_weights(tmp_path / "w.safetensors", {"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_errors_of_other_files_are_not_taken_for_those_of_the_target(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Errno 2.*source.jpg"), whole_folder(tmp_path / "target"):
        (tmp_path / "source.jpg").read_bytes()
    with (
        pytest.raises(OSError, match=r"target: writing failed \(.*nowhere"),
        whole_file(tmp_path / "nowhere/target") as file,
    ):
        file.write_text("x")
    assert list(tmp_path.iterdir()) == []


def damage_file(folder):
    (folder / "w.safetensors").write_bytes(b"x" * 99)
    return folder / "w.safetensors"


READERS = {
    "weights": lambda folder: read_weights(damage_file(folder)),
    "model": lambda folder: load_weights(network(), damage_file(folder)),
    "squeezenet": lambda folder: SqueezeNetTrunk(damage_file(folder)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_damaged_file_is_named(tmp_path, read):
    with pytest.raises(ValueError, match=r"\.safetensors: is no safetensors file, or damaged \("):
        read(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors: not found"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="not found"):
        read_weights(tmp_path)


def test_a_checkpoint_of_a_compiled_model_serves_the_plain_one(tmp_path):
    torch.manual_seed(0)
    model = compiled(torch.nn.Linear(3, 3))
    ema = moving_average(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    ema.update_parameters(model)
    path = save_checkpoint(tmp_path, 1, model=model, ema=ema, optimizer=optimizer, state={})
    for part in ("model", "ema"):
        assert sorted(load_file(path / f"{part}.safetensors")) == ["bias", "weight"]
    other = torch.nn.Linear(3, 3)
    average, fresh = moving_average(other, 0.9), torch.optim.AdamW(other.parameters())
    load_checkpoint(path, model=other, ema=average, optimizer=fresh)
    assert torch.equal(other.weight, model.weight) and int(average.n_averaged) == 1
    assert torch.equal(average.module.weight, ema.module.weight)
    assert torch.equal(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
