"""Nothing reaches the network that was not asked to."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("omegaconf", reason="the commands need ssmgen[train]")

TESTS = Path(__file__).parent
# Reports what libraries do with sockets below Python; absent on some machines, and not allowed on others.
STRACE = [
    "strace",
    "-f",
    "-qq",
    "--seccomp-bpf",
    "-e",
    "trace=connect,sendto,sendmsg,sendmmsg",
    "-e",
    "signal=none",
]


def can_trace():
    if shutil.which("strace") is None:
        return False
    return subprocess.run([*STRACE, "-o", "/dev/null", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_offline_runs_open_no_socket(tmp_path):
    trace = tmp_path / "trace"
    tracer = [*STRACE, "-o", str(trace)] if can_trace() else []
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("TELEMETRY", "OFFLINE"))}
    environment["PYTHONPATH"] = f"{TESTS.parent}:{TESTS}"
    environment["TRACKIO_DIR"] = str(tmp_path / "trackio")
    environment["TRITON_INTERPRET"] = "1"  # the kernels' module cannot be imported without a device otherwise
    command = [*tracer, sys.executable, str(TESTS / "offline_run.py"), str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout.splitlines()
    assert [line for line in done.stdout.splitlines() if line.startswith("network:")] == []
    if tracer:
        calls = trace.read_text()
        assert re.findall(r".*\bAF_INET6?\b.*", calls) == []


def test_the_hub_is_told_nothing_about_this_machine():
    from ssmgen.hub import hub_library

    hub = hub_library()
    assert hub.constants.HF_HUB_DISABLE_TELEMETRY and "torch/" not in hub.utils.build_hf_headers()["user-agent"]
