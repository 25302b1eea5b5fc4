"""The language-model head's loss by its reference in PyTorch: against the definition, whatever the tiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from lm_head_cases import assert_same, expected, found, make_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from farspan.kernels import forms
from farspan.kernels.lm_head import lm_head_loss, losses_of, shard_gradients, shard_statistics, tiles
from farspan.kernels.lm_head.ops import gradients_op, loss_op, statistics_op

N, H, V, SIZE = 21, 8, 400, 389


@pytest.fixture(autouse=True)
def _reference() -> Iterator[None]:
    with forms.mode("reference"):
        yield


@pytest.fixture(params=["one tile", "tiles, kept", "tiles, computed again"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "one tile":
        monkeypatch.setattr(tiles, "CPU_COLUMNS", 128)
        monkeypatch.setattr(tiles, "CPU_ROWS", 8)
    if request.param == "tiles, computed again":
        monkeypatch.setattr(tiles, "CPU_KEPT_BYTES", 0)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize(("v", "size"), [(V, SIZE), (389, 389), (3, 2), (1, 1)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float64, 16), (torch.float32, 8), (torch.bfloat16, 4)])
def test_losses_and_gradients(dtype: torch.dtype, roundings: int, bias: bool, v: int, size: int) -> None:
    case = make_case(N, H, v, size, dtype, bias=bias)
    ours = found(case)
    assert ours["losses"].dtype == torch.promote_types(dtype, torch.float32)
    if size > 2:
        assert 0.4 < ours["correct"].mean() < 1
    assert_same(ours, expected(case), dtype, roundings)
    assert not ours["gradient of weight"][size:].any()
    assert not bias or not ours["gradient of bias"][size:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_what_torch_computes_of_whole_logits(dtype: torch.dtype) -> None:
    case = make_case(N, 64, V, V, dtype)
    logits = F.linear(case.x, case.weight, case.bias).float()
    losses, correct = lm_head_loss(case.x, case.weight, case.bias, case.labels)
    torch.testing.assert_close(losses, F.cross_entropy(logits, case.labels, reduction="none"), rtol=1e-6, atol=1e-6)
    assert torch.equal(correct, (logits.argmax(-1) == case.labels).float())


@pytest.mark.usefixtures("tiling")
def test_the_first_of_equal_logits_is_the_guess() -> None:
    x, weight, bias = torch.zeros(6, H), torch.zeros(V, H), torch.zeros(V)
    labels = torch.tensor([0, 1, 200, 7, 300, 388])
    assert lm_head_loss(x, weight, bias, labels, size=SIZE)[1].tolist() == [1, 0, 0, 0, 0, 0]
    bias[torch.tensor([200, 300, 388])] = 1.0
    losses, correct = lm_head_loss(x, weight, bias, labels, size=SIZE)
    assert correct.tolist() == [0, 0, 1, 0, 0, 0]
    assert losses.tolist() == pytest.approx(F.cross_entropy(bias[:SIZE].expand(6, -1), labels, reduction="none"))
    assert not lm_head_loss(x, weight, bias, labels, size=SIZE, count_correct=False)[1].any()


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits(offset: float) -> None:
    case = make_case(N, H, V, SIZE, torch.float64)
    plain = found(case)
    assert case.bias is not None
    case.bias.data += offset
    shifted = found(case)
    for name, value in plain.items():
        torch.testing.assert_close(shifted[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    case = make_case(N, H, V, SIZE, torch.float32)
    case.x.data[3, 0] = value
    losses, _ = lm_head_loss(case.x, case.weight, case.bias, case.labels, size=SIZE)
    losses.sum().backward()
    assert losses[3].isnan()
    assert losses[:3].isfinite().all() and losses[4:].isfinite().all()
    assert case.weight.grad is not None and case.weight.grad.isnan().any()


@pytest.mark.usefixtures("tiling")
def test_a_row_has_its_loss_whatever_the_others() -> None:
    case = make_case(N, H, V, SIZE, torch.float32)
    losses, _ = lm_head_loss(case.x, case.weight, case.bias, case.labels, size=SIZE)
    for row in range(0, N, 5):
        alone, _ = lm_head_loss(case.x[row:][:1], case.weight, case.bias, case.labels[row:][:1], size=SIZE)
        torch.testing.assert_close(alone, losses[row:][:1], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize("part", [128, 200, 389, 400])
def test_shards(part: int) -> None:
    """Several, the last of nothing but padding: their statistics and gradients are those of the whole."""
    case = make_case(N, H, V, SIZE, torch.float64)
    whole = expected(case)
    x, weight, bias = (t.detach() for t in (case.x, case.weight, case.bias))  # type: ignore[union-attr]
    shards = []
    for first in range(0, SIZE + part, part):
        padded = [F.pad(t, (0, 0) * (t.ndim - 1) + (0, first + 2 * part - V)) if first + part > V else t
                  for t in (weight, bias)]  # fmt: skip
        w, b = (t[first : first + part] for t in padded)
        shards.append((first, w, b, *shard_statistics(x, w, b, case.labels, first=first, size=SIZE, keep=True)))
    maximum = torch.stack([s.maximum for *_, s, _ in shards]).amax(0)
    total = sum(s.total * (s.maximum - maximum).exp() for *_, s, _ in shards)
    label_logit = torch.stack([s.label_logit for *_, s, _ in shards]).amax(0)
    assert isinstance(total, Tensor)
    losses = losses_of(maximum, total, label_logit)
    torch.testing.assert_close(losses, whole["losses"], rtol=1e-12, atol=1e-12)
    of_x, of_weight, of_bias = torch.zeros_like(x), [], []
    for first, w, b, _, kept in shards:
        gradients = shard_gradients(
            x, w, b, case.labels, first=first, size=SIZE, maximum=maximum, total=total, upstream=case.upstream,
            kept=kept, needed=(True, True, True),
        )  # fmt: skip
        assert all(g is not None for g in gradients)
        of_x += gradients[0]
        of_weight.append(gradients[1])
        of_bias.append(gradients[2])
    torch.testing.assert_close(of_x, whole["gradient of x"])
    torch.testing.assert_close(torch.cat(of_weight)[:SIZE], whole["gradient of weight"][:SIZE])
    torch.testing.assert_close(torch.cat(of_bias)[:SIZE], whole["gradient of bias"][:SIZE])


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("tiled", [True, False])
def test_there_are_never_all_logits(monkeypatch: pytest.MonkeyPatch, tiled: bool) -> None:
    """As on a device, where what does not fit a tile is not kept."""
    from farspan.kernels.lm_head import chunked

    if tiled:
        monkeypatch.setattr(tiles, "CPU_COLUMNS", 128)
        monkeypatch.setattr(tiles, "CPU_ROWS", 64)
        monkeypatch.setattr(tiles, "CPU_KEPT_BYTES", 4 * 64 * 128)
    case = make_case(256, H, 1024, 1024, torch.float32)
    x, weight, bias = (t.detach() for t in (case.x, case.weight, case.bias))  # type: ignore[union-attr]
    with Largest() as largest:
        statistics, kept = chunked.forward(x, weight, bias, case.labels, 0, 1024, keep=True)
        chunked.backward(x, weight, bias, case.labels, 0, 1024, statistics, case.upstream, kept, (True, True, True))
    assert (largest.numbers <= max(64 * 128, weight.numel())) == tiled
    assert tiled or largest.numbers == 256 * 1024


@pytest.mark.parametrize(
    ("rows", "entries", "dtype", "columns", "count"),
    [
        (4915, 50265, torch.bfloat16, 3200, 16),  # 15% of 32k tokens
        (77, 50265, torch.bfloat16, 50304, 1),
        (32768, 50265, torch.bfloat16, 2048, 25),
        (8192, 32000, torch.float32, 1024, 32),
        (0, 5, torch.float32, 128, 1),
    ],
)
def test_tiles_of_a_device(rows: int, entries: int, dtype: torch.dtype, columns: int, count: int) -> None:
    tiling = tiles.Tiling.of(rows, entries, tiles.round_up(entries, 128), dtype, torch.device("cuda"))
    assert tiling.tile_columns == columns
    assert tiling.tile_rows * columns * dtype.itemsize <= tiles.TILE_BYTES * 1.05
    parts = list(tiling.column_tiles())
    assert len(parts) == count
    assert sum(of_columns[0].real for of_columns in parts if of_columns) == (entries if rows else 0)
    for of_columns in parts:
        assert [t.first_row for t in of_columns[1:]] == [t.last_row for t in of_columns[:-1]]
        assert sum(t.last_row - t.first_row for t in of_columns) == rows
        assert all(t.stride % tiles.VECTOR == 0 and t.width >= t.real for t in of_columns)


@pytest.mark.usefixtures("tiling")
def test_the_backward_pass_in_all_its_ways() -> None:
    """Recomputed activations, a compiled graph, twice, of parts of the inputs: always the same numbers."""
    case = make_case(N, H, V, SIZE, torch.float32)
    plain = found(case)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return lm_head_loss(x, weight, bias, case.labels, size=SIZE)[0]

    def assert_plain(names: str = "x weight bias") -> None:
        for name, parameter in case.parameters.items():
            if name in names.split():
                assert parameter.grad is not None and torch.equal(parameter.grad, plain[f"gradient of {name}"]), name
            else:
                assert parameter.grad is None
            parameter.grad = None

    for p in case.parameters.values():
        p.grad = None
    inputs = tuple(case.parameters.values())
    for reentrant in (True, False):
        checkpoint(loss, *inputs, use_reentrant=reentrant).backward(case.upstream)
        assert_plain()
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs).backward(case.upstream)
    assert_plain()
    losses = loss(*inputs)
    losses.backward(case.upstream, retain_graph=True)
    assert_plain()
    losses.backward(case.upstream)
    assert_plain()
    for names in ("x", "weight", "bias", "x bias"):
        chosen = [p if name in names.split() else p.detach() for name, p in case.parameters.items()]
        loss(*chosen).backward(case.upstream)
        assert_plain(names)
    wide = case.x.detach().repeat(1, 2).requires_grad_()
    loss(wide[:, :H], case.weight.detach().t().contiguous().t(), case.bias).backward(case.upstream)  # type: ignore[arg-type]
    torch.testing.assert_close(wide.grad[:, :H], plain["gradient of x"])


@pytest.mark.usefixtures("tiling")
def test_registered_operations() -> None:
    case = make_case(7, H, V, SIZE, torch.float32)
    for keep in (True, False):
        torch.library.opcheck(loss_op, (case.x, case.weight, case.bias, case.labels, SIZE, keep))
    x, weight, bias = (t.detach() for t in (case.x, case.weight, case.bias))  # type: ignore[union-attr]
    torch.library.opcheck(statistics_op, (x, weight[:128], None, case.labels, 256, SIZE, True))
    maximum, total, *_, kept = statistics_op(x, weight, bias, case.labels, 0, SIZE, True)
    for needed in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            gradients_op, (x, weight, bias, case.labels, 0, SIZE, maximum, total, case.upstream, kept, *needed)
        )


def test_no_rows() -> None:
    case = make_case(0, H, V, SIZE, torch.float32)
    ours = found(case)
    assert ours["losses"].shape == ours["correct"].shape == (0,)
    assert not ours["gradient of weight"].any() and not ours["gradient of bias"].any()


def test_operations_are_counted() -> None:
    """Without the products that compute logits again, and without padding."""
    case = make_case(N, H, V, SIZE, torch.float32)
    with FlopCounterMode(display=False) as counter:
        found(case)
    assert counter.get_total_flops() == 3 * 2 * N * H * SIZE


def test_bad_input() -> None:
    case = make_case(N, H, V, SIZE, torch.float32)
    x, weight, bias, labels = case.x, case.weight, case.bias, case.labels
    assert bias is not None
    with pytest.raises(ValueError, match=r"labels are 0 to 389: must be from 0 to 388"):
        lm_head_loss(x, weight, bias, labels.clamp(max=387) + (labels == 388) * 2, size=SIZE)
    with pytest.raises(ValueError, match=r"labels are -100 "):
        lm_head_loss(x, weight, bias, torch.where(labels == 0, -100, labels), size=SIZE)
    with pytest.raises(ValueError, match=r"x \(21, 7\), weight \(400, 8\) and labels \(21,\) must be"):
        lm_head_loss(x[:, 1:], weight, bias, labels)
    with pytest.raises(ValueError, match=r"bias \(399,\) must have a number for each of 400"):
        lm_head_loss(x, weight, bias[1:], labels)
    with pytest.raises(ValueError, match=r"one dtype, not torch.bfloat16, torch.float32"):
        lm_head_loss(x.bfloat16(), weight, bias, labels)
    with pytest.raises(ValueError, match=r"labels are torch\.int32, must be torch\.int64"):
        lm_head_loss(x, weight, bias, labels.int())
