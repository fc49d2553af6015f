"""Whatever stands in a checkpoint's folder, reading it gives its content or a `CheckpointError` that names the file."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tracemalloc
from errno import EACCES, EIO
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ssmgen.training import (
    CheckpointError,
    NewerFormatError,
    find_checkpoint,
    load_checkpoint,
    manifest,
    moving_average,
    newest_checkpoint,
    read_manifest,
    read_state,
    save_checkpoint,
    verify_checkpoint,
)
from ssmgen.training.fsck import check_run, mend_run
from ssmgen.training.manifest import FILES, rendered, write_manifest

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def trained():
    model = torch.nn.Linear(2, 2)
    parts = {"model": model, "ema": moving_average(model, 0.9), "optimizer": torch.optim.AdamW(model.parameters())}
    model(torch.ones(1, 2)).sum().backward()
    parts["optimizer"].step()
    return parts


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    loop = {"seconds": 1.5, "pending": [None, 0.5], "schedule": [{"step": 0, "lr_decay_steps": 0}], "record": {"lr": 1}}
    return save_checkpoint(tmp_path_factory.mktemp("intact"), 7, **trained(), state=loop)


@pytest.fixture
def path(intact, tmp_path):
    return Path(shutil.copytree(intact, tmp_path / intact.name))


def forge(path, name, content):
    """Replace a file, and the manifest as whoever may write to the folder can."""
    (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_manifest(path)


def damaged(draw, content, other):
    """Bytes that differ from ``content``: a bit flipped, the end cut, or a piece of ``other`` put in."""
    position = draw(st.integers(0, len(content) - 1))
    kind = draw(st.sampled_from(["flip", "cut", "splice", "insert"]))
    if kind == "flip":
        flipped = bytes([content[position] ^ 1 << draw(st.integers(0, 7))])
        return content[:position] + flipped + content[position + 1 :]
    if kind == "cut":
        return content[:position]
    start = draw(st.integers(0, len(other) - 1))
    piece = other[start : start + draw(st.integers(1, 100))]
    return content[:position] + piece + content[position + (len(piece) if kind == "splice" else 0) :]


@settings(FUZZ, max_examples=300)
@given(data=st.data())
def test_every_changed_byte_is_found_and_its_file_named(path, intact, data):
    name = data.draw(st.sampled_from(["MANIFEST.json", *FILES]))
    content = (intact / name).read_bytes()
    changed = damaged(data.draw, content, (intact / data.draw(st.sampled_from(FILES))).read_bytes())
    assume(changed != content)
    (path / name).write_bytes(changed)
    for read in (verify_checkpoint, load_checkpoint, read_state)[: 3 if name in ("MANIFEST.json", "state.json") else 2]:
        with pytest.raises(CheckpointError, match=name):
            read(path)
    (path / name).write_bytes(content)
    assert verify_checkpoint(path)["step"] == 7


@FUZZ
@given(data=st.data())
def test_a_forged_file_loads_or_is_an_error_that_names_it(path, intact, data):
    """With a manifest that fits: hashes detect damage, not forgery, but nothing worse than an error may come of it."""
    name = data.draw(st.sampled_from(FILES))
    content = (intact / name).read_bytes()
    head = content[: min(len(content), 400)]  # lengths, names, types and shapes; values may be anything
    forge(path, name, damaged(data.draw, head, content) + content[len(head) :])
    parts = trained()
    try:
        load_checkpoint(path, **parts)
    except CheckpointError as error:
        assert name in str(error)
    shutil.copytree(intact, path, dirs_exist_ok=True)


@pytest.mark.parametrize("length", [2**63, 2**40, 99_999_999, 0])
def test_a_forged_length_takes_no_memory(path, length):
    forge(path, "model.safetensors", length.to_bytes(8, "little") + b"{}" * 100)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(path, model=torch.nn.Linear(2, 2))
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(FILES), inner),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries({"bytes": JSON, "sha256": JSON | st.just("0" * 64)})


@FUZZ
@given(
    content=JSON | st.fixed_dictionaries(dict.fromkeys(FILES, ENTRY)) | st.dictionaries(st.sampled_from(FILES), ENTRY)
)
def test_any_other_json_is_no_manifest(path, content):
    (path / "MANIFEST.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "does not list ema.safetensors"),
        ("[]", "expected a JSON object, got list"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a":' * 60 + "1" + "}" * 60, "is nested too deeply"),
        ('{"format": NaN}', "JSON has no NaN"),
        ('{"format": 1e999}', "out of range"),
        ('{"format": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"a": 1, "a": 2}', "a key stands twice"),
        (b"\xff", "is not valid JSON"),
        ("{" + " " * 1_000_001, "has 1000002 bytes, more than"),
    ],
    ids=range(11),
)
def test_a_manifest_that_is_none(path, text, said):
    (path / "MANIFEST.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=f"MANIFEST.json: .*{said}"):
        verify_checkpoint(path)


def edit(path, change, *, format=1):
    """Change a manifest and, in format 2, its checksum."""
    content = json.loads((path / "MANIFEST.json").read_text())
    files = content["files"]
    change(files if format == 1 else content)
    if format == 2:
        del content["checksum"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(files if format == 1 else content, indent=2) + "\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: files.pop("state.json"), "does not list state.json"),
        (lambda files: files.update({"../../secret": files["state.json"]}), "lists '../../secret', which is no file"),
        (lambda files: files.update({"more": files["state.json"]}), "lists 'more', which is no file of a checkpoint"),
        (lambda files: files.update({"state.json": None}), "entry of state.json must have bytes and sha256, got None"),
        (lambda files: files["state.json"].pop("bytes"), "entry of state.json must have bytes and sha256"),
        (lambda files: files["state.json"].update(more=1), "entry of state.json must have bytes and sha256"),
        (lambda files: files["state.json"].update(bytes=-1), "bytes of state.json must be a size, got -1"),
        (lambda files: files["state.json"].update(bytes=True), "bytes of state.json must be a size, got True"),
        (lambda files: files["state.json"].update(bytes=10**30), "bytes of state.json must be a size, got 1000"),
        (lambda files: files["state.json"].update(bytes=3.0), "bytes of state.json must be a size, got 3.0"),
        (lambda files: files["state.json"].update(sha256="zz"), "sha256 of state.json must be 64 digits, got 'zz'"),
        (lambda files: files["state.json"].update(sha256=[]), r"sha256 of state.json must be 64 digits, got \[\]"),
    ],
    ids=range(12),
)
def test_a_manifest_lists_exactly_the_files_of_a_checkpoint(path, change, said):
    for format in (1, 2):
        edit(path, change if format == 1 else lambda content: change(content["files"]), format=format)
        with pytest.raises(CheckpointError, match=f"MANIFEST.json: .*{said}"):
            verify_checkpoint(path)
        (path / "MANIFEST.json").unlink()
        write_manifest(path)


def test_the_first_format_is_read(path):
    edit(path, lambda files: None)
    assert read_manifest(path).format == 1 and verify_checkpoint(path)["step"] == 7


def test_a_manifest_disagrees_with_its_checksum(path):
    text = (path / "MANIFEST.json").read_text()
    (path / "MANIFEST.json").write_text(text.replace('"bytes": ', '"bytes": 1', 1))
    with pytest.raises(CheckpointError, match=r"MANIFEST.json: does not agree with its own checksum"):
        verify_checkpoint(path)
    (path / "MANIFEST.json").write_text(text.replace('"format": 2', '"format": 6'))
    with pytest.raises(CheckpointError, match=r"MANIFEST.json: does not agree with its own checksum"):
        verify_checkpoint(path)


def test_a_newer_format_says_so(path):
    edit(path, lambda content: content.update(format=3, more={}), format=2)
    with pytest.raises(CheckpointError, match=r"was written by a newer ssmgen \(format 3, this one reads up to 2\)"):
        verify_checkpoint(path)
    for format in (0, 1, -3, "2", None, 2.0):
        edit(path, lambda content, format=format: content.update(format=format), format=2)
        with pytest.raises(CheckpointError, match=r"MANIFEST.json: "):
            verify_checkpoint(path)


def test_a_newer_format_is_no_damage(intact, tmp_path):
    """Falling back or renaming it would undo the work of the later version."""
    folder = tmp_path / "run/checkpoints"
    older = save_checkpoint(folder, 6, **trained(), state={})
    newer = Path(shutil.copytree(intact, folder / intact.name))
    edit(newer, lambda content: content.update(format=3, more={}), format=2)
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    for action in (lambda: find_checkpoint(tmp_path / "run", "auto", {}), lambda: mend_run(tmp_path / "run")):
        with pytest.raises(NewerFormatError, match="update ssmgen"):
            action()
    with pytest.raises(NewerFormatError, match="update ssmgen$"):
        newest_checkpoint(tmp_path / "run")
    found = {finding.name: (finding.status, finding.detail) for finding in check_run(tmp_path / "run")}
    assert found.keys() == {older.name, newer.name} and found[older.name][0] == "ok"
    assert found[newer.name][0] == "unknown" and found[newer.name][1].endswith("update ssmgen")
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_it_is_imported_where_the_system_has_fewer_errors(monkeypatch):
    """As macOS and Windows have."""
    for name in ("EUCLEAN", "EBADMSG"):
        monkeypatch.delattr(errno, name)
    spec = importlib.util.spec_from_file_location("manifest_elsewhere", manifest.__file__)
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules[spec.name])
    assert len(sys.modules[spec.name]._DAMAGE) == len(manifest._DAMAGE) - 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("step", "averaged", "skipped") for value in (-1, True, "3", 2.5, None, 10**30)),
        *(("seconds", value) for value in (-1.0, "x", None, [])),
        *(("pending", value) for value in (1, ["x"], [[1]], {"a": 1}, [True])),
        *(("schedule", value) for value in ([], {}, [1], [{"step": 1}], [{"step": 1, "lr_decay_steps": "x"}])),
        *(("health", value) for value in ([], {"unknown": 1}, {"skipped": "x"})),
        *(("record", value) for value in ([], "x", None, 3)),
    ],
)
def test_a_key_of_the_state_has_its_type(path, key, value):
    state = json.loads((path / "state.json").read_text())
    forge(path, "state.json", json.dumps(state | {key: value}))
    for read in (verify_checkpoint, read_state):
        with pytest.raises(CheckpointError, match=f"state.json: {key} must be"):
            read(path)


def test_a_state_of_another_step_is_damage(path):
    other = path.rename(path.with_name("step-00000008"))
    with pytest.raises(CheckpointError, match=r"state.json: is of step 7, but its folder is named step-00000008"):
        verify_checkpoint(other)
    forge(other, "state.json", "{}")
    with pytest.raises(CheckpointError, match=r"state.json: has no step"):
        verify_checkpoint(other)


@pytest.mark.parametrize("name", ["MANIFEST.json", *FILES])
def test_only_regular_files_are_opened(path, name):
    """A pipe would wait for ever."""
    file = path / name
    content = file.read_bytes()
    for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        make(file)
        with pytest.raises(CheckpointError, match=f"{name}: (is not a regular file|cannot be read)"):
            verify_checkpoint(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        verify_checkpoint(path)
    (path.parent / "elsewhere").write_bytes(content)
    file.symlink_to(path.parent / "elsewhere")  # as in a hub's cache; the content is verified
    assert verify_checkpoint(path)["step"] == 7


def test_a_disk_error_is_damage_and_a_missing_permission_is_not(path, monkeypatch):
    for number, kind in ((EIO, CheckpointError), (EACCES, PermissionError)):

        def fail(*_, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch, pytest.raises(kind, match=r"ema.safetensors"):
            patch.setattr(hashlib, "file_digest", fail)
            verify_checkpoint(path)


def test_optimizer_state_of_another_shape_is_named(path):
    from ssmgen.weights import read_weights, write_weights

    tensors = read_weights(path / "optimizer.safetensors")
    write_weights(path / "optimizer.safetensors", tensors | {"weight:exp_avg": torch.zeros(3)})
    write_manifest(path)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: weight:exp_avg has the shape \(3,\)"):
        load_checkpoint(path, **trained())


def test_the_manifest_is_the_same_text_for_the_same_files(path):
    assert (path / "MANIFEST.json").read_text() == rendered(read_manifest(path).files)
