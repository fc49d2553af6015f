"""The keys of the command line and their checks."""

from dataclasses import dataclass
from pathlib import Path

from recipes.sisma.arguments import UsageError
from recipes.sisma.prepare.splits import METHODS, TEST_SHARE
from ssmgen.registry import closest

_CHOICES = {"layout": ("auto", "official", "folder"), "on_bad": ("stop", "skip"), "sides": ("keep", "fix")}


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        source: the folder to read, or ``drawn``.
        target: the folder to write; it must be empty or not exist.
        layout: of the source: ``auto``, ``official`` or ``folder``. With ``source=drawn``: of the target.
        split: ``auto``, ``first28k``, ``celeba``, ``by-name``, or a JSON file such as
            ``{"train": [...], "test": [...]}``.
        test_share: share of test pairs, for ``split=by-name``.
        labels: class order of the source's masks: ``celebamask19`` or ``bisenet19``, of which the target has the first;
            or a JSON file with the names of other classes by id, ``["background", "skin", ...]``, which is looked for
            in the source and then in the working directory.
        merge: a file with a table that merges the labels into fewer classes, see `ssmgen.data.read_merge_table`, looked
            for as ``labels`` is.
        size: side in pixels of the stored images and masks; without it, image files are copied unchanged.
        sides: ``fix`` swaps left and right in masks of faces where they are the wrong way round, as in some of
            CelebAMask-HQ; ``keep`` only names these masks.
        on_bad: ``stop`` writes nothing if any pair is bad, ``skip`` leaves bad pairs out.
        count: number of drawn faces.
        seed: of the drawn faces.
    """

    source: str = ""
    target: str = ""
    layout: str = "auto"
    split: str = "auto"
    test_share: float = TEST_SHARE
    labels: str = "celebamask19"
    merge: str = ""
    size: int | None = None
    sides: str = "keep"
    on_bad: str = "stop"
    count: int | None = None
    seed: int = 0

    def find_file(self, key: str) -> Path:
        """The file that ``labels`` or ``merge`` names: in the source, otherwise in the working directory.

        Raises:
            FileNotFoundError: it is in neither.
        """
        name = getattr(self, key)
        found = next((path for path in (Path(self.source) / name, Path(name)) if path.exists()), None)
        if found is None:
            raise FileNotFoundError(
                f"{key}={name}: no such file, neither in {self.source} nor in the working directory"
            )
        return found


def check_settings(settings: Settings, defaults: Settings, drawn_faces: bool) -> None:
    """Reject missing, unknown and out-of-range values, and keys without effect, by a `UsageError` naming the key.

    Args:
        settings: the values.
        defaults: those of the recipe, which the user need not have given.
        drawn_faces: whether ``source=drawn`` is allowed.
    """
    for key in ("source", "target"):
        if not getattr(settings, key):
            drawn_too = " (or source=drawn target=DIR count=64)" if drawn_faces else ""
            raise UsageError(f"{key}= is missing: write source=DIR target=DIR{drawn_too}")
    for key, choices in _CHOICES.items():
        if (value := getattr(settings, key)) not in choices:
            raise UsageError(f"{key}={value}: expected one of {', '.join(choices)}{closest(value, choices)}")
    known = ("auto", *METHODS)
    if settings.split not in known and not settings.split.endswith(".json"):
        raise UsageError(
            f"split={settings.split}: expected {', '.join(known)} or a .json file{closest(settings.split, known)}"
        )
    for key in ("size", "count"):
        value = getattr(settings, key)
        if value is not None and value < 1:
            raise UsageError(f"{key}={value}: expected at least 1")
    if not 0 < settings.test_share < 1:
        raise UsageError(f"test_share={settings.test_share}: expected a number between 0 and 1")
    drawn = settings.source == "drawn"
    if drawn and not drawn_faces:
        raise UsageError(
            "source=drawn: this recipe prepares folders alone: draw faces with python -m recipes.sisma.prepare "
            "source=drawn, or give ./drawn for a folder of that name"
        )
    if drawn and settings.layout == "official":
        check_test_share(settings, defaults, "layout=official, which has no splits")
    for key in ("split", "labels", "merge", "sides", "on_bad") if drawn else ("count", "seed"):
        if getattr(settings, key) != getattr(defaults, key):
            raise UsageError(f"{key}= has no effect with source={settings.source}: leave it out")


def check_test_share(settings: Settings, defaults: Settings, split: str) -> None:
    """Reject a ``test_share`` other than the default that ``split``, ``key=value`` with any explanation, ignores."""
    if settings.test_share != defaults.test_share:
        raise UsageError(f"test_share= has no effect with {split}: leave it out, or give split=by-name")
