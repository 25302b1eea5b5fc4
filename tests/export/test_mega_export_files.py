"""The files that travel with an exported MEGA model: what they compute, held against sums written out in float64 and
against what transformers 4.37.2 computed, whole and in pieces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mega_export import (
    CASES,
    CHUNKS,
    GREEDY,
    ROWS,
    load,
    make_case,
    make_inputs,
    make_model,
    write_folder,
    written_out,
)
from safetensors.torch import load_file
from strangers import Largest

import farspan

GOLDEN = sorted((Path(farspan.__file__).parent / "tests" / "golden").glob("mega-*"))

pytestmark = pytest.mark.usefixtures("remote_code")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_the_sums_written_out(name: str, tmp_path: Path) -> None:
    model, inputs, head = make_case(name, tmp_path / "folder")
    real = inputs["attention_mask"].bool()
    weights = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in model.state_dict().items()}
    tied = "lm_head.weight" if head == "CausalLM" else "mlm_head.weight"
    expected = written_out(weights, model.config, inputs, head)[real]
    actual = model(**inputs).logits
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(actual[real], expected, rtol=1e-9, atol=1e-9)

    factors = torch.randn(expected.shape, dtype=torch.float64)
    (factors * expected).sum().backward()
    (factors * actual[real]).sum().backward()
    for key, parameter in model.named_parameters():
        assert key != tied or not model.config.tie_word_embeddings
        assert parameter.grad is not None, key
        wanted = weights[key].grad
        atol = 1e-9 * float(wanted.abs().max() + 1)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-7, atol=atol, msg=key)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_cases(case: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", json.loads((case / "config.json").read_text()))
    shutil.copy(case / "model.safetensors", folder)
    head = json.loads((case / "case.json").read_text())["model_class"].removeprefix("MegaFor")
    model, loading = load(folder, head, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    if "encoder_hidden_states" in inputs:
        inputs["encoder_hidden_states"].requires_grad_()
    output = model.eval()(**inputs, output_hidden_states=True)
    output.loss.backward()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.loss, expected["loss"], rtol=1e-5, atol=1e-5)
    for actual, name in ((output.logits, "logits"), (output.hidden_states[-1], "last_hidden_state")):
        wanted = expected[name][real]
        torch.testing.assert_close(actual[real], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"grad_input.{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    references = {name: value for name, value in expected.items() if name.startswith("grad")}
    assert set(references) <= set(gradients)
    largest = max(float(value.abs().max()) for value in references.values())
    for name, value in references.items():
        # What softmax does not see has a gradient of rounding errors: it is as large as its neighbour's. Gradients a
        # thousand times smaller than others are sums that nearly cancel.
        size = float(references[name.replace("k_proj.bias", "k_proj.weight")].abs().max())
        size = max(size, 1e-3 * largest)
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=1e-5 * size, msg=name)


# Carried state.


# Carried state.


@pytest.mark.parametrize("name", [name for name, (head, *_) in CASES.items() if head == "CausalLM"])
def test_calls_in_pieces_compute_what_one_call_does(name: str, tmp_path: Path) -> None:
    model, inputs, _ = make_case(name, tmp_path / "folder")
    length = inputs["input_ids"].shape[1]
    encoder = {key: inputs.pop(key) for key in list(inputs) if key.startswith("encoder")}
    with torch.no_grad():
        whole = model(**inputs, **encoder).logits
        state, parts, at = None, [], 0
        for index, size in enumerate([6, 1, 1, 9, 1, 1, 1, *[1] * (length - 20)] if length < 40 else [77, 1, 30, 42]):
            piece = {"input_ids": inputs["input_ids"][:, at : at + size]}
            # A mask over the piece's tokens, or over all so far: both are understood.
            piece["attention_mask"] = inputs["attention_mask"][:, (at if index % 2 else 0) : at + size]
            output = model(**piece, **(encoder if state is None else {}), past_key_values=state, use_cache=True)
            state, at = output.past_key_values, at + size
            assert state.get_seq_length() == at
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


def test_what_is_carried_does_not_grow_with_what_was_seen(tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "CausalLM", **CHUNKS, truncation=5)

    def carried(length: int) -> int:
        with torch.no_grad():
            state = model(**make_inputs(length), use_cache=True).past_key_values
        return sum(tensor.numel() for layer in state.layers for tensor in layer.values())

    assert carried(15) == carried(151)


def test_no_tensor_grows_faster_than_the_row(tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "MaskedLM", **CHUNKS, ema_projection_size=16).float()

    def largest(length: int) -> int:
        with Largest() as mode:
            model.mega(**make_inputs(length)).last_hidden_state.sum().backward()
        return mode.size

    short = largest(512)
    assert largest(2048) <= 4 * short
    assert short <= ROWS * 512 * 60  # nothing of [features, N, length]: the widest projection has 40 a token


@pytest.mark.parametrize("config", [CHUNKS, {}, {**CHUNKS, "truncation": 6}], ids=["chunks", "whole", "truncated"])
def test_generate_follows_the_logits(config: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "CausalLM", **config)
    inputs = make_inputs(13, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(12):
            chosen = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, chosen], 1), F.pad(mask, (0, 1), value=1)
    options = {**GREEDY, "max_new_tokens": 12}
    lengths = []
    model.mega.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert torch.equal(model.generate(**inputs, **options), ids)
    assert lengths == [13] + [1] * 11  # each token once: the state is carried
    lengths.clear()
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), ids)
    assert lengths == list(range(13, 25))
    beams = {**inputs, **options, "num_beams": 3}
    assert torch.equal(model.generate(**beams), model.generate(**beams, use_cache=False))


def test_generate_goes_on_from_a_state(tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "CausalLM", **CHUNKS)
    ids = make_inputs(13)["input_ids"]
    first = model.generate(ids, **GREEDY, max_new_tokens=7, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids[:, :3]], 1)
    whole = model.generate(longer, **GREEDY, max_new_tokens=8)
    more = model.generate(longer, **GREEDY, max_new_tokens=8, past_key_values=first.past_key_values)
    assert torch.equal(more, whole)


def test_generate_with_an_encoder(tmp_path: Path) -> None:
    model, inputs, _ = make_case("cross-attention, chunks, post-norm", tmp_path / "folder")
    options = {**inputs, **GREEDY, "max_new_tokens": 10}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))
