"""Other implementations of the same operations, where they are installed.

Each is given its inputs in the layout that it likes best, which is not timed.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import forms
from .kernel_cases import DROPOUT, EPS, TORCH, Case, Function, Tensors, ema_kernel


class Missing(Exception):
    """The peer cannot run here; says why in a few words."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A peer that can run: ``call`` on what ``prepare`` makes of a problem's inputs."""

    call: Function
    prepare: Callable[[Tensors], Tensors] = lambda inputs: inputs
    restore: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = (
        None  # to the case's results; None: it has others
    )


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    find: Callable[[Case], Ready]  # raises Missing


def _same(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # what is installed may not load beside this torch or driver
        if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] == name.split(".")[0]:
            raise Missing("not installed") from None
        raise Missing(f"does not load: {type(error).__name__}") from None


def peers_of(case: Case) -> list[Peer]:
    """In the order of the page."""
    found = [Peer("reference", _reference)]
    if case.own is not None:
        found.append(Peer(case.own_name, _own))
    return found + PEERS.get(case.operation, [])


def _reference(case: Case) -> Ready:
    def call(inputs: Tensors) -> tuple[Tensor, ...]:
        with forms.mode("reference"):
            return case.call(inputs)

    return Ready(call, restore=_same)


def _own(case: Case) -> Ready:
    assert case.own is not None
    return Ready(case.own, restore=_same if case.own_is_same else None)


def _compiled_by_torch(case: Case) -> Ready:
    """torch.compile of torch's own operations (of the reference, where there are none)."""
    return Ready(torch.compile(case.own or _reference(case).call, dynamic=False))


# Norms.


def _in_norm(norm: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case) -> Ready:
    """A norm of somebody's, after torch's dropout and addition where the case has them."""

    def after(t: Tensors) -> tuple[Tensor, ...]:
        total = t["residual"] + F.dropout(t["x"], DROPOUT)
        return total, norm(total, t["weight"], t["bias"])

    def alone(t: Tensors) -> tuple[Tensor, ...]:
        return (norm(t["x"], t["weight"], t["bias"]),)

    return Ready(alone, restore=_same) if case.own_is_same else Ready(after)


def _apex_fused(case: Case) -> Ready:
    module, shape = _module("apex.normalization.fused_layer_norm"), (case.sizes["features"],)
    return _in_norm(lambda x, weight, bias: module.fused_layer_norm_affine(x, weight, bias, shape, EPS), case)


def _apex_fast(case: Case) -> Ready:
    module, features = _module("apex.contrib.layer_norm"), case.sizes["features"]
    norm = module.FastLayerNorm(features, EPS).to("cuda", case.dtype)
    names = [name for name, _ in norm.named_parameters()]
    if len(names) != 2:
        raise Missing("has other parameters than expected")
    try:
        norm(torch.randn(8, features, device="cuda", dtype=case.dtype))
    except RuntimeError:
        raise Missing(f"has no kernel for {features} features") from None
    return _in_norm(
        lambda x, *parameters: torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,)), case
    )


# The moving average.


def _transformers_ema(case: Case) -> Ready:
    _module("transformers")
    module, config = _from_transformers_4("mega")
    d, n = case.sizes["features"], case.sizes["dimensions"]
    average = module.MegaMultiDimensionDampedEma(
        config.MegaConfig(hidden_size=d, ema_projection_size=n, bidirectional=True)
    ).train()

    def prepare(t: Tensors) -> Tensors:
        stored = {"damping": "damping_factor", "decay": "decay_factor", "expansion": "ema_expansion_matrix"}
        parameters = {theirs: t[ours].reshape(2 * d, n, 1) for ours, theirs in stored.items()}
        parameters["kernel_projection_matrix"] = t["projection"].reshape(2 * d, n)
        parameters["residual_weight"] = torch.zeros_like(t["x"][0, 0])
        return {"x": t["x"]} | parameters

    def call(t: Tensors) -> tuple[Tensor, ...]:
        parameters = {name: value for name, value in t.items() if name != "x"}
        return (torch.func.functional_call(average, parameters, (t["x"],))[0],)  # ends in a SiLU

    return Ready(call, prepare)


def _flash_fft(case: Case) -> Ready:
    """The convolution alone, its kernel made beforehand."""
    length = case.sizes["length"]
    convolution = _module("flashfftconv").FlashFFTConv(2 * length, dtype=case.dtype).to("cuda")

    def prepare(t: Tensors) -> Tensors:
        forwards, backwards = ema_kernel(t, length)
        circular = F.pad(forwards, (0, length)) + F.pad(backwards.flip(-1), (length, 0)).roll(1, -1)
        return {"x": t["x"].permute(1, 2, 0).contiguous(), "kernel": circular.contiguous()}

    return Ready(lambda t: (convolution(t["x"], t["kernel"]),), prepare, restore=lambda y: (y[0].permute(2, 0, 1),))


def _from_transformers_4(name: str) -> tuple[Any, Any]:
    version = _module("transformers").__version__
    try:
        folder = f"transformers.models.{name}"
        return importlib.import_module(f"{folder}.modeling_{name}"), importlib.import_module(
            f"{folder}.configuration_{name}"
        )
    except ImportError:
        raise Missing(f"not in transformers {version}") from None


# Attention.


def _transformers_mra(case: Case) -> Ready:
    module, _ = _from_transformers_4("mra")
    if getattr(module, "cuda_kernel", None) is None:
        raise Missing(f"transformers {_module('transformers').__version__} has not built its kernels")

    def call(t: Tensors) -> tuple[Tensor, ...]:  # as its layer calls it
        q, k, v = (t[name].float() for name in ("q", "k", "v"))
        mask = q.new_ones(q.shape[0] * q.shape[1], q.shape[2])
        return (module.mra2_attention(q, k, v, mask, case.sizes["budget"], approx_mode="full").to(t["q"].dtype),)

    return Ready(call, restore=_same)


def _flash(case: Case) -> Ready:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(t: Tensors) -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return (F.scaled_dot_product_attention(t["q"], t["k"], t["v"]),)

    return Ready(call)


# The head.


def _all_logits(case: Case) -> Ready:
    """As transformers' models have it: logits of every token, the loss of those that have a label."""
    tokens = case.sizes["tokens"]

    def prepare(t: Tensors) -> Tensors:
        x = t["x"].repeat(math.ceil(tokens / len(t["x"])), 1)[:tokens].contiguous()
        return t | {"x": x, "labels": F.pad(t["labels"], (0, tokens - len(t["labels"])), value=-100)}

    def call(t: Tensors) -> tuple[Tensor, ...]:
        return (F.cross_entropy(F.linear(t["x"], t["weight"], t["bias"]), t["labels"]),)

    return Ready(call, prepare)


COMPILED = Peer("torch.compile", _compiled_by_torch)
FFT, FLASH_FFT = "transformers' FFT", "FlashFFTConv"
MRA_KERNELS, FLASH = "transformers' MRA kernels", "dense flash attention"
FUSED, FAST = "apex FusedLayerNorm", "apex FastLayerNorm"
PEERS: dict[str, list[Peer]] = {
    "layer_norm": [COMPILED, Peer(FUSED, _apex_fused), Peer(FAST, _apex_fast)],
    "dropout": [COMPILED],
    "activation": [COMPILED],
    "attention": [],
    "ema": [Peer(FFT, _transformers_ema), Peer(FLASH_FFT, _flash_fft)],
    "mra": [Peer(MRA_KERNELS, _transformers_mra), Peer(FLASH, _flash)],
    "lm_head": [Peer("torch, logits of all tokens", _all_logits)],
    "pinv": [],
}
__all__ = ["FAST", "FFT", "FLASH", "FLASH_FFT", "FUSED", "MRA_KERNELS", "PEERS", "TORCH", "Missing", "Peer", "peers_of"]
