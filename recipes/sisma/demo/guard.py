"""What the server takes: a list of addresses, small bodies, no paths and no addresses of files in them."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from recipes.sisma.demo.masks import MAX_BYTES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

#: This machine, as its own browsers call it.
LOCAL = ("127.0.0.1", "localhost")
#: A file in base64 and a mask as text beside it.
MAX_BODY = 2 * MAX_BYTES
_READ = re.compile(
    r"/|/(config|info|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?)/?"
    r"|/(assets|static|svelte)/[\w./@-]+"
    r"|/gradio_api/(info|startup-events|theme\.css|queue/data|heartbeat/\w+)"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|cancel|reset)/?")
# Nothing is fetched from elsewhere, whatever the page's library would like. It compiles templates, hence unsafe-eval.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; form-action 'self'; "
        "frame-ancestors 'self'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """ASGI middleware before the page's server.

    Its library has more doors than the page needs: uploads into files, downloads by path, fetching of addresses that a
    client names. Whatever is not on the list is answered with 404, a body above `MAX_BODY` with 413, and one that names
    a file with 400.

    Args:
        app: the server.
        local: answer only who asks for this machine by its own name; a page elsewhere may have a name that was made to
            point here.
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
            return await _answer(send, 403, f"Ask for {' or '.join(LOCAL)}.")
        path, method = scope["path"], scope["method"]
        reading = method in ("GET", "HEAD") and _READ.fullmatch(path) is not None and ".." not in path
        if not reading and not (method in ("POST", "OPTIONS") and _WRITE.fullmatch(path)):
            return await _answer(send, 404, "There is nothing here.")
        if method == "POST":
            body = await _body(receive)
            if body is None:
                return await _answer(send, 413, f"The request is larger than {MAX_BODY // 1_000_000} MB.")
            if names_files(body):
                return await _answer(send, 400, "The request names a file; this page takes none.")
            receive = _again(body, receive)
        return await self.app(scope, receive, _with_headers(send))


def names_files(body: bytes) -> bool:
    """Whether a JSON body holds what the page's library takes for a file, or is no JSON."""
    try:
        content = json.loads(body) if body else None
    except (ValueError, RecursionError):
        return True
    waiting = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if one.keys() & {"path", "_type"}:
                return True
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False


async def _body(receive: Receive) -> bytes | None:
    parts, length = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""
        part = message.get("body", b"")
        length += len(part)
        if length > MAX_BODY:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what the client does."""
    given = False

    async def once() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def _with_headers(send: Send) -> Send:
    added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if status == 413 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
