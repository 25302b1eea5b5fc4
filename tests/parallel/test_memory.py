from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Fresh pages taken for a tensor of 64 MiB that is made and freed over and over.
PROGRAM = """
import resource, sys, torch
from farspan.parallel.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(24):  # malloc finds its places
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str) -> int:
    done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", PROGRAM, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_memory_is_used_again() -> None:
    kept, freed = pages("kept"), pages("freed")
    assert kept < 100, f"{kept} fresh pages"
    assert freed > 10 * max(kept, 10), "glibc alone keeps them too: the setting is of no use any more"
