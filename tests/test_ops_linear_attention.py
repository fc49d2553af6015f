"""The gated delta rule: the matrix form against the loop, both by hand, gradients, orders and dtypes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen.ops import gated_delta_rule, reorder, scan_order


def arguments(batch=2, length=7, heads=3, width=3, keys=5, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = {
        "q": normal(batch, length, heads, keys),
        "k": F.normalize(normal(batch, length, heads, keys), dim=-1),
        "v": normal(batch, length, heads, width),
        "g": -normal(batch, length, heads).abs(),
        "beta": normal(batch, length, heads).sigmoid(),
        "initial_state": normal(batch, heads, width, keys),
    }
    return {name: x.to(dtype).requires_grad_(grad) for name, x in made.items()}


def run(args, **options):
    return gated_delta_rule(**args, return_last_state=True, **options)


def test_the_loop_is_the_equation():
    args = arguments(batch=1, length=4, heads=2)
    expected = torch.zeros_like(args["v"])
    for head in range(2):
        S = args["initial_state"][0, head]
        for step in range(4):
            q, k, v = (args[name][0, step, head] for name in "qkv")
            decay, beta = args["g"][0, step, head].exp(), args["beta"][0, step, head]
            S = decay * S @ (torch.eye(5, dtype=S.dtype) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
            expected[0, step, head] = S @ q
    y, state = run(args, backend="reference")
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state[0, 1], S)


def test_a_full_correction_replaces_the_value_under_a_key():
    """What sets the rule apart from a state that only adds."""
    args = arguments(batch=1, length=2, heads=1)
    args["k"] = args["k"][:, :1].expand(-1, 2, -1, -1)
    args |= {"q": args["k"], "g": torch.zeros_like(args["g"]), "beta": torch.ones_like(args["beta"])}
    torch.testing.assert_close(run(args)[0], args["v"])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 50),
    st.integers(0, 99),
)  # fmt: skip
def test_chunks_of_any_size_agree_with_the_loop_at_odd_sizes(batch, length, heads, width, keys, chunk, seed):
    args = arguments(batch, length, heads, width, keys, seed=seed)
    torch.testing.assert_close(run(args, chunk=chunk), run(args, backend="reference"), rtol=1e-9, atol=1e-9)


def test_gradients_agree_with_the_loop_and_with_differences():
    args = arguments(length=11, grad=True)

    def gradients(**options):
        y, state = run(args, **options)
        return torch.autograd.grad(y.square().sum() + state.cos().sum(), list(args.values()))

    torch.testing.assert_close(gradients(chunk=4), gradients(backend="reference"), rtol=1e-9, atol=1e-9)
    small = arguments(1, 5, 2, 2, 3, grad=True)
    assert torch.autograd.gradcheck(lambda *x: run(dict(zip(small, x, strict=True)), chunk=2), list(small.values()))


def test_a_decay_of_minus_infinity_empties_the_state():
    args = arguments(length=11)
    args["g"][:, [0, 4, 5, 10]] = -torch.inf
    args = {name: x.requires_grad_() for name, x in args.items()}

    def results(**options):
        y, state = run(args, **options)
        return y, state, *torch.autograd.grad(y.square().sum() + state.cos().sum(), list(args.values()))

    for chunk in (3, 32):
        torch.testing.assert_close(results(chunk=chunk), results(backend="reference"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_close_and_keeps_its_dtype(dtype):
    exact = arguments(length=70)
    args = {name: x.to(dtype) if name in "qkv" else x.float() for name, x in exact.items()}
    found, state = run(args)
    expected = run({name: x.double() for name, x in args.items()}, backend="reference")[0]
    assert found.dtype == dtype and state.dtype == torch.float32
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("keys_alike", [False, True])
def test_hard_sequences_stay_close_and_finite(keys_alike):
    """Steps that forget everything, and one key written again and again, where powers of the system would overflow."""
    args = arguments(length=128, dtype=torch.float32)
    if keys_alike:
        args["k"], args["beta"] = args["k"][:, :1].expand_as(args["k"]), torch.ones_like(args["beta"])
        args["g"] = torch.zeros_like(args["g"])
    else:
        args["g"] = args["g"] * 1e4
    args = {name: x.clone().requires_grad_() for name, x in args.items()}
    y, _ = run(args)
    expected, _ = run({name: x.detach().double() for name, x in args.items()}, backend="reference")
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in args.values())


@pytest.mark.parametrize("order", ["column", "row-reversed"])
def test_any_order_is_a_scan_of_permuted_tokens(order):
    permutation = scan_order(order, 3, 4)
    args = arguments(length=12)
    moved = {name: reorder(x, permutation.forward) if name != "initial_state" else x for name, x in args.items()}
    expected = reorder(run(moved)[0], permutation.inverse)
    torch.testing.assert_close(run(args, order=permutation)[0], expected)
    each = type(permutation)(*(index.expand(2, 12) for index in permutation))
    torch.testing.assert_close(run(args, order=each)[0], expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "best"}, ValueError, "unknown backend 'best': expected 'auto' or one of chunked"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"v": torch.zeros(2, 7, 12)}, ValueError, r"v must be \(batch, length, heads, value_dim\)"),
        ({"v": torch.zeros(0, 7, 3, 3)}, ValueError, r"and not empty, got \(0, 7, 3, 3\)"),
        ({"k": torch.zeros(2, 7, 3, 4)}, ValueError, r"q must be \(2, 7, 3, 4\) to go with .* and k \(2, 7, 3, 4\)"),
        ({"g": torch.zeros(2, 7, 2)}, ValueError, r"g must be \(2, 7, 3\) to go with .*, got \(2, 7, 2\)"),
        ({"k": torch.zeros(2, 7, 3, 5).double()}, TypeError, "k must have v's dtype torch.float32"),
    ],
)
def test_what_does_not_fit_is_explained(change, error, message):
    args = arguments(dtype=torch.float32) | change
    with pytest.raises(error, match=message):
        gated_delta_rule(**args)
