"""Folders of exported MEGA models, loaded as a stranger would, and the model written out to compare them with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import farspan

FILES = Path(farspan.__file__).parent / "pretrain" / "export" / "mega"
HEADS = ("MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification", "MultipleChoice", "QuestionAnswering")
AUTO_MAP = {"AutoConfig": "configuration_mega.MegaConfig", "AutoModel": "modeling_mega.MegaModel"} | {
    f"AutoModelFor{head}": f"modeling_mega.MegaFor{head}" for head in HEADS
}
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "intermediate_size": 10,
    "shared_representation_size": 6,
    "nffn_hidden_size": 14,
    "ema_projection_size": 3,
    "max_positions": 64,
    "dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "nffn_activation_dropout_prob": 0.0,
}
DECODER = {"is_decoder": True, "bidirectional": False}
CHUNKS = {"use_chunking": True, "chunk_size": 8}
ROWS = 3
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """config.json and the code, no weights yet."""
    folder.mkdir(parents=True)
    config = {"model_type": "mega", **SMALL, **config, "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    for file in FILES.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def load(folder: Path, head: str = "", **options: Any) -> Any:
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto.from_pretrained(folder, trust_remote_code=True, **options)


def make_model(folder: Path, head: str, **config: Any) -> Any:
    """A model in float64 with random values that keep every term of order one, its folder complete with weights."""
    write_folder(folder, {**(DECODER if head == "CausalLM" else {}), **config})
    auto = getattr(transformers, f"AutoModelFor{head}")
    model = auto.from_config(auto_config(folder), trust_remote_code=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or name.endswith("_float_tensor"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            scale = 1.2 / tensor.shape[-1] ** 0.5 if tensor.dim() == 2 and "qk_" not in name else 0.5
            positive = name.endswith(("norm.weight", "scalar", "running_var"))
            tensor.copy_((1 + 0.2 * noise).clamp(min=0.3) if positive else scale * noise)
        for name, tensor in model.state_dict().items():
            if name.endswith(("kernel_projection_matrix", "ema_expansion_matrix", "qk_weight")):
                tensor.mul_(2.0)
    model.save_pretrained(folder)
    return load(folder, head).double().eval()


def auto_config(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)


def make_inputs(length: int, padding: str = "none", seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(ROWS, length, dtype=torch.long)
    if padding == "right":
        mask[1, length - 5 :] = 0
        mask[2, 7:] = 0
    elif padding == "left":
        mask[1, :5] = 0
        mask[2, : length - 7] = 0
    elif padding == "holes":
        mask[1, 6:19] = 0  # the second of the chunks of 8 is padding throughout
        mask[2, [0, 8, 9, 20]] = 0
    ids = torch.randint(3, SMALL["vocab_size"], (ROWS, length), generator=generator)
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


# The model written out: sums over all pairs of positions, powers by repeated products, float64.


def norm(w: dict[str, Tensor], at: str, c: Any, x: Tensor) -> Tensor:
    kind, weight, bias = c.normalization_type, w.get(f"{at}.norm.weight"), w.get(f"{at}.norm.bias")
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    elif kind in ("scalenorm", "rmsnorm"):
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        weight = w.get(f"{at}.norm.scalar", weight)
    else:
        x = (x - w[f"{at}.norm.running_mean"]) / (w[f"{at}.norm.running_var"] + 1e-5).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def linear(w: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]


def ema(w: dict[str, Tensor], at: str, c: Any, x: Tensor, real: Tensor) -> Tensor:
    length = x.shape[1]
    damping, decay = torch.sigmoid(w[f"{at}.damping_factor"][..., 0]), torch.sigmoid(w[f"{at}.decay_factor"][..., 0])
    factors = w[f"{at}.ema_expansion_matrix"][..., 0] * damping * w[f"{at}.kernel_projection_matrix"]
    power, kernel = torch.ones_like(decay), []
    for _ in range(length):
        kernel.append((factors * power).sum(-1) / c.ema_projection_size**0.5)
        power = power * (1 - damping * decay)
    taps = torch.stack(kernel)  # [lag, features]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    reach = c.truncation or length
    seen = x * real[..., None]
    forwards = taps[lag.clamp(min=0), : c.hidden_size] * ((lag >= 0) & (lag < reach))[..., None]
    y = torch.einsum("tsd,bsd->btd", forwards, seen)
    if c.bidirectional:
        backwards = taps[(-lag).clamp(min=0), c.hidden_size :] * ((lag <= 0) & (lag > -reach))[..., None]
        y = y + torch.einsum("tsd,bsd->btd", backwards, seen)
    return F.silu(y + x * w[f"{at}.residual_weight"])


def relative(w: dict[str, Tensor], at: str, c: Any, queries: int, keys: int) -> Tensor:
    if c.relative_positional_bias == "simple":
        centre = (c.chunk_size if c.chunk_size > 0 else c.max_positions) - 1
        offset = torch.arange(keys) - torch.arange(queries)[:, None]
        table = w[f"{at}.rel_pos_bias"]
        return table[(centre + offset).clamp(0, len(table) - 1)]

    def turned(vector: Tensor, positions: int) -> Tensor:
        half = vector.shape[-1] // 2
        angles = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        pairs = torch.complex(vector[..., :half], vector[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    return turned(w[f"{at}.alpha"], queries) @ turned(w[f"{at}.b_param"], keys).T


def weigh(c: Any, scores: Tensor, bias: Tensor, visible: Tensor, lengths: Tensor) -> Tensor:
    if c.attention_activation == "softmax":
        powers = torch.exp(scores * c.shared_representation_size**-0.5 + bias) * visible
        return powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)
    scores = scores / lengths + bias
    if c.attention_activation == "relu2":
        return scores.clamp(min=0) ** 2 * visible
    return torch.special.ndtr((scores - 0.707107) / 0.282095) * visible


def written_out(w: dict[str, Tensor], c: Any, inputs: dict[str, Tensor], head: str) -> Tensor:
    """Logits of a language model with tensors `w` and config `c`."""
    act = transformers.activations.ACT2FN[c.activation]
    x = w["mega.embedding_layer.word_embeddings.weight"][inputs["input_ids"]]
    if c.add_token_type_embeddings:
        x = x + w["mega.embedding_layer.token_type_embeddings.weight"][inputs["token_type_ids"]]
    real = inputs["attention_mask"].bool()
    length, d, z = x.shape[1], c.hidden_size, c.shared_representation_size
    at = torch.arange(length)
    size = c.chunk_size if c.use_chunking else length
    together = at[:, None] // size == at // size
    visible = together & real[:, None]
    lengths = (together & real[:, None]).sum(-1, keepdim=True).clamp(min=1)
    if c.is_decoder:
        visible, lengths = visible & (at <= at[:, None]), (at % size + 1)[:, None]
    for layer in range(c.num_hidden_layers):
        name = f"mega.layers.{layer}.mega_layer"
        y = norm(w, f"{name}.norm", c, x) if c.normalize_before_mega else x
        mixed = linear(w, f"{name}.mx_proj", ema(w, f"{name}.ema_gate", c, y, real))
        update, shared, gate, candidate = mixed.split([d, z, c.intermediate_size, d], -1)
        shared = F.silu(shared)
        q, k = (shared * w[f"{name}.qk_weight"][i] + w[f"{name}.qk_bias"][i] for i in range(2))
        bias = relative(w, f"{name}.rel_pos_bias", c, length, length)
        weights = weigh(c, q @ k.mT, bias, visible, lengths)
        attended = weights @ act(linear(w, f"{name}.v_proj", y))
        y = act(candidate + linear(w, f"{name}.h_proj", attended * F.silu(gate)))
        x = x + torch.sigmoid(update) * (y - x)
        x = x if c.normalize_before_mega else norm(w, f"{name}.norm", c, x)
        if c.add_cross_attention:
            name = f"mega.layers.{layer}.cross_attn"
            source, source_real = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"][:, None]
            y = norm(w, f"{name}.norm", c, x) if c.normalize_before_mega else x
            update, gate, q = linear(w, f"{name}.q_proj", y).split([d, d, z], -1)
            bias = relative(w, f"{name}.rel_pos_bias", c, length, source.shape[1])
            scores = q @ linear(w, f"{name}.k_proj", source).mT
            weights = weigh(c, scores, bias, source_real, source_real.sum(-1, keepdim=True).clamp(min=1))
            attended = weights @ act(linear(w, f"{name}.v_proj", source))
            y = act(linear(w, f"{name}.h_proj", attended * F.silu(gate)))
            x = x + torch.sigmoid(update) * (y - x)
            x = x if c.normalize_before_mega else norm(w, f"{name}.norm", c, x)
        if c.use_normalized_ffn:
            name = f"mega.layers.{layer}.nffn"
            y = norm(w, f"{name}.norm", c, x) if c.normalize_before_ffn else x
            x = x + linear(w, f"{name}.fc2", act(linear(w, f"{name}.fc1", y)))
            x = x if c.normalize_before_ffn else norm(w, f"{name}.norm", c, x)
    if c.add_lm_hidden_dense_layer:
        x = torch.tanh(linear(w, "dense", x))
    head = {"MaskedLM": "mlm_head", "CausalLM": "lm_head"}[head]
    words = "mega.embedding_layer.word_embeddings" if c.tie_word_embeddings else head
    return x @ w[f"{words}.weight"].T + w[f"{head}.bias"]


# What the public classes get wrong or refuse is here; where they are right, the golden cases are.
CASES: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "last chunk shorter, a chunk of padding": (
        "MaskedLM",
        37,
        "holes",
        {**CHUNKS, "normalization_type": "rmsnorm", "truncation": 11, "add_token_type_embeddings": True},
    ),
    "post-norm, simple, relu2, left": (
        "MaskedLM",
        30,
        "left",
        {**CHUNKS, "normalization_type": "layernorm", "relative_positional_bias": "simple", "truncation": 1}
        | {"attention_activation": "relu2", "normalize_before_mega": False, "normalize_before_ffn": False},
    ),
    "three tiles, one direction": (
        "MaskedLM",
        150,
        "right",
        {"bidirectional": False, "attention_activation": "laplace", "normalization_type": "batchnorm"}
        | {"tie_word_embeddings": False, "use_normalized_ffn": False},
    ),
    "three tiles, truncated": (
        "CausalLM",
        150,
        "holes",
        {**CHUNKS, "truncation": 70, "attention_activation": "laplace", "add_lm_hidden_dense_layer": False},
    ),
    "three tiles, whole rows": ("CausalLM", 150, "right", {"num_hidden_layers": 1}),
    "causal softmax, left": (
        "CausalLM",
        29,
        "left",
        {**CHUNKS, "normalization_type": "rmsnorm", "activation": "gelu", "truncation": 5},
    ),
    "cross-attention, whole rows": (
        "CausalLM",
        21,
        "left",
        {"add_cross_attention": True, "relative_positional_bias": "simple", "attention_activation": "relu2"},
    ),
    "cross-attention, chunks, post-norm": (
        "CausalLM",
        21,
        "holes",
        {**CHUNKS, "add_cross_attention": True, "normalize_before_mega": False, "normalization_type": "syncbatchnorm"},
    ),
}


def make_case(name: str, folder: Path) -> tuple[Any, dict[str, Tensor], str]:
    head, length, padding, config = CASES[name]
    model = make_model(folder, head, **config)
    inputs = make_inputs(length, padding)
    if model.config.add_token_type_embeddings:
        inputs["token_type_ids"] = (torch.arange(length) // 5 % 2).expand(ROWS, length)
    if model.config.add_cross_attention:
        inputs["encoder_hidden_states"] = torch.randn(ROWS, 33, SMALL["hidden_size"], dtype=torch.float64)
        inputs["encoder_attention_mask"] = make_inputs(33, "right")["attention_mask"]
        inputs["encoder_attention_mask"][0] = 0  # a row whose encoder says nothing
    return model, inputs, head
