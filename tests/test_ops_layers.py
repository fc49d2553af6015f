"""The layers around the scan: the kernels for a CPU against torch's own functions in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.ops import conv_silu, cpu_library, gelu, norm, sum_rows

needs_kernels = pytest.mark.skipif(
    cpu_library.unavailable() is not None, reason=f"no kernels: {cpu_library.unavailable()}"
)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def norm_case(batch, length, dim, *, rows=1, gate=True, dtype=torch.float32):
    tensors = [normal(batch, length, dim, dtype=dtype), normal(rows, dim), normal(rows, dim)]
    tensors += [normal(batch, length, dim, dtype=dtype)] if gate else []
    return lambda *given: norm(*given), tensors


def conv_case(batch, height, width, dim, *, k=3, dtype=torch.float32):
    tensors = normal(batch, height * width, dim, dtype=dtype), normal(dim, 1, k, k), normal(dim)
    return lambda *given: conv_silu(*given, (height, width)), tensors


def gelu_case(*shape, dtype=torch.float32):
    return gelu, [normal(*shape, dtype=dtype)]


def rows_case(tokens, places, classes, dim, *, dtype=torch.float32):
    rows = torch.randint(0, classes, (tokens, places)) + classes * torch.arange(places)
    return lambda table: sum_rows(table, rows, classes), [normal(places * classes, dim, dtype=dtype)]


def with_gradients(function, tensors):
    out = function(*tensors)
    slopes = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, list(tensors), slopes)]


def error(case):
    """The largest L2 error of the result and the gradients, relative to their size, against float64."""
    function, tensors = case
    exact = with_gradients(function, [x.detach().double().requires_grad_() for x in tensors])
    pairs = zip(with_gradients(function, tensors), exact, strict=True)
    return max(((got.double() - want).norm() / want.norm().clamp(min=1)).item() for got, want in pairs)


def every_case(seed=0, **dtype):
    torch.manual_seed(seed)
    return {
        "norm and gate": norm_case(3, 37, 21, **dtype),
        "adaln": norm_case(2, 33, 40, rows=2, gate=False, **dtype),
        "conv": conv_case(2, 5, 7, 37, **dtype),
        "wide conv": conv_case(1, 4, 6, 9, k=5, **dtype),
        "pointwise conv": conv_case(2, 3, 3, 33, k=1, **dtype),
        "gelu": gelu_case(3, 2741, **dtype),
        "rows": rows_case(29, 9, 5, 13, **dtype),
    }


@pytest.mark.parametrize("name", every_case())
def test_agrees_with_float64(name):
    assert error(every_case()[name]) < 1e-6


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3), height=st.integers(1, 6), width=st.integers(1, 6), dim=st.integers(1, 70),
    k=st.sampled_from([1, 3, 5]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_agrees_at_odd_sizes(batch, height, width, dim, k, seed):
    torch.manual_seed(seed)
    cases = [
        conv_case(batch, height, width, dim, k=k),
        norm_case(batch, height * width, dim + 5),
        norm_case(batch, height * width, dim + 5, rows=batch, gate=False),
        gelu_case(height, width, dim),
        rows_case(height * width, k * k, batch + 1, dim),
    ]
    assert max(map(error, cases)) < 2e-5


@pytest.mark.parametrize("name", every_case())
def test_the_float64_form_has_its_gradient(name):
    function, tensors = every_case()[name]
    if sum(x.numel() for x in tensors) > 3000:
        tensors = [x[..., :50] for x in tensors]
    assert torch.autograd.gradcheck(function, [x.detach().double().requires_grad_() for x in tensors], fast_mode=True)


def test_the_equations():
    """Against torch's modules, put together by hand."""
    x, z = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    layer, conv = torch.nn.LayerNorm(8), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    torch.nn.init.normal_(layer.weight)
    torch.testing.assert_close(norm(x, layer.weight, layer.bias, z), layer(x) * F.silu(z))
    torch.testing.assert_close(
        norm(x, layer.weight, layer.bias, eps=0.1), F.layer_norm(x, (8,), *layer.parameters(), 0.1)
    )
    grid = conv(x.transpose(1, 2).unflatten(2, (2, 3))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(conv_silu(x, conv.weight, conv.bias, (2, 3)), F.silu(grid))
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))


@needs_kernels
def test_bfloat16_is_rounded_only_at_the_edges():
    """As exact as a float32 result of the same 16-bit inputs, rounded once."""
    for name, (function, tensors) in every_case(dtype=torch.bfloat16).items():
        exact = function(*(x.detach().double() for x in tensors))
        got = function(*tensors)
        assert got.dtype == torch.bfloat16, name
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all(), name
    assert max(error(case) for case in every_case(dtype=torch.bfloat16).values()) < 0.01


@needs_kernels
def test_slices_of_a_projection_are_taken_as_they_are():
    wide = torch.randn(2, 15, 80)
    for part in (wide[..., :40], wide[..., 40:]):
        function, (_, *rest) = conv_case(2, 3, 5, 40)
        assert torch.equal(function(part, *rest), function(part.contiguous(), *rest))
        function, (y, *rest, _) = norm_case(2, 15, 40)
        assert torch.equal(function(y, *rest, part), function(y, *rest, part.contiguous()))
        assert torch.equal(function(part, *rest, part), function(part.contiguous(), *rest, part))


def test_results_repeat_to_the_bit_for_any_number_of_threads():
    """Forward and backward; torch's SiLU alone would not, on some processors."""
    torch.manual_seed(0)
    cases = [norm_case(3, 133, 193), conv_case(3, 7, 9, 193), gelu_case(33333), rows_case(77, 20, 6, 37)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append([x for case in cases for x in with_gradients(*case)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@needs_kernels
def test_an_image_does_not_depend_on_its_batch():
    for function, (x, *rest) in (conv_case(3, 4, 5, 33), norm_case(3, 20, 33, gate=False)):
        assert torch.equal(function(x, *rest)[1:2], function(x[1:2], *rest))


@needs_kernels
@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 1e30, -1e30])
def test_extreme_values_stay_finite(value):
    x = torch.full((1, 9, 20), value, requires_grad=True)
    ones = torch.ones(20)
    for out in (gelu(x), conv_silu(x, torch.ones(20, 1, 1, 1), ones, (3, 3)), norm(x, ones, ones, x.clamp(-1e4, 1e4))):
        assert out.isfinite().all()
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all() or abs(value) > 1e20


@needs_kernels
def test_what_is_no_number_stays_none():
    for name, (function, tensors) in every_case().items():
        tensors[0].data.view(-1)[0] = float("nan")
        assert all(x.isnan().any() for x in with_gradients(function, tensors)[:1]), name


@needs_kernels
def test_every_instruction_set(isa):
    assert isa in cpu_library.describe()
    assert max(map(error, every_case().values())) < 2e-6
    test_bfloat16_is_rounded_only_at_the_edges()
    test_results_repeat_to_the_bit_for_any_number_of_threads()


@needs_kernels
def test_operator_registration():
    operators = torch.ops.ssmgen
    _, (x, weight, bias, z) = norm_case(2, 5, 6)
    torch.library.opcheck(operators.cpu_norm, (x, weight, bias, z, 1e-5))
    torch.library.opcheck(operators.cpu_norm, (x, weight, bias, None, 1e-5))
    torch.library.opcheck(operators.cpu_conv_silu, (*conv_case(2, 3, 4, 6)[1], 3, 4))
    torch.library.opcheck(operators.cpu_gelu, (x,))
    torch.library.opcheck(
        operators.cpu_sum_rows, (normal(12, 5), torch.arange(12).view(3, 4) // 4 + torch.arange(4) * 3, 3)
    )


@needs_kernels
def test_backward_operators_are_what_their_fakes_say():
    """Inductor relies on it, strides included."""
    operators, out = torch.ops.ssmgen, torch.randn
    _, (x, weight, bias, z) = norm_case(2, 5, 6)
    plain = [each.detach() for each in (x, weight, bias, z)]
    grid = [each.detach() for each in conv_case(2, 3, 4, 6)[1]]
    table, rows = torch.randn(12, 5), torch.arange(4).expand(3, 4) * 3
    for operator, arguments in (
        (operators.cpu_norm_backward, (out(2, 5, 6), *plain, 1e-5)),
        (operators.cpu_conv_silu_backward, (out(2, 12, 6), *grid, 3, 4)),
        (operators.cpu_gelu_backward, (out(2, 5, 6), plain[0])),
        (operators.cpu_sum_rows_backward, (out(3, 5), table, rows, 3)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


BAD = {
    "tokens that do not fill the grid": (lambda x: conv(x, 4, 3, (2, 2)), r"\(batch, 4, dim\)"),
    "weights of other channels": (lambda x: conv(x, 3, 3, (2, 3)), r"\(4, 1, k, k\)"),
    "an even kernel": (lambda x: conv(x, 4, 2, (2, 3)), "odd k"),
    "rows for another batch": (lambda x: norm(x, torch.ones(3, 4), torch.ones(3, 4)), r"\(2, 4\) for x"),
    "another bias": (lambda x: norm(x, torch.ones(4), torch.ones(2, 4)), "both be"),
    "another gate": (lambda x: norm(x, torch.ones(4), torch.ones(4), x[:1]), "z of its shape"),
    "int32 rows": (lambda x: sum_rows(x[0], torch.zeros(2, 3, dtype=torch.int32), 2), "int64"),
    "another table": (lambda x: sum_rows(x[0], torch.zeros(2, 2, dtype=torch.int64), 2), r"\(places \* 2, dim\)"),
}


def conv(x, dim, k, size):
    return conv_silu(x, torch.ones(dim, 1, k, k), torch.ones(4), size)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_fit_never_reaches_a_kernel(case, dtype):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 6, 4, dtype=dtype))


@needs_kernels
def test_a_second_derivative_is_refused():
    x = normal(4, 4)
    (gradient,) = torch.autograd.grad(gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: use float64"):
        gradient.sum().backward()
