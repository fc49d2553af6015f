"""What a process does beyond reading its files: programs, sockets, unpickling, and reads of secrets are recorded."""

import os
import sys
from pathlib import Path
from typing import Any

from torture.campaign import Failed

#: Name and value of an environment variable that nothing has a reason to read.
SECRET, VALUE = "TORTURE_SECRET", "a-secret-of-the-torture"
#: Variables that are set: that one here, and the switch of the hub library's telemetry.
_MAY_BE_SET = (SECRET.encode(), b"HF_HUB_DISABLE_TELEMETRY")
_FORBIDDEN = (
    *(
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "os.fork",
        "os.forkpty",
        "subprocess.Popen",
    ),
    *("socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request"),
    *("pickle.find_class", "pty.spawn", "webbrowser.open", "os.putenv"),
)
_seen: list[str] = []
_watched: list[Path] = []


def watch(secret: Path) -> None:
    """Record from now on, in this process; a file ``secret`` is not to be opened."""
    if not _watched:
        sys.addaudithook(_note)
        _watch_environment()
    os.environ[SECRET] = VALUE
    _watched[:] = [secret]
    secret.write_text(VALUE)
    _seen.clear()


def nothing_done(canary: Path, shown: str) -> None:
    """Require that nothing forbidden was done, no canary file appeared, and nothing secret is shown."""
    _watched[1:] = []
    if _seen:
        raise Failed(f"did what no file may cause: {', '.join(sorted(set(_seen)))}")
    if canary.exists():
        raise Failed(f"{canary.name} was created: something was executed")
    if VALUE in shown:
        raise Failed(f"a secret is shown: {shown[:500]}")


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _FORBIDDEN and not (event == "os.putenv" and arguments[:1] and arguments[0] in _MAY_BE_SET):
        _seen.append(f"{event} {str(arguments)[:100]}")
    elif event == "open" and _watched and arguments[0] == str(_watched[0]) and arguments[1] in (None, "r", "rb"):
        _seen.append(f"open {arguments[0]}")


def _watch_environment() -> None:
    """Record reads of the secret variable through `os.environ`, which everything else in Python goes through."""
    kind: Any = type(os.environ)
    plain = kind.__getitem__

    def read(self: Any, key: Any) -> Any:
        if key == SECRET:
            _seen.append(f"environment {key}")
        return plain(self, key)

    kind.__getitem__ = read
