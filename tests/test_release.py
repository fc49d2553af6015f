"""What is released: wheel and sdist, a clean install, types, and the files that go with them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ssmgen
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, draw_face, write_png
from ssmgen.pipeline import Recipe

ROOT = Path(__file__).parents[1]
IGNORED = (".*", "__pycache__", "*.so", "*.egg-info", "runs", "build", "dist", "site", "exports")
LEFT_OUT = shutil.ignore_patterns(*IGNORED)
TESTS_AND_DATA = ("tests", "recipes", "benchmarks", "docs", "tutorials", "notebooks", "pretrained")
SHIPPED = "drawn-faces"
TORCH_INSIDE = (
    "_dynamo",
    "_inductor",
    "_functorch",
    "_export",
    "distributed",
    "export",
    "fx",
    "onnx",
    "testing",
    "utils",
)

#: Runs before the user's lines: whatever wants the network fails.
OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise OSError("the network is off")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(sdist, wheel), built by the standard front end from a copy of the tree: the wheel out of the sdist."""
    source = tmp_path_factory.mktemp("source") / "ssmgen"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = (list((source / "dist").glob(f"*.{kind}")) for kind in ("tar.gz", "whl"))
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_python(archives, tmp_path_factory):
    """The Python of an environment that holds the wheel, and sees the dependencies installed here behind it."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", "--ignore-installed", str(archives[1])], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    site.joinpath("dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    return python


def run(python: Path, code: str, folder: Path) -> str:
    done = subprocess.run([python, "-I", "-c", OFFLINE + code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_clone_does_not_hide_the_editable_package(tmp_path):
    """A script beside the clone sees a folder called ssmgen first: the package in it must win."""
    clone, python = tmp_path / "ssmgen", tmp_path / "env" / "bin" / "python"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*TESTS_AND_DATA, *IGNORED))
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    site.joinpath("dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    no_compiler = {**os.environ, "CC": "false"}  # the scan is optional, and takes most of the time
    editable = [*command, "--ignore-installed", "--no-build-isolation", "--editable", str(clone)]
    subprocess.run(editable, check=True, env=no_compiler, capture_output=True)
    script = tmp_path / "script.py"
    script.write_text("import importlib.util\nprint(importlib.util.find_spec('ssmgen').origin)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([python, script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == str(clone / "ssmgen/__init__.py"), found.stdout + found.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(archives):
    names = zipfile.ZipFile(archives[1]).namelist()
    assert {name.split("/")[0] for name in names} == {"ssmgen", f"ssmgen-{ssmgen.__version__}.dist-info"}
    tree = {str(file.relative_to(ROOT)) for file in (ROOT / "ssmgen").rglob("*.py")}
    tree |= {str(file.relative_to(ROOT)) for file in (ROOT / "ssmgen/pretrained").rglob("*") if file.is_file()}
    assert tree <= set(names)
    if shutil.which("cc"):
        assert "ssmgen/ops/_cpu_kernels.so" in names, "there is a C compiler: the library must be in it"
    assert {"ssmgen/py.typed", f"ssmgen-{ssmgen.__version__}.dist-info/licenses/LICENSE"} <= set(names)
    assert archives[1].stat().st_size < 10e6


@pytest.mark.slow
def test_the_sdist_holds_the_sources_and_no_build(archives):
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        f"ssmgen/ops/csrc/{name}"
        for name in ("cpu_kernels.c", "cpu_vectors.h", "cpu_scan_kernel.h", "cpu_layers_kernel.h")
    } <= names
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py", "ssmgen/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so") or name.split("/")[0] in ("tests", "recipes", "runs")]


@pytest.mark.slow
def test_what_the_wheel_declares(archives):
    archive = zipfile.ZipFile(archives[1])
    metadata = archive.read(f"ssmgen-{ssmgen.__version__}.dist-info/METADATA").decode()
    core = re.findall(r"^Requires-Dist: ([\w.-]+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert core == ["torch", "einops", "pillow", "safetensors", "numpy", "diffusers", "huggingface_hub"]
    assert f"\nVersion: {ssmgen.__version__}\n" in metadata and "\nRequires-Python: >=3.11\n" in metadata


@pytest.mark.slow
def test_a_clean_install_makes_images(clean_python, tmp_path):
    """Outside the repository, without the network: a pipeline, the compiled scan, the command line."""
    args = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "dim": 96}
    recipe = Recipe("sisma-debug", args, "identity", 32, CELEBAMASK19, {"steps": 2})
    pipe = MaskToImage(ssmgen.build("sisma-debug", **args), ssmgen.build("identity"), recipe)
    pipe.save_pretrained(tmp_path / "model")
    write_png(tmp_path / "mask.png", draw_face(1, 64)[1])
    code = """
import ssmgen
print(ssmgen.__file__)
print(ssmgen.MaskToImage.from_pretrained("model")("mask.png")[0].size)
print({name: reason for name, reason in ssmgen.ops.backends().items() if name == "cpu"})
"""
    where, size, backend = run(clean_python, code, tmp_path).splitlines()
    assert Path(where).is_relative_to(clean_python.parents[1]), "the copy in the repository was imported"
    assert size == "(32, 32)" and "avail" in backend, backend
    command = [clean_python, "-I", clean_python.parent / "ssmgen", "list"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "sisma-xl" in shown.stdout, shown.stderr


@pytest.mark.slow
def test_three_lines_make_an_image(clean_python, tmp_path):
    mask = draw_face(3, 128)[1]
    theirs = ssmgen.data.remap(mask, CELEBAMASK19, ssmgen.data.BISENET19)
    write_png(tmp_path / "mask.png", mask)
    write_png(tmp_path / "colours.png", CELEBAMASK19.colorize(mask))
    write_png(tmp_path / "bisenet.png", theirs)
    code = f"""
from ssmgen import MaskToImage
pipe = MaskToImage.from_pretrained("{SHIPPED}")
pipe("mask.png", seed=0)[0].save("face.png")
pipe("colours.png", palette="celebamask19", seed=0)[0].save("colours-face.png")
pipe("bisenet.png", remap="bisenet19", seed=0)[0].save("bisenet-face.png")
"""
    run(clean_python, code, tmp_path)
    face, *same = (ssmgen.data.read_image(tmp_path / f"{name}face.png") for name in ("", "colours-", "bisenet-"))
    assert face.float().std() > 20, "not one grey plane"
    assert all(torch.equal(one, face) for one in same)


def test_the_packaged_model_is_small_and_tells_of_itself():
    folder = ROOT / "ssmgen/pretrained" / SHIPPED
    assert folder.joinpath("model.safetensors").stat().st_size <= 6e6
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 8e6
    for file in folder.rglob("*.json"):
        assert "/" not in file.read_text(), f"{file}: names a path of the machine that made it"
    card = folder.joinpath("README.md").read_text()
    for part in (f'from_pretrained("{SHIPPED}")', "apache-2.0", "python -m recipes.sisma.train", "mIoU"):
        assert part in card, part


def test_the_packaged_model_follows_its_mask():
    """A parser finds the classes of its images where their own masks have them, and not where others do."""
    from recipes.sisma.parser import load_parser
    from recipes.sisma.presets import ASSETS

    pipe = MaskToImage.from_pretrained(SHIPPED)
    masks = torch.stack([draw_face(seed, pipe.recipe.image_size)[1] for seed in range(9000, 9004)])
    images = pipe(list(masks), seed=0, output_type="pt")
    found = load_parser(ASSETS / "drawn-parser.safetensors")[0].parse(images * 2 - 1)
    own, other = ((found == wanted).float().mean() for wanted in (masks, masks.roll(1, 0)))
    assert own > 0.95 > other + 0.1


@pytest.mark.slow
def test_a_strict_type_checker_sees_the_types(clean_python, tmp_path):
    """A user's ``mypy --strict`` accepts right calls and finds wrong ones."""
    (tmp_path / "right.py").write_text(
        "import torch\nimport ssmgen\nfrom ssmgen.pipeline import Recipe, interpolate\n\n"
        "pipe = ssmgen.MaskToImage.from_pretrained('folder')\nrecipe: Recipe = pipe.recipe\n"
        "noise: torch.Tensor = ssmgen.initial_noise([0], (4, 16, 16))\nsize: tuple[int, int, int] = pipe.latent_size\n"
        "images = interpolate(pipe, 'mask.png', seeds=(0, 1), steps=4)\n"
    )
    (tmp_path / "wrong.py").write_text(
        "import ssmgen\npipe = ssmgen.MaskToImage.from_pretrained(3)\nwords: str = ssmgen.list_models()\n"
        "pipe('mask.png', num_images='four')\n"
    )
    # torch's inner packages take mypy ten seconds to read, and none of them is in a signature of ours.
    parts = (f"torch.{part}.*" for part in TORCH_INSIDE)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{','.join(parts)},sympy.*]\nfollow_imports = skip\n")
    arguments = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    arguments += ["--python-executable", str(clean_python)]
    done = subprocess.run([*arguments, "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[:2] for line in errors] == [["wrong.py", "2"], ["wrong.py", "3"], ["wrong.py", "4"]], (
        done.stdout + done.stderr
    )


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == ssmgen.__version__ and cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_the_lowest_versions_that_are_tested_are_those_declared():
    """``make test-lowest`` installs what constraints-lowest.txt pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [Requirement(each) for each in (*project["dependencies"], *extras["adaptive"], *extras["train"])]
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints-lowest.txt").read_text().splitlines())
    pinned = {
        canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines if line)
    }
    for requirement in declared:
        (lowest,) = (part.version for part in requirement.specifier if part.operator == ">=")
        assert pinned[canonicalize_name(requirement.name)] == Version(lowest), requirement


def pins(name):
    """Version and hashes of each package in a file of constraints."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    requirements = [(Requirement(first), rest) for first, *rest in filter(None, lines)]
    assert all(str(each.specifier).startswith("==") and each.marker is None for each, _ in requirements)
    return {canonicalize_name(each.name): (str(each.specifier), rest) for each, rest in requirements}


def test_hashes_are_those_of_the_constraints_and_name_no_host():
    constraints, hashed = pins("constraints.txt"), pins("constraints-hashes.txt")
    versions = {name: version for name, (version, _) in hashed.items()}
    assert versions == {name: version for name, (version, _) in constraints.items()}, "run make hashes"
    for name, (_, hashes) in hashed.items():
        assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes), name
    for file in ROOT.glob("constraints*.txt"):
        lines = [line.strip() for line in file.read_text().splitlines()]
        assert not [line for line in lines if "://" in line or (line.startswith("-") and "--hash" not in line)], file


def test_constraints_pin_all_that_an_installation_brings():
    """Every requirement of ``ssmgen[dev]``, and theirs in turn: pip refuses hashes for only some of them."""
    pinned, seen = pins("constraints.txt"), set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    dev = [Requirement(each) for each in extras["dev"]]
    own = {extra for each in dev if each.name == "ssmgen" for extra in each.extras}
    pending = [Requirement(each) for extra in own for each in extras[extra]]
    pending += [Requirement(each) for each in project["dependencies"]] + [each for each in dev if each.name != "ssmgen"]
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        for text in metadata.requires(name) or ():
            inner = Requirement(text)
            wanted = ("", *requirement.extras)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in wanted):
                pending.append(inner)
    assert len(seen) > 100


def test_ci_tries_other_instruction_sets_and_the_lowest_versions():
    script = (ROOT / ".ci/run").read_text()
    called = {target for line in re.findall("^make (.*)", script, re.MULTILINE) for target in line.split()}
    assert called == {"check", "test", "test-isa", "test-lowest"}
    done = subprocess.run(["make", "--dry-run", "--always-make", *called], cwd=ROOT, capture_output=True, text=True)
    for part in (
        "-m pip check",
        "tests/instruction_sets.py",
        "--requirement constraints-lowest.txt",
        "tests/test_ops_cpu.py",
    ):
        assert part in done.stdout, done.stdout + done.stderr


def test_github_does_what_ci_run_does():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", each) for each in used), "a tag can be moved to other code"
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text())
        assert form.name == "config.yml" or {"name", "description", "body"} <= content.keys(), form


def test_contributing_leads_to_a_tested_block(tmp_path):
    """Its snippets, put where it says, make a block that the tests take."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"<!-- (.+?): (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert [what for what, *_ in found] == ["file", "line", "append", "append"]
    for folder in ("ssmgen", "tests", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "pretrained"))
    for what, name, code in found:
        file = tmp_path / name
        old = file.read_text() if file.exists() else ""
        file.write_text(f"{old}\n\n{code}" if what == "append" else old + code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    wanted = ["tests/test_nn.py", "tests/test_contracts.py", "-k", "gated", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *wanted], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and re.search(r"[1-9]\d* passed", done.stdout), done.stdout + done.stderr
    lint = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "ssmgen/nn"]
    assert subprocess.run(lint, cwd=tmp_path).returncode == 0
