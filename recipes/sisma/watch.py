"""Watch runs train: ``python -m recipes.sisma.watch run=RUN [port=8008]``.

    python -m recipes.sisma.watch run=runs/quick
    python -m recipes.sisma.watch run=runs/quick,runs/mine       # to compare; run='runs/*' takes all of them
    python -m recipes.sisma.watch run=runs/quick once=true       # only write runs/quick/watch.html

A page with the curves and the sample grids of a run, which renews itself. It needs no network and nothing but this
machine sees it, unless ``host=`` says otherwise.
"""

from __future__ import annotations

import base64
import glob
import os
import re
import sys
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from recipes.sisma.arguments import UsageError, from_command_line, run_command
from recipes.sisma.curves import chart, points_of, read_log, smoothed
from ssmgen.atomic import write_text
from ssmgen.extras import require

QUANTITIES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_second": "images a second",
}
SMOOTHING = (0.0, 0.6, 0.9, 0.97)
_FOLDER = Path(__file__).parent
_LOCAL = ("127.0.0.1", "localhost")
_MOST_RUNS, _MOST_GRIDS = 8, 60
_EMBEDDED_GRIDS = 12
_GRID_ADDRESS = re.compile(r"/grids/([0-9]{1,2})/([0-9]{1,9})")
_GRID_FILE = re.compile(r"step-([0-9]{1,9})\.png")
# The page's own style and script, the grids, and nothing else from anywhere.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline'",
    )
)


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: a run's folder; several are separated by commas, and ``*`` stands for any name.
        port: of the page; 0 takes a free one.
        host: the address the page is served on.
        smoothing: of the curves, in [0, 1); the page offers others.
        refresh: seconds between two looks at the runs.
        once: write ``watch.html`` into the (first) run and end.
    """

    run: str = "runs/quick"
    port: int = 8008
    host: str = "127.0.0.1"
    smoothing: float = 0.6
    refresh: float = 5.0
    once: bool = False


def main(argv: list[str]) -> None:
    """Serve the page until Ctrl-C, or write it once."""
    settings = from_command_line(Settings(), argv)
    if not 0 <= settings.smoothing < 1:
        raise UsageError(f"smoothing must be in [0, 1), got {settings.smoothing}; 0 draws the curves as they are")
    if not settings.refresh >= 1:
        raise UsageError(f"refresh must be at least 1 second, got {settings.refresh}")
    runs = find_runs(settings.run)
    if settings.once:
        file = runs[0] / "watch.html"
        write_text(file, page(runs, settings.smoothing, embed=True))
        print(f"wrote {file}")
        return
    with serve(runs, settings) as server:
        try:  # from the first word on: Ctrl-C may follow it at once
            print(f"watching {', '.join(map(str, runs))} on {server.address} (Ctrl-C ends)", file=sys.stderr)
            if not server.local:
                print(f"host={settings.host}: others on the network can see this page", file=sys.stderr)
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)


def find_runs(words: str) -> list[Path]:
    """The folders meant by ``run=``.

    Raises:
        UsageError: none, or too many to tell apart.
        FileNotFoundError: a name that is no folder.
    """
    found: list[Path] = []
    for word in filter(None, (os.path.expanduser(word.strip()) for word in words.split(","))):
        if "*" in word:
            matches = [Path(name) for name in sorted(glob.glob(word)) if Path(name, "config.yaml").is_file()]
            if not matches:
                raise FileNotFoundError(f"run={word}: no run of recipes.sisma.train lies there")
        elif not Path(word).is_dir():
            raise FileNotFoundError(f"run={word}: no such folder; it appears when recipes.sisma.train starts")
        else:
            matches = [Path(word)]
        found += [folder for folder in matches if folder not in found]
    if not 1 <= len(found) <= _MOST_RUNS:
        raise UsageError(f"run={words} names {len(found)} runs: the page shows 1 to {_MOST_RUNS}")
    return found


def page(runs: list[Path], smoothing: float, *, refresh: float = 0.0, embed: bool = False) -> str:
    """The page as HTML.

    Args:
        runs: the folders.
        smoothing: of the curves.
        refresh: seconds after which the page fetches itself anew; 0 does not.
        embed: hold the grids in the page itself, at most a dozen of each run, instead of fetching them.
    """
    jinja2 = require("jinja2", extra="train")  # torch depends on it
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    logs = [read_log(run) for run in runs]
    charts = [_chart(key, title, logs, smoothing) for key, title in QUANTITIES.items()]
    return environment.get_template("watch.html.j2").render(
        runs=[_row(run, log) for run, log in zip(runs, logs, strict=True)],
        charts=[one for one in charts if one],
        grids=[_grids(number, run, embed) for number, run in enumerate(runs)],
        smoothing=smoothing,
        levels=sorted({*SMOOTHING, smoothing}),
        refresh=refresh,
    )


def _chart(key: str, title: str, logs: list[list[dict[str, Any]]], smoothing: float) -> dict[str, Any] | None:
    chosen = key == "lr"  # not measured: drawn as it is
    return chart(title, [points_of(log, key) for log in logs], 0.0 if chosen else smoothing, linear=chosen)


def _row(run: Path, log: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table: how far a run is and how it does."""
    total, batch = _planned(run)
    step = log[-1]["step"] if log else 0
    rate = points_of(log, "images_per_second")
    losses = smoothed(points_of(log, "loss"), 0.9)
    seconds = batch / rate[-1][1] if rate and rate[-1][1] else 0.0  # of a step
    silent = time.time() - (run / "log.jsonl").stat().st_mtime if log else None
    between = seconds * (log[-1]["step"] - log[-2]["step"]) if len(log) > 1 else 0.0
    stalled = silent is not None and silent > max(60.0, 5 * between)
    return {
        "name": str(run),
        "step": step,
        "total": total,
        "share": min(100.0, 100 * step / total) if total else None,
        "loss": losses[-1][1] if losses else None,
        "rate": rate[-1][1] if rate else None,
        "remaining": _duration((total - step) * seconds) if total > step and seconds and not stalled else None,
        "silent": _duration(silent) if silent is not None else None,
        "stalled": stalled,
        "done": bool(total) and step >= total,
    }


def _planned(run: Path) -> tuple[int, int]:
    """Steps in all and examples of each, from the run's settings; 0 and 0 where they cannot be read."""
    try:
        settings = require("omegaconf", extra="train").OmegaConf.load(run / "config.yaml")
        return int(settings["steps"]), int(settings["batch_size"])
    except Exception:  # half-written, or of another version: the curves do without
        return 0, 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def grid_files(run: Path) -> dict[int, Path]:
    """The run's sample grids by step: PNG files of their own name in ``samples/``, and no links to others."""
    folder = run / "samples"
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    found = {int(match[1]): file for file in names if (match := _GRID_FILE.fullmatch(file.name))}
    return {step: file for step, file in found.items() if file.is_file() and not file.is_symlink()}


def _grids(number: int, run: Path, embed: bool) -> list[dict[str, Any]]:
    """Step and address of some of the grids, the first and the last among them."""
    files = sorted(grid_files(run).items())
    most = _EMBEDDED_GRIDS if embed else _MOST_GRIDS
    if len(files) > most:
        files = [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
    if embed:
        return [{"step": step, "src": "data:image/png;base64," + _base64(file)} for step, file in files]
    return [{"step": step, "src": f"/grids/{number}/{step}?{file.stat().st_mtime_ns}"} for step, file in files]


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


class Server(ThreadingHTTPServer):
    """Serves the page and the grids of its runs; ``address`` is where."""

    daemon_threads = True

    def __init__(self, runs: list[Path], settings: Settings) -> None:
        self.runs, self.smoothing, self.refresh = runs, settings.smoothing, settings.refresh
        super().__init__((settings.host, settings.port), _Handler)
        self.local = settings.host in _LOCAL
        shown = settings.host if self.local else self.server_name
        self.address = f"http://{shown}:{self.server_address[1]}/"

    def answer(self, address: str) -> tuple[str, bytes] | None:
        """Content type and content for what a client asks; None where there is no such thing.

        No part of an address is ever used as a path: it gives two numbers, which pick from what the runs hold.
        """
        parts = urlsplit(address)
        if parts.path == "/":
            asked = parse_qs(parts.query).get("smoothing", [""])[0]
            level = next((one for one in SMOOTHING if str(one) == asked), self.smoothing)
            return "text/html; charset=utf-8", page(self.runs, level, refresh=self.refresh).encode()
        match = _GRID_ADDRESS.fullmatch(parts.path)
        if match is None or int(match[1]) >= len(self.runs):
            return None
        file = grid_files(self.runs[int(match[1])]).get(int(match[2]))
        return ("image/png", file.read_bytes()) if file else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is nothing to report."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 20
    server_version, sys_version = "ssmgen-watch", ""

    def do_GET(self) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if self.server.local and host not in _LOCAL:  # a page elsewhere under a name made to point here
            self.send_error(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1 or localhost")
            return
        found = self.server.answer(self.path)
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND, "only the page and the grids of its runs are here")
            return
        kind, content = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store" if kind.startswith("text") else "max-age=86400")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal stays free of a line for every look at the page."""


def serve(runs: list[Path], settings: Settings) -> Server:
    """Open the port.

    Raises:
        OSError: it is taken, or the host is none of this machine's.
    """
    try:
        return Server(runs, settings)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"{settings.host}:{settings.port} cannot be served on ({error}); port=0 takes any free one"
        ) from error


if __name__ == "__main__":
    run_command(main)
