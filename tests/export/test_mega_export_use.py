"""The files that travel with an exported MEGA model in use: training, saving, refusals, and interpreters of their own
that know neither Farspan nor this test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from mega_export import (
    AUTO_MAP,
    CASES,
    CHUNKS,
    DECODER,
    FILES,
    GREEDY,
    ROWS,
    SMALL,
    auto_config,
    load,
    make_inputs,
    make_model,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import save_file
from strangers import in_each_interpreter, run
from torch import Tensor

pytestmark = pytest.mark.usefixtures("remote_code")


# Training.


def test_heads_learn(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    body = make_model(folder, "MaskedLM", **CHUNKS, num_labels=3, dropout_prob=0.1, hidden_dropout_prob=0.1)
    inputs = make_inputs(19, "right")
    others = make_inputs(19, "right", seed=4)
    choices = {key: torch.stack([value, others[key]], 1) for key, value in inputs.items()}
    at = torch.tensor([0, 3, 2])
    tags = at[:, None].expand(-1, 19)
    tasks: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("MaskedLM", inputs, {"labels": inputs["input_ids"]}),
        ("SequenceClassification", inputs, {"labels": at % 3}),
        ("TokenClassification", inputs, {"labels": (tags % 3).masked_fill(tags == 2, -100)}),
        ("MultipleChoice", choices, {"labels": at % 2}),
        ("QuestionAnswering", inputs, {"start_positions": at, "end_positions": torch.tensor([5, 99, 4])}),
    ]
    for head, given, labels in tasks:
        model = load(folder, head, **({"num_labels": 2} if head == "QuestionAnswering" else {}))
        assert torch.equal(model.get_input_embeddings().weight, body.get_input_embeddings().weight.float()), head
        output = model.eval()(**given, **labels)
        expected = [
            F.cross_entropy(scores.flatten(0, -2), label.flatten(), ignore_index=ignored)
            for scores, label, ignored in (
                [(output.start_logits, at, 19), (output.end_logits, torch.tensor([5, 19, 4]), 19)]
                if head == "QuestionAnswering"
                else [(output.logits, labels["labels"], -100)]
            )
        ]
        torch.testing.assert_close(output.loss, sum(expected) / len(expected))
        as_tuple = model(**given, **labels, return_dict=False)
        assert isinstance(as_tuple, tuple) and as_tuple[0] == output.loss
        if head == "SequenceClassification":
            first = model.mega(**given).last_hidden_state[:, 0]
            layers = model.classifier
            torch.testing.assert_close(output.logits, layers.out_proj(torch.tanh(layers.dense(first))))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(**given, **labels).loss.backward()
            optimizer.step()
        assert model.eval()(**given, **labels).loss < output.loss, head


def test_losses_of_a_classifier_follow_the_labels(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    make_model(folder, "MaskedLM")
    inputs = make_inputs(9)
    one = load(folder, "SequenceClassification", num_labels=1).eval()
    output = one(**inputs, labels=torch.tensor([0.5, -1.0, 2.0]))
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], torch.tensor([0.5, -1.0, 2.0])))
    several = load(folder, "SequenceClassification", num_labels=2).eval()
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    output = several(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


def test_feature_dropout_drops_features_of_rows(tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "MaskedLM", **CHUNKS, use_feature_dropout=True, hidden_dropout_prob=0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.mega.layers:
        layer.mega_layer.hidden_dropout.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    model.train()(**make_inputs(20))
    for before, after in seen:
        kept = (after / before).round(decimals=9)
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        assert kept.shape[1] == 20 and (kept == kept[:, :1]).all()  # all of a row's positions alike
        assert not (kept == kept[:1]).all()  # each row its own


def test_batch_norm_takes_its_statistics_from_real_tokens(tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "MaskedLM", normalization_type="batchnorm", num_hidden_layers=1)
    inputs = make_inputs(11, "right")
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 17)}
    real = inputs["attention_mask"].bool()
    bn = model.mega.layers[0].mega_layer.norm.norm
    before = bn.running_mean.clone()
    first = model.train()(**inputs).logits[real]
    words = model.get_input_embeddings().weight[inputs["input_ids"][real]]
    torch.testing.assert_close(bn.running_mean, 0.9 * before + 0.1 * words.mean(0))
    torch.testing.assert_close(model(**other).logits[real], first)


def test_bfloat16_keeps_the_average_in_float32(tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "CausalLM", **CHUNKS).bfloat16()
    gate = model.mega.layers[0].mega_layer.ema_gate
    x, real = torch.randn(2, 300, SMALL["hidden_size"]).bfloat16(), torch.ones(2, 300, dtype=torch.bool)
    with torch.no_grad():
        gate.decay_factor.fill_(-9.0)  # q = 0.9999...: 1 in bfloat16
        rounded = gate(x, real, None)[0]
        exact = gate.double()(x.double(), real, None)[0]
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=0.02, atol=0.02)


def test_initial_values(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", {"hidden_size": 64, "ema_projection_size": 16, **DECODER})
    model = transformers.AutoModelForCausalLM.from_config(auto_config(folder), trust_remote_code=True)
    ema_gate = model.mega.layers[0].mega_layer.ema_gate
    signs = torch.tensor([1.0, -1.0] * 8)[:, None].expand(64, 16, 1)
    assert (ema_gate.ema_expansion_matrix - signs).abs().max() < 0.2
    assert 0.9 < ema_gate.kernel_projection_matrix.std() < 1.1
    assert 0.17 < ema_gate.damping_factor.std() < 0.23
    assert not model.mega.layers[0].mega_layer.qk_bias.any()
    assert not model.get_input_embeddings().weight[1].any()
    assert 0.015 < model.mega.layers[0].mega_layer.mx_proj.weight.std() < 0.025
    assert model.lm_head.weight is model.get_input_embeddings().weight


# Folders.


# Folders.


@pytest.mark.parametrize("model_type", ["mega", "farspan_mega"])
def test_saved_again_the_folder_is_as_good(model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(tmp_path / "folder", "MaskedLM", **CHUNKS, model_type=model_type).float()
    model.save_pretrained(tmp_path / "again")
    assert {file.name for file in FILES.glob("*.py")} <= {file.name for file in (tmp_path / "again").iterdir()}
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == model_type and config["auto_map"] == AUTO_MAP
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert "mlm_head.weight" not in file.keys() and "mlm_head.bias" in file.keys()  # noqa: SIM118
    again = load(tmp_path / "again", "MaskedLM")
    assert again.config.model_type == model_type
    assert again.mlm_head.weight is again.get_input_embeddings().weight
    inputs = make_inputs(21)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert "model of type" not in caplog.text  # transformers' warning about another model type


def test_embeddings_can_be_replaced(tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", "CausalLM")
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == 70 and model.lm_head.out_features == 70
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = make_inputs(9)["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(input_ids=ids).logits)


def test_code_that_nobody_trusts_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    make_model(folder, "MaskedLM", model_type="farspan_mega")
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_decoder": True}, "sees the tokens to be predicted; set bidirectional=False"),
        ({"add_cross_attention": True}, "only a decoder has cross-attention"),
        ({"use_chunking": True}, "chunk_size is -1: it must be at least 1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"truncation": 0}, "truncation is 0: it must be at least 1"),
        ({"attention_activation": "relu"}, "attention_activation is 'relu': it must be one of softmax, relu2, laplace"),
        ({"normalization_type": "none"}, "normalization_type is 'none'"),
        ({"relative_positional_bias": "alibi"}, "it must be one of rotary, simple"),
        ({"chunk_size": 80, "use_chunking": True, "relative_positional_bias": "simple"}, "no entry for chunks longer"),
        ({"shared_representation_size": 7}, "pairs of features, so it must be even"),
        ({"activation": "step"}, "activation is 'step': it must be one of"),
        ({"model_type": "llama"}, "model_type is 'llama': it must be one of mega, farspan_mega"),
    ],
)
def test_impossible_configs_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", config)
    with pytest.raises(ValueError) as caught:
        transformers.AutoModel.from_config(auto_config(folder), trust_remote_code=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_became_impossible_is_refused(tmp_path: Path) -> None:
    config = auto_config(write_folder(tmp_path / "folder", {}))
    config.is_decoder = True
    with pytest.raises(ValueError, match="set bidirectional=False"):
        transformers.AutoModel.from_config(config, trust_remote_code=True)


def test_loaded_without_an_auto_class_it_saves_its_code_all_the_same(tmp_path: Path) -> None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    make_model(tmp_path / "folder", "MaskedLM")
    for index, reference in enumerate(["modeling_mega.MegaModel", "modeling_mega.MegaForQuestionAnswering"]):
        model = get_class_from_dynamic_module(reference, tmp_path / "folder").from_pretrained(tmp_path / "folder")
        model.save_pretrained(tmp_path / f"again{index}")
        written = {file.name for file in (tmp_path / f"again{index}").iterdir()}
        assert {file.name for file in FILES.glob("*.py")} <= written


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    encoder = make_model(tmp_path / "encoder", "MaskedLM", relative_positional_bias="simple")
    decoder = make_model(tmp_path / "decoder", "CausalLM", add_cross_attention=True)
    ids = make_inputs(5)["input_ids"]
    mask = torch.ones(ROWS, 4)
    for call, message in (
        (lambda: encoder(), "give either input_ids or inputs_embeds"),
        (lambda: encoder(ids, inputs_embeds=torch.zeros(ROWS, 5, 12)), "give either input_ids or inputs_embeds"),
        (lambda: encoder(ids, mask), "attention_mask is [3, 4]: it must be [3, 5]"),
        (lambda: encoder(ids, output_attentions=True), "does not return attention weights"),
        (lambda: encoder(**make_inputs(65)), "65 positions: the simple relative bias has 64"),
        (lambda: encoder.mega(ids, use_cache=True), "need a decoder"),
        (lambda: decoder(ids), "encoder_hidden_states is missing"),
        (lambda: decoder(ids, past_key_values=((mask, mask),)), "past_key_values is a tuple"),
        (lambda: load(tmp_path / "encoder", "CausalLM"), "is_decoder is false"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value)


# Interpreters of their own.

# Interpreters of their own.

STRANGER = """
import json, os, sys
import torch, transformers
from safetensors.torch import load_file

def load(folder, name, **options):
    return getattr(transformers, name).from_pretrained(folder, trust_remote_code=True, **options)

def close(actual, expected, what):
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5), (what, (actual - expected).abs().max())

for case in json.loads(sys.argv[1]):
    folder, name, inputs = case["folder"], case["auto"], load_file(case["inputs"])
    expected = load_file(case["outputs"])
    model = load(folder, name).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    output = model(**inputs)
    real = inputs["attention_mask"].bool()
    close(output.logits[real], expected["logits"][real], "logits")
    output.logits[real].square().mean().backward()
    for key, parameter in model.named_parameters():
        close(parameter.grad, expected["grad." + key], key)
    model.save_pretrained(folder + "-again")
    again = load(folder + "-again", name).eval()
    assert again.config.model_type == json.load(open(folder + "/config.json"))["model_type"]
    assert torch.equal(again(**inputs).logits, output.logits)
    if name == "AutoModelForCausalLM":
        options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
        for beams in (1, 2):
            ids = model.generate(**inputs, **options, num_beams=beams)
            assert torch.equal(ids, expected["generated.%d" % beams]), (beams, ids)
    else:
        for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
            head = load(folder, "AutoModelFor" + kind).train()
            assert torch.isfinite(head(**inputs)[0]).all()
    try:
        getattr(transformers, name).from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded without trust_remote_code")
assert "farspan" not in sys.modules
print("transformers", transformers.__version__)
"""


@in_each_interpreter
def test_in_an_interpreter_of_its_own(python: str, tmp_path: Path) -> None:
    cases = []
    for name in ("last chunk shorter, a chunk of padding", "causal softmax, left"):
        folder = tmp_path / f"case{len(cases)}"
        head, length, padding, config = CASES[name]
        model = make_model(folder, head, **config, model_type="farspan_mega").float()
        inputs = make_inputs(length, padding)
        output = model(**inputs)
        output.logits[inputs["attention_mask"].bool()].square().mean().backward()
        outputs = {"logits": output.logits.detach()}
        outputs |= {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()}
        if head == "CausalLM":
            for beams in (1, 2):
                ids = model.generate(**inputs, **GREEDY, max_new_tokens=12, num_beams=beams)
                outputs[f"generated.{beams}"] = ids.contiguous()
        save_file(inputs, tmp_path / f"inputs{len(cases)}.safetensors")
        save_file(outputs, tmp_path / f"outputs{len(cases)}.safetensors")
        paths = {kind: str(tmp_path / f"{kind}{len(cases)}.safetensors") for kind in ("inputs", "outputs")}
        cases.append({"folder": str(folder), "auto": f"AutoModelFor{head}", **paths})
    run(python, STRANGER, cases, tmp_path)
