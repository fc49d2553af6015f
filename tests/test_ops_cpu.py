"""The fused CPU scan against the float64 reference: values, gradients, views, instruction sets, threads."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import PARTS, arguments, run, with_gradients

from ssmgen.ops import ScanOrder, cpu_library, selective_scan
from ssmgen.ops.local import cpu as layers
from ssmgen.ops.scan import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"no fused kernel: {cpu.unavailable()}")


def errors(got, expected, least=1e-30):
    """L2 error of each output and gradient, relative to its size or to ``least`` where terms cancel to less."""
    return {
        name: ((got[name].double() - expected[name]).norm() / expected[name].norm().clamp(min=least)).item()
        for name in expected
    }


def against_reference(**shape):
    args = arguments(**shape, dtype=torch.float32, grad=True)
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    return errors(with_gradients(args, "cpu"), with_gradients(exact, "reference"), least=1.0)


def test_the_library_is_here_and_auto_takes_it():
    assert "fused C kernel" in cpu.describe()
    from ssmgen.ops import backends

    assert backends()["cpu"].auto_for == ("cpu",)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 35),
    dim=st.integers(1, 40),
    d_state=st.sampled_from([1, 2, 5, 8, 16, 17, 33]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_float64_reference_at_odd_sizes(batch, length, dim, d_state, seed):
    found = against_reference(batch=batch, length=length, dim=dim, d_state=d_state, seed=seed)
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize("d_state", [16, 64])
def test_is_accurate_at_working_sizes(d_state):
    args = arguments(batch=2, length=131, dim=200, d_state=d_state, dtype=torch.float32, grad=True)
    exact = with_gradients({k: v.detach().double().requires_grad_() for k, v in args.items()}, "reference")
    fused, loop = (errors(with_gradients(args, backend), exact) for backend in ("cpu", "reference"))
    for name in exact:  # as near to float64 as a float32 loop is
        assert fused[name] < 3 * loop[name] + 2e-7, (name, fused[name], loop[name])


def test_a_decay_near_one_does_not_drift_with_the_length():
    """h keeps its start when delta * A is next to nothing, however long the sequence."""
    one = torch.ones(1, 4096, 1)
    state = selective_scan(
        one * 0, one * 1e-9, -one[0, :1], one, one, initial_state=one[:, :1], return_last_state=True, backend="cpu"
    )[1]
    assert abs(state.item() - 1) < 1e-5


def test_states_that_decay_away_become_zero(isa):
    """Numbers below 1e-38 would make the kernel a hundred times slower; nothing else of the process may be flushed."""
    one = torch.ones(1, 9, 32)
    args = (one * 0, one * 10, -one[0, 0, :, None].expand(32, 16), one[..., :16], one[..., :16])
    start = torch.ones(1, 32, 16)
    state = selective_scan(*args, initial_state=start, return_last_state=True, backend="cpu")[1]
    assert (state == 0).all(), state.max()
    assert (torch.tensor([1e-20]) * 1e-22).item() > 0


@pytest.mark.parametrize("missing", [("D",), ("z",), ("delta_bias",), ("initial_state",), PARTS[5:]])
def test_optional_parts(missing):
    args = {k: v for k, v in arguments(dtype=torch.float32, grad=True).items() if k not in missing}
    exact = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    found = errors(with_gradients(args, "cpu"), with_gradients(exact, "reference"))
    assert max(found.values()) < 5e-6, found


def test_views_are_taken_as_they_are():
    """Slices of a wider projection, and a condition of one image expanded over the batch."""
    wide = torch.randn(3, 9, 2 * 7 + 2 * 4)
    u, delta, B, C = wide.split([7, 7, 4, 4], dim=-1)
    one = torch.rand(1, 9, 7)
    A = -torch.rand(7, 4)
    for step in (delta.abs(), one.expand(3, -1, -1), wide.transpose(1, 2)[:, :7, :9].transpose(1, 2).abs()):
        got = selective_scan(u, step, A, B, C, backend="cpu")
        dense = selective_scan(*(x.contiguous() for x in (u, step, A, B, C)), backend="cpu")
        assert torch.equal(got, dense)
    shared = one.clone().requires_grad_()
    selective_scan(u, shared.expand(3, -1, -1), A, B, C, backend="cpu").square().sum().backward()
    copies = one.expand(3, -1, -1).clone().requires_grad_()
    selective_scan(u, copies, A, B, C, backend="cpu").square().sum().backward()
    torch.testing.assert_close(shared.grad, copies.grad.sum(0, keepdim=True))


def test_transposed_inputs():
    u = torch.randn(2, 5, 9).transpose(1, 2)
    args = (u, torch.rand(2, 9, 5), -torch.rand(5, 16), torch.randn(2, 9, 16), torch.randn(2, 16, 9).transpose(1, 2))
    torch.testing.assert_close(selective_scan(*args, backend="cpu"), selective_scan(*args, backend="reference"))


def test_gradients_through_the_state_alone():
    args = arguments(dtype=torch.float32, grad=True)
    _, state = run(args, "cpu")
    state.sum().backward()
    assert args["u"].grad.abs().sum() > 0 and args["initial_state"].grad.abs().sum() > 0
    assert not args["C"].grad.any()


def test_results_repeat_to_the_bit_for_any_number_of_threads():
    args = arguments(batch=3, length=37, dim=300, d_state=16, dtype=torch.float32, grad=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(args, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def test_an_image_does_not_depend_on_its_batch():
    args = {k: v for k, v in arguments(batch=3, length=20, dim=33, dtype=torch.float32).items() if k != "z"}
    whole, _ = run(args, "cpu")
    alone, _ = run({k: v[1:2] if v.shape[0] == 3 else v for k, v in args.items()}, "cpu")
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("extreme", [0.0, 1e-30, 50.0, 1e4, 1e30])
def test_extreme_steps_stay_finite(extreme):
    args = arguments(length=20, dtype=torch.float32, grad=True)
    with torch.no_grad():
        args["delta"].fill_(extreme)
        args["delta_bias"].zero_()
        args["u"].mul_(1e-3)
    y, state = run(args, "cpu", softplus=False)
    assert torch.isfinite(y).all() and torch.isfinite(state).all()
    expected, _ = run({k: v.double() for k, v in args.items()}, "reference", softplus=False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("x", [-80.0, -20.0, -1.0, 0.0, 1.0, 30.0, 1e4])
def test_softplus_is_accurate_where_steps_are_tiny(x):
    """With A = 0 and u = B = C = 1 the first output is the step itself."""
    one = torch.ones(1, 1, 1)
    step = selective_scan(one, one * x, one[0] * 0, one, one, delta_softplus=True, backend="cpu")
    expected = torch.nn.functional.softplus(torch.tensor(x, dtype=torch.float64)).item()
    assert abs(step.item() - expected) <= 2e-6 * expected


@pytest.mark.parametrize("dim", [16, 37, 200])
def test_bfloat16_is_rounded_only_at_the_edges(dim):
    """The same as widening the inputs, scanning in float32 and rounding the results, to the bit."""
    args = arguments(length=19, dim=dim, d_state=16, dtype=torch.bfloat16, grad=True)
    args.pop("z")
    wide = {k: v.detach().float().requires_grad_() for k, v in args.items()}
    (y, state), (wide_y, wide_state) = run(args, "cpu"), run(wide, "cpu")
    assert y.dtype == torch.bfloat16 and torch.equal(y, wide_y.bfloat16()) and torch.equal(state, wide_state)
    up = torch.randn(y.shape).bfloat16()
    got = torch.autograd.grad(y, list(args.values()), up)
    expected = torch.autograd.grad(wide_y, list(wide.values()), up.float())
    for name, g, e in zip(args, got, expected, strict=True):
        assert g.dtype == args[name].dtype and torch.equal(g, e.to(g.dtype)), name


def test_bfloat16_of_what_is_no_number():
    u = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38]).bfloat16().view(1, 1, 4)
    step, maps = torch.ones_like(u), torch.zeros(1, 1, 1).bfloat16()
    y = selective_scan(u, step, -torch.ones(4, 1), maps, maps, torch.ones(4), backend="cpu")
    assert y[0, 0, 0].isnan() and y[0, 0, 3] == u[0, 0, 3]


@pytest.mark.parametrize("bad", [[0, 1, 2, 4], [0, 1, 2, -1], [0, 0, 1, 2]])
def test_an_order_that_is_no_permutation_never_reaches_the_kernel(bad):
    u = torch.randn(2, 4, 3)
    maps = torch.randn(2, 4, 2)
    for forward in (torch.tensor(bad), torch.tensor([[0, 1, 2, 3], bad])):
        order = ScanOrder(forward, torch.arange(4).expand(forward.shape))
        with pytest.raises(ValueError, match=r"each of 0\.\.3 once"):
            selective_scan(u, u, -torch.ones(3, 2), maps, maps, order=order, backend="cpu")


def test_every_instruction_set(isa):
    assert isa in cpu.describe()
    for shape in (dict(batch=2, length=19, dim=37, d_state=16), dict(batch=1, length=9, dim=5, d_state=3)):
        found = against_reference(**shape)
        assert max(found.values()) < 5e-6, found
    test_bfloat16_is_rounded_only_at_the_edges(37)


def test_an_unknown_instruction_set_is_explained(monkeypatch):
    monkeypatch.setenv("SSMGEN_CPU_ISA", "mmx")
    library, reason, _ = cpu_library._load()
    assert library is None and "SSMGEN_CPU_ISA=mmx is not avx512, avx2 or generic" in reason


@pytest.mark.parametrize(
    "source",
    ["int64_t ssmgen_cpu_version(void) { return 12345; }", "int before_versions;"],
    ids=["newer", "unversioned"],
)
def test_a_library_of_another_version_is_not_run(source, tmp_path, monkeypatch):
    """It would read its arguments at other offsets."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    library, code = tmp_path / "_cpu_kernels.so", f"#include <stdint.h>\n{source}\n"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=code, text=True, check=True)
    monkeypatch.setattr(cpu_library, "__file__", str(tmp_path / "cpu_library.py"))
    loaded, reason, _ = cpu_library._load()
    found = 12345 if "12345" in source else 0
    assert loaded is None
    assert reason == f"_cpu_kernels.so is version {found} and this ssmgen needs {cpu_library.VERSION}: run make install"
    monkeypatch.setattr(cpu_library, "_REASON", reason)
    assert cpu.unavailable() == reason
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: .*run make install"):
        run(arguments(dtype=torch.float32), "cpu")


def test_a_changed_structure_has_a_new_version():
    """Where this fails, raise VERSION in cpu_library.py and csrc/cpu_kernels.c, and put the new pair here."""
    structures = (cpu._Args, layers._NormArgs, layers._ConvArgs, layers._GeluArgs, layers._EmbedArgs)
    names = [[name for name, _ in structure._fields_] for structure in structures]
    digest = hashlib.sha256(repr((names, cpu_library.KERNELS)).encode()).hexdigest()[:12]
    assert (cpu_library.VERSION, digest) == (1, "980ecbf5ec3c")


def test_operator_registration():
    args = arguments(dtype=torch.float32, grad=True)
    inputs = [args[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")]
    torch.library.opcheck(torch.ops.ssmgen.cpu_scan, (*inputs, None, True, True))


def test_a_second_derivative_is_refused():
    args = arguments(dtype=torch.float32, grad=True)
    y, _ = run(args, "cpu")
    (gradient,) = torch.autograd.grad(y.square().sum(), args["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: use backend='reference'"):
        gradient.sum().backward()


def test_the_library_serves_every_python():
    library = Path(cpu_library.__file__).with_name("_cpu_kernels.so")
    assert library.is_file(), "its name must not carry the tag of one Python"


def test_compiles_as_one_graph():
    args = arguments(batch=2, length=9, dim=6, dtype=torch.float32, grad=True)

    def function(**tensors):
        return selective_scan(**tensors, delta_softplus=True).square().sum()

    expected = torch.autograd.grad(function(**args), list(args.values()))
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(**args), list(args.values()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_whole_model_compiles_as_one_graph():
    from conftest import randomize

    from ssmgen import build

    model = randomize(build("sisma-debug"), std=0.1).eval()
    x, t, mask = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randint(0, 19, (2, 8, 8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, mask), model(x, t, mask), rtol=1e-4, atol=1e-5)


def test_no_state_sized_tensor_is_made():
    """Neither forward nor backward holds (batch, length, dim, d_state): one state per chunk of 8 steps is kept."""
    from test_ops import peak_elements

    args = arguments(batch=1, length=512, dim=64, d_state=16, dtype=torch.float32, grad=True)
    assert peak_elements(lambda: run(args, "cpu")) <= 4 * 512 * 64 * 16 / 8
