"""The calls that `farspan bench kernels` measures: inputs, the public function, what it must move and compute at least,
and what is asked of it on a GPU.

Sizes and targets on a GPU are those of one NVIDIA H200 (bandwidth 4.3 TB/s, 790 TFLOP/s in bfloat16, as measured).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.activation import bias_gelu
from ...kernels.attention import attention
from ...kernels.documents import Documents
from ...kernels.dropout import DropoutKey, dropout
from ...kernels.ema import ema
from ...kernels.layer_norm import dropout_add_layer_norm, layer_norm
from ...kernels.lm_head import lm_head_loss
from ...kernels.mra import BLOCK, block_budget, mra_attention
from ...kernels.pinv import column_maximum, iterative_pinv
from ..approximation.synthetic import synthetic_qkv

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], tuple[Tensor, ...]]
EPS, DROPOUT = 1e-5, 0.1
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
TORCH = "torch"  # the peer that is torch's own operation


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs of one call, which of them want gradients, and the gradients of the outputs."""

    inputs: Tensors
    learnt: tuple[str, ...]
    upstream: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Problem:
        """In another precision, what is not a number left as it is."""
        return Problem(
            {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs.items()},
            self.learnt,
            tuple(x.to(dtype) for x in self.upstream),
        )

    def leaves(self) -> Tensors:
        """The inputs, those that learn with their own record of gradients."""
        return {name: x.detach().requires_grad_(name in self.learnt) for name, x in self.inputs.items()}

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.inputs.values(), *self.upstream))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a pass cannot do without: every input read and every result written once, and its products."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, ceilings: dict[str, float]) -> float:
        """The least that the device could take, at the rates that it was measured to reach."""
        return max(self.bytes / ceilings["copy"], self.flops / ceilings["matmul"])


@dataclasses.dataclass(frozen=True)
class Goal:
    """At most so many seconds, bytes or launches of a ``quantity`` (a pass, or a key of what is measured beside)."""

    quantity: str
    most: float


@dataclasses.dataclass(frozen=True)
class Against:
    """At least so many times as fast as a peer in a pass."""

    peer: str
    quantity: str
    least: float


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a public function at one size.

    ``operation``: its name in ``kernels.forms``.  ``make(seed, device)``: fresh inputs.  ``own``: torch's operation (or
    the shortest way through torch's operations) for the same, where there is one; ``own_is_same``: with the same
    result.  ``error``: the largest relative error that is allowed.
    """

    operation: str
    title: str
    shape: str
    dtype: torch.dtype
    make: Callable[[int, torch.device], Problem]
    call: Function
    forward: Work
    backward: Work
    error: float
    own: Function | None = None
    own_name: str = TORCH
    own_is_same: bool = True
    goals: tuple[Goal, ...] = ()
    against: tuple[Against, ...] = ()
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)  # what peers need to know
    smaller: Case | None = None  # to compare with float64 where this one does not fit in memory

    @property
    def name(self) -> str:
        return f"{self.title} {self.shape}"

    def work(self, quantity: str) -> Work | None:
        return {FORWARD: self.forward, BACKWARD: self.backward, BOTH: self.forward + self.backward}.get(quantity)


# Inputs.


def numbers_of(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def hidden(numbers: torch.Generator, *shape: int) -> Tensor:
    """Like hidden states: neighbours along the first dimension alike, some features far from zero."""
    noise = torch.randn(shape, generator=numbers, device=numbers.device)
    features = torch.randn(shape[-1], generator=numbers, device=numbers.device)
    return (noise + noise.roll(1, 0) + noise.roll(2, 0)) / math.sqrt(3) + 0.5 * features


def _weights(numbers: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, size, generator=numbers, device=numbers.device) * 0.1
    return weight + 1, bias


def _keys(seed: int, rows: int, device: torch.device) -> Tensor:
    key = DropoutKey(seed, 1, torch.zeros(1, dtype=torch.int64, device=device))
    return key.rows(3, torch.arange(rows, device=device))


# Cases.


def dropout_add_layer_norm_case(rows: int, features: int, dtype: torch.dtype, **asked: Any) -> Case:
    def make(seed: int, device: torch.device) -> Problem:
        numbers = numbers_of(seed, device)
        x, residual, *upstream = (hidden(numbers, rows, features).to(dtype) for _ in range(4))
        weight, bias = (w.to(dtype) for w in _weights(numbers, features))
        inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias, "keys": _keys(seed, rows, device)}
        return Problem(inputs, ("x", "residual", "weight", "bias"), tuple(upstream))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return dropout_add_layer_norm(t["x"], t["residual"], t["weight"], t["bias"], EPS, DROPOUT, t["keys"])

    def own(t: Tensors) -> tuple[Tensor, ...]:
        total = t["residual"] + F.dropout(t["x"], DROPOUT)
        return total, F.layer_norm(total, (features,), t["weight"], t["bias"], EPS)

    size = rows * features * dtype.itemsize
    return Case(
        "layer_norm", "dropout + add + LayerNorm", f"[{rows}, {features}]", dtype, make, call,
        Work(4 * size + 8 * rows), Work(5 * size + 8 * rows), _allowed(dtype), own, own_is_same=False,
        sizes={"features": features}, **asked,
    )  # fmt: skip


def layer_norm_case(rows: int, features: int, dtype: torch.dtype, **asked: Any) -> Case:
    def make(seed: int, device: torch.device) -> Problem:
        numbers = numbers_of(seed, device)
        x, upstream = (hidden(numbers, rows, features).to(dtype) for _ in range(2))
        weight, bias = (w.to(dtype) for w in _weights(numbers, features))
        return Problem({"x": x, "weight": weight, "bias": bias}, ("x", "weight", "bias"), (upstream,))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (layer_norm(t["x"], t["weight"], t["bias"], EPS),)

    def own(t: Tensors) -> tuple[Tensor, ...]:
        return (F.layer_norm(t["x"], (features,), t["weight"], t["bias"], EPS),)

    size = rows * features * dtype.itemsize
    return Case(
        "layer_norm", "LayerNorm", f"[{rows}, {features}]", dtype, make, call, Work(2 * size), Work(3 * size),
        _allowed(dtype), own, sizes={"features": features}, **asked,
    )  # fmt: skip


def dropout_case(rows: int, features: int, dtype: torch.dtype, **asked: Any) -> Case:
    def make(seed: int, device: torch.device) -> Problem:
        x, upstream = (hidden(numbers_of(seed + i, device), rows, features).to(dtype) for i in range(2))
        return Problem({"x": x, "keys": _keys(seed, rows, device)}, ("x",), (upstream,))

    size = rows * features * dtype.itemsize
    work = Work(2 * size + 8 * rows)
    return Case(
        "dropout", "dropout", f"[{rows}, {features}]", dtype, make,
        lambda t: (dropout(t["x"], DROPOUT, t["keys"]),), work, work, _allowed(dtype),
        lambda t: (F.dropout(t["x"], DROPOUT),), own_is_same=False, **asked,
    )  # fmt: skip


def ema_case(batch: int, length: int, features: int, dimensions: int, dtype: torch.dtype, **asked: Any) -> Case:
    """In both directions, parameters as a MEGA layer begins with them (a deviation of 0.2, ±1, 1)."""

    def make(seed: int, device: torch.device) -> Problem:
        numbers = numbers_of(seed, device)
        shape = (2, features, dimensions)
        damping, decay, expansion, projection = torch.randn(4, *shape, generator=numbers, device=device)
        signs = 1.0 - 2.0 * (torch.arange(dimensions, device=device) % 2)
        parameters = {
            "damping": 0.2 * damping, "decay": 0.2 * decay, "expansion": signs + 0.02 * expansion,
            "projection": projection,
        }  # fmt: skip
        x, upstream = (hidden(numbers, length, batch, features).to(dtype) for _ in range(2))
        inputs = {"x": x} | {name: value.to(dtype) for name, value in parameters.items()}
        return Problem(inputs, tuple(inputs), (upstream,))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (ema(t["x"], t["damping"], t["decay"], t["expansion"], t["projection"])[0],)

    size = batch * length * features * dtype.itemsize
    return Case(
        "ema", "bidirectional EMA", f"B{batch} L{length} D{features} N{dimensions}", dtype, make, call,
        Work(2 * size), Work(3 * size), max(_allowed(dtype), 1e-5), convolution_by_fft, own_name="torch, by FFT",
        sizes={"features": features, "dimensions": dimensions, "length": length}, **asked,
    )  # fmt: skip


def ema_kernel(t: Tensors, length: int) -> Tensor:
    """[2, features, length] float32: what each direction weighs every lag with (kernels/ema, the docstring)."""
    damping, decay, expansion, projection = (
        t[name].float() for name in ("damping", "decay", "expansion", "projection")
    )
    p = torch.sigmoid(damping)
    logarithm = torch.log1p(-torch.sigmoid(decay) * p)
    powers = torch.exp(logarithm.unsqueeze(-1) * torch.arange(length, device=damping.device))
    weights = projection * p * expansion / math.sqrt(damping.shape[-1])
    return torch.einsum("kdn,kdnl->kdl", weights, powers)


def convolution_by_fft(t: Tensors) -> tuple[Tensor, ...]:
    x = t["x"]
    length = len(x)
    forwards, backwards = ema_kernel(t, length)
    # Lag −l stands at 2 · length − l; lag 0 counts in both directions.
    circular = F.pad(forwards, (0, length)) + F.pad(backwards.flip(-1), (length, 0)).roll(1, -1)
    spectrum = torch.fft.rfft(x.float().permute(1, 2, 0), n=2 * length) * torch.fft.rfft(circular)
    return (torch.fft.irfft(spectrum, n=2 * length)[..., :length].permute(2, 0, 1).to(x.dtype),)


def mra_case(batch: int, heads: int, length: int, size: int, blocks: int, dtype: torch.dtype, **asked: Any) -> Case:
    budget = block_budget(length, blocks)

    def make(seed: int, device: torch.device) -> Problem:
        q, k, v = (x.to(device, dtype) for x in synthetic_qkv(batch, heads, length, size, seed))
        upstream = hidden(numbers_of(seed, device), batch, heads, length, size).to(dtype)
        return Problem({"q": q, "k": k, "v": v}, ("q", "k", "v"), (upstream,))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (mra_attention(t["q"], t["k"], t["v"], budget=budget),)

    tensor = batch * heads * length * size * dtype.itemsize
    products = batch * heads * size * 2.0 * (budget * BLOCK**2 + (length / BLOCK) ** 2)
    return Case(
        "mra", "MRA-2", f"B{batch} H{heads} L{length} d{size}, {blocks} blocks a row", dtype, make, call,
        Work(4 * tensor, 2 * products), Work(8 * tensor, 5 * products), max(2 * _allowed(dtype), 1e-4),
        lambda t: (F.scaled_dot_product_attention(t["q"], t["k"], t["v"]),), own_name="torch, dense attention",
        own_is_same=False, sizes={"budget": budget}, **asked,
    )  # fmt: skip


def lm_head_case(predictions: int, tokens: int, features: int, words: int, dtype: torch.dtype, **asked: Any) -> Case:
    padded = -(-words // 128) * 128  # as the word embedding is, in training

    def make(seed: int, device: torch.device) -> Problem:
        numbers = numbers_of(seed, device)
        x = hidden(numbers, predictions, features).to(dtype)
        weight = (0.02 * hidden(numbers, padded, features)).to(dtype)
        bias = (0.1 * torch.randn(padded, generator=numbers, device=device)).to(dtype)
        # Frequent words first, about as Zipf has them.
        shares = torch.rand(predictions, generator=numbers, device=device)
        labels = ((words**shares) - 1).long().clamp(max=words - 1)
        upstream = torch.rand(predictions, generator=numbers, device=device) / predictions
        return Problem({"x": x, "weight": weight, "bias": bias, "labels": labels}, ("x", "weight", "bias"), (upstream,))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (lm_head_loss(t["x"], t["weight"], t["bias"], t["labels"], size=words, count_correct=False)[0],)

    def own(t: Tensors) -> tuple[Tensor, ...]:
        logits = F.linear(t["x"], t["weight"], t["bias"])[:, :words]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return (F.cross_entropy(logits.to(wide), t["labels"], reduction="none"),)

    products = 2.0 * predictions * features * padded
    read = (predictions + padded) * features * dtype.itemsize
    return Case(
        "lm_head", "MLM head and cross-entropy", f"{predictions} of {tokens} tokens, D{features} V{words}", dtype, make,
        call, Work(read, products), Work(2 * read, 2 * products), max(_allowed(dtype), 1e-5), own,
        own_name="torch, all logits of these tokens", sizes={"tokens": tokens, "words": words}, **asked,
    )  # fmt: skip


def bias_gelu_case(rows: int, features: int, dtype: torch.dtype, **asked: Any) -> Case:
    def make(seed: int, device: torch.device) -> Problem:
        numbers = numbers_of(seed, device)
        x, upstream = (hidden(numbers, rows, features).to(dtype) for _ in range(2))
        _, bias = _weights(numbers, features)
        return Problem({"x": x, "bias": bias.to(dtype)}, ("x", "bias"), (upstream,))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (bias_gelu(t["x"], t["bias"], approximate=False),)

    def own(t: Tensors) -> tuple[Tensor, ...]:
        return (F.gelu(t["x"] + t["bias"]),)

    size = rows * features * dtype.itemsize
    return Case(
        "activation", "bias + GELU", f"[{rows}, {features}]", dtype, make, call, Work(2 * size), Work(3 * size),
        _allowed(dtype), own, **asked,
    )  # fmt: skip


def attention_case(batch: int, heads: int, length: int, size: int, dtype: torch.dtype, **asked: Any) -> Case:
    """Whole rows, with dropout of the weights."""

    @functools.cache
    def documents(device: torch.device) -> Documents:
        ids = torch.ones(batch, length, dtype=torch.int64, device=device)
        return Documents.of(ids, torch.arange(length, device=device).expand(batch, length), "full", causal=False)

    def make(seed: int, device: torch.device) -> Problem:
        q, k, v = (x.permute(2, 0, 1, 3).to(device, dtype) for x in synthetic_qkv(batch, heads, length, size, seed))
        upstream = hidden(numbers_of(seed, device), length, batch, heads, size).to(dtype)
        keys = _keys(seed, heads * length * batch, device).view(heads, length, batch)
        return Problem({"q": q, "k": k, "v": v, "keys": keys}, ("q", "k", "v"), (upstream,))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (attention(t["q"], t["k"], t["v"], documents(t["q"].device), p=DROPOUT, keys=t["keys"]),)

    def own(t: Tensors) -> tuple[Tensor, ...]:
        q, k, v = (t[name].permute(1, 2, 0, 3) for name in ("q", "k", "v"))
        return (F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT).permute(2, 0, 1, 3),)

    tensor, products = batch * heads * length * size * dtype.itemsize, 2.0 * batch * heads * length**2 * size
    return Case(
        "attention", "attention with dropout", f"B{batch} H{heads} L{length} d{size}", dtype, make, call,
        Work(4 * tensor, 2 * products), Work(8 * tensor, 5 * products), max(2 * _allowed(dtype), 1e-5), own,
        own_is_same=False, **asked,
    )  # fmt: skip


def pinv_case(rows: int, heads: int, landmarks: int, dtype: torch.dtype, **asked: Any) -> Case:
    """Of the softmax between landmarks, as Nyström attention meets it."""

    def make(seed: int, device: torch.device) -> Problem:
        q, k, _ = synthetic_qkv(rows, heads, 8 * landmarks, 64, seed)
        q, k = (x.unflatten(2, (landmarks, 8)).mean(3) for x in (q, k))
        a = (q @ k.mT / 8).softmax(-1).to(device, dtype)
        upstream = hidden(numbers_of(seed, device), rows, heads, landmarks, landmarks).to(dtype)
        return Problem({"a": a, "start": column_maximum(a)}, ("a", "start"), (upstream,))

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (iterative_pinv(t["a"], t["start"]),)

    size, products = rows * heads * landmarks**2 * dtype.itemsize, 6 * 4 * 2.0 * landmarks**3 * rows * heads
    return Case(
        "pinv", "Nyström pseudo-inverse", f"{rows * heads} heads, {landmarks}×{landmarks}", dtype, make, call,
        Work(2 * size, products), Work(3 * size, 2 * products), 1e-3,
        lambda t: (torch.linalg.pinv(t["a"]),), own_name="torch.linalg.pinv", own_is_same=False, **asked,
    )  # fmt: skip


def _allowed(dtype: torch.dtype) -> float:
    """The relative error (of norms) that a result rounded to ``dtype`` may have."""
    return {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
