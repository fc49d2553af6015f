"""``key=value`` command lines over dataclasses, and commands that fail with one clear message."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, cast

from ssmgen.extras import require
from ssmgen.registry import closest

Schema = TypeVar("Schema")


class UsageError(ValueError):
    """A command line that cannot be understood."""


def from_command_line(schema: Schema, argv: list[str]) -> Schema:
    """Fill a dataclass from ``key=value`` words; nested keys are written with dots.

    Args:
        schema: an instance whose values are the defaults.
        argv: the words.

    Raises:
        UsageError: a word that is no ``key=value``, an unknown key (with the closest ones), or a value of another type.
    """
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
            # A plain value is converted by its field's type alone: as YAML, run=007 would become 7.
            given = omegaconf.OmegaConf.from_dotlist([word]) if "." in key else {key: value}
            structured = omegaconf.OmegaConf.merge(structured, given)
        return cast(Schema, omegaconf.OmegaConf.to_object(structured))
    except omegaconf.errors.OmegaConfBaseException as error:
        raise UsageError(f"{word}: {str(error).splitlines()[0]}") from error


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command; what a user can mend ends it with one message on stderr and exit status 2, without a traceback."""
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
