"""Token orders, and scans of tokens in an order: one for all images or one per image, with every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import arguments

from ssmgen.ops import SCAN_ORDERS, ScanOrder, reorder, scan_order, selective_scan
from ssmgen.ops.scan.selective_scan import SELECTIVE_SCAN

TOKENS = ("u", "delta", "B", "C", "z")
#: Those that can run here; mamba-ssm's op takes no initial state.
BACKENDS = [b for b in SELECTIVE_SCAN.backends if b.unavailable() is None and b.name != "mamba-ssm"]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)


def inputs_for(backend, **shape):
    """Arguments in the widest dtype that a backend takes, on a device that it takes, with that device."""
    device = "cuda" if torch.cuda.is_available() and "cuda" in (backend.devices or ()) else "cpu"
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    made = arguments(**shape, dtype=dtype)
    return {name: x.to(device).requires_grad_() for name, x in made.items()}, device


def gradients(args, *outputs):
    weighted = (torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view_as(x) * x for x in outputs)
    return torch.autograd.grad(sum(x.sum() for x in weighted), list(args.values()))


def one_order_per_image(batch, length, device="cpu"):
    forward = torch.stack([torch.randperm(length) for _ in range(batch)]).to(device)
    return ScanOrder(forward, forward.argsort(1))


def each_image_alone(args, order, backend):
    """The outputs and last states of images scanned one by one, each with its own order."""
    found = []
    for i, (forward, inverse) in enumerate(zip(*order, strict=True)):
        image = {k: x[i : i + 1] if k in (*TOKENS, "initial_state") else x for k, x in args.items()}
        alone = ScanOrder(forward, inverse)
        found.append(selective_scan(**image, delta_softplus=True, return_last_state=True, order=alone, backend=backend))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def test_orders_made_while_sampling_serve_training():
    with torch.inference_mode():
        order = scan_order("column", 11, 13)
    weights = torch.randn(1, 143, 2, requires_grad=True)
    reorder(weights, order.forward).sum().backward()
    assert weights.grad is not None


EXPECTED_ORDERS = {
    "row": [0, 1, 2, 3, 4, 5],
    "column": [0, 3, 1, 4, 2, 5],
    "row-reversed": [5, 4, 3, 2, 1, 0],
    "column-reversed": [5, 2, 4, 1, 3, 0],
    "row-boustrophedon": [0, 1, 2, 5, 4, 3],
    "column-boustrophedon": [0, 3, 4, 1, 2, 5],
    "row-boustrophedon-reversed": [3, 4, 5, 2, 1, 0],
    "column-boustrophedon-reversed": [5, 2, 1, 4, 3, 0],
}


@pytest.mark.parametrize("name", SCAN_ORDERS)
def test_orders_of_a_small_grid(name):
    order = scan_order(name, 2, 3)
    tokens = torch.arange(6)
    assert (tokens if order is None else tokens[order.forward]).tolist() == EXPECTED_ORDERS[name]


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(SCAN_ORDERS[1:]), height=st.integers(1, 9), width=st.integers(1, 9))
def test_orders_are_permutations_with_their_inverse(name, height, width):
    order = scan_order(name, height, width)
    tokens = torch.arange(height * width)
    assert sorted(order.forward.tolist()) == tokens.tolist()
    assert tokens[order.forward][order.inverse].tolist() == tokens.tolist()


def test_boustrophedon_steps_to_neighbours():
    for name in (n for n in SCAN_ORDERS if "boustrophedon" in n):
        sequence = scan_order(name, 5, 4).forward
        rows, columns = sequence // 4, sequence % 4
        assert ((rows.diff().abs() + columns.diff().abs()) == 1).all(), name


def test_unknown_order():
    with pytest.raises(ValueError, match="unknown scan order 'rows'.*'row'"):
        scan_order("rows", 2, 2)


@each_backend
@pytest.mark.parametrize("name", SCAN_ORDERS)
def test_an_order_is_the_scan_of_permuted_tokens(backend, name):
    args, device = inputs_for(backend, length=12, dim=6)
    order = scan_order(name, 3, 4, device)
    forward, inverse = (torch.arange(12, device=device),) * 2 if order is None else order
    got = selective_scan(**args, order=order, backend=backend.name)
    permuted = {k: v[:, forward] if k in TOKENS else v for k, v in args.items()}
    expected = selective_scan(**permuted, backend=backend.name)[:, inverse]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(args, got), gradients(args, expected))


@each_backend
@pytest.mark.parametrize(
    ("batch", "length", "dim", "d_state"), [(3, 7, 5, 3), (2, 19, 37, 16), (2, 70, 5, 3), (1, 9, 1, 1), (4, 1, 3, 2)]
)
def test_an_order_per_image_is_the_scan_of_each_image_alone(backend, batch, length, dim, d_state):
    args, device = inputs_for(backend, batch=batch, length=length, dim=dim, d_state=d_state)
    order = one_order_per_image(batch, length, device)
    got = selective_scan(**args, delta_softplus=True, return_last_state=True, order=order, backend=backend.name)
    expected = each_image_alone(args, order, backend.name)
    torch.testing.assert_close(list(got), expected)
    torch.testing.assert_close(gradients(args, *got), gradients(args, *expected))


@each_backend
def test_the_same_order_for_each_image_is_one_order_for_all(backend):
    args, device = inputs_for(backend, batch=3, length=12, dim=6)
    order = scan_order("column-boustrophedon", 3, 4, device)
    repeated = ScanOrder(*(index.expand(3, -1) for index in order))
    one, each = (selective_scan(**args, order=o, backend=backend.name) for o in (order, repeated))
    assert torch.equal(one, each)


@each_backend
def test_an_order_per_image_compiles_as_one_graph(backend):
    args, device = inputs_for(backend, batch=3, length=9, dim=6)
    order = one_order_per_image(3, 9, device)

    def function(forward, inverse, **tensors):
        order = ScanOrder(forward, inverse)
        return selective_scan(**tensors, return_last_state=True, order=order, backend=backend.name)

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got, expected = compiled(*order, **args), function(*order, **args)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(args, *got), gradients(args, *expected))


def test_auto_takes_an_order_per_image_of_views_in_16_bits():
    """Slices of a wider projection, and a condition of one image expanded over the batch."""
    args = arguments(batch=3, length=11, dim=6, dtype=torch.bfloat16)
    order = one_order_per_image(3, 11)
    args["u"] = torch.cat([args["u"], args["z"]], -1)[..., :6]
    args["delta"] = args["delta"][:1].expand(3, -1, -1)
    got = selective_scan(**args, delta_softplus=True, return_last_state=True, order=order)
    torch.testing.assert_close(list(got), each_image_alone(args, order, "auto"))


def test_reorder_takes_one_index_for_all_images_or_one_per_image():
    tokens = torch.randn(3, 5, 2, requires_grad=True)
    order = one_order_per_image(3, 5)
    got = reorder(tokens, order.forward)
    assert torch.equal(got, torch.stack([x[i] for x, i in zip(tokens, order.forward, strict=True)]))
    assert torch.equal(reorder(got, order.inverse), tokens)
    assert torch.equal(reorder(tokens, order.forward[0]), tokens[:, order.forward[0]])
    assert torch.equal(reorder(tokens[:1], order.forward), reorder(tokens[:1].expand(3, -1, -1), order.forward))
    assert reorder(tokens, None) is tokens


def test_an_order_of_another_length_is_refused():
    args = arguments(length=7)
    with pytest.raises(ValueError, match=r"two int64 tensors \(7,\)"):
        selective_scan(**args, order=scan_order("column", 2, 4))


@pytest.mark.parametrize("change", [lambda index: index[:1], lambda index: index.t(), lambda index: index[None]])
def test_an_order_of_another_batch_is_rejected(change):
    order = ScanOrder(*map(change, one_order_per_image(2, 7)))
    with pytest.raises(ValueError, match=r"\(2, 7\) for one order per image.*got torch.int64"):
        selective_scan(**arguments(), order=order)


def test_both_indices_of_an_order_have_one_form():
    forward, inverse = one_order_per_image(2, 7)
    with pytest.raises(ValueError, match=r"got torch.int64 \(7,\)"):
        selective_scan(**arguments(), order=ScanOrder(forward, inverse[0]))
