"""Cases of the language-model head's loss, and its definition in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from farspan.kernels.lm_head import lm_head_loss, tiles
from farspan.kernels.lm_head.pointwise import Statistics, turn_into_gradient, update_statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclasses.dataclass
class Case:
    x: Tensor  # [n, h]
    weight: Tensor  # [v, h]
    bias: Tensor | None  # [v]
    labels: Tensor  # [n]
    upstream: Tensor  # [n] float32
    size: int

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Case:
        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(device, dtype).requires_grad_()

        x, weight, bias = moved(self.x), moved(self.weight), moved(self.bias)
        assert x is not None and weight is not None
        return Case(x, weight, bias, self.labels.to(device), self.upstream.to(device), self.size)

    @property
    def parameters(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return {name: value for name, value in named.items() if value is not None}


def make_case(n: int, h: int, v: int, size: int, dtype: torch.dtype, *, bias: bool = True, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = random(v, h)
    weight[size:] = 100.0  # padding would be the largest by far
    case = Case(
        random(n, h), weight, random(v) if bias else None, torch.randint(size, (n,), generator=generator),
        random(n), size,
    )  # fmt: skip
    case.labels[:2] = torch.tensor([0, size - 1])[:n]
    with torch.no_grad():  # half of the guesses are right
        rounded = case.to(dtype)
        logits = _logits(rounded.to(torch.float64))
        case.labels[2::2] = logits.argmax(-1)[2::2]
    return rounded


def _logits(case: Case) -> Tensor:
    logits = case.x @ case.weight[: case.size].t()
    return logits if case.bias is None else logits + case.bias[: case.size]


def expected(case: Case) -> dict[str, Tensor]:
    """Losses, correctness and gradients by definition, in float64 on the CPU."""
    exact = case.to(torch.float64)
    probabilities = torch.exp(_logits(exact) - _logits(exact).detach().amax(-1, keepdim=True))
    of_labels = probabilities.gather(1, exact.labels.unsqueeze(1)).squeeze(1)
    losses = probabilities.sum(-1).log() - of_labels.log()
    losses.backward(exact.upstream.double())
    correct = (_logits(exact).argmax(-1) == exact.labels).double()
    gradients = {f"gradient of {name}": p.grad for name, p in exact.parameters.items()}
    return {"losses": losses.detach(), "correct": correct, **gradients}  # type: ignore[dict-item]


def found(case: Case) -> dict[str, Tensor]:
    for parameter in case.parameters.values():
        parameter.grad = None
    losses, correct = lm_head_loss(case.x, case.weight, case.bias, case.labels, size=case.size)
    losses.backward(case.upstream.to(losses.dtype))
    gradients = {f"gradient of {name}": p.grad for name, p in case.parameters.items()}
    return {"losses": losses.detach(), "correct": correct, **gradients}  # type: ignore[dict-item]


def assert_same(ours: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, roundings: float) -> None:
    """``roundings``: what a number may be off by, in units of the dtype's, relative to the largest.  ``correct`` is not
    compared where logits were rounded."""
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        if name == "correct":
            assert dtype not in (torch.float32, torch.float64) or torch.equal(value.double().cpu(), exact[name])
            continue
        assert value.isfinite().all(), name
        error, scale = (
            (t.abs().amax().item() if t.numel() else 0.0) for t in (value.double().cpu() - exact[name], exact[name])
        )
        error /= scale or 1.0
        allowed = roundings * torch.finfo(dtype).eps
        assert error <= allowed, f"{name}: off by {error:.1e} of the largest, allowed {allowed:.1e}"


def _largest(x: Tensor) -> float:
    return x.abs().amax().item() if x.numel() else 0.0


@dataclasses.dataclass
class TileCase:
    """A tile of logits after statistics of an earlier one."""

    logits: Tensor  # [rows, stride]; what lies beyond `real` is not finite
    real: int
    first: int
    labels: Tensor
    upstream: Tensor

    def to(self, device: str | torch.device) -> TileCase:
        return TileCase(self.logits.to(device), self.real, self.first, self.labels.to(device), self.upstream.to(device))

    def before(self, dtype: torch.dtype) -> Statistics:
        """As if a tile of two entries had come before: logits 1 and -3."""
        n, device = len(self.labels), self.logits.device
        s = Statistics.of_nothing(n, dtype, device)
        early = torch.tensor([[1.0, -3.0]], dtype=torch.float64, device=device).expand(n, 2)
        exact = Statistics(s.maximum.double(), s.total.double(), s.label_logit.double(), s.best)
        update_statistics(early, 2, self.first - 2, self.labels, exact)
        wide = torch.promote_types(dtype, torch.float32)
        return Statistics(exact.maximum.to(wide), exact.total.to(wide), exact.label_logit.to(wide), exact.best)


def make_tile(rows: int, real: int, dtype: torch.dtype, *, seed: int = 0) -> TileCase:
    generator = torch.Generator().manual_seed(seed)
    first = 5
    logits = torch.full((rows, tiles.round_up(real, tiles.VECTOR)), torch.nan)
    logits[:, :real] = torch.randn(rows, real, generator=generator) * 4
    # Many equal logits, also the largest, also as large as one before; a row of -inf but for one; a row far below what
    # came before.
    logits[::3] = logits[::3].round()
    logits[2:3] = logits[2:3].clamp(max=1.0)
    logits[3:4, : real - 1] = -torch.inf
    logits[4:5] -= 200.0
    labels = torch.randint(first - 4, first + real + 4, (rows,), generator=generator).clamp(min=first - 2)
    return TileCase(logits.to(dtype), real, first, labels, torch.randn(rows, generator=generator))


def tile_results(case: TileCase, *, in_place: bool) -> dict[str, Tensor]:
    """What the two pointwise operations make of a tile, by whichever form is chosen."""
    logits, dtype = case.logits.clone(), case.logits.dtype
    s = case.before(dtype)
    update_statistics(logits, case.real, case.first, case.labels, s)
    out = logits if in_place else torch.full_like(logits, torch.nan)
    upstream = case.upstream.to(s.maximum.dtype)
    sums = turn_into_gradient(logits, case.real, case.first, case.labels, s, upstream, out)
    return {
        "maximum": s.maximum, "total": s.total, "label logit": s.label_logit, "best": s.best, "gradient": out,
        "sums": sums,
    }  # fmt: skip


def assert_same_tile(ours: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name in ("maximum", "label logit", "best"):
        assert torch.equal(ours[name].double().cpu(), exact[name].double()), name
    torch.testing.assert_close(ours["total"].double().cpu(), exact["total"], rtol=1e-6, atol=0)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(ours["gradient"].double().cpu(), exact["gradient"], rtol=rounding, atol=1e-6)
    torch.testing.assert_close(ours["sums"].double().cpu(), exact["sums"], rtol=1e-5, atol=1e-5)


def exact_tile(case: TileCase) -> dict[str, Tensor]:
    return tile_results(dataclasses.replace(case, logits=case.logits.double()), in_place=False)
