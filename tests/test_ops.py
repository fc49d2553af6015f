"""The scan's contract, its portable and reference forms, and the choice of a backend."""

import shutil
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmgen import ops
from ssmgen.ops import ScanInputs, dispatch, selective_scan
from ssmgen.ops.backend import FLOATS
from ssmgen.ops.scan import cpu, mamba_ssm
from ssmgen.ops.scan.selective_scan import SELECTIVE_SCAN

PARTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def arguments(batch=2, length=7, dim=5, d_state=3, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = {
        "u": normal(batch, length, dim),
        "delta": normal(batch, length, dim),
        "A": -torch.rand(dim, d_state, generator=g, dtype=torch.float64) * 3,
        "B": normal(batch, length, d_state),
        "C": normal(batch, length, d_state),
        "D": normal(dim),
        "z": normal(batch, length, dim),
        "delta_bias": normal(dim),
        "initial_state": normal(batch, dim, d_state),
    }
    exact = {"A", "D", "delta_bias", "initial_state"}
    keep = torch.float64 if dtype == torch.float64 else torch.float32
    return {k: v.to(keep if k in exact else dtype).requires_grad_(grad) for k, v in made.items()}


def run(args, backend, softplus=True):
    return selective_scan(**args, delta_softplus=softplus, return_last_state=True, backend=backend)


def with_gradients(args, backend, softplus=True):
    y, state = run(args, backend, softplus)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view_as(y)
    gradients = torch.autograd.grad((y.double() * weights).sum() + state.double().cos().sum(), list(args.values()))
    return {"y": y, "state": state, **dict(zip(args, gradients, strict=True))}


def by_hand(args):
    """The equations, element by element."""
    delta = F.softplus(args["delta"] + args["delta_bias"])
    batch, length, dim = args["u"].shape
    y = torch.zeros_like(args["u"])
    h = args["initial_state"].clone()
    for b in range(batch):
        for k in range(length):
            for d in range(dim):
                step = delta[b, k, d]
                h[b, d] = torch.exp(step * args["A"][d]) * h[b, d] + step * args["B"][b, k] * args["u"][b, k, d]
                value = (args["C"][b, k] * h[b, d]).sum() + args["D"][d] * args["u"][b, k, d]
                z = args["z"][b, k, d]
                y[b, k, d] = value * z * torch.sigmoid(z)
    return y, h


def test_reference_is_the_equation():
    args = arguments()
    y, state = run(args, "reference")
    expected_y, expected_state = by_hand(args)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_gradcheck(backend):
    args = arguments(batch=1, length=5, dim=2, d_state=2, grad=True)

    def function(*values):
        return run(dict(zip(PARTS, values, strict=True)), backend)

    assert torch.autograd.gradcheck(function, tuple(args.values()))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    dim=st.integers(1, 9),
    d_state=st.integers(1, 9),
    softplus=st.booleans(),
)
def test_portable_agrees_with_reference(batch, length, dim, d_state, softplus):
    args = arguments(batch, length, dim, d_state, grad=True)
    if not softplus:  # a negative step grows without bound
        for part in ("delta", "delta_bias"):
            args[part] = args[part].detach().abs().requires_grad_()
    expected, got = (with_gradients(args, backend, softplus) for backend in ("reference", "portable"))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("slices", [1, 3])
def test_portable_in_slices_of_channels(slices, monkeypatch):
    from ssmgen.ops.scan import portable

    args = arguments(length=11, dim=7, grad=True)
    expected = with_gradients(args, "reference")
    monkeypatch.setattr(portable, "_WORKING_ELEMENTS_CPU", slices * 2 * 11 * 3)
    got = with_gradients(args, "portable")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("backend", ["portable", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_keeps_a_float32_state(backend, dtype):
    args = arguments(length=33, dim=6, dtype=dtype, grad=True)
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    got, expected = with_gradients(args, backend), with_gradients(exact, "reference")
    assert got["y"].dtype == dtype and got["state"].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name in expected:
        error = (got[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("backend", ["reference", "portable", "auto"])
def test_no_overflow_at_any_step_size(backend):
    args = arguments(length=64, dtype=torch.float32, grad=True)
    with torch.no_grad():
        args["delta"].mul_(0).add_(torch.logspace(-6, 4, 64).view(1, -1, 1))
        args["A"].mul_(0).sub_(1e3)
    for name, value in with_gradients(args, backend).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("backend", ["portable", "auto"])
def test_autocast_does_not_reach_into_the_scan(backend):
    args = arguments(length=33, dim=6, dtype=torch.float32, grad=True)
    plain = with_gradients(args, backend)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = with_gradients(args, backend)
    for name in plain:
        torch.testing.assert_close(mixed[name], plain[name], rtol=1e-4, atol=1e-4)


def test_optional_parts_may_be_left_out():
    args = {k: v for k, v in arguments().items() if k in ("u", "delta", "A", "B", "C")}
    args["delta"] = args["delta"].abs()
    y = selective_scan(**args, backend="reference")
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(selective_scan(**args, backend="portable"), y)


def test_a_state_carries_a_scan_on():
    args = arguments(length=9)
    whole, end = run(args, "portable")
    cut = {k: v[:, :4] if k in ("u", "delta", "B", "C", "z") else v for k, v in args.items()}
    first, middle = run(cut, "portable")
    rest = {k: v[:, 4:] if k in ("u", "delta", "B", "C", "z") else v for k, v in args.items()}
    second, last = run({**rest, "initial_state": middle}, "portable")
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, end)


def peak_elements(function):
    """Largest tensor, in elements, that a function's autograd graph or body makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
            return out

    with Watch() as watch:
        function()
    return watch.largest


def test_portable_memory_does_not_grow_with_the_square_of_the_length():
    def largest(length):
        args = arguments(batch=1, length=length, dim=4, d_state=2, grad=True)
        return peak_elements(lambda: with_gradients(args, "portable"))

    assert largest(1024) <= 4.5 * largest(256)


ERRORS = {
    "u": (lambda a: a["u"][0], "u must be"),
    "delta": (lambda a: a["delta"][:, :-1], r"delta must be \(2, 7, 5\).*got \(2, 6, 5\)"),
    "A": (lambda a: a["A"][:-1], "A must be"),
    "B": (lambda a: a["B"][..., :-1], "B must be"),
    "C": (lambda a: a["C"][:1], "C must be"),
    "D": (lambda a: a["D"][:-1], "D must be"),
    "z": (lambda a: a["z"][..., :-1], "z must be"),
    "delta_bias": (lambda a: a["delta_bias"][:-1], "delta_bias must be"),
    "initial_state": (lambda a: a["initial_state"][..., :-1], "initial_state must be"),
}


@pytest.mark.parametrize("part", ERRORS)
def test_a_wrong_shape_is_named(part):
    args = arguments()
    change, message = ERRORS[part]
    args[part] = change(args)
    with pytest.raises(ValueError, match=message):
        selective_scan(**args)


def test_wrong_dtypes_are_named():
    args = arguments()
    with pytest.raises(TypeError, match="delta must have u's dtype"):
        selective_scan(**{**args, "delta": args["delta"].float()})
    with pytest.raises(TypeError, match="u must be float32"):
        selective_scan(**{**args, "u": args["u"].long()})
    with pytest.raises(TypeError, match="A must be real"):
        selective_scan(**{**args, "A": args["A"].to(torch.complex128)})


def test_backends_that_cannot_run_say_why():
    args = arguments()
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        run(args, "fast")
    with pytest.raises(RuntimeError, match="backend 'cpu' (takes float32|cannot run here)"):
        run(args, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="mamba-ssm.*cannot run here"):
            run(args, "mamba-ssm")


def test_a_missing_kernel_falls_back_once_and_says_so(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "no library")
    monkeypatch.setattr(dispatch, "_warned", set())
    args = arguments(dtype=torch.float32)
    with pytest.warns(UserWarning, match="portable.*no library"):
        run(args, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(args, "auto")
    assert ops.backends()["portable"].auto_for[0] == "cpu"
    assert ops.backends()["cpu"].detail == "no library"


@pytest.mark.parametrize("backend", SELECTIVE_SCAN.backends, ids=lambda backend: backend.name)
def test_a_backend_takes_what_it_declares_and_rejects_the_rest(backend, monkeypatch):
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    for device in ("cpu", "cuda", "mps", "meta"):
        for dtype in FLOATS:
            if dtype in backend.dtypes and (backend.devices is None or device in backend.devices):
                assert SELECTIVE_SCAN.choose(device, dtype, backend.name) is backend
            else:
                with pytest.raises(RuntimeError, match=f"{backend.name}' takes .*got {dtype} on {device}: use"):
                    SELECTIVE_SCAN.choose(device, dtype, backend.name)


def test_auto_chooses_by_device_and_dtype_and_warns_where_a_fused_kernel_was_expected(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    for backend in SELECTIVE_SCAN.backends:
        monkeypatch.setattr(backend, "unavailable", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device, fused in (("cpu", "cpu"), ("cuda", "triton"), ("meta", "portable")):
            assert SELECTIVE_SCAN.choose(device, torch.bfloat16).name == fused
            assert SELECTIVE_SCAN.choose(device, torch.float64).name == "portable"
    with pytest.warns(UserWarning, match="There is no fused scan for mps"):
        assert SELECTIVE_SCAN.choose("mps", torch.float32).name == "portable"


def test_report_names_one_backend_per_device():
    report = ops.backends()
    assert [name for name, status in report.items() if "cpu" in status.auto_for] == [
        "cpu" if cpu.unavailable() is None else "portable"
    ]
    assert all(status.detail for status in report.values())


def test_mamba_ssm_is_called_channel_first(monkeypatch):
    """Its CUDA op cannot run here: a stand-in with its signature and layout checks what we hand over."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        assert all(x.stride(-1) == 1 for x in (u, delta, B, C, z))
        back = [x.transpose(1, 2) for x in (u, delta)], [x.transpose(1, 2) for x in (B, C)]
        y, state = selective_scan(
            *back[0],
            A,
            *back[1],
            D,
            z.transpose(1, 2),
            delta_bias,
            delta_softplus,
            return_last_state=True,
            backend="reference",
        )
        return y.transpose(1, 2), state

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    args = arguments()
    start = args.pop("initial_state")
    expected = selective_scan(**args, delta_softplus=True, return_last_state=True, backend="reference")
    got = mamba_ssm.scan(ScanInputs(**args, softplus=True))
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="no initial_state"):
        mamba_ssm.scan(ScanInputs(**args, initial_state=start))


def test_the_fused_kernel_is_built_where_there_is_a_compiler():
    """Its own tests skip without it; a build that fails silently must not."""
    if shutil.which("cc") or shutil.which("gcc"):
        assert cpu.unavailable() is None, cpu.unavailable()


@pytest.mark.parametrize("backend", SELECTIVE_SCAN.backends, ids=lambda backend: backend.name)
def test_whether_a_backend_can_run_is_asked_within_one_graph(backend):
    """Sampling and training compile the choice of a backend with everything else."""
    unavailable = backend.unavailable

    def choose(x):
        return x + 1 if unavailable() is None else x - 1

    torch.compiler.reset()
    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), choose(torch.zeros(2)))


def test_the_portable_scan_compiles_as_one_graph():
    args = arguments(length=9, dim=6, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**args, backend="portable"), selective_scan(**args, backend="portable"))
