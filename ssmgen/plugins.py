"""Plug-ins: installed packages that add names to the table, by an entry point of the group ``ssmgen``."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

_GROUP = "ssmgen"


@dataclass(frozen=True)
class Plugin:
    """An entry point of the group ``ssmgen``, which an installed package declares.

    Attributes:
        package: name and version of the distribution, e.g. ``"ssmgen-shift 0.1.0"``.
        name: name of the entry point.
        module: the module that is imported; its ``@register`` lines add the names.
        error: why the import failed, and what to do; empty if it did not fail.
    """

    package: str
    name: str
    module: str
    error: str = ""


def installed() -> list[Plugin]:
    """The plug-ins of all installed distributions, by distribution and entry point; nothing is imported."""
    from importlib.metadata import entry_points

    found = (
        Plugin(f"{point.dist.name} {point.dist.version}" if point.dist else "?", point.name, point.module)
        for point in entry_points(group=_GROUP)
    )
    return sorted(found, key=lambda plugin: (plugin.package, plugin.name))


def importing() -> Iterator[str]:
    """The modules that this thread is importing, the innermost first: each but the last is imported by the next."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


def owner(modules: Sequence[str], plugins: Sequence[Plugin]) -> Plugin | None:
    """The plug-in that a registration belongs to.

    Args:
        modules: the module that registered, then those that were importing it, as in `importing`: the module of an
            entry point may import another package that registers the names.
        plugins: those to choose from.
    """
    if not modules or top(modules[0]) == "ssmgen":
        return None  # also where a plug-in was the first to import ssmgen
    return next((found for module in modules if (found := _nearest(module, modules, plugins))), None)


def _nearest(module: str, modules: Sequence[str], plugins: Sequence[Plugin]) -> Plugin | None:
    """The plug-in whose package a module belongs to.

    In a shared namespace it is that with the longest common path, and of several that which was being imported.
    """

    def shared(plugin: Plugin) -> int:
        ours, theirs = module.split("."), plugin.module.split(".")
        return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))

    near = [plugin for plugin in plugins if shared(plugin)]
    return max(near, key=lambda plugin: (shared(plugin), plugin.module in modules), default=None)


def top(module: str) -> str:
    """The top-level package of a module."""
    return module.partition(".")[0]
