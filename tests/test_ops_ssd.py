"""Mamba-2's scan: the matrix form against the loop, both by hand, gradients, orders and dtypes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.ops import reorder, scan_order, ssd


def arguments(batch=2, length=7, heads=4, width=3, groups=2, d_state=5, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = {
        "x": normal(batch, length, heads, width),
        "delta": normal(batch, length, heads),
        "A": -torch.rand(heads, generator=g, dtype=torch.float64) * 3,
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(heads),
        "delta_bias": normal(heads),
        "initial_state": normal(batch, heads, width, d_state),
    }
    return {name: x.to(dtype).requires_grad_(grad) for name, x in made.items()}


def run(args, **options):
    return ssd(**args, delta_softplus=True, return_last_state=True, **options)


def test_the_loop_is_the_equation():
    args = arguments(batch=1, length=3, heads=2, width=2, groups=1, d_state=2)
    delta = F.softplus(args["delta"] + args["delta_bias"])
    expected = torch.zeros_like(args["x"])
    for head in range(2):
        H = args["initial_state"][0, head]
        for k in range(3):
            x_k, B_k, C_k = args["x"][0, k, head], args["B"][0, k, 0], args["C"][0, k, 0]
            H = torch.exp(delta[0, k, head] * args["A"][head]) * H + delta[0, k, head] * torch.outer(x_k, B_k)
            expected[0, k, head] = H @ C_k + args["D"][head] * x_k
    torch.testing.assert_close(run(args, backend="reference")[0], expected)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 5),
    st.integers(1, 6), st.integers(1, 50), st.integers(0, 99),
)  # fmt: skip
def test_chunks_of_any_size_agree_with_the_loop_at_odd_sizes(batch, length, heads, width, d_state, chunk, seed):
    args = arguments(batch, length, heads[0], width, heads[1], d_state, seed=seed)
    torch.testing.assert_close(run(args, chunk=chunk), run(args, backend="reference"), rtol=1e-9, atol=1e-9)


def test_gradients_agree_with_the_loop_and_with_differences():
    args = arguments(length=11, grad=True)

    def gradients(**options):
        y, state = run(args, **options)
        return torch.autograd.grad(y.square().sum() + state.cos().sum(), list(args.values()))

    torch.testing.assert_close(gradients(chunk=4), gradients(backend="reference"), rtol=1e-9, atol=1e-9)
    small = arguments(1, 5, 2, 2, 1, 2, grad=True)
    assert torch.autograd.gradcheck(lambda *x: run(dict(zip(small, x, strict=True)), chunk=2), list(small.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_close_and_keeps_its_dtype(dtype):
    exact = arguments(length=40)
    args = {name: x.to(dtype) if name in "xBC" else x.float() for name, x in exact.items()}
    found, state = run(args)
    expected = run({name: x.double() for name, x in args.items()}, backend="reference")[0]
    assert found.dtype == dtype and state.dtype == torch.float32
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


def test_long_steps_neither_overflow_nor_void_a_gradient():
    args = arguments(length=64, dtype=torch.float32)
    args["delta"] = (args["delta"] * 1e4).requires_grad_()
    y, _ = run(args)
    y.sum().backward()
    assert y.isfinite().all() and args["delta"].grad.isfinite().all()


@pytest.mark.parametrize("order", ["column", "row-reversed"])
def test_any_order_is_a_scan_of_permuted_tokens(order):
    permutation = scan_order(order, 3, 4)
    args = arguments(length=12)
    moved = {
        name: reorder(x, permutation.forward) if name in ("x", "delta", "B", "C") else x for name, x in args.items()
    }
    expected = reorder(run(moved)[0], permutation.inverse)
    torch.testing.assert_close(run(args, order=permutation)[0], expected)
    each = type(permutation)(*(index.expand(2, 12) for index in permutation))
    torch.testing.assert_close(run(args, order=each)[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "best"}, ValueError, "unknown backend 'best': expected 'auto' or one of chunked"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"x": torch.zeros(2, 7, 12)}, ValueError, r"x must be \(batch, length, heads, head_dim\)"),
        ({"B": torch.zeros(2, 7, 3, 5)}, ValueError, "groups that divide 4 heads"),
        ({"delta": torch.zeros(2, 7, 3)}, ValueError, r"delta must be \(2, 7, 4\) to go with x \(2, 7, 4, 3\)"),
        ({"C": torch.zeros(2, 7, 2, 5, dtype=torch.float64)}, TypeError, "C must have x's dtype torch.float32"),
    ],
)
def test_what_does_not_fit_is_explained(change, error, message):
    args = arguments(dtype=torch.float32) | change
    with pytest.raises(error, match=message):
        ssd(**args)
