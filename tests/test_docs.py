"""Code and commands in README and docs work; what the docs quote and promise is there."""

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from markdown.extensions.toc import slugify

import ssmgen
import ssmgen.metrics
from recipes.sisma.arguments import from_command_line
from recipes.sisma.train import parse as parse_training
from ssmgen import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"  # whose code tests/test_release.py tries
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
CONSTANTS = ("SCAN_ORDERS", "ZIGZAG_ORDERS", "HILBERT_ORDERS", "FID_PROTOCOLS")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def scratch(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    orders = importlib.import_module("ssmgen.ops.scan_order")  # the function of that name hides the module
    monkeypatch.setattr(orders, "_PATHS", dict(orders._PATHS))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p not in TUTORIALS], ids=name_of)
def test_code_blocks_run_in_order(page, scratch):
    namespace: dict = {"__name__": "docs"}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_tutorials_quote_their_script(page):
    """Which tests/test_tutorials.py runs."""
    (name,) = set(re.findall(r"python -m tutorials\.(\w+)", page.read_text()))
    script = unindented((ROOT / "tutorials" / f"{name}.py").read_text())
    assert blocks(page, "python")
    for code in blocks(page, "python"):
        assert unindented(code) in script, code


def unindented(code):
    return "\n".join(line.strip() for line in code.splitlines())


def commands():
    """Every command line of a bash block, continued lines joined and comments dropped."""
    for page in [*PAGES, CONTRIBUTING]:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    yield page, words[: words.index("&&")]
                    words = words[words.index("&&") + 1 :]
                if words:
                    yield page, words


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(p, w, id=f"{name_of(p)}: {' '.join(w)}") for p, w in commands()]
)
def test_every_command_line_is_understood(page, words, monkeypatch):
    CHECKS[Path(words[0]).name](words[1:], monkeypatch)


def check_python(words, monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))  # a tutorial registers names when it is imported
    assert words[0] == "-m", "a command of the docs runs a module"
    module, words = words[1], words[2:]
    if module in CHECKS:
        return CHECKS[module](words, monkeypatch)
    assert importlib.util.find_spec(module), f"no module {module}"
    room = module.partition(".")[0]
    if room == "benchmarks":
        return check_flags_are_in_the_source(importlib.util.find_spec(module).origin, words)
    found = importlib.import_module(module)
    if room == "tutorials":
        monkeypatch.setattr(sys, "argv", [module, *words])
        return found.parse()
    assert room == "recipes", f"no check for {module}"
    if module.endswith(".train"):
        return parse_training(words, found.PRESETS)
    return from_command_line(settings_of(found), words)


def settings_of(module):
    """The dataclass whose fields are the keys of a recipe's command."""
    name = module.__name__
    if not hasattr(module, "Settings"):  # another recipe's command has the keys of the one it is made of
        name = f"{name}.__main__" if hasattr(module, "__path__") else f"recipes.sisma.{name.rpartition('.')[2]}"
    return importlib.import_module(name).Settings()


def check_flags_are_in_the_source(file, words):
    source = Path(file).read_text() + (ROOT / "benchmarks/timing.py").read_text()
    assert all(f'"{word}"' in source for word in words if word.startswith("--")), words


class Parsed(Exception):
    """Raised in the place of what a command would do."""


def check_ssmgen(words, monkeypatch):
    from ssmgen.cli import main

    original = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **options):
        original(self, *args, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        main(words)


def check_launcher(words, monkeypatch):
    check_python(words[words.index("-m") :], monkeypatch)


def check_make(words, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def check_pytest(words, monkeypatch):
    assert all((ROOT / word.partition("::")[0]).exists() for word in words if word.startswith("tests"))


def check_pip(words, monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for word in words for group in re.findall(r"\[(.+)\]", word) for extra in group.split(",")} <= {
        *extras
    }


CHECKS = {
    "python": check_python,
    "ssmgen": check_ssmgen,
    "torchrun": check_launcher,
    "accelerate": check_launcher,
    "make": check_make,
    "pytest": check_pytest,
    "pip": check_pip,
    **dict.fromkeys(("git", "cd", "tensorboard", "venv"), lambda words, monkeypatch: None),
}


#: Where each line of docs/extend.md goes: the file, and what stands after it.
PLACES = (
    ("solvers/__init__.py", "from ssmgen.solvers.runge_kutta"),
    ("nn/__init__.py", "from ssmgen.nn.mamba "),
    ("models/sisma.py", 'register("model", "sisma-b"'),
)


def test_extending_takes_one_file_and_one_line(tmp_path):
    """The page is followed to the letter in a copy of the package."""
    page = ROOT / "docs/extend.md"
    package = shutil.copytree(ROOT / "ssmgen", tmp_path / "ssmgen", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    names = re.findall(r"^`ssmgen/(\w+/\w+\.py)`", page.read_text(), re.MULTILINE)
    for name, code in zip(names, blocks(page, "python"), strict=False):
        assert not (package / name).exists()
        (package / name).write_text(code)
    for (name, after), line in zip(PLACES, blocks(page, "text"), strict=True):
        text = (package / name).read_text()
        assert text.count(after) == 1 and line.count("\n") == 1
        (package / name).write_text(text.replace(after, line + after))
    code = (
        "import ssmgen as s; print(s.build('kutta3').order, s.build('line-mixer', dim=8).conv.groups, s.names('model'))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("3 8 [") and "'sisma-m'" in answer.stdout
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "ssmgen"], cwd=tmp_path, check=True)


def headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slugify(title.replace("`", ""), "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=name_of)
def test_links_lead_to_pages_images_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), f"{target}#{anchor}"


def test_own_masks_are_one_click_from_home():
    home = (ROOT / "docs/index.md").read_text()
    assert "](tutorials/your-own-masks.md)" in home and "](images/" in home


def strings(tree):
    """Every string of a source file; what is formatted into it reads as an ellipsis."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_quotes_real_messages():
    files = [file for room in ("ssmgen", "recipes") for file in (ROOT / room).rglob("*.py")]
    source = [text for file in files for text in strings(ast.parse(file.read_text()))]
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 30
    assert not [stem for stem in quoted if not any(stem in text for text in source)]


def test_what_other_targets_of_make_run_exists():
    sets = re.findall(r'"(tests/\w+\.py)(?:::(\w+))?"', (ROOT / "tests/instruction_sets.py").read_text())
    lowest = re.search(
        r"^LOWEST_TESTS := .*%,(tests/test_%\.py),(.*)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert len(sets) == 2 and len(lowest[2].split()) > 10
    for file, test in [*sets, *((lowest[1].replace("%", name), "") for name in lowest[2].split())]:
        assert f"def {test}" in (ROOT / file).read_text(), (file, test)


def test_promises_name_tests_that_exist():
    promised = re.findall(r"`(tests/\w+\.py)::(\w+)`", "".join(page.read_text() for page in PAGES))
    assert len(promised) > 25
    missing = [f"{file}::{test}" for file, test in promised if f"def {test}(" not in (ROOT / file).read_text()]
    assert not missing


def test_the_api_pages_name_every_public_name():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    public = [f"ssmgen.{name}" for name in ssmgen.__all__ if not isinstance(getattr(ssmgen, name), ModuleType)]
    for module in (ssmgen.ops, ssmgen.nn, ssmgen.models, ssmgen.objectives, ssmgen.solvers, ssmgen.metrics):
        public += [f"{module.__name__}.{name}" for name in module.__all__ if name not in CONSTANTS]
    assert not [name for name in public if f"::: {name}\n" not in text]


@pytest.mark.parametrize("package", ["ssmgen.data", "ssmgen.training"])
def test_the_api_pages_cover_packages_by_module(package):
    """A name counts if its page has it, or the whole module it comes from."""
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    module = importlib.import_module(package)
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        home = getattr(value, "__module__", None) or module.__name__
        homes = (f"{package}.{name}", f"ssmgen.ops.{name}", home)
        if name.isupper() or any(f"::: {place}\n" in text for place in homes):
            continue
        missing.append(name)
    assert not missing


def test_the_notebook_runs(scratch, monkeypatch):
    """With few steps; what is shown and what is installed is left to a notebook service."""
    monkeypatch.setenv("SSMGEN_NOTEBOOK_STEPS", "2")
    notebook = json.loads((ROOT / "notebooks/ssmgen.ipynb").read_text())
    namespace: dict = {"__name__": "notebook", "display": lambda *shown: None}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(cell.startswith("%pip install") for cell in cells)
    for cell in cells:
        if not cell.startswith("%"):
            exec(compile(cell, "notebooks/ssmgen.ipynb", "exec"), namespace)
