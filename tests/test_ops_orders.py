"""Token orders, and scans of tokens in an order: one for all images or one per image, with every backend."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import arguments

from ssmgen import build
from ssmgen.ops import (
    HILBERT_ORDERS,
    SCAN_ORDERS,
    ZIGZAG_ORDERS,
    ScanOrder,
    register_order,
    reorder,
    scan_directions,
    scan_order,
    scan_orders,
    selective_scan,
)
from ssmgen.ops.scan.selective_scan import SELECTIVE_SCAN

orders = importlib.import_module("ssmgen.ops.scan_order")  # the function of that name hides the module

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


#: Every path, by rows and columns, and some from another corner or with another number.
NAMES = sorted({*scan_orders(), *ZIGZAG_ORDERS, *HILBERT_ORDERS} - {"row"})
NAMES += ["random-7", "window-1", "column-window-3-bottom-right", "row-top-right", "hilbert-bottom-left-reversed"]
sides = st.integers(1, 9)


def sequence_of(name, height, width):
    order = scan_order(name, height, width)
    return torch.arange(height * width) if order is None else order.forward


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(NAMES), height=sides, width=sides)
def test_orders_are_permutations_with_their_inverse(name, height, width):
    order = scan_order(name, height, width)
    tokens = torch.arange(height * width)
    assert sorted(order.forward.tolist()) == tokens.tolist()
    assert tokens[order.forward][order.inverse].tolist() == tokens.tolist()


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(NAMES), height=sides, width=sides)
def test_a_reversed_order_is_the_order_backwards(name, height, width):
    plain, backwards = name.removesuffix("-reversed"), name.removesuffix("-reversed") + "-reversed"
    assert torch.equal(sequence_of(backwards, height, width), sequence_of(plain, height, width).flip(0))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([n for n in NAMES if "boustrophedon" in n or "hilbert" in n]),
    height=st.integers(1, 33),
    width=st.integers(1, 33),
)
def test_boustrophedon_and_hilbert_step_to_neighbours(name, height, width):
    sequence = scan_order(name, height, width).forward
    rows, columns = sequence // width, sequence % width
    assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()


@settings(max_examples=50, deadline=None)
@given(path=st.sampled_from(["", "-boustrophedon", "-hilbert", "-window-3", "-random-2"]), height=sides, width=sides)
def test_corners_and_columns_are_views_of_one_path(path, height, width):
    def mirrored(grid, corner):
        flipped = [axis for axis, end in enumerate(("bottom", "right")) if end in corner]
        return grid.flip(flipped)

    grid = torch.arange(height * width).view(height, width)
    for corner in ("-top-right", "-bottom-left", "-bottom-right"):
        expected = mirrored(grid, corner).flatten()[sequence_of(f"row{path}", height, width)]
        assert torch.equal(sequence_of(f"row{path}{corner}", height, width), expected)
        expected = mirrored(grid, corner).t().flatten()[sequence_of(f"row{path}", width, height)]
        assert torch.equal(sequence_of(f"column{path}{corner}", height, width), expected)


def test_the_zigzag_orders_are_zigmas_eight():
    """Written as ZigMa's ``zigzag_path``: from each corner, rows first, then columns."""
    n, expected = 4, []
    for row, column, down, right in ((0, 0, 1, 1), (0, n - 1, 1, -1), (n - 1, 0, -1, 1), (n - 1, n - 1, -1, -1)):
        turning = [[j if i % 2 == 0 else n - 1 - j for j in range(n)] for i in range(n)]
        expected.append([(row + down * i) * n + column + right * j for i in range(n) for j in turning[i]])
        expected.append([(row + down * i) * n + column + right * j for j in range(n) for i in turning[j]])
    assert [sequence_of(name, n, n).tolist() for name in ZIGZAG_ORDERS] == expected
    assert len({tuple(path) for path in expected}) == 8


def test_the_hilbert_orders_of_a_square_are_the_curve_seen_from_eight_sides():
    assert sequence_of("hilbert", 4, 4).tolist() == [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3]
    assert len({tuple(sequence_of(name, 4, 4).tolist()) for name in HILBERT_ORDERS}) == 8
    # Locality: 64 tokens in a row are a square of the image.
    quarter = sequence_of("hilbert", 16, 16)[64:128]
    assert (quarter // 16).unique().numel() == (quarter % 16).unique().numel() == 8


def test_diagonals_are_scanned_as_jpeg_does():
    forward = scan_order("row-diagonal", 3, 4).forward.tolist()
    assert forward == [0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11]


def test_windows_are_scanned_one_after_the_other():
    expected = [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], [10, 11], [12, 13], [14]]
    assert sequence_of("window-2", 3, 5).tolist() == sum(expected, [])
    assert torch.equal(sequence_of("window-9", 3, 5), torch.arange(15))


def test_random_orders_are_the_same_everywhere():
    assert sequence_of("random-7", 3, 4).tolist() == [9, 8, 2, 6, 10, 0, 11, 1, 3, 5, 7, 4]
    first, second = sequence_of("random-1", 16, 16), sequence_of("random-2", 16, 16)
    assert (first == second).sum() < 8 and (first == torch.arange(256)).sum() < 8
    assert abs(torch.corrcoef(torch.stack([first, torch.arange(256)]).double())[0, 1]) < 0.2


def test_names_have_a_short_form_and_a_list():
    for path in ("boustrophedon", "hilbert", "window-3", "random-5"):
        assert torch.equal(sequence_of(path, 3, 5), sequence_of(f"row-{path}", 3, 5))
    assert scan_orders()[:8] == list(SCAN_ORDERS) and len(set(scan_orders())) == len(scan_orders())


BAD_NAMES = ["rows", "row-", "spiral", "", "-reversed", "window", "window-0", "window--4", "row-window-4-", "row-row"]
BAD_NAMES += ["row-hilbert-3", "row--hilbert", "row-reversed-reversed", "bottom-left", "row-bottom-left-top-right"]
BAD_NAMES += ["hilbert-top-left", "window-²", "window-1.5", "random--1", "column-column"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_rejected(name):
    with pytest.raises(ValueError, match="unknown scan order.*All: row, column, "):
        scan_order(name, 2, 2)


def test_unknown_order():
    with pytest.raises(ValueError, match="unknown scan order 'rows'.*'row'"):
        scan_order("rows", 2, 2)


def test_a_path_of_ones_own(monkeypatch):
    monkeypatch.setattr(orders, "_PATHS", dict(orders._PATHS))

    @register_order("slope")
    def slope(lines):
        height, width = lines.shape
        place = torch.arange(height)[:, None] + torch.arange(width)
        return lines.flatten()[torch.argsort(place.flatten(), stable=True)]

    assert sequence_of("slope", 2, 3).tolist() == [0, 1, 3, 2, 4, 5]
    assert sequence_of("column-slope-top-right-reversed", 2, 3).tolist() == [3, 0, 4, 1, 5, 2]
    assert "row-slope" in scan_orders()
    register_order("rowspiral")(slope)
    register_order("columnwise")(slope)
    assert scan_directions("rowspiral", 4)[1] == "column-rowspiral"
    assert scan_directions("columnwise-reversed", 4)[1] == "column-columnwise-reversed"
    assert scan_directions("column-rowspiral", 4)[1] == "row-rowspiral"
    layer = build("cross-scan-mamba", dim=8, order="rowspiral")
    assert layer(torch.randn(1, 6, 8), (2, 3)).shape == (1, 6, 8)
    for name in ("slope", "column", "left", "two-words", "ring3"):
        with pytest.raises(ValueError, match=f"is one word that is not taken, got '{name}'"):
            register_order(name)


@pytest.mark.parametrize("dynamic", [False, True])
def test_orders_compile_as_part_of_one_graph(dynamic):
    names = ("column", "hilbert-bottom-right", "column-window-3", "random-5-reversed")

    def function(x):
        found = [scan_order(name, *x.shape[1:], device=x.device) for name in names]
        return torch.stack([reorder(x.flatten(1), order.forward) for order in found])

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 6, 5), (2, 7, 9)):
        x = torch.randn(shape)
        assert torch.equal(compiled(x), function(x))


@pytest.mark.parametrize("name", NAMES)
def test_orders_of_meta_tensors(name):
    order = scan_order(name, 3, 5, "meta")
    assert order.forward.is_meta and order.forward.shape == order.inverse.shape == (15,)


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
