"""Code blocks in README and docs run; the docs name every public thing."""

import re
from pathlib import Path
from types import ModuleType

import pytest

import ssmgen
import ssmgen.metrics
from ssmgen import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONSTANTS = ("SCAN_ORDERS", "FID_PROTOCOLS")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages_with_code():
    return [page for page in PAGES if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda p: str(p.relative_to(ROOT)))
def test_code_blocks_run_in_order(page, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "docs"}
    for code in BLOCK.findall(page.read_text()):
        compiled = compile(code, str(page), "exec")
        exec(compiled, namespace)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_api_pages_name_every_public_name():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    public = [f"ssmgen.{name}" for name in ssmgen.__all__ if not isinstance(getattr(ssmgen, name), ModuleType)]
    for module in (ssmgen.ops, ssmgen.nn, ssmgen.models, ssmgen.objectives, ssmgen.solvers, ssmgen.metrics):
        public += [f"{module.__name__}.{name}" for name in module.__all__ if name not in CONSTANTS]
    assert not [name for name in public if f"::: {name}\n" not in text]
