"""What every command is made of: a parser, ``--json``, examples, and a function that answers."""

import argparse
from collections.abc import Callable
from typing import Any

#: The same facts as JSON and as lines of text. A fact ``ok`` that is False makes the exit status 1.
Answer = tuple[dict[str, Any], list[str]]


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], Answer], help: str, about: str, *shown: str
) -> argparse.ArgumentParser:
    """Add a command to the subparsers ``commands``; ``shown`` are the arguments of its examples."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=about,
        epilog=examples(*(f"{name} {words}".strip() for words in shown)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(command=run)
    return command


def examples(*commands: str) -> str:
    """The examples at the end of a help text."""
    return "\n".join(["examples:", *(f"  ssmgen {words}" for words in commands)])
