"""The painting page under many requests: ``python -m benchmarks.demo_soak``.

Starts ``python -m recipes.sisma.demo`` in a process of its own with an untrained model, sends it requests of all kinds
and counts: resident memory over the run, files it has left, answers to attempts at reading files by path, and how many
of the requests that are no good were answered with a message.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import torch

import ssmgen
from benchmarks.timing import write
from recipes.sisma.demo.exchange import encode_png, to_text
from ssmgen import MaskToImage
from ssmgen.data import CELEBAMASK19, draw_face
from ssmgen.pipeline import Recipe

SIDE = 32
_WARM = 0.2  # share of the requests before memory is compared


def main() -> None:
    """Print what was counted; write JSON if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="requests to the model (default 1000)")
    parser.add_argument("--tries", type=int, default=200, help="attempts at reading a file (default 200)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    found = soak(given.requests, given.tries)
    for name, value in found.items():
        if name != "memory_mb":
            print(f"{name:<20}{value}")
    write(given.json, f"demo_soak --requests {given.requests} --tries {given.tries}", found)


def soak(requests: int, tries: int) -> dict[str, Any]:
    """Run it; see the module."""
    with tempfile.TemporaryDirectory(prefix="ssmgen-soak-") as name:
        folder = Path(name)
        untrained_pipe().save_pretrained(folder / "model")
        secret = secrets.token_hex(16)
        folder.joinpath("secret.txt").write_text(secret)
        with served(folder / "model", temporary=folder / "tmp") as server:
            client = Client(server.address)
            memory, answers = _requests(client, server, requests)
            traversal = sum(secret in text or "root:x:0:0" in text for text in attempts(client, folder, tries))
            left_running = files_in(folder / "tmp")
        left_after = files_in(folder / "tmp")
    early, late = memory[int(len(memory) * _WARM) :][: len(memory) // 5], memory[-len(memory) // 5 :]
    return {
        "requests": requests,
        "answers": dict(answers),
        "memory_early_mb": round(statistics.mean(early), 1),
        "memory_late_mb": round(statistics.mean(late), 1),
        "memory_growth": round(statistics.mean(late) / statistics.mean(early) - 1, 4),
        "files_left": len(left_running) + len(left_after),
        "tries": tries,
        "files_read": traversal,
        "memory_mb": memory,
    }


def untrained_pipe(side: int = SIDE) -> MaskToImage:
    """A small model with random weights: the page's cost without the model's."""
    args = {"in_channels": 3, "mask_scale": 1, "patch_size": 4, "mask_dropout": 0.1, "dim": 96}
    torch.manual_seed(0)
    model = ssmgen.build("sisma-debug", **args)
    for parameter in model.parameters():  # an untrained head is zero: every image would be its noise
        torch.nn.init.normal_(parameter, std=0.1)
    recipe = Recipe("sisma-debug", args, "identity", side, CELEBAMASK19, {"solver": "euler", "steps": 2}, "Untrained.")
    return MaskToImage(model, ssmgen.build("identity"), recipe)


@dataclass
class Server:
    """The page in a process of its own."""

    address: str
    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)

    def resident_mb(self) -> float:
        """Memory of the process that is in RAM."""
        line = next(x for x in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmRSS" in x)
        return int(line.split()[1]) / 1024


@contextmanager
def served(model: Path, temporary: Path) -> Iterator[Server]:
    """Run the page's own command, with its temporary files under a folder."""
    temporary.mkdir()
    command = [sys.executable, "-m", "recipes.sisma.demo", f"pipe={model}", "port=0"]
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        assert process.stdout is not None
        output = []
        for line in process.stdout:
            output.append(line)
            if line.startswith("open http"):
                break
        else:
            raise RuntimeError(f"the page did not start: {''.join(output)}")
        yield Server(output[-1].split()[1].rstrip("/"), process, output)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


class Client:
    """A browser's requests to the page, without a browser."""

    def __init__(self, address: str) -> None:
        self.host = urlsplit(address).netloc
        config = json.loads(self.get("/config")[1])
        self.functions = {each["api_name"]: each["id"] for each in config["dependencies"] if each["api_name"]}

    def get(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, str]:
        """Status and text of the answer; the path is sent as it is."""
        connection = http.client.HTTPConnection(self.host, timeout=120)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            if body is not None:
                connection.putheader("Content-Type", "application/json")
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def call(self, name: str, *data: Any) -> list[list[Any]]:
        """What the page's function gives, every step of it.

        Raises:
            RuntimeError: the server did not take the request.
        """
        return list(self.news(self.join(name, *data)))

    def join(self, name: str, *data: Any) -> str:
        """Ask for it and leave; the session that `news` takes.

        Raises:
            RuntimeError: the server did not take the request.
        """
        session = secrets.token_hex(6)
        wanted = {"data": data, "fn_index": self.functions[name], "session_hash": session, "trigger_id": 0}
        status, text = self.get("/gradio_api/queue/join", "POST", json.dumps(wanted).encode())
        if status != 200:
            raise RuntimeError(f"{status}: {text}")
        return session

    def news(self, session: str) -> Iterator[list[Any]]:
        """The outputs of what a session asked for, as they come."""
        connection = http.client.HTTPConnection(self.host, timeout=120)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
        try:
            for line in connection.getresponse():
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") in ("process_generating", "process_completed"):
                    yield message["output"].get("data") or [message["output"].get("error")]
                if message.get("msg") in ("process_completed", "unexpected_error", "close_stream"):
                    return
        finally:
            connection.close()


def _requests(client: Client, server: Server, count: int) -> tuple[list[float], Counter[str]]:
    """All kinds of requests in turn: the memory after each, and how many were answered with what."""
    answers: Counter[str] = Counter()
    memory = []
    last: dict[str, Any] = {}
    for number in range(count):
        kind, data = request(number, last)
        answer = client.call(kind, *data)[-1]
        if kind == "upload":
            answers["mask" if isinstance(answer[0], str) else "message"] += 1
        elif isinstance(answer[1], dict) and "images" in answer[1]:
            last = answer[1]
            answers["pictures"] += 1
        else:
            answers["message" if 'class="bad"' in "".join(map(str, answer[2:])) else "nothing"] += 1
        memory.append(round(server.resident_mb(), 1))
    return memory, answers


def request(number: int, last: dict[str, Any]) -> tuple[str, list[Any]]:
    """One request of a round of eight: five good, three that are to be answered with a message.

    Args:
        number: which.
        last: the results of the last good one.
    """
    face = draw_face(number % 16, SIDE)[1]
    mask, controls = to_text(face), [number, 2, "euler", 1.0, 2]
    chosen = {"png": last["images"][0]["png"], "mask": last["mask"]} if last else None
    kinds: list[tuple[str, list[Any]]] = [
        ("generate", [mask, *controls]),
        ("redraw", [mask.replace(",0x", ",14x", 1), *controls, chosen, "inversion"]),
        ("vary", [mask, *controls, chosen, 0.5]),
        ("between", [mask, *controls, number + 1]),
        ("upload", [base64.b64encode(encode_png(face, CELEBAMASK19)).decode(), "celebamask19"]),
        ("upload", [base64.b64encode(b"no picture").decode(), "celebamask19"]),
        ("generate", ["32x32 99x1024", *controls]),
        ("generate", [mask, number, 10_000, "euler", 1.0, 2]),
    ]
    return kinds[number % len(kinds)]


def attempts(client: Client, folder: Path, count: int) -> Iterator[str]:
    """What the page answers to attempts at reading ``secret.txt`` of a folder, or /etc/passwd, by their paths."""
    wanted = (str(folder / "secret.txt"), "/etc/passwd")
    made = itertools.islice(_tries(wanted), count)
    for kind, *data in made:
        if kind == "address":
            yield client.get(data[0])[1]
        else:
            try:
                yield json.dumps(client.call(kind, *data))
            except RuntimeError as error:
                yield str(error)


def _tries(wanted: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    doors = ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/file/", "/static/", "/assets/", "/svelte/")
    doors += (
        "/gradio_api/proxy=file://",
        "/gradio_api/stream/",
        "/custom_component/x/client/component/",
        "/static/img/",
    )
    ways = (
        lambda path: path,
        lambda path: quote(path, safe=""),
        lambda path: "../" * 12 + path.lstrip("/"),
        lambda path: quote("../" * 12 + path.lstrip("/"), safe=""),
        lambda path: quote(quote("../" * 12 + path.lstrip("/"), safe=""), safe=""),
        lambda path: "....//" * 12 + path.lstrip("/"),
        lambda path: "..%5c" * 12 + path.lstrip("/"),
        lambda path: f"x/..%00/{path}",
    )
    controls = [0, 1, "euler", 1.0, 1]
    mask = f"{SIDE} 1x{SIDE * SIDE}"
    for path in wanted:
        for named in ({"path": path, "meta": {"_type": "gradio.FileData"}}, path, f"file://{path}", [path]):
            yield "generate", named, *controls
            yield "upload", named, "celebamask19"
            yield "upload", "", named
            yield "redraw", mask, *controls, {"png": named, "mask": mask}, "inversion"
            yield "vary", mask, *controls, {"png": f"data:image/png;base64,{path}", "mask": named}, 0.5
    for path, door, way in itertools.product(wanted, doors, ways):
        yield "address", door + way(path)


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [file for file in folder.rglob("*") if file.is_file()]


if __name__ == "__main__":
    main()
