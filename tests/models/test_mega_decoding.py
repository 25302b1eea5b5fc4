"""A causal MEGA given its tokens in pieces: the same as whole, whatever the pieces, at a cost that does not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_close, assert_differs, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Description
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farspan import load
from farspan.parallel.mesh import Mesh
from farspan.pretrain.load import LoadedModel

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.name for path in GOLDEN.glob("mega-clm*"))
CAUSAL = {"is_decoder": True, "bidirectional": False, "vocab_size": 97, "max_positions": 64}
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "simple": {"relative_positional_bias": "simple"},
    "chunked": {"use_chunking": True, "chunk_size": 8},
    "laplace, chunked, truncated": {
        "use_chunking": True,
        "chunk_size": 7,
        "attention_activation": "laplace",
        "truncation": 5,
    },
    "relu2, truncated": {"attention_activation": "relu2", "truncation": 9, "normalization_type": "layernorm"},
    "batchnorm": {"normalization_type": "batchnorm", "use_chunking": True, "chunk_size": 16},
}


def model_of(kind: str, **fields: Any) -> LoadedModel:
    return LoadedModel(Description("mega", CAUSAL | KINDS[kind] | fields).filled(Mesh.solo()))


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def in_pieces(model: LoadedModel, sizes: list[int], ids: Tensor, **others: Tensor) -> Tensor:
    """The logits of each piece after the ones before it; ``others`` of the tokens are cut up alike."""
    parts, cache, start = [], None, 0
    for size in [*sizes, ids.shape[1] - sum(sizes)]:
        piece = slice(start, start + size)
        given = {key: value if key.startswith("encoder") else value[:, piece] for key, value in others.items()}
        output = model(ids[:, piece], use_cache=True, cache=cache, **given)
        parts.append(output.logits)
        cache, start = output.cache, start + size
    assert cache is not None and cache.seen == ids.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", CASES)
def test_reference_cases_token_by_token(name: str) -> None:
    inputs = load_file(GOLDEN / name / "inputs.safetensors")
    expected = load_file(GOLDEN / name / "outputs.safetensors")["logits"]
    ids = inputs.pop("input_ids")
    del inputs["labels"]
    logits = in_pieces(load(GOLDEN / name), [1] * (ids.shape[1] - 1), ids, **inputs)
    real = inputs["attention_mask"] == 1
    assert_close(logits[real], expected[real], "logits")


@pytest.mark.parametrize("kind", KINDS)
@given(sizes=st.lists(st.integers(1, 20), max_size=3), padding=st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_pieces_equal_whole(kind: str, sizes: list[int], padding: int) -> None:
    model, ids = model_of(kind), tokens(2, sum(sizes) + 3)
    mask = torch.ones_like(ids)
    mask[0, : min(padding, ids.shape[1] - 1)] = 0
    with torch.no_grad():
        whole = model(ids, mask).logits
    real = mask == 1
    assert_close(in_pieces(model, sizes, ids, attention_mask=mask)[real], whole[real], "logits")


def test_a_cache_serves_two_continuations() -> None:
    model, ids = model_of("chunked"), tokens(1, 20)
    with torch.no_grad():
        first = model(ids[:, :11], use_cache=True)
        other = tokens(1, 30)[:, :9]
        for following in (ids[:, 11:], other, ids[:, 11:]):
            whole = model(torch.cat((ids[:, :11], following), 1)).logits[:, 11:]
            assert_close(model(following, cache=first.cache).logits, whole, "logits")
        assert_differs(model(other, use_cache=True).logits, model(other, cache=first.cache).logits, "what came before")


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_same_with_and_without_a_cache(kind: str) -> None:
    model, prompt = model_of(kind), tokens(2, 6)
    for options in ({}, {"temperature": 0.7, "top_k": 20, "seed": 5}):
        cached = model.generate(prompt, 30, **options)
        assert cached.shape == (2, 36) and torch.equal(cached[:, :6], prompt)
        assert torch.equal(cached, model.generate(prompt, 30, use_cache=False, **options))
    assert not torch.equal(model.generate(prompt, 30, temperature=0.7, seed=6), model.generate(prompt, 30))


def test_generation_stops_row_by_row() -> None:
    model, prompt = model_of("chunked"), tokens(2, 6)
    free = model.generate(prompt, 12)
    stop = int(free[0, 9])
    stopped = model.generate(prompt, 12, stop=stop)
    for row, other in zip(stopped.tolist(), free.tolist(), strict=True):
        at = other.index(stop, 6) if stop in other[6:] else len(other)
        assert row == other[:at] + [stop] * (len(other) - at)


class Numbers(TorchDispatchMode):
    """Counts what operations produce."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += result.numel() if isinstance(result, Tensor) else 0
        return result


@torch.no_grad()
def test_a_token_costs_the_same_however_many_came_before() -> None:
    model = model_of("chunked")
    cost = {}
    for seen in (8 * 3 + 4, 8 * 300 + 4):
        cache = model(tokens(1, seen), use_cache=True).cache
        with Numbers() as numbers:
            model(tokens(1, 1), cache=cache)
        cost[seen] = numbers.count
    few, many = cost.values()
    assert few == many


@torch.no_grad()
def test_long_generation_drifts_by_rounding_alone() -> None:
    model, ids = model_of("chunked"), tokens(1, 700)
    assert difference(in_pieces(model, [1] * 699, ids), model(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(tokens(1, 60), 5), "65 tokens a row: this model has positions for 64"),
        (lambda m: m.generate(tokens(1, 6), 0), "6 given and 0 new tokens, temperature 0.0, top_k None: give "),
        (lambda m: m.generate(tokens(1, 6), 3, temperature=-1.0), "temperature -1.0"),
        (lambda m: m(tokens(1, 20), cache=m(tokens(1, 50), use_cache=True).cache), "70 tokens a row"),
    ],
)
def test_what_cannot_be_generated(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model_of("simple"))


def test_models_without_a_cache() -> None:
    encoder = LoadedModel(Description("mega", {"vocab_size": 97}).filled(Mesh.solo()))
    with pytest.raises(ValueError, match="sees what follows"):
        encoder.generate(tokens(1, 4), 2)
    with pytest.raises(ValueError, match="this mega model has no cache: it takes whole sequences only"):
        encoder(tokens(1, 4), use_cache=True)
    bert = LoadedModel(Description("megatron-bert", {"is_decoder": True, "vocab_size": 97}).filled(Mesh.solo()))
    with pytest.raises(ValueError, match="this megatron-bert model has no cache"):
        bert.generate(tokens(1, 4), 2, use_cache=True)
    assert bert.generate(tokens(1, 4), 3).shape == (1, 7)
