"""``auto`` measures; what it takes follows from the times alone."""

import os
import platform
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from ssmgen import precision
from ssmgen.precision import (
    Choice,
    ProductTimes,
    choose_precision,
    product_times,
    sampling_dtype,
    set_product_precision,
)


@pytest.mark.parametrize(
    ("float32", "bfloat16", "taken"),
    [(5.8, 58, "no"), (3, 1.4, "bf16"), (1, 1, "no"), (1.05, 1, "no"), (1.2, 1, "bf16")],
)
def test_auto_takes_what_is_faster_by_enough_and_gives_both_times(monkeypatch, float32, bfloat16, taken):
    monkeypatch.setattr(precision, "product_times", lambda: ProductTimes(float32 / 1e3, bfloat16 / 1e3))
    choice = choose_precision("auto", "cpu")
    assert choice.precision == taken
    assert f"{float32:.1f} ms in float32" in str(choice) and str(choice).startswith(f"precision {taken}")
    assert sampling_dtype("auto", "cpu") == (torch.bfloat16 if taken == "bf16" else None)


def test_what_is_asked_for_is_not_measured(monkeypatch):
    monkeypatch.setattr(precision, "product_times", lambda: pytest.fail("measured"))
    assert [choose_precision(asked).precision for asked in ("no", "bf16")] == ["no", "bf16"]
    assert sampling_dtype(None, "cpu") is None and sampling_dtype(torch.float16, "cpu") == torch.float16
    assert choose_precision("auto", "meta") == Choice("no", "bfloat16 is not tried on meta")
    with pytest.raises(ValueError, match="precision must be 'auto', 'no' .float32. or 'bf16', got 'fp16'"):
        choose_precision("fp16")
    with pytest.raises(ValueError, match="dtype must be a torch.dtype, 'auto' or None, got 'bf16'"):
        sampling_dtype("bf16", "cpu")


@pytest.mark.parametrize("native", [True, False])
def test_cuda_is_asked_for_its_instructions_and_not_for_emulation(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    choice = choose_precision("auto", "cuda")
    assert choice.precision == ("bf16" if native else "no") and choice.reason.startswith("A card ")


@pytest.mark.parametrize(("rounding", "tf32"), [("highest", False), ("high", True), ("medium", True)])
def test_products_and_convolutions_are_rounded_to_tf32_only_when_asked(monkeypatch, rounding, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    before = torch.get_float32_matmul_precision()
    try:
        set_product_precision(rounding)
        assert torch.backends.cudnn.allow_tf32 == (torch.backends.cuda.matmul.fp32_precision == "tf32") == tf32
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == tf32
        assert torch.get_float32_matmul_precision() == rounding
    finally:
        torch.set_float32_matmul_precision(before)


def test_measuring_happens_once_and_disturbs_nothing():
    precision._product_times.cache_clear()
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        first = product_times()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert product_times() is first and 0 < min(first) < max(first) < 5


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are for x86")
def test_a_processor_without_16_bit_products_is_found_out():
    without = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", "from ssmgen.precision import *; print(choose_precision('auto'))"],
        env=os.environ | without,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("precision no (float32): a layer's products take ")
