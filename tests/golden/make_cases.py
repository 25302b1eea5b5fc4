"""Make reference cases for RoBERTa-PreLayerNorm and Megatron-BERT with the model classes of transformers 4.37.2.

    python tests/golden/make_cases.py [CASE ...]

writes one folder a case beside this file, in the format that README.md there describes. It needs only torch,
safetensors, numpy<2 and `transformers==4.37.2`: the last release whose two model classes still know the relative
position embeddings. Every case is a pure function of its name and of the versions in its case.json.
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

TRANSFORMERS = "4.37.2"
IGNORED = -100  # the label that cross-entropy skips
MASKED_FRACTION = 0.25
# Large enough that attention is far from uniform and that a term dropped from a score shows in the logits.
MATRIX_NOISE = 0.15
VECTOR_NOISE = 0.2
# With relative_key_query a key bias works through the distances alone: small ones drown its gradient in rounding.
DISTANCE_NOISE = 0.6
# Leaving out any one tensor must move a logit by more than this; the comparisons that use the cases allow 1e-5.
SMALLEST_EFFECT = 1e-3


@dataclass(frozen=True)
class Case:
    """One case: a model class of transformers, what its config changes, and where its rows are padded."""

    model_class: str
    config: dict[str, Any] = field(default_factory=dict)
    padding: str = "right"  # right, left, interior or none
    token_types: bool = False


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 44,
    "vocab_size": 129,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BATCH, LENGTH = 3, 24


def _relative(kind: str, **others: Any) -> dict[str, Any]:
    return {"position_embedding_type": kind, **others}


CASES = {
    "roberta-prelayernorm-mlm-relative-key": Case(
        "RobertaPreLayerNormForMaskedLM",
        _relative("relative_key", hidden_act="gelu_new", num_hidden_layers=1),
    ),
    # As long as there are positions: every row of the distance table is used.
    "roberta-prelayernorm-mlm-relative-key-query": Case(
        "RobertaPreLayerNormForMaskedLM",
        _relative(
            "relative_key_query",
            hidden_act="relu",
            num_hidden_layers=3,
            type_vocab_size=1,
            max_position_embeddings=LENGTH,
        ),
        padding="left",
    ),
    "roberta-prelayernorm-mlm-untied": Case(
        "RobertaPreLayerNormForMaskedLM",
        {"tie_word_embeddings": False, "pad_token_id": 5, "intermediate_size": 60, "layer_norm_eps": 1e-5},
        padding="interior",
        token_types=True,
    ),
    "roberta-prelayernorm-clm-relative-key": Case(
        "RobertaPreLayerNormForCausalLM",
        _relative("relative_key", hidden_act="silu", pad_token_id=3, tie_word_embeddings=False),
        padding="left",
    ),
    "roberta-prelayernorm-clm-relative-key-query": Case(
        "RobertaPreLayerNormForCausalLM",
        _relative("relative_key_query", num_hidden_layers=1, vocab_size=97),
        padding="interior",
        token_types=True,
    ),
    "roberta-prelayernorm-clm-left-padded": Case(
        "RobertaPreLayerNormForCausalLM",
        {"hidden_act": "gelu_new", "num_hidden_layers": 3, "type_vocab_size": 1, "intermediate_size": 52},
        padding="left",
    ),
    "megatron-bert-mlm-relative-key": Case(
        "MegatronBertForMaskedLM",
        _relative("relative_key", hidden_act="relu", num_hidden_layers=1, layer_norm_eps=1e-5),
        padding="left",
        token_types=True,
    ),
    "megatron-bert-mlm-untied": Case(
        "MegatronBertForMaskedLM",
        {"tie_word_embeddings": False, "hidden_act": "gelu_new", "pad_token_id": 3, "intermediate_size": 60},
        padding="interior",
    ),
    "megatron-bert-pretraining-relative-key-query": Case(
        "MegatronBertForPreTraining",
        _relative(
            "relative_key_query", hidden_act="silu", num_hidden_layers=3, vocab_size=97, max_position_embeddings=LENGTH
        ),
        padding="interior",
        token_types=True,
    ),
    "megatron-bert-pretraining-untied": Case(
        "MegatronBertForPreTraining",
        {"tie_word_embeddings": False, "hidden_act": "gelu_new", "type_vocab_size": 1, "pad_token_id": 7},
    ),
    "megatron-bert-clm-relative-key": Case(
        "MegatronBertForCausalLM",
        _relative("relative_key", num_hidden_layers=1, tie_word_embeddings=False, intermediate_size=52),
        padding="left",
    ),
    "megatron-bert-clm-relative-key-query": Case(
        "MegatronBertForCausalLM",
        _relative("relative_key_query", hidden_act="relu", num_hidden_layers=3, type_vocab_size=1),
        padding="none",
        token_types=True,
    ),
}


def make_config(case: Case) -> Any:
    """The case's Hugging Face config: SMALL with the case's own changes."""
    config_class = getattr(transformers, case.model_class).config_class
    config = config_class(**{**SMALL, "is_decoder": case.model_class.endswith("CausalLM"), **case.config})
    if config.model_type == "roberta-prelayernorm" and "max_position_embeddings" not in case.config:
        # Positions are counted from the padding index on.
        config.max_position_embeddings += config.pad_token_id + 1
    return config


def make_model(case: Case, seed: int) -> PreTrainedModel:
    """The case's model in evaluation mode, with noise on every parameter so that none is zero, one or a twin."""
    model_class = getattr(transformers, case.model_class)
    torch.manual_seed(seed)
    model = model_class(make_config(case))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = MATRIX_NOISE if parameter.dim() > 1 else VECTOR_NOISE
            if "distance_embedding" in name:
                noise = DISTANCE_NOISE
            parameter.add_(noise * torch.randn(parameter.shape))
    return model.eval()


def make_attention_mask(padding: str) -> torch.Tensor:
    """[BATCH, LENGTH] of 0 and 1: a full row, then rows padded in the given place (`interior`: holes, never at 0)."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    if padding == "right":
        mask[1, 17:], mask[2, 9:] = 0, 0
    elif padding == "left":
        mask[1, :5], mask[2, :13] = 0, 0
    elif padding == "interior":
        mask[1, 6:9], mask[2, 4], mask[2, 11:16], mask[2, 21:] = 0, 0, 0, 0
    return mask


def make_inputs(case: Case, config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Ids, mask, labels and, where the case has them, token types and next-sentence labels."""

    def uniform(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    attention_mask = make_attention_mask(case.padding)
    real = attention_mask.bool()
    ids = uniform(config.vocab_size, BATCH, LENGTH)
    ids[ids == config.pad_token_id] += 1
    ids[~real] = config.pad_token_id
    if case.padding == "interior":
        ids[1, 7] = 11  # masked out by the attention mask alone: it still counts as a RoBERTa position
    if config.is_decoder:
        labels = ids.clone()
        # A label is predicted from the position before it, which must not be padding.
        predicted = real.clone()
        predicted[:, 1:] &= real[:, :-1]
    else:
        labels = uniform(config.vocab_size, BATCH, LENGTH)
        predicted = real & (torch.rand(BATCH, LENGTH, generator=generator) < MASKED_FRACTION)
        predicted[:, 0] = False
    labels[~predicted] = IGNORED

    inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    if case.token_types:
        inputs["token_type_ids"] = uniform(config.type_vocab_size, BATCH, LENGTH)
    if case.model_class.endswith("PreTraining"):
        inputs["next_sentence_label"] = torch.tensor([0, 1, 1])
    return inputs


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, loss, last hidden state, next-sentence logits where there are any, and every gradient."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs, output_hidden_states=True, return_dict=True)
    output.loss.backward()
    logits = output.prediction_logits if "prediction_logits" in output else output.logits
    tensors = {"logits": logits, "loss": output.loss, "last_hidden_state": output.hidden_states[-1]}
    if "seq_relationship_logits" in output:
        tensors["seq_relationship_logits"] = output.seq_relationship_logits
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            tensors[f"grad.{name}"] = parameter.grad
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def check_every_tensor_shows(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Leave out each parameter in turn: the outputs at real positions must change, or the case could hide its loss."""
    relative = model.config.position_embedding_type
    real = inputs["attention_mask"].bool()

    @torch.no_grad()
    def outputs() -> torch.Tensor:
        output = model(**inputs, return_dict=True)
        parts = [output[key][real] if "seq" not in key else output[key] for key in output if "logits" in key]
        return torch.cat([part.flatten() for part in parts])

    whole = outputs()
    for name, parameter in model.named_parameters():
        # Softmax does not see what is the same for all keys, and relative positions replace the absolute table.
        unseen = (name.endswith("key.bias") and relative != "relative_key_query") or (
            name.endswith(".position_embeddings.weight") and relative != "absolute"
        )
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.zero_()
            effect = (outputs() - whole).abs().max().item()
            parameter.copy_(kept)
        if (effect < SMALLEST_EFFECT) != unseen:
            raise AssertionError(
                f"without {name} the outputs move by {effect:.2e}: expected {'none' if unseen else 'more'}"
            )


def make_case(name: str, root: Path) -> None:
    """Write the case's folder, checking that the saved model gives the saved outputs."""
    case, folder, seed = CASES[name], root / name, zlib.crc32(name.encode())
    model = make_model(case, seed)
    inputs = make_inputs(case, model.config, torch.Generator().manual_seed(seed))
    check_every_tensor_shows(model, inputs)
    outputs = run(model, inputs)

    model.save_pretrained(folder, safe_serialization=True)
    again = run(type(model).from_pretrained(folder).eval(), inputs)
    for key, tensor in outputs.items():
        if not torch.equal(tensor, again[key]):
            raise AssertionError(f"{name}: the saved model gives another {key}")

    save_file(inputs, folder / "inputs.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    description = {"case": name, "model_class": case.model_class, **versions, "made_by": "make_cases.py", "seed": seed}
    (folder / "case.json").write_text(json.dumps(description, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: loss {outputs['loss'].item():.6f}, {size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the reference cases beside this file.")
    parser.add_argument("case", nargs="*", help="names of cases (default: all)")
    names = parser.parse_args().case or list(CASES)
    if transformers.__version__ != TRANSFORMERS:
        raise SystemExit(f"transformers is {transformers.__version__}; the cases are made with {TRANSFORMERS}")
    if unknown := [name for name in names if name not in CASES]:
        raise SystemExit(f"no case named {unknown[0]!r}; there are: {', '.join(CASES)}")
    torch.set_num_threads(1)
    for name in names:
        make_case(name, Path(__file__).resolve().parent)


if __name__ == "__main__":
    main()
