"""What `ssd` and `gated_delta_rule` share: views, devices, autocast, compilation, states, and where they run."""

import pytest
import test_ops_linear_attention as delta_rule
import test_ops_ssd as mamba2
import torch

from ssmgen.ops import ScanOrder, backends

BOTH = pytest.mark.parametrize("module", [mamba2, delta_rule], ids=["ssd", "gated_delta_rule"])
OPERATORS = {mamba2: "ssd", delta_rule: "gated_delta_rule"}


def sequences(args):
    return {name: x for name, x in args.items() if x.dim() > 2 and name != "initial_state"}


@BOTH
def test_a_state_carries_a_scan_on(module):
    args = module.arguments(length=41)
    whole, end = module.run(args)
    first, middle = module.run(args | {name: x[:, :17] for name, x in sequences(args).items()})
    rest = {name: x[:, 17:] for name, x in sequences(args).items()}
    second, last = module.run(args | rest | {"initial_state": middle})
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(last, end)


@BOTH
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_views_give_what_copies_give(module, backend):
    args = module.arguments(length=9)
    views = {name: x.flip(1).contiguous().flip(1).transpose(0, 1).contiguous().transpose(0, 1) for name, x in
             sequences(args).items()}  # fmt: skip
    views = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in views.items()}
    assert not any(x.is_contiguous() for x in views.values())
    torch.testing.assert_close(module.run(args | views, backend=backend), module.run(args, backend=backend))


@BOTH
def test_an_image_does_not_depend_on_its_batch(module):
    args = module.arguments(batch=3, length=40)
    y, state = module.run(args)
    one = {name: x[1:2] for name, x in args.items() if name in sequences(args) or name == "initial_state"}
    torch.testing.assert_close(module.run(args | one), (y[1:2], state[1:2]))


@BOTH
def test_autocast_does_not_reach_into_the_scan(module):
    args = module.arguments(length=40, dtype=torch.float32)
    expected = module.run(args)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.run(args)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@BOTH
def test_meta_and_compilation_in_one_graph(module):
    args = module.arguments(length=40, dtype=torch.float32, grad=True)
    y, state = module.run({name: x.detach().to("meta") for name, x in args.items()})
    expected = module.run(args)
    assert (y.shape, state.shape) == (expected[0].shape, expected[1].shape) and y.device.type == "meta"
    torch.compiler.reset()
    compiled = torch.compile(lambda: module.run(args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), expected, rtol=1e-5, atol=1e-5)


@BOTH
def test_what_is_on_another_device_or_fits_no_token_is_named(module):
    args = module.arguments(dtype=torch.float32)
    with pytest.raises(ValueError, match="initial_state is on meta but . is on cpu: move one of them"):
        module.run(args | {"initial_state": args["initial_state"].to("meta")})
    order = ScanOrder(torch.arange(5), torch.arange(5))
    with pytest.raises(ValueError, match=r"order must be two int64 tensors \(7,\) .* for 7 tokens, got .* \(5,\)"):
        module.run(args, order=order)
    with pytest.raises(ValueError, match=r"initial_state must be \(2, ., 3, 5\) to go with"):
        module.run(args | {"initial_state": torch.zeros(2, 3)})


@BOTH
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_an_order_that_is_no_permutation_is_rejected(module, backend):
    args, places = module.arguments(length=4), torch.arange(4)
    for bad in ([0, 0, 0, 0], [0, 1, 2, 4], [0, 1, 2, -1]):
        for forward in (torch.tensor(bad), torch.tensor([[0, 1, 2, 3], bad])):
            with pytest.raises(ValueError, match=r"each of 0\.\.3 once"):
                module.run(args, order=ScanOrder(forward, places.expand(forward.shape)), backend=backend)
    with pytest.raises(ValueError, match="its inverse undo it"):
        module.run(args, order=ScanOrder(places.roll(1), places), backend=backend)


@BOTH
def test_auto_runs_the_matrix_form_and_says_so(module):
    report = backends(OPERATORS[module])
    assert report["chunked"].auto_for[0] == "cpu" and report["reference"].available
    with pytest.raises(ValueError, match=r"unknown operator 'ssb'.*ssd"):
        backends("ssb")
