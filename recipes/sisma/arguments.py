"""``key=value`` command lines over dataclasses, and commands that fail with one clear message."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, cast

from ssmgen.extras import require
from ssmgen.noise import checked_seed
from ssmgen.registry import closest

Schema = TypeVar("Schema")


#: Exit status of what was stopped by Ctrl-C, as shells give it.
STOPPED = 130


class UsageError(ValueError):
    """A command line that cannot be understood."""


class Help(Exception):
    """``--help`` was asked for; its text is what to print."""


def from_command_line(schema: Schema, argv: list[str]) -> Schema:
    """Fill a dataclass from ``key=value`` words; nested keys are written with dots, ``~`` is the home folder.

    Args:
        schema: an instance whose values are the defaults.
        argv: the words.

    Raises:
        UsageError: a word that is no ``key=value``, an unknown key (with the closest ones), or a value of another type.
        ValueError: a ``seed`` outside 0 to 2**64 - 1.
        Help: one of the words is ``--help`` or ``-h``.
    """
    if {"-h", "--help"} & set(argv):
        raise Help(keys_help(schema))
    omegaconf = require("omegaconf", extra="train")
    known = [field.name for field in fields(cast(Any, schema))]
    for word in argv:
        key, separator, _ = word.partition("=")
        if not separator:
            raise UsageError(f"{word!r} is not key=value; the keys are {', '.join(known)}")
        if key.partition(".")[0] not in known:
            raise UsageError(f"unknown key {key!r}{closest(key, known)} The keys are {', '.join(known)}.")
    structured = omegaconf.OmegaConf.structured(schema)
    try:
        for word in argv:
            key, _, value = word.partition("=")
            if value.startswith("~"):  # not every shell does this behind a "="
                value = os.path.expanduser(value)
            # A plain value is converted by its field's type alone: as YAML, run=007 would become 7.
            given = omegaconf.OmegaConf.from_dotlist([word]) if "." in key else {key: value}
            structured = omegaconf.OmegaConf.merge(structured, given)
        filled = cast(Schema, omegaconf.OmegaConf.to_object(structured))
    except omegaconf.errors.OmegaConfBaseException as error:
        raise UsageError(f"{word}: {str(error).splitlines()[0]}") from error
    checked_seed(getattr(filled, "seed", 0))
    return filled


def keys_help(schema: Any) -> str:
    """Every key with its default and what a docstring says of it.

    That is the dataclass's own, its parents', or that of a class in its ``documented_by``.
    """
    told: dict[str, str] = {}
    for kind in (*getattr(schema, "documented_by", ()), *reversed(type(schema).__mro__)):
        told |= _attributes(inspect.getdoc(kind) or "")
    lines = [f"  {each.name}={getattr(schema, each.name)}\n      {told[each.name]}" for each in fields(schema)]
    return "Keys and their defaults, given as key=value:\n" + "\n".join(lines)


def _attributes(doc: str) -> dict[str, str]:
    """The entries under ``Attributes:``; one for several names, ``a, b: text``, is an entry of each."""
    section = re.match(r"(?: {4}.*\n?)*", doc.partition("Attributes:\n")[2])
    assert section is not None
    entries = re.sub(r"\n {5,}", " ", section[0]).splitlines()
    found = {}
    for entry in entries:
        heading, _, text = entry.strip().partition(": ")
        found |= dict.fromkeys(re.split(r", | and ", heading), text)
    return found


def command_line(command: str, *words: str) -> str:
    """``python -m recipes.sisma.COMMAND`` with its words, quoted so that it can be pasted into a shell."""
    return shlex.join(["python", "-m", f"recipes.sisma.{command}", *words])


def run_command(main: Callable[[list[str]], int | None]) -> None:
    """Run a command and exit with the status it returns.

    What a user can mend ends it with one message on stderr and status 2, Ctrl-C with one line, both without traceback.
    Warnings are one line each.
    """
    warnings.formatwarning = _one_line
    try:
        raise SystemExit(main(sys.argv[1:]) or 0)
    except Help as help:
        print(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\n{help}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning without the line of the library that gave it, which says nothing to who typed a command."""
    return f"warning: {' '.join(str(message).split())}\n"
