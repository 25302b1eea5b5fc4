"""The multi-dimension damped exponential moving average of MEGA (arXiv 2209.10655, section 3.1).

Of feature d with n hidden dimensions: p = σ(δ), q = 1 − σ(α) σ(δ), and from h_0 = 0

    h_t = q h_{t-1} + p β x_t,    y_t = N^-½ Σ_n γ_n h_t,n,

which is y = k ∗ x with k[l] = N^-½ Σ_n γ_n p_n β_n q_n^l.  With two directions a second set of parameters runs from the
end, and lag 0 counts in both.  Truncated, only lags below a limit count.

Forms: "recurrence" is the definition, step by step, the truth for tests; "chunked" works by chunks of positions and
matrix products, linear in length, and keeps only its inputs for the backward pass; "compiled" is that as a CUDA kernel
(ema.cu), for what is not truncated and not float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .. import forms
from ..documents import Documents
from .chunked import chunked
from .fused import DTYPES, fused, why_not
from .recurrence import recurrence

Form = Literal["recurrence", "chunked", "compiled"]
# Of calls that name none; None: the best for the device.
DEFAULT: Form | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class EmaState:
    """What a sequence leaves to its continuation: one of the two."""

    hidden: Tensor | None  # [b, d, n] h after the last position, float32 (float64 where x was)
    inputs: Tensor | None  # [up to truncation − 1, b, d] where truncated, the last inputs in x's dtype


def ema(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    *,
    documents: Documents | None = None,
    state: EmaState | None = None,
    carry: bool = False,
    truncation: int | None = None,
    form: Form | None = None,
) -> tuple[Tensor, EmaState | None]:
    """The convolution alone: neither a residual term nor an activation.  Differentiable in every tensor, once.

    x: [s, b, d]; damping (δ), decay (α), expansion (β), projection (γ): [directions, d, n] as stored, before sigmoids;
    one direction is causal, of two the second runs backwards.
    documents: None or of kind "full": every row is one; "padding": as that, with inputs at padding 0 (positions count);
    "document": the average starts anew at every document (backwards at its end), and padding gives 0.
    state: of what came before, from a call with ``carry``.  truncation: only lags below it count; None: all.
    Returns y [s, b, d] in x's dtype, computed in float32 at least, and with ``carry`` the state after the last one.

    ValueError: shapes that do not fit, a truncation below 1, a document in pieces, a state with two directions or with
    packed documents, or one that was made under another truncation.
    """
    _check(x, (damping, decay, expansion, projection), documents, truncation)
    packed = documents is not None and documents.kind == "document"
    if state is not None or carry:
        _check_carry(x, damping, packed, state, truncation)
    if documents is not None and documents.stretches is not None and documents.stretches.fill_rows:
        documents, packed = None, False
    if documents is not None and documents.kind == "padding":
        x = x.masked_fill((documents.document_ids.T == 0).unsqueeze(-1), 0)

    start, before = None if state is None else state.hidden, 0
    if state is not None and state.inputs is not None:
        before = len(state.inputs)
        x = torch.cat((state.inputs.to(x.dtype), x))
    forms_of: dict[Form, Callable[..., tuple[Tensor, Tensor | None]]] = {
        "recurrence": recurrence, "chunked": chunked, "compiled": functools.partial(fused, carry=carry),
    }  # fmt: skip
    compute = forms_of[_form(x, damping, truncation, form)]
    lanes = documents if packed else None
    y, hidden = compute(x, damping, decay, expansion, projection, documents=lanes, start=start, truncation=truncation)
    if not carry:
        return y[before:], None
    if truncation is None:
        return y[before:], EmaState(hidden, None)
    return y[before:], EmaState(None, x[max(len(x) - truncation + 1, 0) :].clone())


def _form(x: Tensor, damping: Tensor, truncation: int | None, form: Form | None) -> Form:
    """The form that is asked for, or the best for x's device."""
    form = form or DEFAULT
    if form is not None:
        return form
    if truncation is None and x.dtype in DTYPES and forms.compiled("ema", x.device):
        if (reason := why_not(x, damping)) is None:
            return "compiled"
        forms.declined("ema", reason)
    return "chunked"


def _check(x: Tensor, parameters: tuple[Tensor, ...], documents: Documents | None, truncation: int | None) -> None:
    shapes = [tuple(p.shape) for p in parameters]
    if x.dim() != 3 or not len(x) or len(set(shapes)) > 1 or len(shapes[0]) != 3 or shapes[0][0] not in (1, 2):
        raise ValueError(
            f"x {tuple(x.shape)} and parameters {', '.join(map(str, shapes))}: give x [s, b, d] with s > 0 and four "
            "parameters of one shape [1 or 2 directions, d, n]"
        )
    if shapes[0][1] != x.shape[2]:
        raise ValueError(f"x has {x.shape[2]} features and the parameters have {shapes[0][1]}: give as many")
    if truncation is not None and truncation < 1:
        raise ValueError(f"truncation {truncation}: it must be 1 or more, or None for every lag")
    if documents is None:
        return
    if documents.document_ids.shape != (x.shape[1], x.shape[0]):
        raise ValueError(
            f"document ids {tuple(documents.document_ids.shape)} for x {tuple(x.shape)}: give [b, s] for [s, b, d]"
        )
    stretches = documents.stretches
    if documents.kind == "document" and stretches is not None and not stretches.compact and len(stretches.starts):
        raise ValueError(
            "a document lies in pieces in its row: the moving average takes documents in one piece with consecutive "
            "indices; give every piece a number of its own"
        )


def _check_carry(x: Tensor, damping: Tensor, packed: bool, state: EmaState | None, truncation: int | None) -> None:
    if len(damping) == 2:
        raise ValueError("a state with two directions: the second starts at the end; set carry and state for one only")
    if packed:
        raise ValueError('a state with packed documents: each starts anew; use documents of kind "full" or "padding"')
    if state is None:
        return
    if (state.hidden is None) is (truncation is None):
        made = "without" if state.inputs is None else "with a"
        raise ValueError(f"a state made {made} truncation, and truncation {truncation}: use the same for both calls")
    found = state.hidden if state.inputs is None else state.inputs[:1].squeeze(0) if len(state.inputs) else None
    allowed = (x.shape[1], *damping.shape[1:]) if state.inputs is None else x.shape[1:]
    if found is not None and found.shape != tuple(allowed):
        raise ValueError(f"a state of shape {tuple(found.shape)} for x {tuple(x.shape)}: it must be {tuple(allowed)}")
