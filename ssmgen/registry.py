"""One table of names: models, blocks, conditions, objectives, solvers and encoders are built by their names in it.

A name is looked up, never imported from a dotted path, so a configuration file cannot run code. Installed packages add
names by an entry point of the group ``ssmgen``. Their modules are imported when a name is not in the table yet, or when
names are listed.
"""

import difflib
import fnmatch
import functools
import importlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

from ssmgen.plugins import Plugin, importing, installed, owner, top

KINDS = ("model", "block", "condition", "objective", "solver", "autoencoder", "text-encoder")

#: What a part of something larger is to be: a registered name, or ``{"name": ..., **arguments}``.
Spec = str | Mapping[str, Any]

Builder = TypeVar("Builder", bound=Callable[..., Any])
Given = ParamSpec("Given")
Result = TypeVar("Result")

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Entry:
    """What a name stands for: a builder, and the keyword arguments the name fixes for it.

    Attributes:
        place: file and line of the registration.
        modules: the module that registered it, then those that were importing it, the innermost first.
    """

    kind: str
    name: str
    builder: Callable[..., Any]
    defaults: dict[str, Any]
    place: str = ""
    modules: tuple[str, ...] = ("",)

    @property
    def module(self) -> str:
        """The module that registered it."""
        return self.modules[0]

    def __str__(self) -> str:
        plugin = owner(self.modules, installed())
        return f"{self.builder.__qualname__} ({self.place}{f', of {plugin.package}' if plugin else ''})"


class NameTaken(ValueError):
    """A name is registered for two different things.

    Attributes:
        entry: what already has the name.
    """

    def __init__(self, entry: Entry, other: Entry) -> None:
        super().__init__(
            f"the name {entry.name!r} is taken twice: by {entry} and by {other}. Names are unique across kinds; choose "
            "another for one of them."
        )
        self.entry = entry


_ENTRIES: dict[str, Entry] = {}
_CLASHES: dict[str, str] = {}  # names that two plug-ins claim
_PLUGINS: tuple[Plugin, ...] | None = None
_THREAD = threading.local()
_LOADING = threading.Lock()


def register(kind: str, name: str, **defaults: Any) -> Callable[[Builder], Builder]:
    """Decorator that makes a class or function buildable as ``build(name)``.

    Args:
        kind: one of ``model``, ``block``, ``condition``, ``objective``, ``solver``, ``autoencoder``, ``text-encoder``.
        name: unique over all kinds, lower case with dashes, e.g. ``"cross-mamba"``.
        **defaults: keyword arguments this name stands for. A model size is one such line over its class.

    Raises:
        ValueError: unknown kind, or a name that something else already has (`NameTaken` names both places).
            Registering the same class again, as re-running a notebook cell does, replaces it.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}{closest(kind, KINDS)}")
    caller = sys._getframe(1)
    place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
    modules = tuple(dict.fromkeys([caller.f_globals.get("__name__", ""), *importing()]))

    def decorate(builder: Builder) -> Builder:
        entry, taken = Entry(kind, name, builder, defaults, place, modules), _ENTRIES.get(name)
        if taken is not None and _identity(taken) != _identity(entry):
            raise NameTaken(taken, entry)
        _check_arguments(name, builder, defaults)
        _ENTRIES[name] = entry
        return builder

    return decorate


def build(name: str, **overrides: Any) -> Any:
    """Build whatever ``name`` stands for, e.g. ``build("sisma-xl", depth=12)`` or ``build("cross-mamba", dim=256)``.

    Raises:
        ValueError: unknown name; the message lists the closest ones.
        TypeError: an override the builder does not take; the message lists the closest ones and all of them.
    """
    entry = find(name)
    arguments = {**entry.defaults, **overrides}
    known = _keywords(entry.builder, arguments)
    if known is not None:
        check_keywords(repr(name), overrides, known)
        # Other parts than those that the name stands for may not take what it fixes for its own.
        arguments = {key: value for key, value in arguments.items() if key in known}
    missing = [p for p in _required(entry.builder) if p not in arguments]
    if missing:
        example = ", ".join(f"{p}=..." for p in missing)
        spec = ", ".join(f"{p!r}: ..." for p in missing)
        raise TypeError(
            f"{name!r} needs {', '.join(missing)}: write build({name!r}, {example}), or as a spec "
            f"{{'name': {name!r}, {spec}}}"
        )
    return entry.builder(**arguments)


def make(spec: Spec, **offered: Any) -> Any:
    """Build a part from its spec, with those of the offered arguments that its builder takes.

    Arguments in the spec win over offered ones, and offered ones over those that the name stands for.

    Raises:
        TypeError: a spec that is neither a name nor a mapping with one, or an argument the builder does not take.
        ValueError: unknown name.
    """
    name, arguments = divided(spec)
    known = takes(spec)
    wanted = offered if known is None else {key: value for key, value in offered.items() if key in known}
    return build(name, **{**wanted, **arguments})


def divided(spec: Spec) -> tuple[str, dict[str, Any]]:
    """A spec as name and arguments.

    Raises:
        TypeError: it is neither a name nor a mapping with one.
    """
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        return spec["name"], {key: value for key, value in spec.items() if key != "name"}
    raise TypeError(f"a spec is a registered name or {{'name': ..., arguments}}, got {spec!r}")


def takes(spec: Spec) -> list[str] | None:
    """Names of the arguments that the builder of a spec takes; None where it takes any."""
    name, arguments = divided(spec)
    entry = find(name)
    return _keywords(entry.builder, {**entry.defaults, **arguments})


def find(name: str, kind: str | None = None) -> Entry:
    """The entry behind ``name``, which has to be of ``kind`` where one is given.

    Raises:
        ValueError: an unknown name, with the closest matches and the plug-ins that could not be imported; one of
            another kind; or one that two plug-ins claim.
    """
    if not isinstance(name, str):
        raise TypeError(f"a registered name is text, got {name!r}")
    entry = _ENTRIES.get(name)
    # While another thread imports plug-ins, a second one may still claim the name, or the import of the first may fail.
    unsure = entry is None or (_LOADING.locked() and top(entry.module) != "ssmgen")
    broken = [plugin.error for plugin in plugins() if plugin.error] if unsure else []
    if name in _CLASHES:
        raise ValueError(_CLASHES[name])
    entry = _ENTRIES.get(name)
    if entry is not None and kind in (None, entry.kind):
        return entry
    known = names(kind)
    listed = f"All {kind + 's' if kind else 'names'}: {', '.join(known)}."
    if entry is not None:
        raise ValueError(f"{name!r} is of kind {entry.kind}, not {kind}. {listed}")
    raise ValueError(" ".join([f"unknown {kind or 'name'} {name!r}{closest(name, known)} {listed}", *broken]))


def names(kind: str | None = None, pattern: str = "*") -> list[str]:
    """Registered names, sorted, of one kind or of all, filtered by a shell pattern such as ``"sisma*"``.

    A plug-in that cannot be imported is left out, with a warning.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}{closest(kind, KINDS)}")
    plugins()
    found = [entry.name for entry in list(_ENTRIES.values()) if kind in (None, entry.kind)]
    return sorted(fnmatch.filter(found, pattern))


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models, e.g. ``list_models("sisma*")``."""
    return names("model", pattern)


def plugins() -> tuple[Plugin, ...]:
    """The installed plug-ins, ordered by distribution and entry point; the first call imports them.

    A failing import does not stop the others: it leaves its reason in ``error`` and gives a warning. Of threads that
    call this at once, one imports them, and the others wait for it.
    """
    if _PLUGINS is not None or getattr(_THREAD, "loading", False):  # a plug-in may ask for names itself
        return _PLUGINS or ()
    # A thread that is importing a module does not wait: the thread that holds the lock may need that module. Both then
    # go through all plug-ins, and Python's import system runs each module once.
    alone = any(name != "__main__" for name in importing())
    with nullcontext() if alone else _LOADING:
        return _loaded() if _PLUGINS is None else _PLUGINS


def _loaded() -> tuple[Plugin, ...]:
    global _PLUGINS
    _THREAD.loading = True
    try:
        _PLUGINS = found = tuple(_imported(plugin) for plugin in installed())
    finally:
        _THREAD.loading = False
    for plugin in found:
        if plugin.error:
            warnings.warn(plugin.error, RuntimeWarning, stacklevel=4)
    return found


def plugin_of(name: str) -> Plugin | None:
    """The plug-in that registered ``name``; None if it comes from elsewhere."""
    return owner(find(name).modules, plugins())


def source(name: str) -> str:
    """Where ``name`` comes from: ``"ssmgen"``, a plug-in's package such as ``"ssmgen-shift 0.1.0"``, or a module."""
    module, plugin = find(name).module, plugin_of(name)
    return plugin.package if plugin else "ssmgen" if top(module) == "ssmgen" else module


def _imported(plugin: Plugin) -> Plugin:
    """Import a plug-in's module. If that fails, take back the names that were registered by it or for it."""
    try:
        importlib.import_module(plugin.module)
    except (Exception, SystemExit) as error:
        _take_back(plugin)
        package = plugin.package.partition(" ")[0]
        reason = (
            f"The plug-in {plugin.name} = {plugin.module} of {plugin.package} cannot be imported "
            f"({type(error).__name__}: {error}): update it (pip install --upgrade {package}), or remove it "
            f"(pip uninstall {package})."
        )
        if isinstance(error, NameTaken) and owner(error.entry.modules, installed()):
            _CLASHES[error.entry.name] = reason
        return replace(plugin, error=reason)
    return plugin


def _take_back(plugin: Plugin) -> None:
    """Remove the names that were registered while the module of a plug-in was imported, which failed.

    The modules that registered them are forgotten, so that another plug-in that imports one registers its names again.
    """
    known = installed()
    for name, entry in list(_ENTRIES.items()):
        found = owner(entry.modules, known)
        if found and found.module == plugin.module and plugin.module in entry.modules:
            for module in entry.modules[: entry.modules.index(plugin.module) + 1]:
                _forget(module)
        elif top(entry.module) != top(plugin.module) or entry.module in sys.modules:
            continue
        del _ENTRIES[name]


def _forget(module: str) -> None:
    sys.modules.pop(module, None)
    package, _, last = module.rpartition(".")
    if package in sys.modules:
        vars(sys.modules[package]).pop(last, None)  # where `from package import last` would find it


def closest(name: str, candidates: Any) -> str:
    """A sentence that offers the nearest candidates, or a full stop where none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    return f". Did you mean {' or '.join(repr(n) for n in near)}?" if near else "."


def check_keywords(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Reject a keyword argument that ``name`` does not take.

    Raises:
        TypeError: says which, the closest ones, and all that there are.
    """
    accepted = list(known)
    for keyword in given:
        if keyword not in accepted:
            listed = f"It takes: {', '.join(accepted)}." if accepted else "It takes no arguments."
            raise TypeError(f"{name} takes no {keyword!r}{closest(keyword, accepted)} {listed}")


def keywords(call: Callable[..., Any]) -> list[str]:
    """The parameters of a function or a method, taken from its class or not, that may be given by name."""
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.kind in _NAMED and p.name not in ("self", "cls")]


def explained(*more: str) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]:
    """Decorator of a function whose settings people type: a misspelt one is answered with the closest name.

    Args:
        *more: what the function takes by name beside its own parameters, where it hands ``**settings`` on.
    """

    def decorate(call: Callable[Given, Result]) -> Callable[Given, Result]:
        known = [*keywords(call), *more]
        name = call.__qualname__.removesuffix(".__call__")

        @functools.wraps(call)
        def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
            check_keywords(name, kwargs, known)
            return call(*args, **kwargs)

        return checked

    return decorate


def passes_on(core: Callable[..., Any], *fixed: str) -> Callable[[Builder], Builder]:
    """Decorator of a constructor that hands its ``**rest`` to ``core``: its signature then lists what ``core`` takes.

    Args:
        core: the class or function that gets them.
        *fixed: arguments of ``core`` that the constructor sets itself.
    """

    def decorate(constructor: Builder) -> Builder:
        signature = inspect.signature(constructor)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {p.name for p in own} | set(fixed)
        more = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in inspect.signature(core).parameters.values()
            if p.name not in taken
        ]
        constructor.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return constructor

    return decorate


def _keywords(builder: Callable[..., Any], arguments: Mapping[str, Any]) -> list[str] | None:
    """Names a builder takes when it is called with ``arguments``; None where it takes any.

    A class that hands ``**rest`` to its parent takes the parent's too, and one with a method ``takes`` what that says:
    a stack takes what the parts take of which it is made.
    """
    parameters = inspect.signature(builder).parameters.values()
    found = [p.name for p in parameters if p.kind in _NAMED]
    if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
        return found
    parent = builder.__mro__[1] if isinstance(builder, type) else object
    inherited = None if parent is object else _keywords(parent, arguments)
    parts = builder.takes(arguments) if hasattr(builder, "takes") else None
    if inherited is None and parts is None:
        return None
    return list(dict.fromkeys([*found, *(inherited or ()), *(parts or ())]))


def _required(builder: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(builder).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind in _NAMED]


def _check_arguments(name: str, builder: Callable[..., Any], arguments: dict[str, Any]) -> None:
    known = _keywords(builder, arguments)
    if known is not None:
        check_keywords(repr(name), arguments, known)


def _identity(entry: Entry) -> tuple[Any, ...]:
    return entry.kind, entry.module, entry.builder.__module__, entry.builder.__qualname__, entry.defaults
