"""How Triton kernels are launched: the device, the options and the grid. No GPU is needed: CUDA is a fake here."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from ssmgen.ops.launch import launch  # noqa: E402
from ssmgen.ops.triton_place import program_place  # noqa: E402

OPS = Path(__file__).parents[1] / "ssmgen/ops"


class Kernel:
    """A kernel that records its launches and the device that was then current."""

    def __init__(self, devices):
        self.devices, self.launches = devices, []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.devices[-1], grid, arguments, options))


@pytest.fixture
def kernel(monkeypatch):
    devices = [0]  # of which the last is current

    def exchange(index):
        if index < 0:
            return -1
        devices.append(index)
        return devices[-2]

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return Kernel(devices)


def test_a_kernel_runs_on_the_device_of_its_tensors(kernel):
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda:1")
    launch(kernel, (3, 2), None, tensor, 5, num_warps=4)
    assert kernel.launches == [(1, (6,), (None, tensor, 5), {"enable_fp_fusion": True, "num_warps": 4})]
    assert kernel.devices == [0, 1, 0]  # the device that was current is so again


def test_a_tensor_of_the_cpu_changes_no_device(kernel):
    launch(kernel, (1,), torch.empty(2))
    assert kernel.devices == [0] and len(kernel.launches) == 1


def test_a_batch_may_exceed_what_cuda_takes_on_the_second_axis_and_third(kernel):
    launch(kernel, (1, 2, 70_000), torch.empty(1))
    assert kernel.launches[0][1] == (140_000,)
    with pytest.raises(ValueError, match=r"\(1, 2, 2000000000\) has 4000000000 programs.*at most 2147483647: split"):
        launch(kernel, (1, 2, 2_000_000_000), torch.empty(1))


@triton.jit
def write_places(out, first, second):
    x, y, z = program_place(first, second)
    at = out + 3 * tl.program_id(0)
    tl.store(at, x)
    tl.store(at + 1, y)
    tl.store(at + 2, z)


def test_programs_find_their_places():
    out = torch.full((24, 3), -1, device="cuda" if torch.cuda.is_available() else "cpu")
    launch(write_places, (2, 3, 4), out, 2, 3)
    assert out.tolist() == [[x, y, z] for z in range(4) for y in range(3) for x in range(2)]


def test_every_kernel_is_launched_here():
    files = {file.relative_to(OPS).as_posix(): file.read_text() for file in OPS.rglob("*.py")}
    found = {name for name, text in files.items() if re.search(r"kernel\w*\[", text)}
    assert found == {"launch.py"}
