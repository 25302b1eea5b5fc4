"""Checkpoints in Megatron-LM's format, of a transformers model: written from what Megatron-LM's own loading code says,
with an index for every row, so that it shares nothing with the reader."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MegatronBertConfig, MegatronBertForPreTraining

State = dict[str, Tensor]


def model(*, seed: int = 0, **config: Any) -> MegatronBertForPreTraining:
    """A small model in evaluation mode, no tensor of which is zero, one or a twin of another."""
    fields: dict[str, Any] = {
        "vocab_size": 43, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32,
        "max_position_embeddings": 20, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
    }  # fmt: skip
    made = MegatronBertForPreTraining(MegatronBertConfig(**(fields | config))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            shift = name.endswith(("ln.weight", "LayerNorm.weight"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + shift)
    return made


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint is written.

    ``names``: of 2020 (``transformer``, ``attention``), of 2021 (``encoder``, ``self_attention``), of 2023 (``norm``)
    or of megatron-core with (``fused``) or without Transformer Engine.  ``chunks``: of every pipeline stage.
    ``padded``: rows of the word embedding.
    """

    version: float = 3.0
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    names: str = "2021"
    padded: int = 48
    args: bool = True
    old_file: bool = False


def qkv_rows(version: float, rank: int, tensor: int, heads: int, width: int) -> list[int]:
    """For every row of one rank's query_key_value, which row of [query; key; value] over all heads it is."""
    own = range(rank * heads // tensor, (rank + 1) * heads // tensor)
    if version == 0:
        order = [(part, head, i) for part in range(3) for head in own for i in range(width)]
    elif version == 1:
        order = [(part, head, i) for head in own for i in range(width) for part in range(3)]
    else:
        order = [(part, head, i) for head in own for part in range(3) for i in range(width)]
    return [part * heads * width + head * width + i for part, head, i in order]


def shares(value: Tensor, tensor: int, rank: int, dim: int) -> Tensor:
    return value.chunk(tensor, dim)[rank].clone()


def parts(source: MegatronBertForPreTraining, layout: Layout) -> dict[tuple[int, int], dict[str, Any]]:
    """{(tensor rank, pipeline stage): what its file holds}"""
    state, config, c = source.state_dict(), source.config, layout
    old, core = c.names == "2020", c.names in ("core", "fused")
    norm = "norm" if c.names == "2023" else "layernorm"
    padding = c.padded - config.vocab_size
    generator = torch.Generator().manual_seed(99)
    pad_rows = torch.randn(padding, config.hidden_size, generator=generator)
    words, bias = state["bert.embeddings.word_embeddings.weight"], state["cls.predictions.bias"]
    bias = torch.cat((bias, torch.randn(padding, generator=generator).to(bias.dtype)))
    words = torch.cat((words, pad_rows.to(words.dtype)))
    per_chunk = config.num_hidden_layers // c.pipeline // c.chunks

    def layer(rank: int, index: int, within: int) -> State:
        at = f"bert.encoder.layer.{index}"
        rows = qkv_rows(
            c.version, rank, c.tensor, config.num_attention_heads, config.hidden_size // config.num_attention_heads
        )
        result: State = {}
        for kind in ("weight", "bias"):
            qkv = torch.cat([state[f"{at}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")])[rows]
            first, second = state[f"{at}.attention.ln.{kind}"], state[f"{at}.ln.{kind}"]
            output, down = state[f"{at}.attention.output.dense.{kind}"], state[f"{at}.output.dense.{kind}"]
            if kind == "weight":
                output, down = shares(output, c.tensor, rank, 1), shares(down, c.tensor, rank, 1)
            up = shares(state[f"{at}.intermediate.dense.{kind}"], c.tensor, rank, 0)
            if c.names == "fused":
                names = ["self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.",
                         "self_attention.linear_proj.", "mlp.linear_fc1.layer_norm_", "mlp.linear_fc1.",
                         "mlp.linear_fc2."]  # fmt: skip
            elif core:
                names = ["input_layernorm.", "self_attention.linear_qkv.", "self_attention.linear_proj.",
                         "pre_mlp_layernorm.", "mlp.linear_fc1.", "mlp.linear_fc2."]  # fmt: skip
            else:
                attention = "attention" if old else "self_attention"
                names = [f"input_{norm}.", f"{attention}.query_key_value.", f"{attention}.dense.",
                         f"post_attention_{norm}.", "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h."]  # fmt: skip
            for name, value in zip(names, (first, qkv, output, second, up, down), strict=True):
                result[f"layers.{within}.{name}{kind}"] = value.clone()
        return result

    def chunk(rank: int, stage: int, number: int) -> dict[str, Any]:
        first = stage == 0 and number == 0
        last = stage == c.pipeline - 1 and number == c.chunks - 1
        start = (number * c.pipeline + stage) * per_chunk
        encoder: State = OrderedDict()
        for within in range(per_chunk):
            encoder |= layer(rank, start + within, within)
        if last:
            for kind in ("weight", "bias"):
                encoder[f"final_{norm}.{kind}"] = state[f"bert.encoder.ln.{kind}"]
        tables = {
            f"{theirs}_embeddings": {"weight": state[f"bert.embeddings.{ours}_embeddings.weight"]}
            for theirs, ours in (("position", "position"), ("tokentype", "token_type"))
        }
        tables["word_embeddings"] = {"weight": shares(words, c.tensor, rank, 0)}
        pooler = {f"dense.{kind}": state[f"bert.pooler.dense.{kind}"] for kind in ("weight", "bias")}
        binary = {kind: state[f"cls.seq_relationship.{kind}"] for kind in ("weight", "bias")}
        head = {f"dense.{kind}": state[f"cls.predictions.transform.dense.{kind}"] for kind in ("weight", "bias")}
        of_head = "layer_norm" if core else norm
        head |= {f"{of_head}.{k}": state[f"cls.predictions.transform.LayerNorm.{k}"] for k in ("weight", "bias")}
        own_bias = shares(bias, c.tensor, rank, 0)
        if core:
            nested: dict[str, Any] = {"encoder": encoder} | ({"embedding": tables} if first else {})
            if last:
                output = {"bias": own_bias} | ({} if first else {"weight": shares(words, c.tensor, rank, 0)})
                nested |= {"pooler": pooler, "lm_head": head, "binary_head": binary, "output_layer": output}
            flat = OrderedDict((key, value) for key, value in flattened(nested, ""))
            flat["encoder.layers.0.self_attention.linear_qkv._extra_state"] = None
            return flat
        language_model: dict[str, Any] = {"transformer" if old else "encoder": encoder}
        language_model |= {"embedding": tables} if first else {}
        language_model |= {"pooler": pooler} if last else {}
        result: dict[str, Any] = {"language_model": language_model}
        if last:
            result |= {"lm_head": head | {"bias": own_bias}, "binary_head": binary}
            result |= {} if first else {"word_embeddings_for_head": {"weight": shares(words, c.tensor, rank, 0)}}
        return result

    return {
        (rank, stage): contents(source, layout, [chunk(rank, stage, number) for number in range(c.chunks)])
        for rank in range(c.tensor)
        for stage in range(c.pipeline)
    }


def flattened(tree: dict[str, Any], prefix: str) -> list[tuple[str, Tensor]]:
    found = []
    for key, value in tree.items():
        found += flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def contents(source: MegatronBertForPreTraining, layout: Layout, chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """What stands beside the model in a file."""
    config = source.config
    state: dict[str, Any] = {"iteration": 7}
    if layout.args:
        sizes = ("tensor_model_parallel_size" if layout.version >= 2 else "model_parallel_size", layout.tensor)
        fields = dict([sizes], pipeline_model_parallel_size=layout.pipeline)
        state["args"] = argparse.Namespace(
            **fields, num_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads, ffn_hidden_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings, padded_vocab_size=layout.padded,
            layernorm_epsilon=config.layer_norm_eps, openai_gelu=config.hidden_act == "gelu_new",
            bias_gelu_fusion=False, hidden_dropout=0.2, attention_dropout=0.05, init_method_std=0.01,
            params_dtype=torch.float32, data_path=["text"],
        )  # fmt: skip
    if layout.version:
        state["checkpoint_version"] = layout.version
    for number, chunk in enumerate(chunks):
        state[f"model{number}" if layout.chunks > 1 else "model"] = chunk
    state["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}}
    state["random_rng_state"], state["np_rng_state"] = random.getstate(), np.random.get_state()
    state["rng_tracker_states"] = {"model-parallel-rng": torch.get_rng_state()}
    return state


def write(folder: Path, source: MegatronBertForPreTraining, layout: Layout = Layout()) -> Path:
    """A folder with a tracker file; returns the folder of the iteration in it."""
    iteration = folder / "iter_0000007"
    for (rank, stage), state in parts(source, layout).items():
        name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if layout.pipeline > 1 else "")
        save(iteration / name / "model_optim_rng.pt", state, old_file=layout.old_file)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return iteration


def save(path: Path, state: Any, *, old_file: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path, _use_new_zipfile_serialization=not old_file)
