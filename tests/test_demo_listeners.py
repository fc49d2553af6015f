"""Who asks the demo page's server for jobs: browsers that go away, and calls that the page does not make."""

import http.client
import json
import random
import socket
import time
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("gradio", reason="the page needs ssmgen[demo]")
pytest.importorskip("omegaconf", reason="the commands need ssmgen[train]")

from benchmarks.demo_soak import Client, untrained_pipe
from recipes.sisma.demo import listeners, server
from recipes.sisma.demo.exchange import to_text
from recipes.sisma.demo.jobs import JobRunner
from recipes.sisma.demo.page import build_page
from ssmgen import MaskToImage
from ssmgen.data import draw_face

SIDE = 32
MASK = to_text(draw_face(2, SIDE)[1])
STEP = 0.02  # seconds


class Slow(MaskToImage):
    """Takes `STEP` a step, notes when it took each, and returns black images."""

    taken: list[tuple[int, float]] = []
    preview_side = SIDE

    def __call__(self, mask, *, callback, seed, sampling, num_images, **settings):
        for step in range(sampling.steps):
            time.sleep(STEP)
            Slow.taken.append((seed[0], time.monotonic()))
            callback(step, torch.rand(num_images, 3, self.preview_side, self.preview_side))
        return torch.zeros(num_images, 3, SIDE, SIDE)


@pytest.fixture(scope="module")
def page():
    pipe = untrained_pipe(SIDE)
    runner = JobRunner(Slow(pipe.model, pipe.autoencoder, pipe.recipe))
    page = build_page(runner)
    address = server.serve(page, runner, host="127.0.0.1", port=0)
    yield page, Client(address)
    page.close()


@pytest.fixture
def client(page):
    Slow.taken.clear()
    return page[1]


@pytest.fixture
def queue(page):
    return page[0]._queue


def controls(seed, steps):
    return MASK, seed, steps, "euler", 1.0, 1


@contextmanager
def listening(client, session, receive_buffer=None):
    """The session's open event stream, as a socket that has received its first bytes."""
    host, _, port = client.host.partition(":")
    with socket.socket() as stream:
        if receive_buffer:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        stream.connect((host, int(port)))
        request = f"GET /gradio_api/queue/data?session_hash={session} HTTP/1.1\r\nHost: {client.host}\r\n\r\n"
        stream.sendall(request.encode())
        assert b"200 OK" in stream.recv(200)
        yield stream


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def sampled(seed):
    return [when for number, when in Slow.taken if number == seed]


def is_empty(queue):
    return not (
        len(queue)
        or any(queue.active_jobs)
        or queue.event_ids_to_events
        or any(queue.pending_event_ids_session.values())
    )


def test_jobs_of_browsers_that_went_away_delay_nobody(client, queue):
    sessions = [client.join("generate", *controls(seed, 100)) for seed in (1, 2, 3)]
    with listening(client, sessions[0]), listening(client, sessions[1]), listening(client, sessions[2]):
        wait_for(lambda: len(sampled(1)) >= 5)
    left = time.monotonic()
    assert client.call("generate", *controls(4, 2))[-1][1]["images"]
    assert time.monotonic() - left < 1.5  # the three would take 6 s
    assert not sampled(2) and not sampled(3)
    assert sum(when > left + 0.1 for when in sampled(1)) <= 1
    wait_for(lambda: is_empty(queue))
    assert not set(sessions) & queue.pending_messages_per_session.keys()


def test_a_stream_that_is_never_opened_is_not_waited_for(client, queue, monkeypatch):
    monkeypatch.setattr(listeners, "LISTEN_WITHIN", 0.3)
    sessions = [client.join("generate", *controls(seed, 100)) for seed in (1, 2, 3)]
    joined = time.monotonic()
    assert client.call("generate", *controls(4, 2))[-1][1]["images"]
    assert time.monotonic() - joined < 1.5
    assert len(sampled(1)) < 50 and len(sampled(2)) + len(sampled(3)) <= 2  # their times end a moment apart
    wait_for(lambda: is_empty(queue))
    assert not set(sessions) & queue.pending_messages_per_session.keys()


def test_a_stream_that_nobody_reads_is_given_up(client, queue, monkeypatch):
    monkeypatch.setattr(server, "STALLED_AFTER", 0.3)
    monkeypatch.setattr(Slow, "preview_side", 1024)  # previews of 4 MB fill every buffer on the way
    session = client.join("generate", *controls(1, 100))
    with listening(client, session, receive_buffer=4096):
        wait_for(lambda: is_empty(queue))
        assert 0 < len(sampled(1)) < 100


def test_a_browser_with_another_job_in_its_stream_keeps_both(client):
    session = client.join("generate", *controls(1, 3))
    wanted = {"data": controls(2, 3), "fn_index": client.functions["generate"], "session_hash": session}
    assert client.get("/gradio_api/queue/join", "POST", json.dumps(wanted).encode())[0] == 200
    with listening(client, session) as stream:
        stream.settimeout(10)
        text = b""
        while b"close_stream" not in text:
            text += stream.recv(100_000)
    assert text.count(b"process_completed") == 2 and len(sampled(1)) == len(sampled(2)) == 3


def test_a_stopped_job_ends_at_its_next_step_and_only_its_own_session_stops_it(client, queue):
    session = client.join("generate", *controls(1, 100))
    with listening(client, session):
        wait_for(lambda: sampled(1))
        (event,) = queue.pending_event_ids_session[session]
        call = {"session_hash": "another", "fn_index": client.functions["generate"], "event_id": event}
        assert client.get("/gradio_api/cancel", "POST", json.dumps(call).encode())[0] == 404
        steps = len(sampled(1))
        wait_for(lambda: len(sampled(1)) > steps)
        stopped = time.monotonic()
        assert client.get("/gradio_api/cancel", "POST", json.dumps(call | {"session_hash": session}).encode())[0] == 200
        wait_for(lambda: is_empty(queue))
    assert sum(when > stopped + STEP for when in sampled(1)) <= 1


CALLS = [
    ("queue/join", {"fn_index": 999}, 404),
    ("queue/join", {"fn_index": -1}, 404),
    ("queue/join", {"fn_index": 0}, 404),  # runs in the browser only
    ("queue/join", {"fn_index": None}, 404),
    ("queue/join", {"fn_index": "1"}, 404),
    ("queue/join", {"fn_index": True}, 404),
    ("queue/join", {"fn_index": 10**400}, 404),
    ("queue/join", {"fn_index": float("nan")}, 404),
    ("queue/join", {"api_name": "generate", "fn_index": None}, 404),
    ("queue/join", {"data": []}, 422),
    ("queue/join", {"data": [1] * 50}, 422),
    ("queue/join", {"data": None}, 422),
    ("queue/join", {"session_hash": None}, 422),
    ("queue/join", {"session_hash": "a/../b"}, 422),
    ("queue/join", {"session_hash": "a" * 65}, 422),
    ("queue/join", {"trigger_id": "x"}, 422),
    ("queue/join", {"batched": True}, 422),
    ("queue/join", {"oauth_token": "x"}, 422),
    ("cancel", {"event_id": "none"}, 404),
    ("cancel", {"event_id": ["none"]}, 404),
    ("cancel", {"event_id": None}, 404),
    ("reset", {"event_id": None}, 422),
    ("call/generate", {}, 404),
    ("call/none", {}, 404),
    ("run/none", {}, 404),
    ("api/generate", {}, 404),
    ("upload", {}, 404),
    ("stream/none", {}, 404),
]


@pytest.mark.parametrize(("path", "changes", "expected"), CALLS)
def test_calls_that_the_page_does_not_make_are_refused(client, queue, capfd, path, changes, expected):
    body = {"data": list(controls(1, 1)), "fn_index": client.functions["generate"], "session_hash": "a"} | changes
    status, text = client.get(f"/gradio_api/{path}", "POST", json.dumps(body).encode())
    assert status == expected and json.loads(text)["detail"]
    assert is_empty(queue) and "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("session", ["unknown", "", "a%00b", "..%2f..%2f", "a" * 100])
def test_an_unknown_session_has_no_events(client, capfd, session):
    status, _ = client.get(f"/gradio_api/queue/data?session_hash={session}")
    assert status == (404 if session == "unknown" else 422) and "Traceback" not in "".join(capfd.readouterr())


def fuzzed(count, seed=0):
    """Requests of random paths, methods and bodies; none of them is a valid call."""
    draw = random.Random(seed)
    paths = ["/", "/config", "/gradio_api/", "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/queue/data"]
    paths += ["/assets/", "/static/", "/svelte/", "/pwa_icon/", "/gradio_api/heartbeat/", "/gradio_api/call/"]
    tails = ["", "/", "..", "%00", "%2e%2e%2f", "?session_hash=[", "?a=%ff", "\u00e9", "x" * 3000, "//", ";", "#", "{}"]
    values = [None, True, -1, 10**300, 1e308, "", "x", "\u0000", [], {}, [[[[]]]], {"a": {"b": 1}}, "9" * 5000]
    keys = ["data", "fn_index", "session_hash", "event_id", "event_data", "trigger_id", "__proto__", "request"]
    for _ in range(count):
        path = draw.choice(paths) + draw.choice(tails)
        body = {draw.choice(keys): draw.choice(values) for _ in range(draw.randrange(6))} | {
            "data": draw.choice(values)
        }
        text = json.dumps(draw.choice([body, values, draw.choice(values)])).encode()
        cut = draw.randrange(len(text) + 1) if draw.random() < 0.3 else len(text)
        noise = draw.randbytes(4) if draw.random() < 0.2 else b""
        depth = draw.choice([10, 1000, 200_000])
        body = draw.choice([text[:cut] + noise, b"[" * depth + b"]" * depth, b"9" * 10_000, b"\xff\xfe" + text])
        yield draw.choice(["GET", "POST", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]), path, body


def test_random_requests_never_break_the_server(client, queue, capfd):
    for method, path, body in fuzzed(300):
        connection = http.client.HTTPConnection(client.host, timeout=10)
        connection.putrequest(method, path.encode("ascii", "replace").decode(), skip_accept_encoding=True)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        if not ("heartbeat" in path and method == "GET"):
            assert connection.getresponse().status < 500, (method, path, body[:100])
        connection.close()
    assert is_empty(queue) and "Traceback" not in "".join(capfd.readouterr())
    assert client.call("generate", *controls(9, 1))[-1][1]["images"]
