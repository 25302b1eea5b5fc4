"""Which Farspan it is: the commit of a clone, and the digest of its sources."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from farspan.pretrain import provenance


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for layer in ("launch", "pretrain", "parallel", "kernels/cuda"):
        (tmp_path / layer).mkdir(parents=True)
    (tmp_path / "kernels/a.py").write_text("x")
    return tmp_path


def test_the_commit(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"
        return subprocess.run(["git", *who, *words], cwd=clone, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(provenance, "ROOT", clone)
    commit = provenance.commit.__wrapped__
    assert commit() == "unknown"
    git("init", "--quiet")
    assert commit() == "unknown"  # nothing is committed
    git("add", "kernels/a.py")
    git("commit", "--quiet", "-m", "x")
    head = git("rev-parse", "HEAD").strip()
    assert len(commit()) >= 7 and head.startswith(commit())
    (clone / "kernels/a.py").write_text("y")
    assert commit().endswith("-dirty") and head.startswith(commit().removesuffix("-dirty"))


def test_sources_are_told_apart(clone: Path) -> None:
    digest, seen = provenance.sources_digest.__wrapped__, set()
    assert digest(clone) == hashlib.sha256(b"kernels/a.py\0x\0").hexdigest()[:8]
    for path, text in (("kernels/a.py", "y"), ("kernels/cuda/b.cu", ""), ("launch/c.txt", ""), ("docs.py", "")):
        (clone / path).write_text(text)
        seen.add(digest(clone))
    (clone / "kernels/a.py").rename(clone / "parallel/a.py")
    seen.add(digest(clone))
    assert len(seen) == 3
