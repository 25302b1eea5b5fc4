from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from architecture_suite import COMMON
from encoder_suite import EncoderSuite, exported
from models import Description

from farspan import load
from farspan.kernels.mra import BLOCK, block_budget
from farspan.pretrain.models.config import ModelConfig
from farspan.pretrain.models.mra import MraConfig

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCKS = {"max_position_embeddings": 208, "block_per_row": 2}


class TestMra(EncoderSuite):
    model_type = "mra"
    length = 208  # six and a half blocks
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": BLOCKS,
        "sparse-untied": BLOCKS | COMMON["untied"] | {"approx_mode": "sparse", "hidden_act": "silu"},
        "priors": BLOCKS | {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3, "vocab_size": 256},
        "all-blocks": BLOCKS | {"block_per_row": 7, "type_vocab_size": 2},
    }

    def recomputed(self, config: ModelConfig) -> float:
        """Exact scores, unless there are no others."""
        assert isinstance(config, MraConfig)
        blocks = -(-self.length // BLOCK)
        exact = block_budget(self.length, config.block_per_row)
        return 0 if exact == blocks**2 else config.num_hidden_layers * 2 * exact * BLOCK**2 * config.hidden_size


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "in their padded rows padding fills blocks"),
        ({"padding_counts": True}, "wrong for head sizes such as 8, no multiple of 64"),
        ({"padding_counts": True, "num_attention_heads": 1, "hidden_size": 64}, None),
    ],
)
def test_stock_exports_where_they_agree(fields, reason, tmp_path):
    described = Description("mra", BLOCKS | fields)
    config, said = exported(described, tmp_path / "own")
    assert config["model_type"] == "farspan_mra" and "trust_remote_code" in said
    if reason is None:
        config, said = exported(described, tmp_path / "stock", stock=True)
        assert config["model_type"] == "mra" and "auto_map" not in config
        assert said.startswith("the stock mra classes need their CUDA kernel (without it their attention is zero)")
    else:
        with pytest.raises(ValueError, match=reason):
            exported(described, tmp_path / "stock", stock=True)


def test_a_stock_configuration_is_read_as_stock_code_reads_it(tmp_path):
    folder = tmp_path / "stock"
    shutil.copytree(GOLDEN / "mra-full", folder)
    config = json.loads((folder / "config.json").read_text()) | {"attention_probs_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    config = load(folder).config
    assert (config.padding_counts, config.attention_probs_dropout_prob) == (True, 0.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_decoder": True}, "is_decoder true does not go with mra"),
        ({"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob 0.1 does not go with mra"),
        ({"approx_mode": "half"}, "'full' or 'sparse'"),
    ],
)
def test_what_cannot_be_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        Description("mra", BLOCKS | fields).config  # noqa: B018
