"""``key=value`` command lines for dataclasses, and commands that fail with one clear message."""

import atexit
import inspect
import multiprocessing
import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import reduce
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, cast

from recipes.sisma.reading import UsageError, parse_yaml, read_yaml, reject_expansion
from ssmgen.extras import require
from ssmgen.noise import checked_seed
from ssmgen.registry import closest
from ssmgen.signals import Stopped, ignore_stop_requests, say, status_of, stopping
from ssmgen.training.processes import kill_workers, without_traceback
from ssmgen.training.watchdog import blamed

Schema = TypeVar("Schema")


class Help(Exception):
    """Raised for ``--help``; its text is the list of keys."""


def from_command_line(schema: Schema, argv: list[str]) -> Schema:
    """Fill a dataclass from ``key=value`` words; a leading ``~`` in a value is the home folder.

    A field of a nested dataclass has two keys, its dotted path and its name alone (``train.lr=`` and ``lr=``). The
    short key is left out where another field has that name; ``short_names`` of the schema's class, a dict from key to
    dotted path, gives a field a different one: ``{"solver_steps": "sampling.steps"}``. The values of ``schema`` are
    the defaults.

    Raises:
        UsageError: a word without ``=``, an unknown key (the closest ones are listed), a value of the wrong type, or
            ``${...}``, which is never expanded.
        ValueError: a ``seed`` outside 0 to 2**64 - 1.
        Help: one of the words is ``--help`` or ``-h``.
    """
    short = _short_keys(schema)
    if {"-h", "--help"} & set(argv):
        raise Help(keys_help(schema))
    omegaconf = require("omegaconf", extra="train")
    keys = {path: path for path in short.values()} | short
    for word in argv:
        reject_expansion(word, word)
    paths = [_path_of(word, keys, short) for word in argv]
    structured = _structured(schema, short)
    typed = set(_field_paths(schema, typed=True))
    try:
        for word, path in zip(argv, paths, strict=True):
            structured = omegaconf.OmegaConf.merge(structured, _nested(path, word.partition("=")[2], typed, omegaconf))
        filled = cast(Schema, omegaconf.OmegaConf.to_object(structured))
    except (omegaconf.errors.OmegaConfBaseException, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{word[:200]}: {str(error).splitlines()[0]}") from error
    for path in short.values():
        if path.rpartition(".")[2] == "seed":
            checked_seed(attrgetter(path)(filled))
    return filled


def from_file(schema: Schema, file: Path) -> Schema:
    """Fill a dataclass from a YAML file, whose nested settings may also stand side by side under their short keys.

    Raises:
        FileNotFoundError: no such file.
        UsageError: a key that the dataclass does not have, a value of the wrong type, or what `read_yaml` rejects;
            names the file.
    """
    short = _short_keys(schema)
    omegaconf = require("omegaconf", extra="train")
    written, text = read_yaml(file)
    structured, where = _structured(schema, short), str(file)
    try:
        loaded = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(text))
        for path, value in _assignments(written, loaded, short, set(_field_paths(schema, typed=True))):
            where = f"{file}: {path}"
            omegaconf.OmegaConf.update(structured, path, value, merge=True)
        where = str(file)
        return cast(Schema, omegaconf.OmegaConf.to_object(structured))
    except (omegaconf.errors.OmegaConfBaseException, TypeError, ValueError) as error:
        raise UsageError(f"{where}: {(str(error).splitlines() or ['not valid'])[0]}") from error


def _assignments(
    written: Mapping[str, Any], loaded: Mapping[str, Any], short: Mapping[str, str], typed: set[str], owner: str = ""
) -> Iterator[tuple[str, Any]]:
    """Dotted paths with their values: the text of a typed field, which its type converts, otherwise the YAML value."""
    known = {path: path for path in short.values()} | ({} if owner else dict(short))
    for name, value in loaded.items():
        path = known.get(f"{owner}{name}", f"{owner}{name}")
        if isinstance(value, dict) and any(field.startswith(f"{path}.") for field in known):
            yield from _assignments(written[name], value, short, typed, f"{path}.")
        elif path not in known:
            raise ValueError(f"unknown key {path!r}{closest(path, known)}".removesuffix(" "))
        elif path in typed and isinstance(value, bool | int | str):  # run: 007 is a name, no number
            yield path, written[name]
        else:
            yield path, value


def flat(schema: Any) -> dict[str, Any]:
    """All settings side by side under their short keys."""
    return {key: attrgetter(path)(schema) for key, path in _short_keys(schema).items()}


def _structured(schema: Any, short: Mapping[str, str]) -> Any:
    """OmegaConf's form of a dataclass in which nested frozen ones can be set too."""
    omegaconf = require("omegaconf", extra="train").OmegaConf
    structured = omegaconf.structured(schema)
    for owner in {path.rpartition(".")[0] for path in short.values()} - {""}:
        omegaconf.set_readonly(omegaconf.select(structured, owner), False)
    return structured


def keys_help(schema: Any) -> str:
    """List every key with its default and its description, from the ``Attributes:`` of the dataclasses."""
    described, lines = _attributes(schema), []
    for key, path in _short_keys(schema).items():
        owner, _, name = path.rpartition(".")
        text = described[key] if key in described else _attributes(attrgetter(owner)(schema))[name]
        lines.append(f"  {key}={attrgetter(path)(schema)}\n      {text}")
    return "Keys and their defaults, given as key=value:\n" + "\n".join(lines)


def _short_keys(schema: Any) -> dict[str, str]:
    """The dotted path of every field, nested ones included, by its shortest key."""
    paths = list(_field_paths(schema))
    renamed = {path: key for key, path in getattr(schema, "short_names", {}).items()}
    short = {path: renamed.get(path, path.rpartition(".")[2]) for path in paths}
    used = Counter(short.values())
    return {short[path] if used[short[path]] == 1 else path: path for path in paths}


def _field_paths(schema: Any, prefix: str = "", typed: bool = False) -> Iterator[str]:
    """Dotted paths of the fields; without those of type Any if only ``typed`` ones are wanted."""
    for each in fields(schema):
        value = getattr(schema, each.name)
        if is_dataclass(value):
            yield from _field_paths(value, f"{prefix}{each.name}.", typed)
        elif not (typed and each.type in (Any, "Any")):
            yield prefix + each.name


def _path_of(word: str, keys: Mapping[str, str], short: Mapping[str, str]) -> str:
    """The dotted path that a ``key=value`` word sets: of a field, or of an entry of a dict field."""
    key, separator, _ = word.partition("=")
    if not separator:
        raise UsageError(f"{word!r} is not key=value; the keys are {', '.join(short)}")
    field, entry = key, ""
    while field not in keys:
        field, dot, last = field.rpartition(".")
        if not dot:
            raise UsageError(f"unknown key {key!r}{closest(key, keys)} The keys are {', '.join(short)}.")
        entry = f".{last}{entry}"
    return keys[field] + entry


def _nested(path: str, value: str, typed: set[str], omegaconf: Any) -> Any:
    """The value under its path, as nested mappings."""
    if path not in typed:  # such as an entry of a dict: it is read as YAML
        parse_yaml(value, f"{path}={value}")
        return omegaconf.OmegaConf.from_dotlist([f"{path}={value}"])
    if value.startswith("~"):  # not every shell expands it after "="
        value = os.path.expanduser(value)
    # The field's type alone converts the value: as YAML, run=007 would become 7.
    return reduce(lambda inner, name: {name: inner}, reversed(path.split(".")), cast(Any, value))


def _attributes(schema: Any) -> dict[str, str]:
    """Descriptions by attribute; an entry for several, ``a, b: text``, describes each."""
    docstring_parser = require("docstring_parser", extra="train")
    found: dict[str, str] = {}
    for kind in reversed(type(schema).__mro__):
        for entry in docstring_parser.google.parse(inspect.getdoc(kind) or "").params:
            found |= dict.fromkeys(entry.arg_name.split(", "), " ".join((entry.description or "").split()))
    return found


def command_line(command: str, *words: str, recipe: str = "recipes.sisma") -> str:
    """``python -m RECIPE.COMMAND`` with its words, quoted for a shell."""
    return shlex.join(["python", "-m", f"{recipe}.{command}", *words])


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command and exit with the status it returns.

    Errors that the user can fix end it with one message on stderr and status 2. A request to stop ends it with one
    sentence and the status of `ssmgen.signals`. Neither prints a traceback. Each warning is one line.
    """
    # Without the source line that raised it, which does not help the user of a command.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    atexit.register(ignore_stop_requests)  # Python takes a while to end, and would end with another status
    try:
        with stopping() as requests:
            status = _status(main, requests)
    except KeyboardInterrupt as stopped:  # while the outcome was printed
        status = status_of(stopped)
    raise SystemExit(status)


def _status(main: Callable[[list[str]], int | None], requests: list[Stopped]) -> int:
    try:
        return main(sys.argv[1:]) or 0
    except Help as help:
        print(f"{(sys.modules[main.__module__].__doc__ or '').strip()}\n\n{help}")
        return 0
    except KeyboardInterrupt as stopped:
        kill_workers(multiprocessing.active_children())  # Python would wait for a stalled one
        return _stopped(stopped)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        kill_workers(multiprocessing.active_children())
        if requests:  # a library made an error of its own of it, as Python 3.11 does where a class is defined
            return _stopped(requests[-1])
        blame = blamed(error)
        say(f"error: {without_traceback(blame)}")
        return getattr(blame, "status", 2)
    finally:
        with suppress(OSError):  # the reader of a pipe has closed it; Python says so at exit
            sys.stdout.flush()


def _stopped(stopped: KeyboardInterrupt) -> int:
    """Say that a request stopped the command, or which process of the job failed if that was behind it."""
    blame = blamed(stopped)  # tells the other ranks, too, which may wait for this one
    status = getattr(blame, "status", status_of(stopped))
    if status < 128:
        say(f"error: {blame}")
    else:
        say(f"{str(stopped) or 'stopped by SIGINT'}; no half-written file is left")
    return status
