"""Folders of exported MRA and Nyströmformer models, loaded as a stranger would, and their attention written out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import farspan

FILES = Path(farspan.__file__).parent / "pretrain" / "export" / "encoders"
ARCHITECTURES = ("mra", "nystromformer")
HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "MultipleChoice", "QuestionAnswering")
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 14,
    "type_vocab_size": 2,
    "max_position_embeddings": 160,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.1,  # never applied
}
OWN: dict[str, dict[str, Any]] = {
    "mra": {"block_per_row": 2},
    "nystromformer": {
        "num_landmarks": 5,
        "segment_means_seq_len": 160,
        "conv_kernel_size": 5,
        "inv_coeff_init_option": True,
    },
}
# What stock configurations mean without saying it.
AS_RELEASED = {"padding_counts": True, "inv_coeff_init_option": False}
GOLDEN = [case for name in ARCHITECTURES for case in sorted((Path(__file__).parents[1] / "golden").glob(f"{name}-*"))]
ROWS = 4
BLOCK = 32


def code_files(architecture: str) -> list[str]:
    return ["modeling_encoder.py", f"configuration_{architecture}.py", f"modeling_{architecture}.py"]


def auto_map(architecture: str) -> dict[str, str]:
    name = architecture.capitalize()
    models = {f"AutoModelFor{head}": f"modeling_{architecture}.{name}For{head}" for head in HEADS}
    config = {"AutoConfig": f"configuration_{architecture}.{name}Config"}
    return config | {"AutoModel": f"modeling_{architecture}.{name}Model"} | models


def write_folder(folder: Path, architecture: str, config: dict[str, Any]) -> Path:
    """config.json and the code, no weights yet."""
    folder.mkdir(parents=True)
    config = {"model_type": f"farspan_{architecture}", **config, "auto_map": auto_map(architecture)}
    (folder / "config.json").write_text(json.dumps(config))
    for file in code_files(architecture):
        shutil.copy(FILES / file, folder)
    return folder


def golden_folder(case: Path, folder: Path, **config: Any) -> Path:
    """A reference case's weights, under `config` and what stock configurations mean."""
    architecture = case.name.split("-")[0]
    config = json.loads((case / "config.json").read_text()) | AS_RELEASED | config
    write_folder(folder, architecture, config)
    shutil.copy(case / "model.safetensors", folder)
    return folder


def load(folder: Path, head: str = "MaskedLM", **options: Any) -> Any:
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    return auto.from_pretrained(folder, trust_remote_code=True, **options)


def load_config(folder: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)


def make_model(folder: Path, architecture: str, **config: Any) -> Any:
    """A masked language model in float64 with random values that keep every term of order one, saved in `folder`."""
    write_folder(folder, architecture, {**SMALL, **OWN[architecture], **config})
    model = transformers.AutoModelForMaskedLM.from_config(load_config(folder), trust_remote_code=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 / parameter.shape[1] ** 0.5 if name.endswith(("query.weight", "key.weight")) else 0.4
            parameter.copy_(1 + 0.2 * noise if "LayerNorm.weight" in name else scale * noise)
    model.save_pretrained(folder)
    return load(folder).double().eval()


def make_mask(length: int, padding: str) -> Tensor:
    """[ROWS, length] bool: rows whole, padded a little, padded a lot, and with three tokens (none needs padding)."""
    real = torch.ones(ROWS, length, dtype=torch.bool)
    if padding == "right":
        real[1, length - 5 :], real[2, length // 3 :], real[3, 3:] = False, False, False
    elif padding == "left":
        real[1, :5], real[2, : length - length // 3], real[3, : length - 3] = False, False, False
    elif padding == "holes":
        real[1, 3:9], real[2, length // 4 : length - 6], real[3] = False, False, False
        real[3, [0, 7, length - 2]] = True
    return real


def make_inputs(length: int, padding: str = "none", seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real = make_mask(length, padding)
    ids = torch.randint(3, SMALL["vocab_size"], (ROWS, length), generator=generator)
    types = torch.randint(0, 2, (ROWS, length), generator=generator)
    return {"input_ids": ids.masked_fill(~real, 1), "attention_mask": real.long(), "token_type_ids": types}


# Attention written out: row by row and head by head, in lists of what there is.


def mra_written_out(q: Tensor, k: Tensor, v: Tensor, real: Tensor, c: Any) -> Tensor:
    """One row and head of a row as it is. q, k, v: [L, d]; real: [L] → [L, d]."""
    starts = range(0, len(q), BLOCK)
    n, scale = len(starts), q.shape[1] ** -0.5
    members = [[t for t in range(i, min(i + BLOCK, len(q))) if real[t]] for i in starts]
    q_mean, k_mean, v_mean = (torch.stack([x[m].sum(0) / (len(m) + 1e-6) for m in members]) for x in (q, k, v))
    coarse = scale * q_mean @ k_mean.T
    relative = (coarse - coarse.amax(1, keepdim=True)).tolist()
    ranked: list[tuple[float, int, int]] = []
    for i in range(n):
        for j in range(n):
            score = relative[i][j] - (0 if members[i] and members[j] else 1e4)
            if c.initial_prior_diagonal_n_blocks and abs(i - j) <= c.initial_prior_diagonal_n_blocks // 2:
                score += 5e3
            score += 5e3 * (i < c.initial_prior_first_n_blocks) + 5e3 * (j < c.initial_prior_first_n_blocks)
            ranked.append((-score, i, j))
    selected = {(i, j) for _, i, j in sorted(ranked)[: min(n * c.block_per_row, n * n)]}
    y = torch.zeros_like(v)
    for t in range(len(q)):
        if not real[t]:
            continue
        i = t // BLOCK
        keys = [u for j in range(n) if (i, j) in selected for u in members[j]]
        rest = [j for j in range(n) if (i, j) not in selected and members[j]] if c.approx_mode == "full" else []
        scores = torch.cat([scale * k[keys] @ q[t], coarse[i, rest]])
        counts = torch.tensor([1.0] * len(keys) + [float(len(members[j])) for j in rest], dtype=q.dtype)
        if len(scores):
            weights = counts * torch.exp(scores - scores.detach().max())
            y[t] = weights @ torch.cat([v[keys], v_mean[rest]]) / (weights.sum() + 1e-6)
    return y


def landmarks(x: Tensor, number: int) -> Tensor:
    return torch.stack([segment.mean(0) for segment in x.split(math.ceil(len(x) / number))])


def nystrom_start(q: Tensor, k: Tensor, number: int) -> Tensor:
    """The largest column sum of the landmarks' matrix; 0 where it is not used."""
    if len(q) <= number:
        return torch.zeros((), dtype=q.dtype)
    scores = landmarks(q, number) @ landmarks(k, number).T / q.shape[1] ** 0.5
    return scores.softmax(1).sum(0).max()


def nystrom_written_out(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, weight: Tensor | None, start: Tensor | None, c: Any
) -> Tensor:
    """One row and head, of the tokens that there are. q, k, v: [n, d]; keys: [n], those attended to → [n, d]."""
    scale, m = q.shape[1] ** -0.5, c.num_landmarks
    if m == c.segment_means_seq_len or len(q) <= m:
        y = (scale * q @ k[keys].T).softmax(1) @ v[keys]
    else:
        q_mean, k_mean = landmarks(q, m), landmarks(k, m)
        a = (scale * q_mean @ k_mean.T).softmax(1)
        z = a.T / (a.sum(0).max() if start is None else start)
        one = torch.eye(len(a), dtype=a.dtype)
        for _ in range(6):
            z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
        y = (scale * q @ k_mean.T).softmax(1) @ z @ (scale * q_mean @ k[keys].T).softmax(1) @ v[keys]
    if weight is not None:
        half = len(weight) // 2
        rows = [
            sum(weight[o + half] * v[t + o] for o in range(-half, half + 1) if 0 <= t + o < len(v))
            for t in range(len(v))
        ]
        y = y + torch.stack(rows)
    return y


def attention_written_out(attention: Any, x: Tensor, real: Tensor, c: Any) -> Tensor:
    """What `attention` of config `c` gives for x: [B, L, D], real: [B, L] → [B, L, D]."""
    q, k, v = (
        f(x).unflatten(2, (c.num_attention_heads, -1)) for f in (attention.query, attention.key, attention.value)
    )
    there = [torch.ones_like(r) if c.padding_counts else r for r in real]
    every = [(b, h) for b in range(len(x)) for h in range(c.num_attention_heads)]
    y = torch.zeros_like(v)
    if c.model_type.endswith("mra"):
        for b, h in every:
            parts = (part[b, there[b], h] for part in (q, k, v))
            y[b, there[b], h] = mra_written_out(*parts, real[b, there[b]], c)
        return y.flatten(2)
    start = None
    if not c.inv_coeff_init_option:
        start = torch.stack(
            [nystrom_start(q[b, there[b], h], k[b, there[b], h], c.num_landmarks) for b, h in every]
        ).max()
    for b, h in every:
        parts = (part[b, there[b], h] for part in (q, k, v))
        weight = None if attention.conv is None else attention.conv.weight[h, 0, :, 0]
        y[b, there[b], h] = nystrom_written_out(*parts, real[b, there[b]], weight, start, c)
    return y.flatten(2)
