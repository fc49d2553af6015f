"""The Triton scan against the float64 reference: interpreted where there is no GPU, compiled where there is one."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import PARTS, arguments, run, with_gradients
from test_ops_cpu import errors
from test_ops_ssd import arguments as ssd_arguments
from test_ops_ssd import run as run_ssd

from ssmgen.ops import ScanOrder, scan_order, selective_scan, ssd
from ssmgen.ops.scan import triton as triton_scan
from ssmgen.ops.scan.inputs import ScanInputs
from ssmgen.ops.ssd import triton as triton_ssd

pytestmark = pytest.mark.skipif(triton_scan.unavailable() is not None, reason=str(triton_scan.unavailable()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[1]


def on_device(args):
    return {k: v.detach().to(DEVICE).requires_grad_(v.requires_grad) for k, v in args.items()}


def against_reference(leave_out=(), **shape):
    args = {k: v for k, v in arguments(**shape, dtype=torch.float32, grad=True).items() if k not in leave_out}
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    got = {k: v.cpu() for k, v in with_gradients(on_device(args), "triton").items()}
    return errors(got, with_gradients(exact, "reference"), least=1.0)


@pytest.mark.parametrize(
    ("batch", "length", "dim", "d_state"),
    [(2, 7, 37, 16), (1, 1, 1, 1), (1, 8, 32, 16), (3, 5, 33, 5), (1, 65, 5, 3), (1, 257, 2, 4), (2, 9, 3, 17)]
    + [(1, 6, 9, 64), (1, 3, 2, 200), (1, 12, 3, 16), (1, 20, 3, 64)],  # the last two: whole groups, not whole rounds
)
def test_agrees_with_the_float64_reference_at_odd_sizes(batch, length, dim, d_state):
    found = against_reference(batch=batch, length=length, dim=dim, d_state=d_state)
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("missing", [("D",), ("z",), ("delta_bias",), ("initial_state",), PARTS[5:]])
@pytest.mark.parametrize("length", [7, 70])
def test_optional_parts(missing, length):
    found = against_reference(missing, length=length)
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("length", [7, 30])
def test_step_sizes_that_are_given_as_they_are(length):
    """Without softplus a step beyond the end has a gradient, that of the last state, which is no step's."""
    args = arguments(batch=2, length=length, dim=5, d_state=3, dtype=torch.float32)
    args |= {name: 0.1 * args[name].abs() for name in ("delta", "delta_bias")}
    args = {name: each.requires_grad_() for name, each in args.items()}
    exact = {name: each.detach().double().requires_grad_() for name, each in args.items()}
    got = {k: v.cpu() for k, v in with_gradients(on_device(args), "triton", softplus=False).items()}
    found = errors(got, with_gradients(exact, "reference", softplus=False), least=1.0)
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize(
    ("batch", "dim", "length", "chunks", "programs"),
    [(8, 2048, 256, 1, 1024), (1, 2048, 256, 8, 1024), (4, 2048, 256, 1, 512), (2, 2048, 256, 4, 1024)]
    + [(1, 768, 1024, 16, 768), (1, 8, 40, 2, 2)],
)
def test_the_length_is_cut_only_where_images_and_channels_leave_the_chip_idle(batch, dim, length, chunks, programs):
    u, states = torch.empty(batch, length, dim, device="meta"), torch.empty(batch, length, 16, device="meta")
    inputs = ScanInputs(u, u, torch.empty(dim, 16, device="meta"), states, states)
    plan = triton_scan._Plan(inputs, triton_scan._Tile.forward(16, whole=True))
    assert plan.chunks == chunks and math.prod(plan.programs) == programs
    assert plan.chunk_length % triton_scan._SEGMENT == 0 and plan.chunk_length * plan.chunks >= length


def test_a_tile_holds_all_states_and_is_made_of_powers_of_two():
    for n in range(1, 257):
        forward = [triton_scan._Tile.forward(n, whole) for whole in (True, False)]
        for tile, most in ((forward[0], 32), (forward[1], 32), (triton_scan._Tile.backward(n), 16)):
            assert all(size & (size - 1) == 0 and size > 0 for size in tile)
            assert tile.STATES % tile.WIDTH == 0 and n <= tile.STATES and triton_scan._SEGMENT % tile.STEPS == 0
            assert triton_scan._ROUND % tile.STEPS == 0 and 32 * most >= tile.CHANNELS * tile.STATES


def test_every_32nd_state_is_saved_for_backward():
    args = on_device(arguments(batch=1, length=70, dim=3, d_state=4, dtype=torch.float32, grad=True))
    inputs = [args[k].detach() for k in ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")]
    *_, saved = torch.ops.ssmgen.triton_scan(*inputs[:6], None, *inputs[6:], None, True, True)
    assert saved.shape == (1, 3, 3, 4)
    torch.testing.assert_close(saved[:, 0], inputs[-1])
    for k in (1, 2):
        short = [x[:, : 32 * k] if x.dim() == 3 and x.shape[1] == 70 else x for x in inputs]
        _, state, _ = torch.ops.ssmgen.triton_scan(*short[:6], None, *short[6:], None, True, False)
        torch.testing.assert_close(saved[:, k], state)


def test_the_cut_of_the_length_changes_no_result(monkeypatch):
    args = on_device(arguments(batch=1, length=70, dim=20, d_state=4, dtype=torch.float32, grad=True))
    chunked = with_gradients(args, "triton")
    monkeypatch.setattr(triton_scan, "_ENOUGH_PROGRAMS", 1)
    whole = with_gradients(args, "triton")
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-4, atol=1e-4)


def test_results_repeat_to_the_bit():
    args = on_device(arguments(batch=1, length=70, dim=33, d_state=4, dtype=torch.float32, grad=True))
    first, second = with_gradients(args, "triton"), with_gradients(args, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_read_and_written_as_they_are(dtype):
    args = on_device(arguments(dtype=dtype, grad=True))
    exact = {k: v.detach().cpu().double().requires_grad_() for k, v in args.items()}
    y, _ = run(args, "triton")
    expected, _ = run(exact, "reference")
    assert y.dtype == dtype
    tolerance = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(y.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    y.float().sum().backward()
    expected.sum().backward()
    for name, value in args.items():
        assert value.grad.dtype == value.dtype
        torch.testing.assert_close(value.grad.cpu().double(), exact[name].grad, rtol=0.03, atol=0.05)


def test_views_are_taken_as_they_are():
    """Slices of a wider projection, and a condition of one image expanded over the batch."""
    wide = torch.randn(3, 9, 2 * 7 + 2 * 4, device=DEVICE)
    u, delta, B, C = wide.split([7, 7, 4, 4], dim=-1)
    A = -torch.rand(7, 4, device=DEVICE)
    for step in (delta.abs(), torch.rand(1, 9, 7, device=DEVICE).expand(3, -1, -1)):
        got = selective_scan(u, step, A, B, C, backend="triton")
        dense = selective_scan(*(x.contiguous() for x in (u, step, A, B, C)), backend="triton")
        assert torch.equal(got, dense)
    shared = [x[:1].expand(3, -1, -1) for x in (B, C)]
    dense = selective_scan(u, delta, A, *(x.contiguous() for x in shared), backend="triton")
    assert torch.equal(selective_scan(u, delta, A, *shared, backend="triton"), dense)


def gated(wide, others, order, backend):
    u, z = wide.chunk(2, dim=-1)
    y, state = selective_scan(
        u, z=z, **others, delta_softplus=True, return_last_state=True, order=order, backend=backend
    )
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64, device=y.device).view_as(y)
    loss = (y.double() * weights).sum() + state.double().cos().sum()
    gradients = torch.autograd.grad(loss, [wide, *others.values()])
    return {"y": y.detach(), **dict(zip(["wide", *others], gradients, strict=True))}


@pytest.mark.parametrize(("dtype", "d_state"), [(torch.float32, 3), (torch.bfloat16, 4)])
def test_the_gate_is_half_of_a_wider_row(dtype, d_state):
    """As a projection gives it, in an order per image and a length that is cut; and twice, to the same bit.

    Rows of B and C are read as words of two bfloat16 where their number is even.
    """
    made = arguments(batch=2, length=35, dim=19, d_state=d_state, dtype=dtype)
    made["wide"] = torch.cat([made.pop("u"), made.pop("z")], dim=-1)
    args = on_device({name: each.requires_grad_() for name, each in made.items()})
    exact = {name: each.detach().cpu().double().requires_grad_() for name, each in args.items()}
    forward = torch.stack([scan_order("column-boustrophedon", 5, 7).forward, torch.arange(34, -1, -1)])
    order = ScanOrder(forward, forward.argsort(1))
    moved = ScanOrder(*(index.to(DEVICE) for index in order))
    first, second = (gated(args["wide"], without(args, "wide"), moved, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    found = errors(
        {name: each.cpu() for name, each in first.items()},
        gated(exact["wide"], without(exact, "wide"), order, "reference"),
        least=1.0,
    )
    assert max(found.values()) < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps), found


def without(args, name):
    return {key: each for key, each in args.items() if key != name}


@pytest.mark.parametrize(
    ("width", "first", "d_state", "words"),
    [(8, 2, 4, True), (8, 1, 4, False), (9, 2, 4, False), (8, 2, 3, False), (4, 0, 4, True)],
)
def test_rows_of_bfloat16_are_words_where_their_numbers_lie_in_pairs(width, first, d_state, words):
    rows = torch.randn(2, 3, width).to(torch.bfloat16)[..., first : first + d_state]
    read = triton_scan._words(rows)
    assert read.dtype == (torch.int32 if words else torch.bfloat16)
    assert torch.equal(read.view(torch.bfloat16), rows)
    assert triton_scan._words(rows.half()).dtype == torch.float16


def test_large_steps_stay_finite():
    args = on_device(arguments(length=20, dtype=torch.float32))
    args["delta"].fill_(1e4)
    y, state = run(args, "triton", softplus=False)
    assert torch.isfinite(y).all() and torch.isfinite(state).all()


def test_operator_registration():
    args = on_device(arguments(dtype=torch.float32, grad=True))
    inputs = [args[k] for k in ("u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")]
    torch.library.opcheck(torch.ops.ssmgen.triton_scan, (*inputs[:6], args["z"], *inputs[6:], None, True, True))


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 or float16 on .*got torch.float64.*'portable'"):
        selective_scan(**arguments(), backend="triton")


def test_a_wrong_order_never_reaches_the_kernel():
    args = on_device(arguments(length=4, dtype=torch.float32))
    order = ScanOrder(torch.arange(5, device=DEVICE), torch.arange(5, device=DEVICE))
    with pytest.raises(ValueError, match=r"two int64 tensors \(4,\)"):
        selective_scan(**args, order=order, backend="triton")


def ssd_results(args, **options):
    y, state = run_ssd(args, **options)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64, device=y.device).view_as(y)
    gradients = torch.autograd.grad((y.double() * weights).sum() + state.double().sum(), list(args.values()))
    return {"y": y.detach(), "state": state.detach(), **dict(zip(args, gradients, strict=True))}


def ssd_against_reference(order=None, **shape):
    args = {name: x.detach().float().requires_grad_() for name, x in ssd_arguments(**shape).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in args.items()}
    moved = order if order is None else ScanOrder(*(index.to(DEVICE) for index in order))
    got = ssd_results(on_device(args), order=moved, backend="triton")
    return errors({k: v.cpu() for k, v in got.items()}, ssd_results(exact, order=order, backend="reference"), least=1.0)


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "groups", "d_state"),
    [(2, 7, 4, 3, 2, 5), (1, 1, 1, 1, 1, 1), (2, 70, 4, 20, 2, 17), (1, 64, 3, 16, 3, 16), (3, 33, 2, 1, 1, 9)],
)
def test_ssd_agrees_with_the_float64_reference_at_odd_sizes(batch, length, heads, width, groups, d_state):
    found = ssd_against_reference(batch=batch, length=length, heads=heads, width=width, groups=groups, d_state=d_state)
    assert max(found.values()) < 1e-5, found


def test_ssd_takes_exponents_of_both_signs():
    """A of both signs and step sizes as they are: within a chunk some decays lie above 1, some below."""
    args = ssd_arguments(length=70, heads=4)
    args |= {
        "A": torch.tensor([-0.8, 0.5, 0.1, -0.1]).double(),
        "delta": args["delta"] * 0.3,
        "delta_bias": args["delta_bias"] * 0,
    }
    args = {name: x.float().requires_grad_() for name, x in args.items()}

    def results(given, backend):
        y, state = ssd(**given, return_last_state=True, backend=backend)
        gradients = torch.autograd.grad(y.double().sum() + state.double().sum(), list(given.values()))
        return {"y": y.detach(), "state": state.detach(), **dict(zip(given, gradients, strict=True))}

    exact = results({name: x.detach().double().requires_grad_() for name, x in args.items()}, "reference")
    found = errors({k: v.cpu() for k, v in results(on_device(args), "triton").items()}, exact, least=1.0)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("each", [False, True])
def test_ssd_reads_any_order_in_place(each):
    order = scan_order("column-boustrophedon", 5, 7)
    if each:  # one per image
        forward = torch.stack([order.forward, torch.arange(35)])
        order = ScanOrder(forward, forward.argsort(1))
    found = ssd_against_reference(order, length=35)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ssd_reads_and_writes_sixteen_bits(dtype):
    args = {k: v.to(dtype) if k in "xBC" else v.float() for k, v in ssd_arguments(length=40).items()}
    args = {k: v.requires_grad_() for k, v in args.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    found, expected = ssd_results(on_device(args), backend="triton"), ssd_results(exact, backend="reference")
    assert found["y"].dtype == found["x"].dtype == found["B"].dtype == dtype and found["state"].dtype == torch.float32
    for name, value in found.items():
        error = (value.cpu().double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 4 * torch.finfo(dtype).eps, name


def test_ssd_takes_views_and_repeats_to_the_bit():
    wide = torch.randn(2, 40, 4 * 3 + 2 * 2 * 5, device=DEVICE)
    x, B, C = wide.split([12, 10, 10], dim=-1)
    x, B, C = x.unflatten(-1, (4, 3)), B.unflatten(-1, (2, 5)), C.unflatten(-1, (2, 5))
    delta, A = torch.rand(1, 40, 4, device=DEVICE).expand(2, -1, -1), -torch.rand(4, device=DEVICE)
    got = ssd(x, delta, A, B, C, backend="triton")
    assert torch.equal(got, ssd(*(each.contiguous() for each in (x, delta, A, B, C)), backend="triton"))


def test_ssd_is_one_operator_of_torch():
    args = on_device({k: v.float().requires_grad_() for k, v in ssd_arguments(length=35).items()})
    inputs = [args[k].detach().requires_grad_() for k in ("x", "delta", "A", "B", "C", "initial_state")]
    torch.library.opcheck(torch.ops.ssmgen.triton_ssd, (*inputs, None))
    torch.compiler.reset()
    compiled = torch.compile(lambda: run_ssd(args, backend="triton")[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), run_ssd(args, backend="triton")[0])
    meta = {k: v.to("meta") for k, v in args.items()}
    if triton_ssd.devices is None:
        assert run_ssd(meta, backend="triton")[0].shape == args["x"].shape


def test_ssd_names_what_its_kernels_do_not_take():
    args = on_device(ssd_arguments(length=2, width=129, d_state=65, dtype=torch.float32))
    with pytest.raises(ValueError, match="head_dim x d_state up to 8192.*got 129 x 65: use backend='chunked'"):
        run_ssd(args, backend="triton")
    with pytest.raises(RuntimeError, match="takes float32, bfloat16 or float16 on .*got torch.float64.*'chunked'"):
        run_ssd(on_device(ssd_arguments()), backend="triton")


#: Of the scan's kernels: registers of a thread, and modelled cycles for (8, 2048, 256) on sm_90, by Triton 3.9 and by
#: 3.6, that of torch 2.11, whose compiler keeps fewer loads ahead of their use. See `sass_model`.
MODELLED = {
    "forward_kernel, fp32, d_state 16, sm_90": (168, 46_744, 48_200),
    "backward_kernel, fp32, d_state 16, sm_90": (255, 235_256, 247_294),
    "forward_kernel, bf16, d_state 16, sm_90": (168, 48_848, 47_720),
    "backward_kernel, bf16, d_state 16, sm_90": (255, 291_852, 291_368),
    "forward_kernel, bf16, d_state 64, sm_90": (255, 161_088, 161_968),
    "backward_kernel, bf16, d_state 64, sm_90": (255, 1_043_732, 972_492),
    "forward_kernel, bf16, d_state 16, gated, sm_90": (168, 54_216, 53_904),
    "backward_kernel, bf16, d_state 16, gated, sm_90": (255, 355_282, 341_444),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="it is compiled and run here anyway")
def test_the_kernels_compile_for_a_gpu():
    """The interpreter takes what the compiler refuses: compile to machine code for a GPU that need not be here.

    The machine code of the scan's kernels keeps no register in memory, and a model of the chip takes no more cycles
    for it than it did, with a margin of a quarter for other compilers.
    """
    triton = pytest.importorskip("triton")
    recent = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    modelled = {name: (most, now if recent else before) for name, (most, now, before) in MODELLED.items()}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (tools / "cuobjdump").exists():
        pytest.skip(f"this Triton brings no cuobjdump, which reads machine code, in {tools}")
    done = subprocess.run(
        [sys.executable, ROOT / "tests/compile_triton.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bytes of machine code") == 26, done.stdout
    shared = [int(amount) for amount in re.findall(r"(\d+) of shared memory", done.stdout)]
    assert len(shared) == 26 and max(shared) <= 163 * 1024  # an A100 has this much for a program, an H100 more
    found = re.findall(r"(.*): (\d+) registers, (\d+) bytes spilled, (\d+) cycles", done.stdout)
    assert {name for name, *_ in found} >= set(modelled)
    for name, *numbers in found:
        registers, spilled, cycles = map(int, numbers)
        assert spilled == 0, name
        if name in modelled:
            assert registers <= modelled[name][0] and cycles <= 1.25 * modelled[name][1], (name, registers, cycles)
