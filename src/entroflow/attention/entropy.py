"""How spread out attention is: the entropy of the softmax over keys, per query (AEGPO, 2602.06825).

For logits s_j = <q, k_j> / sqrt(d) and p = softmax(s),
H = -sum_j p_j log p_j = log sum_j e^s_j - E_p[s], between 0 (one key) and log K (all alike). Which
maps, layers and queries, and that H is divided by log K, is our choice: the paper leaves it open.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 2048
"""Keys at a time: what lies in memory is queries times so many logits."""


def attention_entropy(
    q: Tensor, k: Tensor, keep: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """Entropy in nats of each query's attention, exact for any number of keys.

    Never holds more than `chunk` logits for a query: of every chunk the largest logit m, the sum of
    e^(s - m) and that of e^(s - m) (s - m) say all, and two such triples make one. Where all keys
    fit in one, it is computed as it is written.

    Args:
        q: [..., n, d]; computed in float32 or better.
        k: [..., K, d].
        keep: [..., K] bool, keys that are attended to; all if None.

    Returns:
        [..., n]; 0 where no key is attended to.
    """
    precise = torch.promote_types(q.dtype, torch.float32)
    q = q.to(precise) / math.sqrt(q.shape[-1])
    if k.shape[-2] <= chunk and keep is None:
        logs = torch.log_softmax(q @ k.to(precise).mT, dim=-1)
        return -(logs.exp() * logs).sum(dim=-1)
    largest = q.new_full(q.shape[:-1], -torch.inf)
    total, moment = torch.zeros_like(largest), torch.zeros_like(largest)
    for start in range(0, k.shape[-2], chunk):
        logits = q @ k[..., start : start + chunk, :].to(precise).mT
        if keep is not None:
            absent = ~keep[..., None, start : start + chunk]
            logits = logits.masked_fill(absent, -torch.inf)
        now = torch.maximum(largest, logits.amax(dim=-1))
        level = now.masked_fill(now == -torch.inf, 0.0)
        moved = torch.where(total > 0, largest - level, 0.0)
        moment = moved.exp() * (moment + moved * total)
        total = moved.exp() * total
        below = logits - level[..., None]
        shares = below.exp()
        total = total + shares.sum(dim=-1)
        moment = moment + torch.where(shares > 0, shares * below, 0.0).sum(dim=-1)
        largest = now
    return torch.where(total > 0, total.log() - moment / total, 0.0)


def normalised(entropy: Tensor, keys: Tensor | int) -> Tensor:
    """Entropy over its largest value log K, in [0, 1]; 0 where there is one key or none.

    Args:
        entropy: [...] in nats.
        keys: how many were attended to, broadcastable.
    """
    most = torch.as_tensor(keys, dtype=entropy.dtype).clamp(min=1).log()
    return torch.where(most > 0, entropy / most.clamp(min=1e-12), 0.0)
