"""MRA-2 attention as it is defined, with all l × l scores: what the other form is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .selection import BLOCK, EPSILON, Options, Selection, block_means, low_resolution_logits


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """As ``mra_attention``, differentiated by autograd."""
    (n, h, l, d), dtype = q.shape, q.dtype
    nb = -(-l // BLOCK)
    real = torch.ones(n, l, dtype=torch.bool, device=q.device) if mask is None else mask
    real = F.pad(real, (0, nb * BLOCK - l))[:, None, :, None]  # [n, 1, nb · BLOCK, 1]
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    q, k, v = (F.pad(x, (0, 0, 0, nb * BLOCK - l)).masked_fill(~real, 0) for x in (q * d**-0.5, k, v))

    counts = real.view(n, 1, nb, BLOCK).sum(3).expand(n, h, nb)
    means = [block_means(x.reshape(n * h, nb, BLOCK, x.shape[3]), counts.reshape(n * h, nb)) for x in (q, k, v)]
    coarse = low_resolution_logits(means[0], means[1])
    with torch.no_grad():
        selection = Selection.of(coarse.clone(), counts.reshape(n * h, nb), options)
        chosen = torch.zeros(n * h, nb * nb, dtype=torch.bool, device=q.device)
        chosen = chosen.scatter_(1, selection.indices, True).view(n, h, nb, nb)
    coarse, v_mean = coarse.to(q.dtype).view(n, h, nb, nb), means[2].to(q.dtype).view(n, h, nb, v.shape[3])

    # The scores of keys in selected blocks and, of the others, one for each block, with what they count.
    seen = chosen.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3) & real.mT
    fine = (q @ k.mT).masked_fill(~seen, -torch.inf)
    rest = ~chosen & (counts > 0).unsqueeze(2) & (not options.sparse)
    coarse = coarse.masked_fill(~rest, -torch.inf).repeat_interleave(BLOCK, 2)
    scores = torch.cat((fine, coarse), 3)
    number = torch.cat((real.mT.expand(n, h, 1, -1), counts.unsqueeze(2)), 3)

    maximum = scores.detach().amax(3, keepdim=True)
    weights = number * (scores - maximum.masked_fill(maximum == -torch.inf, 0)).exp()
    y = weights @ torch.cat((v, v_mean), 2) / (weights.sum(3, keepdim=True) + EPSILON)
    return y.masked_fill(~real, 0)[:, :, :l].to(dtype)
