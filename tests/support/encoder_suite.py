"""What MRA and Nyströmformer pass beside what every architecture of the product does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close, difference
from models import Description, save_weights
from reference_suite import ReferenceSuite

from farspan.parallel.mesh import Mesh
from farspan.pretrain import checkpoint as ckpt
from farspan.pretrain.conversion.to_huggingface import to_huggingface
from farspan.pretrain.load import LoadedModel

# Fields of an export that a stock folder lacks, or has another value of.
OURS = ("auto_map", "model_type", "padding_counts", "attention_probs_dropout_prob")


class EncoderSuite(ReferenceSuite):
    @pytest.fixture(autouse=True)
    def _own_code(self, remote_code: None) -> None:
        """Exports are loaded with the modelling files that they carry."""

    def _theirs(self, folder: Path, name: str, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        from transformers import AutoModelForMaskedLM

        model, told = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(told.values()), told
        return dict(model.eval()(**inputs))

    def huggingface_config(self, folder: Path) -> dict[str, Any]:
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] in (self.model_type, f"farspan_{self.model_type}")
        return {key: value for key, value in config.items() if key not in (*OURS, "dtype", "torch_dtype")}

    def test_a_row_does_not_depend_on_padding(self, variant: str) -> None:
        """Alone and beside others, padded in any place, the same to 1e-6; and without the padding."""
        described = self.described(variant)
        if described.config.mixes_rows:
            pytest.skip("as released")
        network = described.filled(Mesh.solo()).eval()
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(3, described.config.vocab_size, (5, self.length), generator=generator)
        mask = torch.ones_like(ids)
        fourth = self.length // 4
        mask[1, -fourth:], mask[2, :fourth], mask[3, fourth : 2 * fourth], mask[4, 3:] = 0, 0, 0, 0
        together = self.logits(network, ids, mask)
        for row in range(5):
            real = mask[row] == 1
            alone = self.logits(network, ids[row : row + 1], mask[row : row + 1])[0]
            found = difference(alone[real], together[row][real])
            assert found <= 1e-6, f"row {row} alone: {found:.1e}"
            if row in (0, 1, 4):  # elsewhere positions would differ
                bare = self.logits(network, ids[row : row + 1, real], None)[0]
                assert_close(bare, together[row][real], f"row {row} without padding")

    def logits(self, network: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            return LoadedModel(network)(ids, mask).logits


def exported(described: Description, root: Path, **options: Any) -> tuple[dict[str, Any], str | None]:
    """An export's config.json, and what was said."""
    mesh = Mesh.solo()
    manifest = ckpt.Manifest(1, described.config.model_dump(), described.heads)
    saved = save_weights(described.filled(mesh), mesh, root, manifest)
    said = to_huggingface(saved, root / "hf", **options)
    return json.loads((root / "hf/config.json").read_text()), said
