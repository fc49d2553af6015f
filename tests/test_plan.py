"""``ssmgen plan``: counted memory and work, communication by hand, and predictions beside measurements."""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from ssmgen import build
from ssmgen.cli import main
from ssmgen.models.summary import summarize
from ssmgen.nn import sincos_position
from ssmgen.ops import scan_order
from ssmgen.ops.local import layers
from ssmgen.planning import DEVICES, count_step, gather_seconds, make_plan, reduce_seconds
from ssmgen.planning.check import check_here, check_reduce, saved_bytes, training_step
from ssmgen.planning.counting import Call, StepCounts, count_activations
from ssmgen.planning.devices import device_named
from ssmgen.planning.plan import Job, communication, memory_of, peak_of, seconds_of

H100 = DEVICES["h100"]
#: A step of 8 bytes of weights in one block of 6, with nothing to compute.
_BYTES = {"weights": 8, "gradients": 8, "optimizer": 16, "matrices": 4, "block": 6, "outside": 2}
COUNTS = StepCounts(**_BYTES, batch=1, activations=100, working=10, peak=105, example=0, calls=())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_optimiser_are_exact(optimizer):
    counts = count_step("sisma-debug", 2, 16, optimizer=optimizer)
    model = build("sisma-debug")
    weights = summarize("sisma-debug", 16).weight_bytes
    inside = {id(p) for p in model.blocks.parameters() if p.dim() == 2 and not hasattr(p, "no_weight_decay")}
    matrices = 4 * sum(p.numel() for p in model.parameters() if id(p) in inside) if optimizer == "muon" else 0
    adamw = [p for p in model.parameters() if optimizer == "adamw" or id(p) not in inside]
    assert counts.weights == counts.gradients == weights and counts.matrices == matrices
    assert counts.optimizer == matrices + sum(8 * p.numel() + 4 for p in adamw)
    assert counts.block == max(4 * sum(p.numel() for p in block.parameters()) for block in model.blocks)
    assert counts.outside + sum(4 * p.numel() for p in model.blocks.parameters()) == weights


@pytest.mark.parametrize(
    ("name", "settings", "batch", "gpu"),
    [
        ("sisma-debug", {"depth": 3}, 3, False),  # on a GPU its scan is Triton's, which does not run here
        ("sisma-attn-debug", {}, 2, False),
        ("sisma-attn-debug", {}, 2, True),
        ("dit-debug", {"dim": 64}, 2, False),
        ("dit-debug", {"dim": 64}, 2, True),
        ("sdm-debug", {}, 1, False),  # has no layer that differs on a GPU
    ],
)
def test_activations_are_what_autograd_saves(name, settings, batch, gpu):
    _, model, loss = training_step(name, settings, batch, 16)
    with mock.patch.object(layers, "_chosen", lambda *given: "torch") if gpu else nullcontext():
        saved = saved_bytes(model, loss)
    predicted = count_activations(name, batch, 16, gpu=gpu, precision="no", **settings)
    assert predicted == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize("name", ["sisma-debug", "sisma-attn-debug", "dit-debug"])
def test_products_are_those_of_the_summary(name):
    counts = count_step(name, 3, 16)
    work = {phase: _work(counts, phase, "matrix") for phase in ("forward", "backward")}
    assert work["forward"] == pytest.approx(3 * summarize(name, 16).matrix_flops, rel=0.05)
    assert work["backward"] == pytest.approx(2 * work["forward"], rel=0.1)
    updates = 3 * 2 * 2 * (16 // 2) ** 2 * 64 * 16  # images, blocks, layers, tokens, channels, states
    assert _work(counts, "forward", "scan forward") == (updates if name == "sisma-debug" else 0)


def _work(counts, phase, kind):
    return sum(call.work for call in counts.calls if (call.phase, call.kind) == (phase, kind))


def test_an_update_reads_and_writes_what_adamw_needs():
    counts = count_step("dit-debug", 1, 16)
    traffic = sum(call.bytes for call in counts.calls if call.phase == "update")
    # The norm reads gradients, clipping reads and writes them; AdamW reads four tensors and writes three or four.
    assert 10 <= traffic / counts.weights <= 11.5


def test_checkpointing_trades_activations_for_work():
    whole, saved = (count_step("sisma-debug", 4, 16, depth=4, checkpointed=c) for c in (False, True))
    assert saved.activations < 0.45 * whole.activations and saved.peak < 0.7 * whole.peak
    computed = [_work(c, "forward", "matrix") + _work(c, "backward", "matrix") for c in (whole, saved)]
    assert 1.2 < computed[1] / computed[0] < 4 / 3


def test_counting_leaves_nothing_behind():
    before = torch.get_rng_state()
    count_step("sisma-debug", 1, 24, gpu=True)
    assert torch.equal(before, torch.get_rng_state())
    assert not isinstance(sincos_position(32, 12, 12, device=torch.device("cpu")), FakeTensor)
    assert not isinstance(scan_order("column", 12, 12).forward, FakeTensor)
    model = build("sisma-debug")
    assert model(torch.zeros(1, 3, 24, 24), torch.zeros(1), torch.zeros(1, 24, 24, dtype=torch.long)).isfinite().all()


def test_communication_by_hand():
    assert reduce_seconds(8e9, 4, 100e9) == pytest.approx(0.12)
    assert gather_seconds(8e9, 4, 100e9) == pytest.approx(0.06)
    assert reduce_seconds(8e9, 1, 100e9) == 0
    job = Job("sisma-debug", 4, 8, accumulate=2)
    assert communication(COUNTS, job, link=2.0, backward=0.0) == (6.0, 0.0)  # 2 x 3/4 x 8 bytes at 2 a second
    assert communication(COUNTS, job, link=2.0, backward=5.0) == (6.0, 4.0)  # behind 80 % of it
    sharded = replace(job, sharding="fsdp")
    # Two gathers a part and one scatter of 3/4 x 8 bytes, and Muon's of 3/4 x 4, which nothing hides.
    assert communication(COUNTS, sharded, link=2.0, backward=100.0) == (15.0 + 1.5, 15.0)


def test_memory_by_hand():
    alone, four = Job("sisma-debug", 1, 4), Job("sisma-debug", 4, 4)
    assert sum(memory_of(COUNTS, alone).values()) == 8 + 8 + 16 + 8 + 100 + 10
    assert peak_of(COUNTS, alone) == 8 + 16 + 8 + 105
    assert peak_of(COUNTS, four) == 8 + 16 + 8 + 8 + 105
    sharded = replace(four, sharding="fsdp")
    assert peak_of(COUNTS, sharded) == (8 + 8 + 16 + 8) / 4 + 2 + 3 * 6 + 100 + 10
    peaks = [peak_of(COUNTS, replace(sharded, gpus=n, batch=n)) for n in (2, 4, 8, 64)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4


def test_time_by_hand():
    device = replace(H100, bfloat16=100.0, bandwidth=10.0, matrix_share=0.5, bandwidth_share=1.0, call=0.0)
    device = replace(device, scan_forward=2.0, scan_backward=1.0)
    calls = [
        Call("forward", "matrix", 500, 20),  # 10 s of arithmetic, 2 s of bytes
        Call("forward", "matrix", 50, 20),  # 1 s and 2 s
        Call("forward", "scan forward", 6, 10),
        Call("backward", "scan backward", 6, 10),
        Call("backward", "other", 0, 40),
    ]
    assert seconds_of(calls, device, "bf16") == {"products": 12.0, "scans": 9.0, "other": 4.0, "host": 0.0}
    assert seconds_of(calls, replace(device, call=6.0), "bf16")["host"] == 5.0  # 30 s of the host instead of 25
    assert sum(seconds_of(calls, replace(device, waits=True), "bf16").values()) == 11 + 9 + 10


def test_more_gpus_never_compute_longer():
    eager = replace(H100, call=0.0)  # at this size the host would take the same time for any batch
    computed = []
    for gpus in (1, 4, 8):
        seconds = make_plan(Job("sisma-debug", gpus, 8, size=16), eager).seconds
        computed.append(sum(seconds.values()) - seconds["communication"])
    assert computed == sorted(computed, reverse=True) and computed[2] < 0.6 * computed[0]


def test_the_largest_batch_fits_and_the_next_does_not():
    device = replace(H100, memory=60e6)
    job = Job("sisma-debug", 1, 2, size=16)
    largest = make_plan(job, device).largest_part
    assert largest > 2 and make_plan(replace(job, batch=largest), device).fits
    more = make_plan(replace(job, batch=2 * largest), device)
    found = re.fullmatch(r"--accumulate (\d+) fits", more.suggestion)
    assert not more.fits and make_plan(replace(more.job, accumulate=int(found[1])), device).fits
    tiny = make_plan(job, replace(H100, memory=1e5))
    assert tiny.largest_part == 0 and "take more or larger GPUs" in tiny.suggestion


def test_what_does_not_fit_comes_with_a_way_that_does(capsys):
    words = ["plan", "dit-debug", "--size", "32", "--gpus", "4", "--batch", "8"]
    small = replace(H100, memory=make_plan(Job("dit-debug", 4, 8, size=32), H100).peak / 0.9 - 1)
    with mock.patch.dict(DEVICES, h100=small):
        assert main(words) == 0
        said = capsys.readouterr().out
        assert "does not fit; --" in said
        way = said.partition("does not fit; ")[2].partition(" fits")[0]
        assert main([*words, *way.split()]) == 0
        assert " fits; the largest batch" in capsys.readouterr().out


def test_the_command_says_what_it_assumes(capsys):
    words = [
        "plan",
        "sisma-debug",
        *["--size", "16", "--gpus", "16", "--batch", "64", "--steps", "1000", "--price", "2"],
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    for said in ("predicted; not measured on this GPU", "60% of the peak", "hidden behind up to 80%", "about 40 % unc"):
        assert said in out
    assert len(out.splitlines()) < 32
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    seconds = facts["step_seconds"]
    assert facts["gpu_hours"] == pytest.approx(seconds["step"] * 1000 * 16 / 3600)
    assert facts["cost"] == pytest.approx(2 * facts["gpu_hours"])
    assert facts["examples_per_second"] == pytest.approx(64 / seconds["step"])
    assert facts["cache_bytes_per_example"] == 3 * 16 * 16 * 4 + 16 * 16
    network = 2 * 15 / 16 * facts["memory_bytes"]["gradients"] / (0.8 * 50e9)  # two nodes: 400 Gb/s for each GPU
    assert facts["communication_seconds"] == pytest.approx(network)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sisma-s --gpu h1000", "no figures for the GPU 'h1000'. Did you mean 'h100'"),
        ("sisma-s --gpus 3 --batch 10", "batch 10 must be a multiple of GPUs x accumulate = 3, e.g. 9 or 12"),
        ("sisma-s --gpus 0", "gpus must be at least 1, got 0"),
        ("sisma-s --gpus 16 --gpu l40s", "the network between nodes of l40s is not in the table: give it as --network"),
        ("sisma-s --gpus 16 --gpu l40s --network -1", "--network must be positive"),
        ("sisma-s --price nan", "price must be a number of at least 0"),
        ("sisma-s --sharding zero", "sharding must be one of ddp, fsdp, got 'zero'"),
        ("self-mamba", "'self-mamba' is of kind block, not model"),
        ("sisma-debug --size 15", "multiple"),
        ("", "plan takes a model's name, or --check"),
    ],
)
def test_impossible_plans_are_sentences(words, said, capsys):
    assert main(["plan", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_this_machine_is_measured():
    device = device_named("cpu")
    rates = device.float32, device.bfloat16, device.bandwidth, device.scan_forward, device.scan_backward
    assert all(1e6 < rate < 1e14 for rate in rates) and device.memory > 1e8 and device.waits
    with pytest.raises(ValueError, match="plans one process"):
        make_plan(Job("sisma-debug", 2, 2, size=16), device)


def test_predictions_stand_beside_measurements():
    found = check_here(1, cases=(("sisma-debug", {"depth": 3}, 4),), size=16)
    assert found["activations"][0].error == pytest.approx(0, abs=0.02)
    for rows in found.values():
        assert rows[0].what == "sisma-debug, depth 3, batch 4" and math.isfinite(rows[0].error)
        assert rows[0].predicted > 0 and rows[0].measured > 0
    reduce = check_reduce((2**16,), rounds=1)
    assert [row.what for row in reduce] == ["all-reduce of 0 MiB"] and reduce[0].measured > 0


def test_scans_take_the_modelled_cycles_of_todays_kernels():
    """Those that the test of the kernels pins, per update of a state."""
    pinned = (Path(__file__).parent / "test_ops_triton.py").read_text()
    updates = 8 * 2048 * 256 * 16
    for name, rate in (("forward", H100.scan_forward), ("backward", H100.scan_backward)):
        row = re.search(rf'"{name}_kernel, bf16, d_state 16, sm_90": \(\d+, ([\d_]+),', pinned)
        assert rate == pytest.approx(1.98e9 * updates / int(row[1])), "an H100 has the modelled 132 multiprocessors"
