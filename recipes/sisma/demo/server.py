"""The server of the page: gradio's, without sharing, monitoring or file access, behind a `Guard`."""

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from recipes.sisma.demo.calls import RejectedCall, check_join, check_session, parse_json
from recipes.sisma.demo.exchange import MAX_BYTES
from recipes.sisma.demo.jobs import JobRunner
from recipes.sisma.demo.listeners import Listeners
from ssmgen.extras import require

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

#: Sessions that the server remembers.
SESSIONS = 32
#: Names of this machine in its own browsers.
LOCAL = ("127.0.0.1", "localhost")
#: Enough for a file in base64 and a mask as text.
MAX_BODY = 2 * MAX_BYTES
#: Seconds that the browser may take to receive one message.
STALLED_AFTER = 20.0
_STREAM = "/gradio_api/queue/data"
_JOIN, _CANCEL, _RESET = "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset"
_READ = re.compile(
    r"/|/(config|info|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?)/?"
    r"|/(assets|static|svelte)/[\w./@-]+"
    rf"|/gradio_api/(info|startup-events|theme\.css|heartbeat/\w+)|{_STREAM}"
)
# The browser loads nothing from elsewhere. gradio compiles templates, hence unsafe-eval.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'self'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def serve(page: Any, runner: JobRunner, *, host: str, port: int, open_browser: bool = False) -> str:
    """Serve the page of `build_page` in the background and return its address.

    Args:
        page: the page.
        runner: runs the page's jobs; its job is stopped when the browser that asked for it has gone.
        host: address to serve at.
        port: port to serve at; 0 picks a free one.
        open_browser: open the page in a browser.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    port = _free_port(host, port)
    gr = require("gradio", extra="demo")
    starlette = require("starlette.middleware", extra="demo")
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    functions = {index: len(each.inputs) for index, each in page.fns.items() if each.fn is not None}
    listeners = Listeners(page._queue, runner.stop)
    guard = starlette.Middleware(Guard, listeners=listeners, functions=functions, local=host in LOCAL)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        quiet=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[],
        max_file_size=MAX_BYTES,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        state_session_capacity=SESSIONS,
        app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None},
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"], primary_hue="indigo"),
        css=_styles(runner.size),
        prevent_thread_lock=True,
    )
    return str(address)


def _styles(size: tuple[int, int]) -> str:
    """The page's style sheet for images of a size (height, width)."""
    sheet = (Path(__file__).parent / "assets" / "page.css").read_text()
    return f"{sheet}:root {{ --aspect: {size[1]} / {size[0]}; --share: {size[1] / size[0]:.4f}; }}\n"


def _free_port(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hint = "give another port=, or port=0 for a free one"
            raise OSError(f"cannot serve at {host}, port {port} ({error.strerror or error}): {hint}") from error
        return int(probe.getsockname()[1])


class Guard:
    """Rejects every request that the page does not make, before gradio sees it.

    gradio has endpoints that upload files, serve them by path, and fetch URLs for a client. The answer to an unlisted
    path, an unknown function, session or job is 404, to a body above `MAX_BODY` 413, and to any other request that the
    page does not make 4xx; see `parse_json` and `check_join`.

    Args:
        app: the server.
        listeners: told of every queued job and every event stream.
        functions: number of inputs of each function of the page, by its index.
        local: accept only `LOCAL` host names, since any other name could be made to resolve to this machine.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        listeners: Listeners,
        functions: dict[int, int],
        local: bool = False,
    ) -> None:
        self.app, self.listeners = app, listeners
        self.functions = functions
        self.local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        try:
            await self._handle(scope, receive, _with_headers(send))
        except RejectedCall as error:
            await _answer(send, error.status, str(error))

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request or let gradio answer it."""
        if self.local and _host(scope) not in LOCAL:
            raise RejectedCall(403, f"Open this page at {' or '.join(LOCAL)}.")
        path, method = scope["path"].rstrip("/") or "/", scope["method"]
        if method == "POST" and path in (_JOIN, _CANCEL, _RESET):
            body = await _body(receive)
            content, receive = parse_json(body), _replay(body, receive)
            answer = {_JOIN: self._join, _CANCEL: self._cancel, _RESET: self._reset}[path]
            return await answer(content, scope, receive, send)
        reading = method in ("GET", "HEAD") and _READ.fullmatch(scope["path"]) is not None and ".." not in path
        if not reading and not (method == "OPTIONS" and path in (_JOIN, _CANCEL, _RESET)):
            raise RejectedCall(404, "There is nothing here.")
        if method == "GET" and path == _STREAM:
            return await self._stream(scope, receive, send)
        return await self.app(scope, receive, send)

    async def _join(self, content: Any, scope: Scope, receive: Receive, send: Send) -> None:
        session = check_join(content, self.functions)
        await self.app(scope, receive, _before_start(send, 200, lambda: self.listeners.joined(session)))

    async def _cancel(self, content: Any, scope: Scope, receive: Receive, send: Send) -> None:
        """Stop a job, at its next step if it runs; a session can stop its own only."""
        session, event = (
            content.get(key) if isinstance(content, dict) else None for key in ("session_hash", "event_id")
        )
        if not isinstance(event, str) or not self.listeners.owns(check_session(session), event):
            raise RejectedCall(404, "There is no such job.")
        self.listeners.stop_running(session, event)
        await self.app(scope, receive, send)

    async def _reset(self, _: Any, scope: Scope, receive: Receive, send: Send) -> None:
        """The page calls this after `_cancel`; gradio does nothing."""
        await self.app(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events of a session until all its jobs have ended, or until nobody receives them."""
        session = check_session(parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0])
        if not self.listeners.knows(session):
            raise RejectedCall(404, "There is no such session.")
        async with self.listeners.listening(session) as finish:

            async def send_in_time(message: MutableMapping[str, Any]) -> None:
                async with asyncio.timeout(STALLED_AFTER):
                    await send(message)
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    finish()

            with suppress(TimeoutError):
                await self.app(scope, receive, send_in_time)


def _host(scope: Scope) -> str | None:
    """Host name that a request was sent to; None if its header is malformed."""
    try:
        return urlsplit("//" + dict(scope["headers"]).get(b"host", b"").decode("latin-1")).hostname
    except ValueError:
        return None


async def _body(receive: Receive) -> bytes:
    """The whole body; raises a RejectedCall if it is larger than `MAX_BODY`."""
    body = bytearray()
    while len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if len(body) > MAX_BODY:
        raise RejectedCall(413, f"The request is larger than {MAX_BODY // 1_000_000} MB.")
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body that was already read, then what the client sends."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return replayed


def _with_headers(send: Send) -> Send:
    extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return send_with_headers


def _before_start(send: Send, status: int, call: Callable[[], None]) -> Send:
    """A ``send`` that calls ``call`` before it answers with this status."""

    async def send_after_call(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start" and message["status"] == status:
            call()
        await send(message)

    return send_after_call


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if status == 413 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
