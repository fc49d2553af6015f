"""Which machine this is, and which of its processes still run."""

import os
import socket
import uuid
from pathlib import Path
from typing import Any


def machine() -> str:
    """What the processes that see each other have in common: the boot of the system, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def start_of(pid: Any) -> str:
    """When a process of this machine started, in the system's own unit; empty if it has ended.

    It is ``"running"`` if the system does not tell the time, or not to this user. On Windows it is so for every
    process, also one that has ended.
    """
    try:
        after_name = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return "" if after_name[0] in "ZX" else after_name[19]
    except (OSError, ValueError):
        pass
    if os.name != "posix":  # there, os.kill would send the process a signal
        return "running"
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return "running"
    except (OSError, ValueError, OverflowError):
        return ""
    return "running"
