"""Fixtures shared by all tests."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # `make test` runs two processes
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run in Python; read when they are defined
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's cache does not know instruction sets: what it compiled for another one gives numbers that are none.
    cache = f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}-{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)

import ssmgen  # noqa: E402  # after what it reads
from ssmgen import registry  # noqa: E402

#: The library's own names: not those of tutorials, benchmarks and plug-ins that happen to be installed.
OWN = frozenset(name for name in ssmgen.names() if registry.source(name) == "ssmgen")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for a run."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small AutoencoderTiny with random weights, saved."""
    from networks import tiny_network

    tiny_network().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def kl(tmp_path: Path) -> Path:
    """A small AutoencoderKL with random weights, saved."""
    from networks import kl_network

    kl_network().save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


@pytest.fixture(params=["avx512", "avx2", "generic"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The CPU kernels of one instruction set for a test, chosen as they are where the library is loaded."""
    from ssmgen.ops import cpu_library

    before = cpu_library._LIBRARY.ssmgen_cpu_chosen()
    monkeypatch.setenv("SSMGEN_CPU_ISA", request.param)
    library, reason, lanes = cpu_library._load()
    if library is None:
        pytest.skip(reason)
    monkeypatch.setattr(cpu_library, "LANES", lanes)
    yield request.param
    cpu_library._LIBRARY.ssmgen_cpu_choose(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data for development; tests that use it skip where it is absent."""
    folder = Path(os.environ.get("SSMGEN_SHARED", Path(__file__).parents[2] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"the shared real data is not here ({folder}); set SSMGEN_SHARED")
    return folder


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small run with everything in it, and of its cache."""
    from recipe_runs import words

    from recipes.sisma import train

    folder = tmp_path_factory.mktemp("trained")
    train.main(words(folder, "steps=6", "sample_every=3", "model_args.mask_dropout=0.1"))
    return folder


@pytest.fixture(scope="module")
def trained(trained_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this run for the tests of one file."""
    return shutil.copytree(trained_once, tmp_path_factory.mktemp("copy") / "trained") / "run"


def randomize(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Replace the zero-initialised weights, which would hide what a block does."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return module


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest -m gpu`` reads test_gpu.py alone: the other files import packages that a bare GPU machine may lack."""
    if config.getoption("markexpr") == "gpu" and collection_path.suffix == ".py":
        return collection_path.name != "test_gpu.py"
    return None
