"""A rank ends with the launcher that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = "import time, farspan.launch.parent as it; it.die_with_launcher(); print('up', flush=True); time.sleep(60)"
STARTER = "import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', sys.argv[1]])"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("name", "environment", "ends"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "a"}, True),
        ("deepspeed.launcher.launch", {}, True),
        ("a shell that started ranks by hand", {}, False),
    ],
)
def test_it_ends_with_its_launcher(name: str, environment: dict[str, str], ends: bool) -> None:
    command = [sys.executable, "-P", "-c", STARTER, CHILD, name]
    launcher = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "up\n"
    [child] = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    try:
        launcher.kill()
        launcher.wait()
        until = time.monotonic() + (10 if ends else 0.5)
        while is_running(int(child)) and time.monotonic() < until:
            time.sleep(0.02)
        assert is_running(int(child)) is not ends
    finally:
        launcher.stdout.close()
        if is_running(int(child)):
            os.kill(int(child), signal.SIGKILL)
