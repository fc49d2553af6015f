"""The compiled step: what tells shapes apart, and the thread of captured graphs, on a CPU."""

import sys
import threading
from contextlib import nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import ssmgen
from ssmgen.compiled import Buffers, CompiledStep, allow_captures, shape_of


class State(NamedTuple):
    tokens: torch.Tensor
    size: tuple[int, int]


def test_shapes_are_told_apart_and_values_are_not():
    def given(length=4, dtype=torch.float32, size=(2, 2), more=None):
        return [State(torch.randn(1, length, 8, dtype=dtype), size)], {"text": torch.randn(3), "more": more}

    assert shape_of(given()) == shape_of(given()) and hash(shape_of(given())) == hash(shape_of(given()))
    others = [given(5), given(dtype=torch.bfloat16), given(size=(4, 1)), given(more=torch.ones(1)), given()[:1]]
    assert len({shape_of(other) for other in [given(), *others]}) == 6


class Stream:
    """One of CUDA's, as far as it is used."""

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.fixture
def captured(monkeypatch):
    """A compiled step that is treated as a captured one, which torch.compile leaves as it is."""
    streams = threading.local()
    monkeypatch.setattr(torch, "compile", lambda f, **given: f)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr("ssmgen.compiled.allow_captures", lambda: None)
    monkeypatch.setattr("ssmgen.compiled._CAPTURES", sys.modules["ssmgen.compiled"]._CaptureThread())
    seen = []

    def model(x, t, cond=None):
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append((threading.get_ident(), torch.is_grad_enabled(), autocast))
        return x if t is None else x + t

    step = CompiledStep(model, torch.device("cuda"))
    return step, streams, seen


def test_all_threads_captured_steps_run_in_one(captured):
    step, streams, seen = captured
    first, second = Stream(), Stream()

    def call(stream, dtype=None):
        streams.current = stream
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            x = torch.ones(2, requires_grad=True)
            out = step(x, None)
        assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()

    call(first)
    for stream, dtype in ((first, None), (second, torch.bfloat16)):
        thread = threading.Thread(target=call, args=(stream, dtype))
        thread.start()
        thread.join()
    assert len({thread for thread, *_ in seen}) == 1 and seen[0][0] != threading.get_ident()
    assert [rest for _, *rest in seen] == [[False, None], [False, None], [False, torch.bfloat16]]
    assert first.waited == [] and second.waited == [first]  # graphs share their memory


def test_an_error_in_that_thread_reaches_the_caller(captured):
    step, streams, _ = captured
    streams.current = Stream()
    with pytest.raises(RuntimeError, match="size of tensor"):
        step(torch.ones(2), torch.ones(3))
    assert torch.equal(step(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def test_that_thread_has_the_callers_settings_of_torch(captured, monkeypatch):
    step, streams, _ = captured
    streams.current = Stream()
    found = []
    monkeypatch.setattr(step, "model", lambda x, t, cond=None: found.append(torch.compiler.config.recompile_limit) or x)
    with torch._dynamo.config.patch(recompile_limit=77):
        step(torch.ones(3), None)
    assert found == [77]


def test_conditions_lie_in_buffers_that_are_written_when_they_change(captured, monkeypatch):
    """A captured graph reads them where they are: the same tensors at each call, and marked so."""
    step, streams, _ = captured
    streams.current, seen = Stream(), []

    def model(x, t, cond, scale):
        seen.append(cond["a"].tokens)
        return x + scale * cond["a"].tokens.sum()

    monkeypatch.setattr(step, "model", model)
    x = torch.zeros(2)
    for value in (1.0, 2.0, 1.0):  # as many calls of a sampler, with a mask each
        tokens = torch.full((1, 4), value).expand(3, 4)
        cond = {"a": State(tokens, (2, 2))}
        before, count = seen[-1]._version if seen else 0, len(seen)
        for _ in range(2):
            assert torch.equal(step(x, None, cond=cond, scale=1), torch.full((2,), 12 * value))
        assert seen[-1]._version - before == (count > 0)
    assert len({id(tokens) for tokens in seen}) == 1 and seen[0] is not tokens
    assert seen[0]._dynamo_static_input_type == "unguarded" and not hasattr(tokens, "_dynamo_static_input_type")
    step(x, None, cond={"a": State(torch.ones(1, 4), (2, 2))}, scale=1)  # another shape has its own
    assert seen[-1] is not seen[0] and seen[-1].shape == (1, 4)


def test_captured_graphs_are_told_that_buffers_stay_where_they_are():
    """Of a model's step, only what changes from step to step is left for torch to copy."""
    model, found = ssmgen.build("sisma-debug", depth=1), []

    def backend(graph, inputs):
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        marked = [node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in given]
        found.extend(x.shape for x, mark in zip(inputs, marked, strict=True) if mark is None)
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        rows, cond = model.modulation(torch.zeros(1)), model.condition(size=(8, 12))
        step = torch.compile(model, backend=backend, fullgraph=True)
        step(torch.zeros(1, 3, 8, 12), None, cond=Buffers().holding([cond]), modulation=rows)
    assert sorted(found) == sorted([(1, 3, 8, 12), rows.shape])


def test_the_mode_of_compiling_is_that_of_device_and_wish(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda f, *, mode, **given: modes.append(mode) or f)
    for device, autotune in (("cpu", False), ("cpu", True), ("cuda", False), ("cuda", True)):
        step = CompiledStep(lambda x, t, cond: x, torch.device(device), autotune)
        monkeypatch.setattr("ssmgen.compiled._CAPTURES", mock.Mock())
        step(torch.ones(1), None)
    assert modes == [None, "max-autotune", "reduce-overhead", "max-autotune"]


def test_a_thread_that_cannot_be_prepared_says_why(captured, monkeypatch):
    step, streams, _ = captured
    streams.current = Stream()
    monkeypatch.setattr("ssmgen.compiled.allow_captures", mock.Mock(side_effect=[AttributeError("no such name"), None]))
    with pytest.raises(AttributeError, match="no such name"):
        step(torch.ones(2), None)
    assert torch.equal(step(torch.ones(2), None), torch.ones(2))


def test_any_thread_can_be_prepared_for_captures():
    """torch 2.11 prepares the thread that imports its module, and fails an assertion in others."""
    from torch._inductor import cudagraph_trees as trees

    def run():
        allow_captures()
        found.append(trees.get_obj(trees.local, "tree_manager_containers"))
        trees.get_obj(trees.local, "tree_manager_locks")[0].acquire(timeout=1)

    found = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [{}] and found[0] is not trees.local.tree_manager_containers
