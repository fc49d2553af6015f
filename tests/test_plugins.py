"""Plug-ins: packages that add names by an entry point of the group ``ssmgen``."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

import ssmgen
from ssmgen import MaskToImage, registry
from ssmgen.cli import main
from ssmgen.data import LabelSet
from ssmgen.pipeline import Recipe
from ssmgen.plugins import Plugin, owner

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs/examples/plugin"
BLOCK = """
from torch import nn
from ssmgen import register

@register("block", {name!r})
class {cls}(nn.Module): ...
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A process in which plug-ins were not imported yet."""
    builtin = {name: entry for name, entry in registry._ENTRIES.items() if entry.module.startswith("ssmgen.")}
    monkeypatch.setattr(registry, "_ENTRIES", builtin)
    monkeypatch.setattr(registry, "_CLASHES", {})
    monkeypatch.setattr(registry, "_PLUGINS", None)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("plug_", "ssmgen_shift")):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one module and an entry point on the path, as an installer leaves it."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(package, code, module=None, version="1.0"):
        module = module or f"plug_{package.replace('-', '_')}"
        file = tmp_path / f"{module.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
        metadata = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (metadata / "entry_points.txt").write_text(f"[ssmgen]\n{package} = {module}\n")

    return add


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package of the docs, built and installed into a folder, offline."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")
    flags = ["--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--no-compile"]
    command = [sys.executable, "-m", "pip", "install", "-q", *flags, "--target", folder / "site", folder / "source"]
    subprocess.run(command, check=True)
    return folder / "site"


def test_the_example_of_the_docs_installs_and_is_found_when_asked_for(site):
    """In a process of its own: `import ssmgen` and built-in names import no plug-in, and an unknown name does."""
    code = """
import sys, ssmgen
from ssmgen import registry
ssmgen.build("sisma-debug"), ssmgen.build("euler")
early = "ssmgen_shift" in sys.modules, registry._PLUGINS is not None
solver = ssmgen.build("ralston")
print(*early, solver.order, registry.source("ralston"), len(registry.plugins()))
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False False 2 ssmgen-shift 0.1.0 1" and not answer.stderr


def test_the_docs_show_the_example():
    page = (ROOT / "docs/plugins.md").read_text()
    for file in ("pyproject.toml", "ssmgen_shift.py"):
        assert f"\n{(EXAMPLE / file).read_text()}```\n" in page


def test_names_of_a_plugin_work_like_built_in_ones(site, monkeypatch, capsys):
    monkeypatch.syspath_prepend(site)
    model = ssmgen.build("sisma-debug", mixer="shift-mixer")
    x, mask = torch.randn(2, 3, 6, 10), torch.randint(0, 19, (2, 6, 10))
    assert model(x, torch.rand(2), mask).shape == x.shape
    assert ssmgen.sample(model, x, mask=mask, solver="ralston", steps=2).shape == x.shape
    assert main(["list", "*s*t*"]) == 0
    out = capsys.readouterr().out
    assert "shift-mixer (ssmgen-shift 0.1.0)" in out and "ralston (ssmgen-shift 0.1.0)" in out
    assert "self-attention," in out, "a built-in name stands alone"
    assert main(["list", "ralston", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"solver": ["ralston"], "sources": {"ralston": "ssmgen-shift 0.1.0"}}
    assert registry.source("euler") == "ssmgen" and registry.plugin_of("euler") is None


def test_info_says_where_a_model_comes_from(install, capsys):
    line = "register('model', 'my-size', mixer='self-mamba', add=('mask',), num_classes=3, dim=32, depth=1)(TokenModel)"
    install("sizes", f"from ssmgen import register\nfrom ssmgen.models import TokenModel\n{line}\n")
    for name, place in (("my-size", "sizes 1.0"), ("sisma-debug", "ssmgen")):
        assert main(["info", name, "--size", "4"]) == 0
        assert f"\nregistered by {place}\n" in capsys.readouterr().out


def test_a_shift_is_what_it_says(site, monkeypatch):
    """The example computes what its docstring says."""
    monkeypatch.syspath_prepend(site)
    block = ssmgen.build("shift-mixer", dim=4)
    with torch.no_grad():
        block.mix.weight.copy_(torch.eye(4))
        block.mix.bias.zero_()
    x = torch.zeros(1, 15, 4)
    x[0, 7] = 1  # the middle of a grid of 3 x 5
    out = block(x, (3, 5)).view(3, 5, 4)
    moved = {channel: out[..., channel].nonzero().tolist() for channel in range(4)}
    assert moved == {0: [[1, 1]], 1: [[1, 3]], 2: [[0, 2]], 3: [[2, 2]]}


def test_two_plugins_that_claim_a_name_are_both_named(install):
    install("beta", BLOCK.format(name="plug-mixer", cls="Second"))
    install("alpha", BLOCK.format(name="plug-mixer", cls="First"))
    first, second = r"First \(.*plug_alpha.py:5, of alpha 1.0\)", r"Second \(.*plug_beta.py:5, of beta 1.0\)"
    said = f"'plug-mixer' is taken twice: by {first} and by {second}"
    with pytest.warns(RuntimeWarning, match=said), pytest.raises(ValueError, match=said):
        ssmgen.build("plug-mixer")
    with pytest.raises(ValueError, match=said):
        ssmgen.build("plug-mixer")
    assert [bool(plugin.error) for plugin in registry.plugins()] == [False, True]


def test_a_plugin_cannot_replace_a_built_in(install, capsys):
    install("thief", BLOCK.format(name="plug-other", cls="Other") + BLOCK.format(name="self-mamba", cls="Mine"))
    said = r"'self-mamba' is taken twice: by SelfMamba \(.*mamba.py:\d+\) and by Mine \(.*of thief 1.0\)"
    with pytest.warns(RuntimeWarning, match=said):
        assert "plug-other" not in ssmgen.names("block"), "a half-imported module leaves no name"
    assert isinstance(ssmgen.build("self-mamba", dim=8), ssmgen.nn.SelfMamba)


def test_the_same_class_registered_elsewhere_is_a_second_claim(install):
    """Also a size over a built-in class, with the same arguments."""
    lines = ("from ssmgen import register", "from ssmgen.solvers import AdamsBashforth")
    install("copy", "\n".join([*lines, "register('solver', 'ab2', order=2)(AdamsBashforth)"]))
    with pytest.warns(RuntimeWarning, match="'ab2' is taken twice.*of copy 1.0"):
        ssmgen.names()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import plug_missing", "ModuleNotFoundError: No module named 'plug_missing'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_plugin_that_fails_to_import_leaves_the_others(install, capsys, code, said):
    install("able", BLOCK.format(name="plug-able", cls="Able"))
    install("broken", code)
    assert ssmgen.build("sisma-debug").in_channels == 3  # asks nobody
    with pytest.warns(RuntimeWarning, match=f"plug-in broken = plug_broken of broken 1.0 cannot be imported .{said}"):
        assert ssmgen.build("plug-able")
    with pytest.raises(ValueError, match=rf"unknown name 'plug-abel'.*'plug-able'.*{said}.*pip uninstall broken"):
        ssmgen.build("plug-abel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["list", "plug-*"]) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["block:", "plug-able", "(able", "1.0)"]
    assert printed.err.startswith("warning: The plug-in broken = plug_broken") and printed.err.count("\n") == 1
    assert main(["list", "sisma-?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["broken"] == [printed.err.removeprefix("warning: ").strip()]


def test_plugins_of_one_namespace_are_told_apart(install):
    install("one", BLOCK.format(name="plug-one", cls="One"), module="plug_company.one")
    install("two", BLOCK.format(name="plug-two", cls="Two"), module="plug_company.two")
    assert registry.source("plug-two") == "two 1.0" and registry.source("plug-one") == "one 1.0"


@pytest.fixture
def parts(tmp_path):
    """A package that registers a block, and is not itself the module of an entry point."""
    (tmp_path / "plug_real").mkdir()
    (tmp_path / "plug_real/__init__.py").write_text("")
    (tmp_path / "plug_real/parts.py").write_text(BLOCK.format(name="plug-part", cls="Part"))


@pytest.mark.parametrize("first", [False, True])
def test_names_that_another_package_registers_for_a_plugin_are_its_own(install, parts, first):
    install("real", "import plug_real.parts", module="plug_entry")
    if first:  # by a script of the user, before any name is asked for
        importlib.import_module("plug_entry")
    assert registry.source("plug-part") == "real 1.0" and str(registry.find("plug-part")).endswith("of real 1.0)")
    assert registry.plugin_of("plug-part").module == "plug_entry" and registry.plugin_of("euler") is None


def test_a_folder_records_a_plugin_whose_names_another_package_registers(install, tmp_path):
    line = "register('model', 'plug-size', **(size.defaults | {'num_classes': 3}))(size.builder)"
    code = f"from ssmgen import register\nfrom ssmgen.registry import find\nsize = find('sisma-debug')\n{line}\n"
    (tmp_path / "plug_models.py").write_text(code)
    install("sizes", "import plug_models", module="plug_entry")
    labels = LabelSet("three", ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))
    recipe = Recipe("plug-size", {}, "identity", 8, labels)
    MaskToImage(ssmgen.build("plug-size"), ssmgen.build("identity"), recipe).save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["plugins"] == {"plug-size": "sizes 1.0"}


def test_a_plugin_that_fails_takes_back_what_other_packages_registered_for_it(install, parts):
    install("real", "import plug_real.parts\nraise OSError", module="plug_entry")
    with pytest.warns(RuntimeWarning, match="real 1.0 cannot be imported"):
        assert "plug-part" not in ssmgen.names("block")


@pytest.mark.parametrize("line", ["import plug_real.parts", "from plug_real import parts"])
def test_a_package_that_a_failing_plugin_shares_registers_again_for_the_next(install, parts, line):
    install("alpha", f"{line}\nraise OSError")
    install("beta", line)
    with pytest.warns(RuntimeWarning, match="alpha 1.0 cannot be imported"):
        assert registry.source("plug-part") == "beta 1.0"


def test_a_plugin_keeps_its_names_where_one_that_imports_it_fails(install):
    install("alpha", "import plug_beta\nraise OSError")
    install("beta", BLOCK.format(name="plug-kept", cls="Kept"))
    with pytest.warns(RuntimeWarning, match="alpha 1.0 cannot be imported"):
        assert registry.source("plug-kept") == "beta 1.0"


def test_of_one_package_the_entry_point_being_imported_has_the_names(install, tmp_path):
    install("one", BLOCK.format(name="plug-one", cls="One"), module="plug_company.one")
    install("two", "import plug_company.shared\nraise OSError", module="plug_company.two")
    (tmp_path / "plug_company/shared.py").write_text(BLOCK.format(name="plug-shared", cls="Shared"))
    with pytest.warns(RuntimeWarning, match="two 1.0 cannot be imported"):
        assert ssmgen.names("block", "plug-*") == ["plug-one"]


def test_a_plugin_that_imports_ssmgen_first_does_not_own_its_names():
    plugin = Plugin("x 1.0", "x", "plug_x")
    assert owner(("ssmgen.nn.mamba", "ssmgen.nn", "ssmgen", "plug_x"), [plugin]) is None
    assert owner(("plug_x", "__main__"), [plugin]) == owner(("real", "plug_x"), [plugin]) == plugin


def test_a_plugin_may_ask_for_names_while_it_is_imported(install, tmp_path):
    install("asking", "import ssmgen\nassert 'euler' in ssmgen.names()\n" + BLOCK.format(name="plug-late", cls="Late"))
    install("before", BLOCK.format(name="plug-before", cls="Before"))
    install("failing", "open(__file__ + '.runs', 'a').write('x')\nraise OSError")
    with pytest.warns(RuntimeWarning, match="of failing 1.0 cannot be imported"):
        assert ssmgen.names(pattern="plug-*") == ["plug-before", "plug-late"]
    assert (tmp_path / "plug_failing.py.runs").read_text() == "x", "and it is tried once"


def test_threads_that_ask_at_once_see_every_name(install):
    slow = "import time\ntime.sleep(0.2)\nopen(__file__ + '.runs', 'a').write('x')\n"
    install("slow", slow + BLOCK.format(name="plug-slow", cls="Slow"))
    seen, barrier = [], threading.Barrier(4)

    def ask():
        barrier.wait()
        seen.append(ssmgen.names(pattern="plug-*"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen == [["plug-slow"]] * 4
    assert Path(sys.modules["plug_slow"].__file__ + ".runs").read_text() == "x", "the module runs once"


def in_threads(*calls):
    """The result or the error of each call, all made at once; fails if one does not return."""
    found, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def run(place, call):
        barrier.wait()
        try:
            found[place] = call()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    return found


def when(name, call):
    """Call as soon as a name is registered."""
    while name not in registry._ENTRIES:
        time.sleep(0.001)
    return call()


def test_two_threads_that_build_at_once_import_each_plugin_once(install, tmp_path):
    """Also one that fails; nobody sees the names that it had until then."""
    slow = "import time\ntime.sleep(0.1)\nopen(__file__ + '.runs', 'a').write('x')\n"
    install("able", slow + BLOCK.format(name="plug-able", cls="Able"))
    install("half", slow + BLOCK.format(name="plug-half", cls="Half") + "time.sleep(0.2)\nraise OSError")
    with pytest.warns(RuntimeWarning, match="half 1.0 cannot be imported") as warned:
        first, second, early = in_threads(
            lambda: ssmgen.build("plug-able"),
            lambda: ssmgen.build("plug-able"),
            lambda: when("plug-half", lambda: ssmgen.build("plug-half")),
        )
    assert type(first) is type(second) and type(first).__name__ == "Able"
    assert isinstance(early, ValueError) and "unknown name 'plug-half'" in str(early)
    assert [(tmp_path / f"plug_{name}.py.runs").read_text() for name in ("able", "half")] == ["x", "x"]
    assert len([w for w in warned if "half 1.0" in str(w.message)]) == 1 and "plug-half" not in ssmgen.names()


def test_a_thread_does_not_get_a_name_before_a_second_claim_is_known(install):
    install("alpha", BLOCK.format(name="plug-mixer", cls="First"))
    install("beta", "import time\ntime.sleep(0.2)\n" + BLOCK.format(name="plug-mixer", cls="Second"))

    def build():
        return ssmgen.build("plug-mixer")

    with pytest.warns(RuntimeWarning, match="taken twice"):
        found = in_threads(build, lambda: when("plug-mixer", build))
    assert all("'plug-mixer' is taken twice" in str(each) for each in found)


def test_a_thread_that_imports_a_plugin_itself_does_not_wait_for_one_that_imports_all(install):
    install(
        "asking", "import time\ntime.sleep(0.3)\nimport ssmgen\nssmgen.names()\n" + BLOCK.format(name="plug-a", cls="A")
    )

    def later():
        time.sleep(0.1)
        return ssmgen.names("block", "plug-*")

    module, names = in_threads(lambda: importlib.import_module("plug_asking"), later)
    assert module.A and names == ["plug-a"]


def test_a_folder_says_which_package_its_model_needs(site, monkeypatch, tmp_path):
    folder = tmp_path / "model"
    labels = LabelSet("three", ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))
    settings = {"mixer": {"name": "shift-mixer"}, "num_classes": 3}
    with monkeypatch.context() as patch:
        patch.syspath_prepend(site)
        recipe = Recipe("sisma-debug", settings, "identity", 8, labels)
        model = ssmgen.build("sisma-debug", **settings)
        MaskToImage(model, ssmgen.build("identity"), recipe).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["plugins"] == {"shift-mixer": "ssmgen-shift 0.1.0"}
        MaskToImage.from_pretrained(folder)
    monkeypatch.setattr(registry, "_PLUGINS", None)
    del registry._ENTRIES["shift-mixer"], registry._ENTRIES["ralston"]
    said = r"config.json.*'shift-mixer' comes from the package ssmgen-shift 0.1.0.*pip install 'ssmgen-shift==0.1.0'"
    with pytest.raises(ValueError, match=said):
        MaskToImage.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"plugins": {"shift-mixer": "-r evil"}}))
    with pytest.raises(ValueError, match="unknown name 'shift-mixer'") as refused:
        MaskToImage.from_pretrained(folder)
    assert "pip install" not in str(refused.value)
