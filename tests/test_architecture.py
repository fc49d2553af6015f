"""Who may import whom, and what importing costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Who may import whom: DESIGN's rule, then the small rooms that everything above may use.
ROOMS = {
    "plugins": set(),
    "registry": {"plugins"},
    "ops": {"registry"},
    "nn": {"ops", "registry"},
    "values": set(),
    "conditions": {"nn", "ops", "registry", "values"},
    "models": {"conditions", "nn", "ops", "registry"},
    "objectives": {"registry"},
    "solvers": {"extras", "noise", "registry"},
    "guidance": {"registry"},
    "noise": set(),
    "compiled": set(),
    "precomputed": set(),
    "sampling": {"compiled", "guidance", "precision", "precomputed", "registry", "solvers", "values"},
    "likelihood": {"noise", "registry", "sampling", "solvers", "values"},
    "extras": set(),
    "machine": set(),
    "atomic": {"machine"},
    "reading": set(),
    "hub": set(),
    "precision": set(),
    "signals": set(),
    "weights": {"atomic", "reading"},
    "latents": {"atomic", "data", "hub", "reading", "registry", "weights"},
    "data": {"atomic", "ops", "reading", "registry", "signals", "values", "weights"},
    "text": {"extras", "hub", "registry", "values", "weights"},
    "metrics": {"atomic", "data", "extras", "ops", "weights"},
    "training": {"atomic", "extras", "machine", "precision", "registry", "signals", "values", "weights"},
    "pipeline": {
        *("atomic", "data", "guidance", "hub", "noise", "objectives", "precision", "reading", "registry", "sampling"),
        *("solvers", "text", "values", "weights"),
    },
    "bench": {"models", "ops", "registry"},
    "planning": {"bench", "nn", "ops", "registry", "training"},
    "cli": {
        *("__init__", "atomic", "bench", "models", "ops", "pipeline", "planning", "precision", "registry", "signals"),
        "training",
    },
}
HEAVY = (
    *("diffusers", "huggingface_hub", "timm", "lpips", "torchvision", "mamba_ssm", "gradio", "accelerate"),
    *("omegaconf", "torchdiffeq", "tensorboard", "trackio", "transformers", "wandb"),
)


def imports(file: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "ssmgen" else {f"ssmgen.{alias.name}" for alias in node.names}
    return found


def package_files() -> list[Path]:
    return sorted(
        file for file in (ROOT / "ssmgen").rglob("*.py") if file.name != "__init__.py" or file.parent.name != "ssmgen"
    )


def source_files() -> list[Path]:
    """Everything that is written by hand: not the packaged models, whose cards record how they were trained."""
    kinds = (".py", ".c", ".h")
    return sorted(file for file in (ROOT / "ssmgen").rglob("*") if file.suffix in kinds)


def room(module: str) -> str:
    parts = module.split(".")
    return "__init__" if len(parts) == 1 or parts[1].startswith("__") else parts[1]


@pytest.mark.parametrize("file", package_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(file):
    path = file.relative_to(ROOT / "ssmgen")
    home = path.parts[0].removesuffix(".py")
    used = {room(name) for name in imports(file) if name.split(".")[0] == "ssmgen"} - {home}
    allowed = ROOMS[home]
    assert used <= allowed, f"{home} may not import {sorted(used - allowed)}"


def test_the_package_does_not_name_recipes():
    files = {file.relative_to(ROOT / "ssmgen").as_posix(): file.read_text() for file in source_files()}
    assert not [name for name, text in files.items() if re.search(r"\brecipes\b", text)]


@pytest.mark.parametrize("file", package_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(file):
    assert not {name.split(".")[0] for name in imports(file, top_level=True)} & set(HEAVY)


def test_files_functions_and_constructors_stay_small():
    for file in [*(ROOT / "ssmgen").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"
                arguments = len(node.args.args) + len(node.args.kwonlyargs)
                assert node.name != "__init__" or arguments <= 13, f"{file}:{node.lineno}"  # self and twelve


def test_nothing_is_unpickled_or_evaluated():
    forbidden = ("import pickle", "pickle.load", "torch.load(", "eval(", "exec(", "yaml.load(", "__import__(")
    for file in [*package_files(), *(ROOT / "recipes").rglob("*.py")]:
        text = re.sub(r"torch\.load\(.*, weights_only=True\)", "", file.read_text().replace(".eval()", ""))
        assert not [word for word in forbidden if word in text], file


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_needs_torch_and_einops_only():
    code = (
        "import sys\n"
        "from importlib.machinery import ModuleSpec\n"
        "class Refuse:\n"  # what can be found and not imported
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {(*HEAVY, 'PIL', 'safetensors', 'tqdm')!r}:\n"
        "            return ModuleSpec(name, self)\n"
        "    def create_module(self, spec):\n"
        "        raise ModuleNotFoundError(spec.name)\n"
        "    def exec_module(self, module):\n"
        "        pass\n"
        "import torch, einops\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import ssmgen\n"
        "print(ssmgen.build('sisma-debug').in_channels)\n"
    )
    assert run_python(code).strip() == "3"


def test_import_adds_little_to_torch():
    """Processor time, which other work on the machine leaves as it is."""
    code = "import time, torch, einops\nstart = time.process_time()\nimport ssmgen\nprint(time.process_time() - start)"
    assert any(float(run_python(code)) < 0.2 for _ in range(5))


def test_gpu_tests_live_in_their_own_file():
    """Which is the only one that ``pytest -m gpu`` reads, and needs no package but torch, einops and pytest."""
    marked = [file.name for file in (ROOT / "tests").glob("test_*.py") if "mark." + "gpu" in file.read_text()]
    assert marked == ["test_gpu.py"]
    needed = imports(ROOT / "tests/test_gpu.py")
    packages = {name.split(".")[0] for name in needed} - sys.stdlib_module_names
    assert packages == {"pytest", "torch", "conftest", "ssmgen"}


def is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def tensor_functions(body: list[ast.stmt], owners: tuple[str, ...] = ()) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Each public function that takes or returns a ``Tensor``, and its docstring with those of its classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and is_public(node.name):
            if "Protocol" not in {ast.unparse(base) for base in node.bases}:
                yield from tensor_functions(node.body, (*owners, ast.get_docstring(node) or ""))
        elif isinstance(node, ast.FunctionDef) and is_public(node.name):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [node.args.vararg] if node.args.vararg else []
            hints = [node.returns, *(argument.annotation for argument in arguments)]
            if any(re.search(r"\bTensor\b", ast.unparse(hint)) for hint in hints if hint):
                yield node, " ".join((*owners, ast.get_docstring(node) or ""))


@pytest.mark.parametrize("file", package_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_tensor_functions_state_a_shape(file):
    shape = re.compile(r"``([^`]*[^`\w])?\([^`]*,[^`]*\)[^`]*``|any shape|same shape|scalar")  # no call: f(t, x)
    offenders = [
        f"{file.name}:{function.lineno} {function.name}"
        for function, text in tensor_functions(ast.parse(file.read_text()).body)
        if all(is_public(part) for part in file.relative_to(ROOT).with_suffix("").parts)
        if not shape.search(" ".join(text.split()))
    ]
    assert not offenders
