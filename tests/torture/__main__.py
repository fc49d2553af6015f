"""Run the campaigns: ``make torture``, or ``PYTHONPATH=tests python -m torture [NAME ...]``."""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # many processes; a fork must have no threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # after what it reads

from recipes.sisma.provenance import provenance
from torture.campaign import Campaign, Report, run_campaign
from torture.campaigns import CAMPAIGNS, NAMED
from torture.trainings import warm_up

_KNOWN = CAMPAIGNS | NAMED


def main() -> int:
    """Run the chosen campaigns, print a table, write the figures if asked; 1 if any case failed."""
    given = _arguments()
    torch.set_num_threads(1)
    folder = given.keep or Path(tempfile.mkdtemp(prefix="ssmgen-torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    if given.campaigns != list(NAMED):
        warm_up()
    reports = [_run(_KNOWN[name], folder, given) for name in given.campaigns or CAMPAIGNS]
    seconds = round(time.monotonic() - started)
    for report in reports:
        _print(report)
    failed = any(report.failures for report in reports)
    print(f"{sum(report.cases for report in reports):,} cases in {seconds} s: {'FAILED' if failed else 'all hold'}")
    if given.json:
        content = {"share": given.share, "seconds": seconds, "campaigns": [asdict(report) for report in reports]}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content | provenance(_command(given), given.seed), indent=2) + "\n")
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("campaigns", nargs="*", metavar="NAME", help=f"of {', '.join(CAMPAIGNS)}; all if none")
    parser.add_argument("--share", type=float, default=1.0, help="share of each campaign's cases (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default 0)")
    parser.add_argument("--jobs", type=int, help="cases at the same time (default: one per core)")
    parser.add_argument("--case", type=int, action="append", help="only this case of one campaign")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder for the cases; failed ones stay there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    given = parser.parse_args()
    unknown = [name for name in given.campaigns if name not in _KNOWN]
    if unknown:
        parser.error(f"unknown campaign {unknown[0]!r}; there are {', '.join(CAMPAIGNS)}")
    if given.case is not None and len(given.campaigns) != 1:
        parser.error("--case needs the name of one campaign")
    if given.share <= 0:
        parser.error(f"--share must be positive, got {given.share:g}")
    return given


def _run(campaign: Campaign, folder: Path, given: argparse.Namespace) -> Report:
    return run_campaign(campaign, folder, share=given.share, seed=given.seed, jobs=given.jobs, only=given.case)


def _command(given: argparse.Namespace) -> str:
    names = f" ONLY={shlex.quote(' '.join(given.campaigns))}" if given.campaigns else ""
    return f"make torture SHARE={given.share:g} SEED={given.seed}{names}"


def _print(report: Report) -> None:
    state = f"skipped: {report.skipped}" if report.skipped else f"{len(report.failures)} failed"
    print(f"\n{report.name}: {report.cases:,} cases of {report.of:,}, {state}, {report.seconds:.0f} s")
    print(f"  {report.promise}")
    for kind, count in sorted(report.kinds.items()):
        print(f"  {count:>6} {kind}")
    for name, value in report.figures.items():
        print(f"  {name}: {value}")
    for failure in report.failures:
        print(f"  FAILED case {failure['case']}: {failure['what'][-600:]}\n    {failure['reproduce']}")
        print(f"    kept: {failure['folder']}")


if __name__ == "__main__":
    sys.exit(main())
