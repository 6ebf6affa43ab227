"""The one attention function of the embedded models."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """Softmax attention, written out: faster than the fused kernel on CPUs with bfloat16 units.

    Args:
        q, k, v: [B, heads, L, head width].
        layer: index of the block that asks.

    Returns:
        [B, heads, L, head width].
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    return torch.softmax(scores, dim=-1) @ v
