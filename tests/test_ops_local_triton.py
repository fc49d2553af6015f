"""The layers around the scan on a GPU: the convolution in Triton, interpreted if there is none, and the embedding."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssmgen.ops import conv_silu, sum_rows
from ssmgen.ops.local import dense, triton

needs_triton = pytest.mark.skipif(triton.unavailable() is not None, reason=str(triton.unavailable()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[1]


def grid(batch, height, width, dim, k=3, dtype=torch.float32, weights=torch.float32):
    """The first half of a projection as tokens, weights and bias; and the size."""
    wide = torch.randn(batch, height * width, 2 * dim).to(DEVICE, dtype)
    tensors = [wide[..., :dim], *(torch.randn(shape).to(DEVICE, weights) for shape in ((dim, 1, k, k), (dim,)))]
    return [x.requires_grad_() for x in tensors], (height, width)


def with_gradients(out, tensors):
    """The output's gradient has values that all dtypes hold."""
    slopes = torch.linspace(-1, 1, out.numel(), device=out.device).bfloat16().view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, slopes)]


def results(tensors, size, backend="triton"):
    return with_gradients(conv_silu(*tensors, size, backend=backend), tensors)


def error(tensors, size):
    """The largest L2 error of the result and the gradients, relative to their size, against float64."""
    exact = results([x.detach().double().requires_grad_() for x in tensors], size, "torch")
    pairs = zip(results(tensors, size), exact, strict=True)
    return max(((got.double() - want).norm() / want.norm().clamp(min=1)).item() for got, want in pairs)


@needs_triton
@pytest.mark.parametrize(
    ("batch", "height", "width", "dim", "k"),
    [(2, 3, 2, 37, 3), (1, 1, 1, 1, 3), (1, 2, 5, 130, 1), (1, 2, 3, 6, 5), (1, 9, 5, 6, 3)],
)
def test_agrees_with_float64_at_odd_sizes(batch, height, width, dim, k):
    assert error(*grid(batch, height, width, dim, k)) < 2e-6


@needs_triton
@pytest.mark.parametrize(("dtype", "weights"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_sixteen_bits_are_rounded_only_at_the_edges(dtype, weights):
    tensors, size = grid(1, 3, 4, 8, dtype=dtype, weights=weights)
    exact = results([x.detach().double().requires_grad_() for x in tensors], size, "torch")
    found = results(tensors, size)
    assert [x.dtype for x in found] == [dtype, dtype, weights, weights]
    for got, want in zip(found[:2], exact[:2], strict=True):
        assert ((got.double() - want).abs() <= want.abs() * torch.finfo(dtype).eps + 1e-5).all()
    for got, want in zip(found[2:], exact[2:], strict=True):
        assert (got.double() - want).norm() < want.norm() * (1e-5 if weights == torch.float32 else 1e-3)


@needs_triton
def test_slices_are_read_in_place_and_results_repeat_to_the_bit():
    """And an image does not depend on its batch."""
    tensors, size = grid(2, 3, 5, 6)
    found = results(tensors, size)
    dense_rows = [tensors[0].detach().contiguous().requires_grad_(), *tensors[1:]]
    assert tensors[0].stride() == (15 * 12, 12, 1) and dense_rows[0].stride() == (15 * 6, 6, 1)
    assert all(map(torch.equal, found, results(dense_rows, size)))
    x, *rest = tensors
    assert torch.equal(conv_silu(x[1:], *rest, size, backend="triton"), found[0][1:])


@needs_triton
def test_backward_cuts_the_rows_only_where_the_chip_idles(monkeypatch):
    cases = [(16, 1024), (16, 2000), (16, 512), (64, 512), (64, 8), (5, 1)]
    assert [triton._rows(*case) for case in cases] == [16, 16, 8, 32, 8, 5]
    tensors, size = grid(1, 5, 2, 3)
    whole = results(tensors, size)
    monkeypatch.setattr(triton, "_FEWEST_ROWS", 2)
    for one, cut in zip(whole, results(tensors, size), strict=True):
        torch.testing.assert_close(cut, one, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("value", [1e30, -1e30, float("nan")])
def test_extreme_values_stay_what_they_are(value):
    x = torch.full((1, 4, 3), value, device=DEVICE, requires_grad=True)
    out = conv_silu(x, torch.ones(3, 1, 3, 3, device=DEVICE), torch.ones(3, device=DEVICE), (2, 2), backend="triton")
    finite = value == value
    assert out.isfinite().all() == finite and torch.autograd.grad(out.sum(), x)[0].isfinite().all() == finite


@needs_triton
def test_the_convolution_is_one_operator_of_torch():
    tensors, size = grid(1, 2, 3, 4)
    torch.library.opcheck(torch.ops.ssmgen.triton_conv_silu, (*tensors, *size))
    plain = [x.detach() for x in tensors]
    backward = (torch.ones(1, 6, 4, device=DEVICE), *plain, *size)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ssmgen.triton_conv_silu_backward, backward, test_utils=tests)
    torch.compiler.reset()
    compiled = torch.compile(partial(conv_silu, size=size, backend="triton"), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradients(compiled(*tensors), tensors), results(tensors, size)))


@needs_triton
def test_what_the_kernels_do_not_take_is_named():
    with pytest.raises(ValueError, match="kernels up to 5 x 5, got 7 x 7: use backend='torch'"):
        results(*grid(1, 2, 2, 3, k=7))
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 or float16 on .*got torch.float64.*'torch'"):
        results(*grid(1, 2, 2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="unknown backend 'mps'"):
        results(*grid(1, 2, 2, 3), "mps")
    (x, weight, bias), size = grid(1, 1, 1, 1)
    out = conv_silu(x, weight, bias, size, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="triton_conv_silu is differentiable once: use float64"):
        gradient.sum().backward()


class Called(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def called_on_a_gpu(function, *tensors):
    """The operators that a function of tensors on a GPU runs; the GPU is a fake."""
    with FakeTensorMode(), Called() as called:
        function(*(torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in tensors))
    return called.names


@needs_triton
def test_a_gpu_takes_the_fast_forms_on_its_own():
    def names(**options):
        tensors, size = grid(1, 2, 3, 4, **options)
        return called_on_a_gpu(lambda *given: conv_silu(*given, size), *(x.detach() for x in tensors))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert names(dtype=dtype, weights=dtype)[-1] == "ssmgen::triton_conv_silu"
    for options in ({"k": 7}, {"dtype": torch.float64, "weights": torch.float64}):
        assert "aten::convolution" in names(**options)
    table, rows = torch.empty(12, 5), torch.zeros(3, 4, dtype=torch.int64)
    for dtype, expected in ((torch.bfloat16, "ssmgen::dense_sum_rows"), (torch.float64, "aten::_embedding_bag")):
        found = called_on_a_gpu(lambda table, rows: sum_rows(table, rows, 3), table.to(dtype), rows)
        assert any(name.startswith(expected) for name in found), found


def embedding(tokens=11, places=9, classes=5, dim=13, dtype=torch.float32):
    rows = torch.randint(0, classes, (tokens, places)) + classes * torch.arange(places)
    return torch.randn(places * classes, dim).to(dtype).requires_grad_(), rows, classes


def embedded(table, rows, classes, backend="dense"):
    return with_gradients(sum_rows(table, rows, classes, backend=backend), [table])


@pytest.mark.parametrize("block", [2**25, 100, 1])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_embedding_as_a_product_agrees_with_float64(block, dtype, allowed, monkeypatch):
    monkeypatch.setattr(dense, "_LARGEST", block)
    table, rows, classes = embedding(dtype=dtype)
    exact = embedded(table.detach().double().requires_grad_(), rows, classes, "torch")
    found = embedded(table, rows, classes)
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.double() - want).norm() < allowed * want.norm()
    assert all(map(torch.equal, found, embedded(table, rows, classes)))


def test_the_matrix_of_ones_is_no_larger_than_its_limit():
    table = torch.empty(256 * 19, 1)
    assert [len(x) for x in dense._blocks(torch.empty(16_384, 1), table)] == [6898, 6898, 2588]
    assert 6898 * len(table) <= dense._LARGEST < 6899 * len(table)


def test_the_embedding_keeps_its_precision_under_autocast_and_is_one_operator():
    table, rows, classes = embedding()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sum_rows(table, rows, classes, backend="dense"), embedded(table, rows, classes)[0])
    torch.library.opcheck(torch.ops.ssmgen.dense_sum_rows, (table, rows, classes))
    backward = (torch.ones(11, 13), table.detach(), rows, classes)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ssmgen.dense_sum_rows_backward, backward, test_utils=tests)


#: Registers of a thread, and modelled cycles for (8, 16 x 16, 2048) on sm_90. See `sass_model`.
MODELLED = {
    "forward_kernel, bf16, 3 x 3, dim 2048, sm_90": (128, 9_285),
    "forward_kernel, fp32, 3 x 3, dim 2048, sm_90": (168, 11_814),
    "backward_kernel, bf16, 3 x 3, dim 2048, sm_90": (208, 25_614),
    "backward_kernel, fp32, 3 x 3, dim 2048, sm_90": (232, 26_577),
}


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="it is compiled and run here anyway")
def test_the_convolution_compiles_for_a_gpu():
    """No kernel keeps a register in memory, nor takes more modelled cycles than it did, with a margin of a quarter."""
    tools = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin"
    if not (tools / "cuobjdump").exists():
        pytest.skip(f"this Triton brings no cuobjdump, which reads machine code, in {tools}")
    done = subprocess.run(
        [sys.executable, ROOT / "tests/compile_local.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(.*): (\d+) registers, (\d+) bytes spilled, (\d+) cycles", done.stdout)
    assert len(found) == 11 and {name for name, *_ in found} >= set(MODELLED), done.stdout
    for name, *numbers in found:
        registers, spilled, cycles = map(int, numbers)
        assert spilled == 0, name
        if name in MODELLED:
            assert registers <= MODELLED[name][0] and cycles <= 1.25 * MODELLED[name][1], (name, registers, cycles)
