"""Plug-ins: installed packages that add names to the table, by an entry point of the group ``ssmgen``."""

from collections.abc import Iterable
from dataclasses import dataclass

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


def owner(module: str, plugins: Iterable[Plugin]) -> Plugin | None:
    """The plug-in whose package a module belongs to: in a shared namespace, the one with the longest common path."""

    def shared(plugin: Plugin) -> int:
        ours, theirs = module.split("."), plugin.module.split(".")
        return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))

    return max((plugin for plugin in plugins if shared(plugin)), key=shared, default=None)


def top(module: str) -> str:
    """The top-level package of a module."""
    return module.partition(".")[0]
