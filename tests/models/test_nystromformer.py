from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from architecture_suite import COMMON
from encoder_suite import EncoderSuite, exported
from models import Description

import farspan.pretrain.models.nystromformer
from farspan import load
from farspan.launch.cli import main
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.to_huggingface import to_huggingface

GOLDEN = Path(__file__).parents[1] / "golden"
LANDMARKS = {"num_landmarks": 4, "segment_means_seq_len": 16, "conv_kernel_size": 5}


class TestNystromformer(EncoderSuite):
    model_type = "nystromformer"
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "plain": LANDMARKS,
        "untied": LANDMARKS | COMMON["untied"] | {"num_landmarks": 3, "hidden_act": "silu"},
        "no-convolution": LANDMARKS | {"conv_kernel_size": None, "num_landmarks": 5, "vocab_size": 256},
        "exact": LANDMARKS | {"num_landmarks": 16, "type_vocab_size": 1},
        "released-start": LANDMARKS | {"inv_coeff_init_option": False},
    }

    def test_flops_of_a_training_step(self, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[override]
        """The convolution as products: of one by groups torch's counter counts too much."""

        def products(v: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            c = weight.shape[1]
            return (F.pad(v, (0, 0, c // 2, c // 2)).unfold(2, c, 1) @ weight[:, None, :, None]).squeeze(-1)

        monkeypatch.setattr(farspan.pretrain.models.nystromformer, "position_convolution", products)
        super().test_flops_of_a_training_step(variant)


@pytest.mark.parametrize(
    ("fields", "model_type", "reason"),
    [
        ({}, "farspan_nystromformer", "inv_coeff_init_option true they crash"),
        ({"inv_coeff_init_option": False}, "farspan_nystromformer", "they average and convolve padding"),
        ({"inv_coeff_init_option": False, "padding_counts": True}, "nystromformer", None),
        (
            {"inv_coeff_init_option": False, "conv_kernel_size": None, "segment_means_seq_len": 4},
            "nystromformer",
            None,
        ),
    ],
)
def test_stock_exports_where_they_agree(fields, model_type, reason, tmp_path):
    described = Description("nystromformer", LANDMARKS | fields)
    config, said = exported(described, tmp_path / "own")
    assert config["model_type"] == model_type and "trust_remote_code" in said
    if reason is None:
        config, _ = exported(described, tmp_path / "stock", stock=True)
        assert config["model_type"] == "nystromformer" and "auto_map" not in config
    else:
        with pytest.raises(ValueError, match=reason):
            exported(described, tmp_path / "stock", stock=True)


def edited(tmp_path: Path, **fields) -> Path:
    folder = tmp_path / "edited"
    shutil.copytree(GOLDEN / "nystromformer-landmarks", folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | fields).items() if value != "missing"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_swapped_fields_of_published_files_are_recognised_and_said(tmp_path, capfd):
    folder = edited(tmp_path, num_landmarks=64, segment_means_seq_len=8)
    with pytest.warns(UserWarning, match="num_landmarks 64 and segment_means_seq_len 8 are swapped"):
        config = load(folder).config
    assert (config.num_landmarks, config.segment_means_seq_len) == (8, 64)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "checkpoint")]) == 0
    assert capfd.readouterr().err == (
        "farspan: note: num_landmarks 64 and segment_means_seq_len 8 are swapped in its config.json: read as 8 "
        "landmarks of rows of 64 tokens\n"
    )
    with pytest.raises(ValueError, match="num_landmarks 64 is above segment_means_seq_len 8, as in published files"):
        Description("nystromformer", {"num_landmarks": 64, "segment_means_seq_len": 8}).config  # noqa: B018


def test_a_stock_configuration_is_read_as_stock_code_reads_it(tmp_path):
    folder = edited(tmp_path, inv_coeff_init_option="missing", attention_probs_dropout_prob=0.1)
    config = load(folder).config
    from_huggingface(folder, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "hf")  # what is not applied comes back as it was
    assert json.loads((tmp_path / "hf/config.json").read_text())["attention_probs_dropout_prob"] == 0.1
    assert load(tmp_path / "hf").config == config
    with pytest.warns(UserWarning, match="num_landmarks 64 and segment_means_seq_len 16 are swapped"):
        load(edited(tmp_path / "4", num_landmarks="missing", segment_means_seq_len=16))
    assert (config.inv_coeff_init_option, config.padding_counts, config.attention_probs_dropout_prob) == (
        False,
        True,
        0,
    )
    assert load(edited(tmp_path / "2", inv_coeff_init_option=True)).config.padding_counts is False
    with pytest.raises(ValueError, match="sets position_embedding_type, which no pretraining objective here uses"):
        load(edited(tmp_path / "3", position_embedding_type="relative_key"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_kernel_size": 4}, "conv_kernel_size 4 is even: set an odd number, or null for none"),
        ({"is_decoder": True}, "is_decoder true does not go with nystromformer"),
        ({"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob 0.1 does not go with nystromformer"),
    ],
)
def test_what_cannot_be_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        Description("nystromformer", LANDMARKS | fields).config  # noqa: B018
