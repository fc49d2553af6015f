"""Configuration files: read as plain values, and every fault of one is a sentence with the file's name."""

import json
import os
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("accelerate", reason="the recipe needs ssmgen[train]")

from recipes.sisma import watch
from recipes.sisma.arguments import UsageError, flat, from_command_line
from recipes.sisma.curves import read_log
from recipes.sisma.export import _result
from recipes.sisma.parser import load_parser
from recipes.sisma.presets import Config, preset
from recipes.sisma.reading import read_json
from recipes.sisma.runs import _machine_memory, load_config, load_source, save_config
from ssmgen import MaskToImage
from ssmgen.training.log import _forget_after
from ssmgen.weights import write_weights


@pytest.fixture
def secret(monkeypatch):
    """A variable of the environment, and a list of what is read of it."""
    monkeypatch.setenv("SECRET", "the secret")
    return "the secret"


def written(folder: Path, content: str | bytes) -> Path:
    folder.joinpath("config.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize("name", ["quick", "faces", "paper"])
def test_what_is_saved_is_read_back(tmp_path, name):
    config = preset(name).with_steps(7)
    config.run, config.data, config.model_args = "007", "yes", {"depth": 2, "name": "1e3", "on": True, "a": {"b": 0.5}}
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path) == config


def test_older_and_hand_written_files_are_read(tmp_path):
    text = "\ufeffsteps: 30\nlr: 1e-3\nrun: 007\nflip: yes\nlr_decay_steps: null\n"
    text += "model_args:\n  depth: 3\nsampling:\n  steps: 5\n"
    config = load_config(written(tmp_path, text))
    assert (config.train.steps, config.train.lr, config.run, config.flip) == (30, 1e-3, "007", True)
    assert (config.model_args, config.sampling.steps) == ({"depth": 3}, 5) and config.train.lr_decay_steps is None


FAULTS = {
    "": "is empty, expected lines of key: value",
    "null": "is empty",
    "- a": "holds a list",
    "text": "holds one value",
    "steps: [": "is not valid YAML",
    "\x00\x01": "is not valid YAML",
    "stepz: 3": "unknown key 'stepz'. Did you mean 'steps'",
    "train: {stepz: 3}": "unknown key 'train.stepz'. Did you mean 'train.steps'",
    "train: {sampling.steps: 3}": "unknown key 'train.sampling.steps'",
    "train: 3": "unknown key 'train'",
    "steps: many": "train.steps: Value 'many'",
    "steps: {a: 1}": "train.steps: ",
    "run: [a]": "run: ",
    "steps: null": "train.steps: ",
    "steps: -1": "steps must not be negative",
    "sampling: {steps: 0}": "sampling steps must be a positive whole number",
    "model_args: 3": "model_args: ",
    "1: 2": "line 1 has a key that is no name",
    "model_args: {1: 2}": "model_args: line 1 has a key that is no name",
    "{[a]: 2}": "line 1 has a key that is no name",
    "run: a\nrun: b": "run is set twice",
    "a: &a [1]\nb: *a": "has an anchor or alias",
    "run: !!python/object/apply:os.system [ls]": "has the tag tag:yaml.org,2002:python/object/apply:os.system",
    "model_args: " + "[" * 3000: "is nested more than 12 deep",
    "run: a\n---\nrun: b": "is not valid YAML",
    "run: ${oc.env:SECRET}": "run: ${...} is not expanded here",
    "run: \\${oc.env:SECRET}": "run: ${...} is not expanded here",
    "run: a${oc.env:${preset}}b": "run: ${...} is not expanded here",
    "model_args: {a: [{b: '${oc.env:SECRET}'}]}": "model_args.a[0].b: ${...} is not expanded here",
    'train: {tracker: "\\x24{oc.env:SECRET}"}': "train.tracker: ${...} is not expanded here",
    "${oc.env:SECRET}: a": "${oc.env:SECRET}: ${...} is not expanded here",
    "model_args: {'${run}': 1}": "${run}: ${...} is not expanded here",
    "run: ${run}": "run: ${...} is not expanded here",
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: text[:30].encode("unicode_escape").decode())
def test_every_fault_names_the_file_and_what_is_wrong(tmp_path, secret, text):
    with pytest.raises(UsageError) as found:
        load_config(written(tmp_path, text))
    message = str(found.value)
    assert message.startswith(f"{tmp_path / 'config.yaml'}: {FAULTS[text]}"[: len(message)]) or FAULTS[text] in message
    assert message.startswith(f"{tmp_path / 'config.yaml'}: ") and secret not in message and "\n" not in message
    assert watch._planned(tmp_path) == (0, 0) or "train" not in text


def test_binary_and_huge_files_are_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match="config.yaml: is not text in UTF-8"):
        load_config(written(tmp_path, b"run: \xff\xfe"))
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    started = time.monotonic()
    with pytest.raises(UsageError, match="has an anchor or alias"):
        load_config(written(tmp_path, bomb))
    with pytest.raises(UsageError, match="is larger than 100,000 bytes"):
        load_config(written(tmp_path, "run: a\n" * 10**6))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "word",
    ["run=${oc.env:SECRET}", "model_args.a=${oc.env:SECRET}", "model_args={a: ['${run}']}", "model_args.${run}=1"],
)
def test_words_of_a_command_are_not_expanded(secret, word):
    with pytest.raises(UsageError, match=r"\$\{\.\.\.\} is not expanded here") as found:
        from_command_line(Config(), [word])
    assert secret not in str(found.value)


@pytest.mark.parametrize("value", ["[1,", "!!python/name:os.system x", "*a", "{" * 40, "\x00"])
def test_a_word_that_is_no_plain_value_is_named(value):
    with pytest.raises(UsageError, match=r"model_args\.x="):
        from_command_line(Config(), [f"model_args.x={value}"])


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["${run}", "???"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = st.sampled_from([*flat(Config()), "train", "sampling", "train.steps"]) | st.text(max_size=6)
CONFIGURATIONS = st.dictionaries(KEYS, VALUES, max_size=4).map(yaml.safe_dump)
DAMAGED = st.tuples(CONFIGURATIONS, st.integers(0, 60), st.text("{}[]:&*!|>'\"%@`#-?, \n\t$\x00", max_size=4)).map(
    lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :]
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(CONFIGURATIONS | DAMAGED | st.binary(max_size=60))
def test_any_content_is_read_or_refused_by_name(content):
    with tempfile.TemporaryDirectory() as name:
        try:
            assert isinstance(load_config(written(Path(name), content)), Config)
        except UsageError as error:
            assert str(error).startswith(f"{name}{os.sep}config.yaml: ")
        assert len(watch._planned(Path(name))) == 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KEYS, st.text(max_size=8) | VALUES.map(str)).map("=".join), max_size=3))
def test_any_words_are_read_or_refused(words):
    try:
        from_command_line(Config(), [word for word in words if word not in ("-h", "--help")])
    except ValueError as error:
        assert str(error)


def test_a_record_that_is_a_fifo_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(ValueError, match=r"result.json: is a FIFO, not a regular file"):
        read_json(tmp_path / "result.json")


def test_the_memory_of_the_machine_is_known_on_every_system(monkeypatch):
    pytest.importorskip("psutil")  # which on Linux needs os.sysconf when it is imported
    monkeypatch.delattr(os, "sysconf", raising=False)  # Windows has none
    assert _machine_memory() > 2**28


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"\x00"])
def test_broken_records_are_named(tmp_path, content):
    for name in ("result.json", "prepared.json", "log.jsonl"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="result.json: "):
        read_json(tmp_path / "result.json")
    with pytest.raises(ValueError, match="result.json: "):
        _result(tmp_path, 3)
    with pytest.raises(ValueError, match="prepared.json: "):
        load_source(tmp_path, Config(data=str(tmp_path)))
    assert read_log(tmp_path) == [] and _forget_after(tmp_path / "log.jsonl", 3) == 0
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json: "):
        MaskToImage.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "card", ["", "[", "[" * 100_000, "[]", "{}", '{"num_classes": "a", "width": 1}', '{"num_classes": 19, "width": -4}']
)
def test_a_parser_with_a_broken_card_is_named(tmp_path, card):
    write_weights(tmp_path / "parser.safetensors", {}, {"card": card})
    with pytest.raises(ValueError, match=r"parser.safetensors: is not a parser"):
        load_parser(tmp_path / "parser.safetensors")


def test_a_pipeline_s_configuration_is_not_expanded(tmp_path, secret):
    config = json.loads((Path(watch.__file__).parents[2] / "ssmgen/pretrained/drawn-faces/config.json").read_text())
    config["about"], config["sampling"]["solver"] = "${oc.env:SECRET}", "${oc.env:SECRET}"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as found:
        MaskToImage.from_pretrained(tmp_path)
    assert secret not in str(found.value) and "${oc.env:SECRET}" in str(found.value)
