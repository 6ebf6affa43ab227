"""How often a model is right: Avg@k and Pass@k over problems, with intervals."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def avg_at(right: Tensor) -> Tensor:
    """[P] share of right answers to each problem.

    Args:
        right: [P, n] bool.
    """
    return right.double().mean(dim=1)


def pass_at(right: Tensor, k: int) -> Tensor:
    """[P] probability that of k answers to a problem one is right, estimated from n.

    Without bias: 1 - C(n - c, k) / C(n, k), the share of all choices of k that hold one of the c
    right ones (Chen et al., 2107.03374).

    Args:
        right: [P, n] bool.
        k: at most n.

    Raises:
        ValueError: k is not in [1, n].
    """
    n = right.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, but must be between 1 and the {n} answers to a problem.")
    missed = [math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)]
    return 1 - torch.tensor(missed, dtype=torch.float64)[right.sum(dim=1)]
