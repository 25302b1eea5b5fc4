"""The files that travel with an exported MRA or Nyströmformer model in use: training, saving, refusals, and
interpreters of their own that know neither Farspan nor this test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from comparison import assert_all_close, assert_close, assert_identical
from encoder_export import (
    ARCHITECTURES,
    GOLDEN,
    HEADS,
    OWN,
    ROWS,
    SMALL,
    auto_map,
    code_files,
    golden_folder,
    load,
    load_config,
    make_inputs,
    make_model,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import save_file
from strangers import in_each_interpreter, run

pytestmark = pytest.mark.usefixtures("remote_code")
both = pytest.mark.parametrize("architecture", ARCHITECTURES)


# Training, saving, refusals.


@both
def test_heads_learn_and_are_saved(architecture: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    body = make_model(folder, architecture, num_labels=3, hidden_dropout_prob=0.1)
    inputs, others = make_inputs(19, "right"), make_inputs(19, "right", seed=4)
    choices = {key: torch.stack([value, others[key]], 1) for key, value in inputs.items()}
    at, ends = torch.tensor([0, 3, 2, 1]), torch.tensor([5, 99, 4, 2])
    tags = at[:, None].expand(-1, 19)
    tasks: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "MaskedLM": (inputs, {"labels": inputs["input_ids"]}),
        "SequenceClassification": (inputs, {"labels": at % 3}),
        "TokenClassification": (inputs, {"labels": (tags % 3).masked_fill(tags == 2, -100)}),
        "MultipleChoice": (choices, {"labels": at % 2}),
        "QuestionAnswering": (inputs, {"start_positions": at, "end_positions": ends}),
    }
    assert set(tasks) == set(HEADS)
    for head, (given, labels) in tasks.items():
        model = load(folder, head)
        assert type(model).__name__ == f"{architecture.capitalize()}For{head}"
        assert torch.equal(model.get_input_embeddings().weight, body.get_input_embeddings().weight.float()), head
        output = model.eval()(**given, **labels)
        if head == "QuestionAnswering":
            scores = [(output.start_logits, at, 19), (output.end_logits, ends.clamp(max=19), 19)]
        else:
            scores = [(output.logits, labels["labels"], -100)]
        losses = [F.cross_entropy(s.flatten(0, -2), l.flatten(), ignore_index=ignored) for s, l, ignored in scores]
        torch.testing.assert_close(output.loss, sum(losses) / len(losses))
        as_tuple = model(**given, **labels, return_dict=False)
        assert isinstance(as_tuple, tuple) and as_tuple[0] == output.loss
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(**given, **labels).loss.backward()
            optimizer.step()
        learnt = model(**given, **labels).loss
        assert learnt < output.loss, head
        dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        used: set[Any] = set()
        for module in dropouts:
            module.register_forward_hook(lambda module, *args, used=used: used.add(module))
        assert model.train()(**given, **labels).loss != learnt, head
        assert len(dropouts) >= 1 + 2 * SMALL["num_hidden_layers"] and used == set(dropouts), head
        model.eval()
        model.save_pretrained(tmp_path / head)
        assert set(code_files(architecture)) <= {file.name for file in (tmp_path / head).iterdir()}
        again, told = load(tmp_path / head, head, output_loading_info=True)
        assert not any(told.values()), told
        assert_identical(again.state_dict(), model.state_dict())
        assert_close(again(**given, **labels).loss, learnt, head)


@both
def test_heads_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    """Names of tensors, and what the heads make of the last hidden state."""
    folder = tmp_path / "folder"
    make_model(folder, architecture, num_labels=3, hidden_act="relu")
    name = architecture.capitalize()
    stock_config = getattr(transformers, f"{name}Config")(**SMALL, **OWN[architecture], hidden_act="relu", num_labels=3)
    stock_config.inv_coeff_init_option = False
    inputs = make_inputs(17)
    for head in ("", *HEADS):
        own = load(folder, head).eval()
        stock = getattr(transformers, f"{name}For{head}" if head else f"{name}Model")(stock_config).eval()
        ours = own.state_dict()
        theirs = set(stock.state_dict()) - {"cls.predictions.decoder.bias"}
        assert set(ours) == {key for key in theirs if not key.endswith("position_ids")}
        stock.load_state_dict(ours, strict=False)
        if not head:
            continue
        body = {key: value.unsqueeze(1) for key, value in inputs.items()} if head == "MultipleChoice" else inputs
        hidden = own(**body, output_hidden_states=True).hidden_states[-1]
        # Their head over our hidden states: their own attention takes other lengths, or nothing without its kernel.
        getattr(stock, architecture).forward = lambda *args, x=hidden, **options: (
            transformers.modeling_outputs.BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)
        )
        names = ("start_logits", "end_logits") if head == "QuestionAnswering" else ("logits",)
        expected = stock(**body, return_dict=True)
        for output in names:
            if head == "MaskedLM":
                stock.cls.predictions.decoder.bias = own.cls.predictions.bias
                expected = stock(**body, return_dict=True)
            assert_close(own(**body)[output], expected[output], f"{head} {output}")


@both
@pytest.mark.parametrize("farspan_name", [True, False])
def test_saved_again_the_folder_is_as_good(
    architecture: str, farspan_name: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_type = f"farspan_{architecture}" if farspan_name else architecture
    model = make_model(tmp_path / "folder", architecture, model_type=model_type).float()
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["model_type"] == model_type and config["auto_map"] == auto_map(architecture)
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "cls.predictions.decoder.weight" not in names and "cls.predictions.bias" in names
    again = load(tmp_path / "again")
    assert again.config.model_type == model_type
    assert again.cls.predictions.decoder.weight is again.get_input_embeddings().weight
    assert_identical(again.state_dict(), model.state_dict())
    assert "model of type" not in caplog.text  # transformers' warning about another model type


@both
def test_the_defaults_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", architecture, {})
    ours, name = load_config(folder).to_dict(), architecture.capitalize()
    theirs = getattr(transformers, f"{name}Config")().to_dict()
    theirs = {
        key: value for key, value in theirs.items() if key not in ("model_type", "_name_or_path", "add_cross_attention")
    }
    assert {key: ours[key] for key in theirs} == theirs
    assert ours["padding_counts"] is False and ours["model_type"] == f"farspan_{architecture}"


@both
def test_checkpointing_gives_the_same_gradients(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", architecture).train()
    inputs = make_inputs(40, "holes")
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        calls: list[int] = []
        hook = model.base_model.encoder.layer[0].register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        hook.remove()
        assert len(calls) == (2 if again else 1)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_all_close(*gradients, "gradient of")


@both
def test_embeddings_can_be_replaced(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", architecture)
    inputs = make_inputs(9)
    before = model(**inputs).logits
    model.resize_token_embeddings(70)
    assert model.get_input_embeddings().num_embeddings == 70
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    after = model(**inputs).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., : SMALL["vocab_size"]], before)
    assert not model.cls.predictions.bias[SMALL["vocab_size"] :].any()
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embedded, **inputs).logits, after)


def test_losses_of_a_classifier_follow_the_labels(tmp_path: Path) -> None:
    make_model(tmp_path / "folder", "nystromformer")
    inputs = make_inputs(9)
    one = load(tmp_path / "folder", "SequenceClassification", num_labels=1).eval()
    numbers = torch.tensor([0.5, -1.0, 2.0, 0.0])
    output = one(**inputs, labels=numbers)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], numbers))
    several = load(tmp_path / "folder", "SequenceClassification", num_labels=2).eval()
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    output = several(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


@both
def test_initial_values(architecture: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", architecture, SMALL | OWN[architecture] | {"hidden_size": 64})
    model = transformers.AutoModelForMaskedLM.from_config(load_config(folder), trust_remote_code=True)
    assert not model.get_input_embeddings().weight[1].any()  # the padding token
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.01 < parameter.std() < 0.03, name
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("mra", {"hidden_size": 13}, "hidden_size is 13 and num_attention_heads 2: heads are equally wide"),
        ("mra", {"hidden_act": "step"}, "hidden_act is 'step': it must be one of"),
        ("mra", {"approx_mode": "dense"}, "approx_mode is 'dense': it must be one of full, sparse"),
        ("mra", {"block_per_row": 0}, "block_per_row is 0: it must be a whole number, at least 1"),
        ("mra", {"initial_prior_first_n_blocks": -1}, "initial_prior_first_n_blocks is -1"),
        ("mra", {"position_embedding_type": "relative_key"}, "has absolute positions only; set 'absolute'"),
        ("mra", {"padding_counts": "no"}, "padding_counts is 'no': it must be true or false"),
        ("mra", {"model_type": "llama"}, "model_type is 'llama': it must be one of mra, farspan_mra"),
        ("nystromformer", {"num_landmarks": 512, "segment_means_seq_len": 64}, "set them the other way round"),
        ("nystromformer", {"num_landmarks": 0}, "num_landmarks is 0"),
        ("nystromformer", {"conv_kernel_size": 4}, "conv_kernel_size is 4: it must be an odd number, or None"),
        ("nystromformer", {"inv_coeff_init_option": "exact"}, "inv_coeff_init_option is 'exact'"),
    ],
)
def test_impossible_configs_are_refused(
    architecture: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "folder", architecture, SMALL | OWN[architecture] | config)
    with pytest.raises(ValueError) as caught:
        load_config(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@both
def test_a_config_that_became_impossible_is_refused(architecture: str, tmp_path: Path) -> None:
    config = load_config(write_folder(tmp_path / "folder", architecture, SMALL | OWN[architecture]))
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="heads are equally wide"):
        transformers.AutoModel.from_config(config, trust_remote_code=True)


@both
def test_wrong_calls_are_refused(architecture: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "folder", architecture)
    ids = make_inputs(5)["input_ids"]
    for call, message in (
        (lambda: model(), "give either input_ids or inputs_embeds"),
        (lambda: model(ids, inputs_embeds=torch.zeros(ROWS, 5, 12)), "give either input_ids or inputs_embeds"),
        (lambda: model(ids, torch.ones(ROWS, 4)), "attention_mask is [4, 4]: it must be [4, 5] (rows, tokens)"),
        (lambda: model(ids, output_attentions=True), "does not return attention weights"),
        (lambda: model(**make_inputs(161)), "rows of 161 tokens: the table of positions has room for 160"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value) and "\n" not in str(caught.value)


@both
def test_loaded_without_an_auto_class_it_saves_its_code_all_the_same(architecture: str, tmp_path: Path) -> None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    make_model(tmp_path / "folder", architecture)
    shutil.copytree(tmp_path / "folder", tmp_path / "another")  # from which no Auto class took anything
    for auto, reference in auto_map(architecture).items():
        if auto != "AutoConfig":
            found = get_class_from_dynamic_module(reference, tmp_path / "another")
            found.from_pretrained(tmp_path / "another").save_pretrained(tmp_path / auto)
            assert set(code_files(architecture)) <= {file.name for file in (tmp_path / auto).iterdir()}


# Interpreters of their own.

STRANGER = """
import json, os, sys
import torch, transformers
from safetensors.torch import load_file

def load(folder, name, **options):
    return getattr(transformers, name).from_pretrained(folder, trust_remote_code=True, **options)

def close(actual, expected, what, size):
    assert (actual - expected).abs().max() <= 1e-5 * size, (what, (actual - expected).abs().max(), size)

for case in json.loads(sys.argv[1]):
    folder, inputs, expected = case["folder"], load_file(case["inputs"]), load_file(case["outputs"])
    config = json.load(open(folder + "/config.json"))
    model = load(folder, "AutoModelForMaskedLM").eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    output = model(**inputs)
    real = inputs["attention_mask"].bool()
    close(output.logits[real], expected["logits"][real], "logits", expected["logits"][real].abs().max())
    close(output.loss, expected["loss"], "loss", expected["loss"])
    output.loss.backward()
    for key, parameter in model.named_parameters():
        size = expected["grad." + key.replace("key.bias", "key.weight")].abs().max()
        close(parameter.grad, expected["grad." + key], key, size)
    model.save_pretrained(folder + "-again")
    again = load(folder + "-again", "AutoModelForMaskedLM").eval()
    assert again.config.model_type == config["model_type"]
    for (name, mine), (other, theirs) in zip(sorted(again.state_dict().items()), sorted(model.state_dict().items())):
        assert name == other and torch.equal(mine, theirs), (name, other)
    for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        head = load(folder, "AutoModelFor" + kind).train()
        head.gradient_checkpointing_enable()
        given = {key: value for key, value in inputs.items() if key != "labels"}
        head(**given)[0].square().mean().backward()
        assert all(parameter.grad is not None for parameter in head.parameters())
    model.resize_token_embeddings(config["vocab_size"] + 3)
    assert model(**inputs).logits.shape[-1] == config["vocab_size"] + 3
    if config["model_type"].startswith("farspan_"):
        try:
            transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=False)
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
    for case in GOLDEN:
        if case.name.endswith(("full-padded", "landmarks")):  # under transformers' own names
            folder = golden_folder(case, tmp_path / case.name)
            paths = {kind: str(case / f"{kind}.safetensors") for kind in ("inputs", "outputs")}
            cases.append({"folder": str(folder), **paths})
    assert len(cases) == len(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        folder = tmp_path / f"farspan-{architecture}"
        model = make_model(folder, architecture, block_per_row=1, tie_word_embeddings=False).float()
        inputs = make_inputs(70, "holes")
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        output = model(**inputs)
        output.loss.backward()
        outputs = {"logits": output.logits.detach(), "loss": output.loss.detach()}
        outputs |= {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()}
        paths = {kind: str(tmp_path / f"{architecture}-{kind}.safetensors") for kind in ("inputs", "outputs")}
        save_file(inputs, paths["inputs"])
        save_file(outputs, paths["outputs"])
        cases.append({"folder": str(folder), **paths})
    run(python, STRANGER, cases, tmp_path)
