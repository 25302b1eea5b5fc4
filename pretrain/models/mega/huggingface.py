"""MEGA's tensors under the names of transformers 4.37."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig
from ..huggingface_keys import HuggingFaceKeys, Source, layer_keys
from .config import MegaConfig


def _head_name(config: ModelConfig) -> str:
    return "lm_head" if config.is_decoder else "mlm_head"


def mega_keys(config: MegaConfig, heads: tuple[str, ...]) -> HuggingFaceKeys:
    prefix = "mega." if heads else ""
    keys: HuggingFaceKeys = {"embeddings.words.weight": (f"{prefix}embedding_layer.word_embeddings.weight",)}
    if config.add_token_type_embeddings:
        keys["embeddings.types.weight"] = (f"{prefix}embedding_layer.token_type_embeddings.weight",)
    for i in range(config.num_hidden_layers):
        keys |= _layer_keys(config, f"layers.{i}", f"{prefix}layers.{i}")
    if "lm" in heads:
        head = _head_name(config)
        if config.add_lm_hidden_dense_layer:
            keys |= layer_keys("lm_head.dense", "dense")
        keys["lm_head.decoder.bias"] = (f"{head}.bias",)
        if not config.tie_word_embeddings:
            keys["lm_head.decoder.weight"] = (f"{head}.weight",)
    return keys


def mega_aliases(config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
    if "lm" not in heads or not config.tie_word_embeddings:
        return {}
    return {f"{_head_name(config)}.weight": "mega.embedding_layer.word_embeddings.weight"}


def mega_constants(config: MegaConfig, heads: tuple[str, ...]) -> dict[str, Tensor]:
    """The released rotary bias registers a zero, to know its type by."""
    if config.relative_positional_bias != "rotary":
        return {}
    prefix = "mega." if heads else ""
    parts = ("mega_layer", "cross_attn") if config.add_cross_attention else ("mega_layer",)
    return {
        f"{prefix}layers.{i}.{part}.rel_pos_bias._float_tensor": torch.zeros(1)
        for i in range(config.num_hidden_layers)
        for part in parts
    }


def _layer_keys(config: MegaConfig, ours: str, theirs: str) -> HuggingFaceKeys:
    h, z, v = config.hidden_size, config.shared_representation_size, config.intermediate_size
    attention, public = f"{ours}.attention", f"{theirs}.mega_layer"
    keys = _norm_keys(config, f"{attention}.norm", f"{public}.norm.norm")
    directions, n = (2 if config.bidirectional else 1), config.ema_projection_size
    shape = (directions * h, n)
    stored = {"damping": "damping_factor", "decay": "decay_factor", "expansion": "ema_expansion_matrix"}
    for name, tensor in stored.items():
        keys[f"{attention}.ema.{name}.weight"] = (Source(f"{public}.ema_gate.{tensor}", shape=(*shape, 1)),)
    keys[f"{attention}.ema.projection.weight"] = (Source(f"{public}.ema_gate.kernel_projection_matrix", shape=shape),)
    keys[f"{attention}.ema.residual.weight"] = (f"{public}.ema_gate.residual_weight",)
    keys |= layer_keys(f"{attention}.values", f"{public}.v_proj") | layer_keys(
        f"{attention}.output", f"{public}.h_proj"
    )
    parts = {"residual_gate": h, "shared": z, "attention_gate": v, "candidate": h}
    keys |= _stacked_keys(attention, parts, f"{public}.mx_proj")
    keys[f"{attention}.query_key_scale.weight"] = (f"{public}.qk_weight",)
    keys[f"{attention}.query_key_offset.weight"] = (f"{public}.qk_bias",)
    keys |= _bias_keys(config, f"{attention}.bias", f"{public}.rel_pos_bias")
    if config.add_cross_attention:
        cross, public = f"{ours}.cross_attention", f"{theirs}.cross_attn"
        keys |= _norm_keys(config, f"{cross}.norm", f"{public}.norm.norm")
        keys |= _stacked_keys(cross, {"residual_gate": h, "attention_gate": h, "query": z}, f"{public}.q_proj")
        for name, tensor in {"key": "k_proj", "values": "v_proj", "output": "h_proj"}.items():
            keys |= layer_keys(f"{cross}.{name}", f"{public}.{tensor}")
        keys |= _bias_keys(config, f"{cross}.bias", f"{public}.rel_pos_bias")
    if config.use_normalized_ffn:
        keys |= _norm_keys(config, f"{ours}.feed_forward.norm", f"{theirs}.nffn.norm.norm")
        keys |= layer_keys(f"{ours}.feed_forward.feed_forward.up", f"{theirs}.nffn.fc1")
        keys |= layer_keys(f"{ours}.feed_forward.feed_forward.down", f"{theirs}.nffn.fc2")
    return keys


def _stacked_keys(ours: str, parts: dict[str, int], theirs: str) -> HuggingFaceKeys:
    """Several layers that are the rows of one public layer; ``parts``: their names and output features, in order."""
    keys: HuggingFaceKeys = {}
    first = 0
    for name, rows in parts.items():
        for kind in ("weight", "bias"):
            keys[f"{ours}.{name}.{kind}"] = (Source(f"{theirs}.{kind}", rows=(first, first + rows)),)
        first += rows
    return keys


def _norm_keys(config: MegaConfig, ours: str, theirs: str) -> HuggingFaceKeys:
    kind = config.normalization_type
    if kind == "scalenorm":
        return {f"{ours}.weight": (f"{theirs}.scalar",)} if config.norm_affine else {}
    keys: HuggingFaceKeys = {}
    if config.norm_affine:
        keys[f"{ours}.weight"] = (f"{theirs}.weight",)
        if kind != "rmsnorm":
            keys[f"{ours}.bias"] = (f"{theirs}.bias",)
    if config.has_running_statistics:
        keys |= {f"{ours}.{n}": (f"{theirs}.{n}",) for n in ("running_mean", "running_var", "num_batches_tracked")}
    return keys


def _bias_keys(config: MegaConfig, ours: str, theirs: str) -> HuggingFaceKeys:
    if config.relative_positional_bias == "simple":
        return {f"{ours}.table.weight": (f"{theirs}.rel_pos_bias",)}
    shape = (1, config.shared_representation_size)
    return {
        f"{ours}.alpha.weight": (Source(f"{theirs}.alpha", shape=shape),),
        f"{ours}.beta.weight": (Source(f"{theirs}.b_param", shape=shape),),
    }
