"""The command ``ssmgen``: ``list``, ``info``, ``plan``, ``export``, ``fsck``, ``doctor`` and ``bench``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from ssmgen import __version__
from ssmgen.cli import fsck, machine, models, plan
from ssmgen.cli.command import examples
from ssmgen.signals import status_of, stopping


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0 is success; 1 means that ``fsck`` found something wrong; 2 is an error that the user can fix, with one message on
    stderr; 130, 143, 129 and 138 follow Ctrl-C, SIGTERM, SIGHUP and SIGUSR1; 141 means that the reader of a pipe has
    closed it, as ``head`` does.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        with stopping():
            facts, lines = arguments.command(arguments)
        print(json.dumps(facts, indent=2) if arguments.json else "\n".join(lines), flush=True)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would print another error at exit
            return 141
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        return status_of(stopped)
    return 0 if facts.get("ok", True) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssmgen",
        description="What ssmgen can build, what it costs, what runs here; and models as folders.",
        epilog=examples("list 'sisma*'", "info sisma-xl", "export OWNER/NAME faces", "fsck RUN", "doctor", "bench")
        + "\n'ssmgen COMMAND --help' shows the options. Training has its own commands, see the README.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ssmgen {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    models.add(commands)
    plan.add(commands)
    fsck.add(commands)
    machine.add(commands)
    return parser
