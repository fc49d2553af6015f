"""Whole models as `torch.compile` traces them for a GPU: on fake CUDA tensors, so that no GPU is needed."""

import pytest
import torch
from fake_gpu import fake_tensors, on_fake_gpu

import ssmgen
from ssmgen.ops.scan import triton

pytestmark = pytest.mark.skipif(triton.unavailable() is not None, reason=str(triton.unavailable()))
#: One model of each family that has a scan, small, and the fused operators in its graph. test_contracts.py compiles all
#: families on the CPU.
FAMILIES = {
    "sisma-debug": ({"depth": 1}, {"triton_scan", "triton_conv_silu"}),
    "zigma-debug": ({"depth": 1}, {"triton_scan"}),
    "dim-debug": ({"depth": 1}, {"triton_scan"}),
    "usm-debug": ({}, {"triton_scan", "triton_conv_silu"}),
}


@pytest.fixture
def mode():
    with fake_tensors() as mode:
        yield mode


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_of_training_and_of_sampling_is_one_graph_on_a_gpu(name, mode):
    arguments, expected = FAMILIES[name]
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph

    model = on_fake_gpu(ssmgen.build(name, **arguments), mode)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with mode:
        x, t = torch.empty(2, model.in_channels, 16, 24, device="cuda"), torch.empty(2, device="cuda")
        mask = torch.empty(2, 16 * model.mask_scale, 24 * model.mask_scale, dtype=torch.uint8, device="cuda")
        out = compiled(x, t, mask)
        one_hot = torch.empty(1, 19, *mask.shape[1:], device="cuda")  # labels are read, to check them
        with torch.no_grad():
            cond = model.condition(one_hot)
            rows = {"modulation": model.modulation(t[:1])} if hasattr(model, "modulation") else {}
            sampled = compiled(x, None if rows else t, cond=[cond] if rows else cond, **rows)
    assert out.shape == sampled.shape == x.shape and out.device.type == sampled.device.type == "cuda"
    assert len(graphs) == 2
    for found, more in zip(graphs, ({"dense_sum_rows"}, set()), strict=True):  # the mask is embedded before sampling
        assert {op.split(".")[1] for op in found if op.startswith("ssmgen.")} == expected | more
