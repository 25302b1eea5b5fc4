"""How ranks part: together, or at once where one of them fails."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from farspan.parallel.mesh import Mesh
from farspan.pretrain import run
from farspan.pretrain.company import Company
from farspan.pretrain.lease import LEASE


@pytest.mark.parametrize(
    ("device", "fails", "left"), [("cpu", False, 1), ("cpu", True, 1), ("cuda", False, 1), ("cuda", True, 0)]
)
def test_a_rank_that_fails_does_not_wait_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, fails: bool, left: int
) -> None:
    """NCCL's groups end together: a rank with an error would wait for those that wait for it, and say nothing."""
    times: list[Mesh] = []
    monkeypatch.setattr(run, "mesh_of", lambda _: Mesh.solo(torch.device(device)))
    monkeypatch.setattr(Mesh, "destroy", lambda mesh: times.append(mesh))
    config = types.SimpleNamespace(run_dir=str(tmp_path))
    try:
        with Company.of(config) as company:
            assert company.lease is not None and (tmp_path / LEASE).exists()
            if fails:
                raise RuntimeError("out of memory")
    except RuntimeError as error:
        assert fails and str(error) == "out of memory"
    assert len(times) == left
    assert not (tmp_path / LEASE).exists()
