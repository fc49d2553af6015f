"""Watch training runs in a browser: ``python -m recipes.sisma.watch run=RUN [port=8008]``.

    python -m recipes.sisma.watch run=runs/quick
    python -m recipes.sisma.watch run=runs/quick,runs/mine       # compare runs; run='runs/*' takes all
    python -m recipes.sisma.watch run=runs/quick once=true       # write runs/quick/watch.html and exit

The page shows a run's progress, curves and sample grids, and refreshes itself. It needs no network, and only this
machine can open it unless ``host=`` says otherwise.
"""

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
from recipes.sisma.demo.server import LOCAL
from ssmgen.atomic import write_text
from ssmgen.data.files import files_with
from ssmgen.extras import require

_TITLES = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate", "images_per_second": "images a second"}
SMOOTHING = (0.0, 0.6, 0.9, 0.97)
_MAX_RUNS, _MAX_GRIDS, _EMBEDDED_GRIDS = 8, 60, 12
_GRID_ADDRESS = re.compile(r"/grids/([0-9]{1,2})/([0-9]{1,9})")
_GRID_FILE = re.compile(r"step-([0-9]{1,9})\.png")
# Allows the page's inline style and script and its grids, and nothing else.
_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


@dataclass
class Settings:
    """Keys of the command line.

    Attributes:
        run: a run's folder, or several separated by commas; ``*`` matches any name.
        port: of the server; 0 takes any free one.
        host: the address to serve at; 0.0.0.0 serves anyone who can reach this machine.
        smoothing: of the curves, in [0, 1); the page offers other values.
        refresh: seconds between updates of the page.
        once: write ``watch.html`` into the (first) run's folder and exit.
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
        raise UsageError(f"smoothing must be in [0, 1), got {settings.smoothing}; 0 disables smoothing")
    if not settings.refresh >= 1:
        raise UsageError(f"refresh must be at least 1 second, got {settings.refresh}")
    runs = find_runs(settings.run)
    if settings.once:
        file = runs[0] / "watch.html"
        write_text(file, page(runs, settings.smoothing, embed=True))
        print(f"wrote {file}")
        return
    with Server(runs, settings) as server:
        try:  # includes the messages: Ctrl-C may come right after the first
            print(f"watching {', '.join(map(str, runs))} on {server.address} (Ctrl-C ends)", file=sys.stderr)
            if not server.local:
                print(f"host={settings.host}: others on the network can see this page", file=sys.stderr)
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)


def find_runs(words: str) -> list[Path]:
    """The folders that ``run=`` names.

    Raises:
        UsageError: no folder, or more than the page can show.
        FileNotFoundError: a name without a folder, or a pattern that matches no run.
    """
    found: dict[Path, None] = {}  # a set that keeps the order
    for word in filter(None, (os.path.expanduser(word.strip()) for word in words.split(","))):
        matches = [Path(word)]
        if "*" in word:
            matches = [Path(name) for name in sorted(glob.glob(word)) if Path(name, "config.yaml").is_file()]
            if not matches:
                raise FileNotFoundError(f"run={word}: matches no run of recipes.sisma.train")
        elif not Path(word).is_dir():
            raise FileNotFoundError(f"run={word}: no such folder; it appears when recipes.sisma.train starts")
        found |= dict.fromkeys(matches)
    if not 1 <= len(found) <= _MAX_RUNS:
        raise UsageError(f"run={words} names {len(found)} runs; the page shows 1 to {_MAX_RUNS}")
    return list(found)


def page(runs: list[Path], smoothing: float, *, refresh: float = 0.0, embed: bool = False) -> str:
    """Render the page as HTML, with ``refresh`` seconds between updates, 0 for none; ``smoothing`` is in [0, 1).

    ``embed`` puts the grids into it, at most 12 of each run, instead of linking to them.
    """
    jinja2 = require("jinja2", extra="train")  # torch depends on it
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    logs = [read_log(run) for run in runs]
    charts = []
    for key, title in _TITLES.items():
        exact = key == "lr"  # has no noise to smooth
        curves = [points_of(log, key) for log in logs]
        charts.append(chart(title, curves, 0.0 if exact else smoothing, linear=exact))
    return environment.get_template("watch.html.j2").render(
        runs=[_row(run, log) for run, log in zip(runs, logs, strict=True)],
        charts=[chart for chart in charts if chart],
        grids=[_grids(number, run, embed) for number, run in enumerate(runs)],
        smoothing=smoothing,
        levels=sorted({*SMOOTHING, smoothing}),
        refresh=refresh,
    )


def _row(run: Path, log: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's progress, as the template shows it."""
    total, batch_size = _planned(run)
    step = log[-1]["step"] if log else 0
    rate = [value for _, value in points_of(log, "images_per_second")][-1:]
    losses = smoothed(points_of(log, "loss"), 0.9)
    seconds_per_step = batch_size / rate[0] if rate and rate[0] else 0.0
    silent = time.time() - (run / "log.jsonl").stat().st_mtime if log else None
    between_lines = seconds_per_step * (log[-1]["step"] - log[-2]["step"]) if len(log) > 1 else 0.0
    stalled = silent is not None and silent > max(60.0, 5 * between_lines)
    remaining = total > step and seconds_per_step and not stalled
    return {
        "name": str(run),
        "step": step,
        "total": total,
        "share": min(100.0, 100 * step / total) if total else None,
        "loss": losses[-1][1] if losses else None,
        "rate": rate[0] if rate else None,
        "skipped": log[-1].get("skipped", 0) if log else 0,
        "spikes": log[-1].get("spikes", 0) if log else 0,
        "remaining": _duration((total - step) * seconds_per_step) if remaining else None,
        "silent": _duration(silent) if silent is not None else None,
        "stalled": stalled,
        "done": bool(total) and step >= total,
    }


def _planned(run: Path) -> tuple[int, int]:
    """Total steps and batch size from the run's settings; 0 and 0 if they cannot be read."""
    try:
        settings = require("omegaconf", extra="train").OmegaConf.load(run / "config.yaml")
        settings = settings.get("train", settings)  # nested or flat
        return int(settings["steps"]), int(settings["batch_size"])
    except Exception:  # half-written, or of another version: the page works without
        return 0, 0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def grid_files(run: Path) -> dict[int, Path]:
    """The run's sample grids by step: ``samples/step-*.png``, without symbolic links."""
    files = [file for file in files_with(run / "samples", {".png"}) if not file.is_symlink()]
    return {int(match[1]): file for file in files if (match := _GRID_FILE.fullmatch(file.name))}


def _grids(number: int, run: Path, embed: bool) -> list[dict[str, Any]]:
    """Step and address of evenly spaced grids, including the first and the last."""
    files = sorted(grid_files(run).items())
    limit = _EMBEDDED_GRIDS if embed else _MAX_GRIDS
    if len(files) > limit:
        files = [files[round(i * (len(files) - 1) / (limit - 1))] for i in range(limit)]

    def address(step: int, file: Path) -> str:
        if embed:
            return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        return f"/grids/{number}/{step}?{file.stat().st_mtime_ns}"

    return [{"step": step, "src": address(step, file)} for step, file in files]


class Server(ThreadingHTTPServer):
    """Serves the page and the grids of its runs at ``address``.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """

    daemon_threads = True

    def __init__(self, runs: list[Path], settings: Settings) -> None:
        self.runs, self.smoothing, self.refresh = runs, settings.smoothing, settings.refresh
        try:
            super().__init__((settings.host, settings.port), _Handler)
        except (OSError, OverflowError) as error:
            address = f"{settings.host}:{settings.port}"
            raise OSError(f"{address} cannot be served on ({error}); port=0 takes any free one") from error
        self.local = settings.host in LOCAL
        host = settings.host if self.local else self.server_name
        self.address = f"http://{host}:{self.server_address[1]}/"

    def answer(self, address: str) -> tuple[str, bytes] | None:
        """Content type and content for a requested address; None for an unknown one.

        No part of an address is used as a path: its numbers select a run and one of that run's grids.
        """
        parts = urlsplit(address)
        if parts.path == "/":
            requested = parse_qs(parts.query).get("smoothing", [""])[0]
            level = next((level for level in SMOOTHING if str(level) == requested), self.smoothing)
            return "text/html; charset=utf-8", page(self.runs, level, refresh=self.refresh).encode()
        match = _GRID_ADDRESS.fullmatch(parts.path)
        if match is None or int(match[1]) >= len(self.runs):
            return None
        file = grid_files(self.runs[int(match[1])]).get(int(match[2]))
        return ("image/png", file.read_bytes()) if file else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 20
    server_version, sys_version = "ssmgen-watch", ""

    def do_GET(self) -> None:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if self.server.local and host not in LOCAL:  # DNS rebinding: another site's name that resolves to this machine
            self.send_error(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1 or localhost")
            return
        answer = self.server.answer(self.path)
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND, "only the page and the grids of its runs are served")
            return
        kind, content = answer
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store" if kind.startswith("text") else "max-age=86400")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log each request to the terminal."""


if __name__ == "__main__":
    run_command(main)
