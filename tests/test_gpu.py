"""What only a CUDA device shows: ``python3 -m pytest -m gpu`` from the bare tree. Needs torch, einops and pytest."""

import threading

import pytest
import torch
from conftest import randomize

import ssmgen
from ssmgen.ops import conv_silu, gated_delta_rule, selective_scan, ssd, sum_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]


@pytest.fixture(autouse=True)
def convolutions_in_float32(monkeypatch):
    """cuDNN rounds the inputs of convolutions to TF32 unless told not to, which these comparisons would notice."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def scan_inputs(batch, length, dim, d_state, dtype):
    draw = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(batch, length, dim, generator=draw) for _ in range(2))
    B, C = (torch.randn(batch, length, d_state, generator=draw) for _ in range(2))
    A = -torch.rand(dim, d_state, generator=draw) - 0.1
    D, bias = torch.randn(dim, generator=draw), torch.randn(dim, generator=draw)
    # What is rounded to 16 bits is rounded once, before either scan sees it.
    u, delta, B, C = (x.to(dtype) for x in (u, delta, B, C))
    return u, delta, A, B, C, D, bias


def scan_and_gradients(tensors, backend, device, exact=False):
    tensors = [(x.double() if exact else x).to(device).requires_grad_() for x in tensors]
    u, delta, A, B, C, D, bias = tensors
    y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=backend)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(device)
    return [y, *torch.autograd.grad((y * weights).sum(), tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 19, 37, 16), (3, 133, 33, 5), (1, 1000, 20, 16), (1, 70, 5, 3), (2, 257, 130, 17)]
)
def test_the_compiled_scan_agrees_with_the_float64_reference(shape, dtype):
    batch, length, dim, d_state = shape
    tensors = scan_inputs(batch, length, dim, d_state, dtype)
    got = scan_and_gradients(tensors, "triton", "cuda")
    expected = scan_and_gradients(tensors, "reference", "cpu", exact=True)
    allowed = 1e-4 if dtype == torch.float32 else 2e-2
    for name, ours, theirs in zip(("y", "u", "delta", "A", "B", "C", "D", "bias"), got, expected, strict=True):
        error = (ours.double().cpu() - theirs).norm() / theirs.norm().clamp(min=1)
        assert error < allowed, (name, error.item())


def test_the_compiled_scan_repeats_to_the_bit():
    tensors = scan_inputs(2, 300, 40, 16, torch.bfloat16)
    first, second = (scan_and_gradients(tensors, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def model_and_inputs(**arguments):
    model = randomize(ssmgen.build("sisma-debug", **arguments))
    noise = ssmgen.initial_noise(range(3), (3, 16, 16))
    return model, noise, torch.randint(0, 19, (1, 16, 16), dtype=torch.uint8)


def test_auto_takes_the_triton_scan():
    model, noise, mask = model_and_inputs()
    on_cpu = ssmgen.sample(model, noise, mask, steps=2)
    on_gpu = ssmgen.sample(model.cuda(), noise, mask.cuda(), steps=2)
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    u = torch.randn(1, 4, 8, device="cuda")
    assert ssmgen.ops.backends()["triton"].available
    one = selective_scan(u, u, -torch.rand(8, 4, device="cuda"), u[..., :4], u[..., :4])
    assert one.is_cuda


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_captured_step_gives_what_the_plain_one_gives(guidance_scale):
    model, noise, mask = model_and_inputs(mask_dropout=0.1)
    sampler = ssmgen.Sampler(model.cuda(), compile=True)
    for seeds in (range(3), range(3, 6)):  # the second call runs the graph that the first one captured
        noise = ssmgen.initial_noise(seeds, (3, 16, 16))
        settings = {"steps": 4, "solver": "ab2", "guidance_scale": guidance_scale}
        plain = ssmgen.sample(model, noise, mask.cuda(), **settings)
        torch.testing.assert_close(sampler(noise, mask.cuda(), **settings), plain, rtol=2e-3, atol=2e-3)


def test_a_captured_step_runs_for_any_thread():
    model, noise, mask = model_and_inputs()
    sampler, settings = ssmgen.Sampler(model.cuda(), compile=True), {"steps": 4, "solver": "euler"}
    expected, found = sampler(noise, mask.cuda(), **settings), []
    thread = threading.Thread(target=lambda: found.append(sampler(noise, mask.cuda(), **settings)))
    thread.start()
    thread.join()
    assert len(found) == 1 and torch.equal(found[0], expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_captured_step_reads_the_states_of_the_mask_of_its_call(guidance_scale):
    model, noise, _ = model_and_inputs(mask_dropout=0.1)
    sampler = ssmgen.Sampler(model.cuda(), compile=True, keep_states=True)
    settings = {"steps": 4, "guidance_scale": guidance_scale}
    for value in (3, 11):  # the graph was captured with the first
        mask = torch.full((1, 16, 16), value, dtype=torch.uint8, device="cuda")
        scanned = ssmgen.sample(model, noise, mask, keep_states=False, **settings)
        torch.testing.assert_close(sampler(noise, mask, **settings), scanned, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    tensors = scan_inputs(2, 19, 37, 16, torch.float32)
    first, second = (scan_and_gradients(tensors, "triton", device) for device in ("cuda:0", "cuda:1"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def test_sixteen_bit_weights_stay_near_the_float32_sample():
    model, noise, mask = model_and_inputs()
    exact = ssmgen.sample(model.cuda(), noise, mask.cuda(), steps=4)
    narrow = ssmgen.sample(model, noise, mask.cuda(), steps=4, dtype=torch.bfloat16)
    assert narrow.dtype == exact.dtype
    assert (narrow - exact).norm() < 0.05 * exact.norm()


class Drawn(torch.utils.data.Dataset):
    """Twelve random examples."""

    def __len__(self):
        return 12

    def __getitem__(self, key):
        draw = torch.Generator().manual_seed(key[0])
        mask = torch.randint(0, 19, (16, 16), generator=draw, dtype=torch.uint8)
        return {"data": torch.randn(3, 16, 16, generator=draw), "mask": mask}


def training_on_the_gpu(optimizer):
    """A state after one step, and a function that takes another step with its batch times a factor."""
    pytest.importorskip("accelerate", reason="training needs accelerate")
    from ssmgen.training import TrainSettings
    from ssmgen.training.launch import make_accelerator
    from ssmgen.training.step import batches_from, prepare, training_step

    settings = TrainSettings(steps=9, batch_size=4, optimizer=optimizer, weight_decay=0.1, precision="bf16")
    accelerator, objective = make_accelerator(settings), ssmgen.build("flow-matching")
    state = prepare(randomize(ssmgen.build("sisma-debug", mask_dropout=0.2)), settings, accelerator)
    batches = iter(batches_from(0, Drawn(), settings, accelerator))
    given = [next(batches) for _ in range(3)]

    def take(step, factor=1.0):
        return training_step(state, objective, given[step] | {"data": given[step]["data"].mul_(factor)}, settings, step)

    assert take(0).finite  # compiles the kernels and makes the optimiser's state
    return state, take


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_waits_for_nothing(optimizer):
    state, take = training_on_the_gpu(optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = take(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.late and result.finite and not result.skipped and int(state.ema.n_averaged) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_leaves_out_a_step_that_is_not_finite(optimizer):
    state, take = training_on_the_gpu(optimizer)

    def kept():
        slots = [value for each in state.saved["optimizer"].state.values() for value in each.values()]
        return [x.clone() for x in [*state.model.parameters(), *state.ema.module.parameters(), *slots]]

    before = kept()
    assert not take(1, factor=float("nan")).finite
    assert all(map(torch.equal, before, kept())) and int(state.ema.n_averaged) == 1
    assert take(2).finite and not all(map(torch.equal, before, kept()))


def test_a_bad_label_is_an_error_and_not_a_device_assert():
    model, noise, mask = model_and_inputs()
    mask[0, 3, 5] = 77
    with pytest.raises(ValueError, match="77"):
        ssmgen.sample(model.cuda(), noise, mask.cuda(), steps=2)
    torch.cuda.synchronize()  # an assert on the device would surface here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 70, 4, 20, 2, 17), (1, 257, 8, 64, 1, 64)])
def test_ssd_agrees_with_the_float64_reference(shape, backend, dtype):
    batch, length, heads, width, groups, d_state = shape
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, heads, width, generator=draw).to(dtype)
    B, C = (torch.randn(batch, length, groups, d_state, generator=draw).to(dtype) for _ in range(2))
    delta, A = torch.rand(batch, length, heads, generator=draw), -torch.rand(heads, generator=draw)

    def results(backend, device, exact):
        tensors = [(y.double() if exact else y).detach().to(device).requires_grad_() for y in (x, delta, A, B, C)]
        y = ssd(*tensors, backend=backend)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(device)
        return [y, *torch.autograd.grad((y * weights).sum(), tensors)]

    for found, expected in zip(results(backend, "cuda", False), results("reference", "cpu", True), strict=True):
        error = (found.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error < (1e-4 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 3), (2, 5, 7, 37, 3), (2, 16, 16, 256, 3), (1, 33, 9, 70, 5)])
def test_the_convolution_agrees_with_float64_and_repeats_to_the_bit(shape, dtype):
    batch, height, width, dim, k = shape
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(batch, height * width, 2 * dim, generator=draw).to(dtype)
    weight, bias = torch.randn(dim, 1, k, k, generator=draw), torch.randn(dim, generator=draw)

    def results(backend, device, exact):
        tensors = [(x.double() if exact else x).to(device).requires_grad_() for x in (wide, weight, bias)]
        y = conv_silu(tensors[0][..., :dim], *tensors[1:], (height, width), backend=backend)
        slopes = torch.linspace(-1, 1, y.numel()).bfloat16().view(y.shape).to(y.device, y.dtype)
        return [y, *torch.autograd.grad(y, tensors, slopes)]

    found, again = (results("auto", "cuda", False) for _ in range(2))
    assert all(map(torch.equal, found, again))
    for got, want in zip(found, results("torch", "cpu", True), strict=True):
        error = (got.double().cpu() - want).norm() / want.norm().clamp(min=1)
        assert error < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_as_a_product_agrees_with_float64(dtype):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 19, (300, 64), generator=draw) + 19 * torch.arange(64)
    table = torch.randn(64 * 19, 70, generator=draw).to(dtype)

    def results(device, exact):
        leaf = (table.double() if exact else table).to(device).requires_grad_()
        out = sum_rows(leaf, rows.to(device), 19)
        slopes = torch.linspace(-1, 1, out.numel()).bfloat16().view(out.shape).to(out.device, out.dtype)
        return out, *torch.autograd.grad(out, leaf, slopes)

    for got, want in zip(results("cuda", False), results("cpu", True), strict=True):
        error = (got.double().cpu() - want).norm() / want.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_the_gated_delta_rule_agrees_with_the_float64_reference():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 257, 4, 32, generator=draw) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = -torch.rand(2, 257, 4, generator=draw), torch.rand(2, 257, 4, generator=draw)
    expected = gated_delta_rule(*(x.double() for x in (q, k, v, g, beta)), backend="reference")
    found = gated_delta_rule(*(x.cuda() for x in (q, k, v, g, beta)))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)
