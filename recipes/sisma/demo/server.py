"""The server of the page: gradio's, behind `Guard`, without sharing, monitoring or file access."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from recipes.sisma.demo.guard import LOCAL, Guard
from recipes.sisma.demo.png import MAX_BYTES
from ssmgen.extras import require

#: Sessions that the server remembers.
SESSIONS = 32


def serve(page: Any, *, host: str, port: int, open_browser: bool = False) -> str:
    """Serve the page in the background and return its address.

    Args:
        page: what `build_page` returned.
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
