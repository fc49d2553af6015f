"""The CPU kernels compiled for another processor, 64-bit ARM, and run by an emulator."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import test_ops_layers as layers
import torch
from test_ops import arguments, with_gradients
from test_ops_cpu import errors

from ssmgen.ops import cpu_library

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.skipif(cpu_library.unavailable() is not None, reason=f"no kernels: {cpu_library.unavailable()}"),
    pytest.mark.skipif(
        not (COMPILER and EMULATOR), reason="apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    file = tmp_path_factory.mktemp("aarch64") / "run_kernel"
    sources = ["-I", str(ROOT / "ssmgen/ops/csrc"), str(ROOT / "tests/run_kernel.c")]
    flags = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-static", "-Wall", "-Werror"]
    subprocess.run([COMPILER, *flags, *sources, "-o", str(file), "-pthread", "-lm"], check=True)
    return file


@pytest.fixture(autouse=True)
def emulated(program, monkeypatch):
    """Every kernel that is called runs there; counts them."""
    calls = []

    def run(kernel, args, tensors):
        calls.append(kernel)
        tensors = {name: x for name, x in tensors.items() if x.numel()}
        sent = struct.pack("3q", cpu_library.KERNELS.index(kernel), ctypes.sizeof(args), len(tensors)) + bytes(args)
        for name, x in tensors.items():
            held = ctypes.string_at(x.data_ptr(), extent(x))
            sent += struct.pack("2q", getattr(type(args), name).offset, len(held)) + held
        done = subprocess.run([EMULATOR, str(program)], input=sent, capture_output=True, check=True)
        at = 0
        for x in tensors.values():
            ctypes.memmove(x.data_ptr(), done.stdout[at : at + extent(x)], extent(x))
            at += extent(x)
        assert at == len(done.stdout)

    monkeypatch.setattr(cpu_library, "run", run)
    monkeypatch.setattr(cpu_library, "LANES", 4)
    return calls


def extent(x):
    """Bytes from the first value of a view to its last."""
    return (sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1) * x.element_size()


@pytest.mark.parametrize("shape", [(2, 19, 37, 16), (1, 1, 1, 1), (3, 5, 133, 5)])
def test_the_scan_agrees_with_the_float64_reference(shape, emulated):
    names = ("batch", "length", "dim", "d_state")
    args = arguments(**dict(zip(names, shape, strict=True)), dtype=torch.float32, grad=True)
    exact = with_gradients({k: v.detach().double().requires_grad_() for k, v in args.items()}, "reference")
    found = errors(with_gradients(args, "cpu"), exact, least=1.0)
    assert emulated == ["scan_forward", "scan_backward"]
    assert max(found.values()) < 5e-6, found


def test_the_scan_in_bfloat16_is_rounded_only_at_the_edges():
    args = arguments(length=19, dim=37, d_state=16, dtype=torch.bfloat16, grad=True)
    wide = {k: v.detach().float().requires_grad_() for k, v in args.items()}
    got, expected = with_gradients(args, "cpu"), with_gradients(wide, "cpu")
    for name in ("y", "state"):
        assert torch.equal(got[name], expected[name].to(got[name].dtype)), name


def test_the_layers_agree_with_float64(emulated):
    found = {name: layers.error(case) for name, case in layers.every_case().items()}
    assert max(found.values()) < 2e-6, found
    assert {"scan_forward", "scan_backward"} | set(emulated) == set(cpu_library.KERNELS)


def test_the_layers_in_bfloat16_are_rounded_only_at_the_edges():
    layers.test_bfloat16_is_rounded_only_at_the_edges()
