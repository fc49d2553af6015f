"""The moving average, weight decay and Muon against their formulas and torch's own."""

import math
from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssmgen import build
from ssmgen.training import TrainSettings, make_optimizer, moving_average, muon, parameter_groups
from ssmgen.training.muon import orthogonalize
from ssmgen.training.step import set_lr


def test_moving_average_is_its_formula():
    model = torch.nn.Linear(2, 2)
    ema = moving_average(model, 0.5)
    expected = None
    for n in range(4):
        with torch.no_grad():
            model.weight.fill_(float(n))
        ema.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = float(n) if expected is None else decay * expected + (1 - decay) * n
    torch.testing.assert_close(ema.module.weight, torch.full((2, 2), expected))
    with pytest.raises(ValueError, match="ema_decay must be in"):
        moving_average(model, 1.0)
    with pytest.raises(ValueError, match="16-bit"):
        moving_average(torch.nn.Linear(2, 2).bfloat16(), 0.999)


def test_the_moving_average_on_a_device_has_the_bits_of_that_on_the_host():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2).double())
    host, device = moving_average(net, 0.3), moving_average(net, 0.3)
    for skipped in (True, False, False, True, False, False, False, False):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
            net[1](torch.randn(4, 2))
        if not skipped:
            host.update_parameters(net)
        device.update_parameters(net, torch.tensor(skipped))
        assert int(host.n_averaged) == int(device.n_averaged)
        assert all(torch.equal(x, host.state_dict()[name]) for name, x in device.state_dict().items())


def test_weight_decay_spares_vectors_and_state_matrices():
    model = build("sisma-debug")
    decayed, exempt = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in exempt["params"]}
    assert {n for n in names.values() if n.endswith(("A_log", "ssm.D", "bias"))} <= spared
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    assert "blocks.0.self_mamba.in_proj.weight" not in spared


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_muon_steps_the_blocks_matrices_and_adamw_the_rest(precision):
    first, second = (build("sisma-debug", dim=24, depth=1) for _ in range(2))
    second.load_state_dict(first.state_dict())
    ours = make_optimizer(first, "muon", lr=0.01, weight_decay=0.1, precision=precision)
    named, before = dict(second.named_parameters()), {n: p.detach().clone() for n, p in first.named_parameters()}
    matrices = [n for n, p in named.items() if n.startswith("blocks.") and p.dim() == 2 and not n.endswith("A_log")]
    assert "blocks.0.self_mamba.in_proj.weight" in matrices
    rest = [{**group, "params": [p for p in group["params"]]} for group in parameter_groups(second, 0.1)]
    rest[0]["params"] = [p for p in rest[0]["params"] if not any(p is named[n] for n in matrices)]
    theirs = [
        torch.optim.Muon([named[n] for n in matrices], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01 / 3, betas=(0.9, 0.95), fused=True),
    ]
    for _ in range(3):
        for name, parameter in first.named_parameters():
            parameter.grad = named[name].grad = torch.randn_like(parameter)
        for optimizer in (ours, *theirs):
            optimizer.step()
    for name, parameter in first.named_parameters():
        if name in matrices:  # theirs multiplies in bfloat16
            assert (parameter - named[name]).norm() < 0.03 * (named[name] - before[name]).norm(), name
            torch.testing.assert_close(ours.state[parameter], theirs[0].state[named[name]])
        else:
            assert torch.equal(parameter, named[name]), name
    set_lr(ours, 0.3)
    assert [group["lr"] for group in ours.param_groups] == [0.3, *[pytest.approx(0.1)] * (len(ours.param_groups) - 1)]
    slots = {name: set(ours.state[p]) for name, p in first.named_parameters()}
    assert all((slots[name] == {"momentum_buffer"}) == (name in matrices) for name in slots)


def newton_schulz(x):
    """The iteration as it is written, in float64."""
    x = x.double() / x.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("rows", "columns"), [(24, 96), (40, 40), (3, 50), (1, 7)])
@pytest.mark.parametrize("smallest", [1.0, 1e-4])
def test_muons_products_are_as_exact_as_the_run(rows, columns, smallest):
    u, _, v = torch.linalg.svd(torch.randn(3, rows, columns, dtype=torch.float64), full_matrices=False)
    x = (u * torch.logspace(0, math.log10(smallest), rows, dtype=torch.float64) @ v).float()
    exact = torch.stack([newton_schulz(each) for each in x])
    high, low = (orthogonalize(x, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert high.dtype == torch.float32 and low.dtype == torch.bfloat16
    errors = [((each - exact).norm() / exact.norm()).item() for each in (high, low)]
    assert errors[0] < 1e-3 and errors[0] < 0.1 * errors[1] and errors[1] < 0.5
    alone = torch.cat([orthogonalize(each.unsqueeze(0), torch.float32) for each in x])
    torch.testing.assert_close(alone, high, rtol=1e-3, atol=1e-4)
    assert not orthogonalize(torch.zeros(1, 2, 3), torch.float32).any(), "no gradient, no step"


def test_large_matrices_are_orthogonalised_a_few_at_a_time(monkeypatch):
    found = []
    for at_once in (muon._BATCH, 200, 1):
        torch.manual_seed(0)
        monkeypatch.setattr(muon, "_BATCH", at_once)
        matrices = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 12), (12, 8), (8, 12), (3, 4))]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        group = {"params": matrices, "lr": 1.0, "weight_decay": 0.0, "momentum": 0.95}
        muon.muon_step(group, defaultdict(dict), torch.float32)
        found.append(matrices)
    for matrices in found[1:]:
        assert all(map(torch.allclose, matrices, found[0]))


def parameters_with_gradients(shapes):
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return matrices


def test_muon_takes_all_parameters_together_to_the_bits_of_one_after_the_other():
    torch.manual_seed(0)
    matrices = parameters_with_gradients([(8, 12), (12, 8), (40, 40)])
    group, state = {"params": matrices, "lr": 0.1, "weight_decay": 0.3, "momentum": 0.9}, defaultdict(dict)
    expected = []
    for matrix in matrices:
        average = torch.zeros_like(matrix).lerp_(matrix.grad, 1 - 0.9)
        direction = matrix.grad.lerp(average, 0.9)
        wide = direction if matrix.shape[0] <= matrix.shape[1] else direction.mT
        update = orthogonalize(wide.unsqueeze(0).contiguous(), torch.float32)[0]
        moved = matrix.detach() * (1 - 0.1 * 0.3)
        moved.add_(update if wide is direction else update.mT, alpha=-0.1 * 0.2 * max(matrix.shape) ** 0.5)
        expected.append((average, moved))
    muon.muon_step(group, state, torch.float32)
    for matrix, (average, moved) in zip(matrices, expected, strict=True):
        assert torch.equal(state[matrix]["momentum_buffer"], average)
        torch.testing.assert_close(matrix.detach(), moved, rtol=0, atol=1e-6)  # products are shared by shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_leaves_out_a_step_that_the_device_says_is_not_finite(dtype):
    """To the bit, and with the bits of a step that nobody asked about where it says the step is."""
    torch.manual_seed(0)
    matrices = parameters_with_gradients([(8, 12), (12, 8), (3, 4)])
    others = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    groups = [{"params": each, "lr": 0.1, "weight_decay": 0.3, "momentum": 0.9} for each in (matrices, others)]
    states = defaultdict(dict), defaultdict(dict)
    for finite in (False, True, True, False, True):
        for matrix, other in zip(matrices, others, strict=True):
            other.grad = torch.randn_like(other)
            matrix.grad = other.grad.clone() if finite else other.grad * math.nan
        muon.muon_step(groups[0], states[0], dtype, torch.tensor(not finite))
        if finite:
            muon.muon_step(groups[1], states[1], dtype)
        for matrix, other in zip(matrices, others, strict=True):
            assert torch.equal(matrix, other)
            if other in states[1]:
                assert torch.equal(states[0][matrix]["momentum_buffer"], states[1][other]["momentum_buffer"])


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "most", "batches"), [("cuda", 2**26, 3), ("cuda", 40 * 60 * 2, 5), ("cpu", 1, 8)])
def test_on_a_gpu_the_matrices_of_one_shape_share_their_products(monkeypatch, device, most, batches):
    monkeypatch.setattr(muon, "_GPU_BATCH" if device == "cuda" else "_BATCH", most)
    with FakeTensorMode(), torch.device(device):
        matrices = parameters_with_gradients([(40, 60), (60, 40)] * 2 + [(60, 40), (3, 4), (16, 60), (16, 60)])
        group = {"params": matrices, "lr": 1.0, "weight_decay": 0.1, "momentum": 0.95}
        with Products() as products:
            muon.muon_step(group, defaultdict(dict), torch.bfloat16, torch.zeros((), dtype=torch.bool))
    assert products.count == batches * 3 * 5, "three products in each of five iterations"


def test_the_products_of_sisma_xl_are_few_on_a_gpu():
    with torch.device("meta"):
        shapes = [p.shape for p in make_optimizer(build("sisma-xl"), "muon", 0.1, 0.0).param_groups[0]["params"]]
    with FakeTensorMode(), torch.device("cuda"):
        matrices = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]
        for matrix in matrices:
            matrix.grad = torch.empty_like(matrix)
        group = {"params": matrices, "lr": 1.0, "weight_decay": 0.1, "momentum": 0.95}
        with Products() as products:
            muon.muon_step(group, defaultdict(dict), torch.bfloat16)
    assert (len(matrices), products.count) == (312, 255)


def test_muon_repeats_to_the_bit_for_any_number_of_threads():
    x = torch.randn(3, 96, 384)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([orthogonalize(x, torch.float32), orthogonalize(x[:1], torch.bfloat16)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'adam'"):
        TrainSettings(steps=1, batch_size=1, optimizer="adam")
