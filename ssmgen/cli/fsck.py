"""``ssmgen fsck``: is every checkpoint of a run intact, and what else lies about in its folder."""

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmgen.atomic import megabytes
from ssmgen.cli.command import Answer, add_command
from ssmgen.training.fsck import Finding, check_run, mend_run, run_of
from ssmgen.training.lock import run_lock


def add(commands: Any) -> None:
    """Add the command."""
    about = (
        "Verifies every checkpoint of a run with the checks of loading, and lists leftovers of killed writes, what\n"
        "was set aside, broken lines of the log, and a configuration that cannot be read. The exit status is 1 if\n"
        "something is wrong. With --mend, damaged checkpoints are renamed to damaged-step-*, those that verify again\n"
        "get their name back, leftovers are deleted, and manifests of an older format are renewed. A run is not\n"
        "mended while it trains."
    )
    shown = ("runs/quick", "runs/quick --mend", "runs/quick --json")
    command = add_command(
        commands, "fsck", _fsck, "verify the checkpoints of a run, and mend its folder", about, *shown
    )
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a training run, or of its checkpoints")
    command.add_argument("--mend", action="store_true", help="mend what can be mended; deletes leftovers only")


def _fsck(arguments: argparse.Namespace) -> Answer:
    run = run_of(arguments.run)
    mended = []
    if arguments.mend:
        with run_lock(run) if run.is_dir() else nullcontext():  # not while a training writes into it
            mended = mend_run(run)
    found = check_run(run)
    wrong = sum(finding.wrong for finding in found)
    facts = {
        "run": str(run),
        "ok": not wrong,
        "mended": mended,
        "found": [asdict(finding) | {"detail": _short(run, finding)} for finding in found],
    }
    closing = f"{wrong} of {len(found)} are wrong" if wrong else "nothing is wrong"
    return facts, [*mended, *_table(run, found), f"{closing}{_advice(run, found)}"]


def _advice(run: Path, found: list[Finding]) -> str:
    if any(finding.mendable for finding in found):
        return f"; ssmgen fsck {run} --mend mends what can be mended"
    if any(finding.name == "checkpoints/" and finding.wrong for finding in found):
        return "; put intact copies of the files back and mend again, or train in another folder"
    return ""


def _table(run: Path, found: list[Finding]) -> list[str]:
    rows = [
        (x.name, f"format {x.format}" if x.format else "", megabytes(x.bytes), x.status, _short(run, x)) for x in found
    ]
    name, kind, size, status = (max((len(row[column]) for row in rows), default=0) for column in range(4))
    lines = (f"{a:<{name}}  {b:<{kind}}  {c:>{size}}  {d:<{status}}  {e}" for a, b, c, d, e in rows)
    return [line.rstrip() for line in lines]


def _short(run: Path, finding: Finding) -> str:
    """The detail without the folder's path, which the table need not repeat."""
    detail = finding.detail
    for path in (run / "checkpoints" / finding.name, run / finding.name):
        detail = detail.replace(f"{path}/", "").replace(f"{path}: ", "")
    return detail
