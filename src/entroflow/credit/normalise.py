"""Group statistics: rewards to advantages, in float64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "global", "none"]

SPREAD_FLOOR = 1e-9
"""Rewards that differ by less than this (relative to their mean, or to 1) count as equal."""


def is_tied(rewards: Tensor) -> bool:
    """Whether the rewards [n] of a group count as equal; a group of one or none is tied."""
    if len(rewards) < 2:
        return True
    spread = (rewards.max() - rewards.min()).item()
    return spread <= SPREAD_FLOOR * max(1.0, abs(rewards.mean().item()))


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    scale: Scale = "group",
    ddof: int = 0,
    epsilon: float = 1e-4,
    clip: float = 5.0,
    floor: float = 0.0,
) -> Tensor:
    """A = clamp((R - mean of its group) / (max(std, floor) + epsilon), -clip, clip).

    Args:
        rewards: [n] values; NaN is masked: it counts in no statistic, and its advantage is NaN.
        group: [n] group numbers.
        scale: the std of the reward's own `group` (GRPO), of all rewards (`global`: Flow-GRPO), or
            no division at all (`none`: Dr. GRPO).
        ddof: 0 divides the variance by n, 1 by n - 1.
        epsilon: added to the std.
        clip: bound on |A|.
        floor: least std to divide by, where a smaller one is the noise of the reward.

    Returns:
        [n] float64. A group of equal rewards, or of a single one, has advantages of exactly 0.
    """
    rewards = rewards.to(torch.float64)
    valid = ~rewards.isnan()
    _, index = group.unique(return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    values = rewards.where(valid, 0.0)

    def per_group(x: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64).index_add_(0, index, x)

    count = per_group(valid.double())
    mean = per_group(values) / count.clamp(min=1)
    centred = (values - mean[index]).where(valid, 0.0)
    tied = torch.tensor(
        [is_tied(values[valid & (index == g)]) for g in range(groups)], dtype=torch.bool
    )

    if scale == "group":
        variance = per_group(centred.square()) / (count - ddof).clamp(min=1)
        advantages = centred / (variance.sqrt().clamp(min=floor) + epsilon)[index]
    elif scale == "global":
        all_valid = values[valid]
        spread = all_valid.std(correction=ddof) if len(all_valid) > ddof else torch.zeros(())
        advantages = centred / (spread.clamp(min=floor) + epsilon)
    else:
        advantages = centred
    advantages = advantages.clamp(-clip, clip).masked_fill(tied[index], 0.0)
    return advantages.where(valid, torch.nan)
