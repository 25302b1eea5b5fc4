"""The files that travel with an exported MRA or Nyströmformer model: what they compute, held against sums written out
in float64, against what transformers computed, and against the model that was exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_all_close, assert_close
from encoder_export import (
    ARCHITECTURES,
    AS_RELEASED,
    GOLDEN,
    ROWS,
    SMALL,
    attention_written_out,
    auto_map,
    code_files,
    golden_folder,
    load,
    make_inputs,
    make_mask,
    make_model,
)
from safetensors.torch import load_file
from strangers import Largest
from torch import Tensor

import farspan
from farspan.pretrain.conversion.from_huggingface import from_huggingface
from farspan.pretrain.conversion.to_huggingface import to_huggingface

pytestmark = pytest.mark.usefixtures("remote_code")
both = pytest.mark.parametrize("architecture", ARCHITECTURES)


# What they compute.


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_cases(case: Path, tmp_path: Path) -> None:
    model, told = load(golden_folder(case, tmp_path / "folder"), output_loading_info=True)
    assert not any(told.values()), told
    assert type(model).__module__.startswith("transformers_modules.")
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    output = model.eval()(**inputs, output_hidden_states=True)
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    assert_close(output.loss, expected["loss"], "loss")
    assert_close(output.logits[real], expected["logits"][real], "logits")
    assert_close(output.hidden_states[-1][real], expected["last_hidden_state"][real], "last hidden state")
    gradients = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    # Where embeddings are not tied, transformers 5 reads another of the bias's two names.
    references = {k.replace("decoder.bias", "bias"): v for k, v in expected.items() if k.startswith("grad")}
    # What softmax does not see has a gradient of rounding errors: it is as large as its neighbour's.
    assert_all_close(gradients, references, "", lambda name: name.replace("key.bias", "key.weight"))


ATTENTION: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "mra": ("mra", 100, "holes", {"block_per_row": 1}),
    "mra, padding counts": ("mra", 100, "holes", {"block_per_row": 1, "padding_counts": True}),
    "mra, sparse": ("mra", 70, "right", {"block_per_row": 1, "approx_mode": "sparse"}),
    "mra, sparse, padding counts": (
        "mra",
        140,
        "left",
        {"block_per_row": 1, "approx_mode": "sparse", "padding_counts": True},
    ),
    "mra, priors": (
        "mra",
        140,
        "left",
        {"initial_prior_first_n_blocks": 1, "initial_prior_diagonal_n_blocks": 3, "num_attention_heads": 4},
    ),
    "mra, priors over budget": (
        "mra",
        129,
        "right",
        {"initial_prior_first_n_blocks": 2, "initial_prior_diagonal_n_blocks": 1, "block_per_row": 1}
        | {"padding_counts": True},
    ),
    "mra, all blocks": ("mra", 33, "left", {"block_per_row": 9}),
    "nystromformer": ("nystromformer", 23, "holes", {}),
    "nystromformer, no convolution": ("nystromformer", 30, "left", {"conv_kernel_size": None, "num_landmarks": 4}),
    "nystromformer, shared start": ("nystromformer", 33, "right", {"inv_coeff_init_option": False}),
    "nystromformer, as released": ("nystromformer", 25, "holes", AS_RELEASED),
    "nystromformer, padding counts, any length": ("nystromformer", 23, "left", {"padding_counts": True}),
    "nystromformer, short": ("nystromformer", 9, "right", {"num_landmarks": 9, "padding_counts": True}),
    "nystromformer, exact": ("nystromformer", 21, "holes", {"segment_means_seq_len": 5}),
    "nystromformer, exact, padding counts": (
        "nystromformer",
        21,
        "left",
        {"segment_means_seq_len": 5, "padding_counts": True},
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_that_of_the_sums_written_out(name: str, tmp_path: Path) -> None:
    architecture, length, padding, config = ATTENTION[name]
    model = make_model(tmp_path / "folder", architecture, **config, num_hidden_layers=1)
    attention, real = model.base_model.encoder.layer[0].attention.self, make_mask(length, padding)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, length, SMALL["hidden_size"], dtype=torch.float64, generator=generator)
    # Neighbours alike, so that blocks and segments mean something.
    x = x + 2 * x[:, torch.arange(length) // 16 * 16]
    if name == "nystromformer, shared start":
        x[:3] /= 8  # so that the largest sums are of a matrix that is not inverted
    x.requires_grad_()
    factors = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    if architecture == "nystromformer":
        factors[~real] = 0  # of what is computed at padding nothing is said
    actual, expected = attention(x, real), attention_written_out(attention, x, real, model.config)
    if not (architecture == "nystromformer" and model.config.padding_counts):
        assert not actual[~real].any()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-9)
    wanted = {"x": x, **dict(attention.named_parameters())}
    gradients = (torch.autograd.grad((factors * y).sum(), list(wanted.values())) for y in (actual, expected))
    for key, mine, theirs in zip(wanted, *gradients, strict=True):
        # A softmax does not see its keys' bias, so that its gradient is a sum that cancels.
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8 * float(factors.abs().sum()), msg=key)


@both
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_a_row_does_not_depend_on_its_padding(architecture: str, padding: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", architecture, block_per_row=1).float()
    inputs = make_inputs(75, padding)
    together = model(**inputs).logits
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = {key: value[row : row + 1, mask] for key, value in inputs.items() if key != "attention_mask"}
        places = mask.nonzero().T + 2
        if padding == "right":
            assert torch.equal(places[0], torch.arange(len(places[0])) + 2)
        else:
            alone["position_ids"] = places
        assert_close(model(**alone).logits[0], together[row, mask], f"row {row}")


@both
@pytest.mark.parametrize("padding_counts", [False, True])
def test_a_row_of_padding_disturbs_nothing(architecture: str, padding_counts: bool, tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", architecture, padding_counts=padding_counts)
    inputs = make_inputs(41)
    inputs["attention_mask"][2] = 0
    output = model(**inputs)
    model.zero_grad()
    output.logits.sum().backward()
    assert torch.isfinite(output.logits).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    kept = [0, 1, 3]
    expected = model(**{key: value[kept] for key, value in inputs.items()}).logits
    torch.testing.assert_close(output.logits[kept], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [1, 31, 32, 77])
@pytest.mark.parametrize("features", [1, 20])
def test_mra_with_every_block_is_softmax_attention(length: int, features: int, tmp_path: Path) -> None:
    sizes = {"num_attention_heads": 2, "hidden_size": 2 * features}
    model = make_model(tmp_path / "folder", "mra", block_per_row=3, **sizes)
    attention, real = model.base_model.encoder.layer[0].attention.self, make_mask(length, "left")
    real[3] = True
    x = 3 * torch.randn(ROWS, length, 2 * features, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    q, k, v = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None]).transpose(1, 2).flatten(2)
    for padding_counts in (False, True):
        attention.padding_counts = padding_counts
        assert_close(attention(x, real)[real], expected[real], "attention")


@both
def test_no_tensor_grows_with_the_square_of_the_length(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", architecture, max_position_embeddings=2048).float()

    def largest(length: int) -> int:
        with Largest() as mode:
            model.base_model(torch.full((1, length), 5)).last_hidden_state.sum().backward()
        return mode.size

    assert largest(2048) <= 4 * largest(512) < 4 * 512 * 512


@both
def test_sixteen_bits_attend_in_float32(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make_model(tmp_path / "folder", architecture)
    attention, real = model.base_model.encoder.layer[0].attention.self.bfloat16(), make_mask(100, "right")
    x = torch.randn(ROWS, 100, SMALL["hidden_size"]).bfloat16()
    seen: list[torch.dtype] = []
    attend = attention.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        seen.append((q @ k.mT).dtype)
        return attend(q, k, v, real)

    attention.attend = watched
    rounded = attention(x, real)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attention.float()(x.float(), real)
    exact = attention.double()(x.double(), real)
    assert rounded.dtype == torch.bfloat16 and seen == [torch.float32, torch.float32, torch.float64]
    for actual in (rounded, under_autocast):
        torch.testing.assert_close(actual.double(), exact, rtol=0.05, atol=0.05)  # over seeds 0.01 to 0.033


# From and to checkpoints.


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mra-full-padded", {"padding_counts": False}),
        ("mra-full-padded", {"padding_counts": True, "approx_mode": "sparse", "block_per_row": 1}),
        ("nystromformer-landmarks", {"padding_counts": False, "inv_coeff_init_option": True}),
        ("nystromformer-landmarks", {"padding_counts": False, "inv_coeff_init_option": False}),
        ("nystromformer-landmarks", {"padding_counts": True, "inv_coeff_init_option": True}),
    ],
)
def test_a_converted_model_computes_what_farspan_does(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    source = golden_folder(GOLDEN[0].parent / name, tmp_path / "source", **config)
    from_huggingface(source, tmp_path / "checkpoint")
    to_huggingface(tmp_path / "checkpoint", tmp_path / "hf")
    architecture = name.split("-")[0]
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        *code_files(architecture),
        "config.json",
        "model.safetensors",
        "README.md",
    }
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["model_type"] == f"farspan_{architecture}" and written["auto_map"] == auto_map(architecture)
    model = load(tmp_path / "hf").eval()
    generator = torch.Generator().manual_seed(6)
    for length, padding in ((61, "right"), (45, "holes")):
        real = make_mask(length, padding)
        ids = torch.randint(3, 97, real.shape, generator=generator)
        with torch.no_grad():
            ours = farspan.load(tmp_path / "hf")(ids, real.long()).logits
            assert_close(model(ids, real.long()).logits[real], ours[real], f"{padding} logits")
