"""The server of the page: gradio's, without sharing, monitoring or file access, behind a `Guard`."""

import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recipes.sisma.demo.exchange import MAX_BYTES
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
_READ = re.compile(
    r"/|/(config|info|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?)/?"
    r"|/(assets|static|svelte)/[\w./@-]+"
    r"|/gradio_api/(info|startup-events|theme\.css|queue/data|heartbeat/\w+)"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|cancel|reset)/?")
# The browser loads nothing from elsewhere. gradio compiles templates, hence unsafe-eval.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'self'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def serve(page: Any, *, host: str, port: int, open_browser: bool = False) -> str:
    """Serve the page of `build_page` in the background and return its address; port 0 picks a free one.

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    port = _free_port(host, port)
    gr = require("gradio", extra="demo")
    starlette = require("starlette.middleware", extra="demo")
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Helvetica", "Arial", "sans-serif"]
    guard = starlette.Middleware(Guard, local=host in LOCAL)
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
        css=(Path(__file__).parent / "assets" / "page.css").read_text(),
        prevent_thread_lock=True,
    )
    return str(address)


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
    """Rejects every request that the page does not need, before gradio sees it.

    gradio has endpoints that upload files, serve them by path, and fetch URLs for a client. The answer to an unlisted
    path is 404, to a body above `MAX_BODY` 413, and to a body that references a file 400.

    Args:
        app: the server.
        local: accept only `LOCAL` host names, since any other name could be made to resolve to this machine.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], local: bool = False) -> None:
        self.app = app
        self.local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        host = urlsplit("//" + dict(scope["headers"]).get(b"host", b"").decode("latin-1")).hostname
        if self.local and host not in LOCAL:
            return await _answer(send, 403, f"Open this page at {' or '.join(LOCAL)}.")
        path, method = scope["path"], scope["method"]
        reading = method in ("GET", "HEAD") and _READ.fullmatch(path) is not None and ".." not in path
        if not reading and not (method in ("POST", "OPTIONS") and _WRITE.fullmatch(path)):
            return await _answer(send, 404, "There is nothing here.")
        if method == "POST":
            body = await _body(receive)
            if body is None:
                return await _answer(send, 413, f"The request is larger than {MAX_BODY // 1_000_000} MB.")
            if references_file(body):
                return await _answer(send, 400, "The request references a file; this page accepts none.")
            receive = _replay(body, receive)
        return await self.app(scope, receive, _with_headers(send))


def references_file(body: bytes) -> bool:
    """Whether a JSON body holds what gradio treats as a file, or is not JSON."""
    try:
        content = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return True
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.keys() & {"path", "_type"}:
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None if it is larger than `MAX_BODY`."""
    body = bytearray()
    while len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return bytes(body) if len(body) <= MAX_BODY else None


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


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if status == 413 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
