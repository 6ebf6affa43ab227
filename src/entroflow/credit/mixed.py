"""Advantages of a mixture of rewards: credit is given for each, or for their sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from entroflow.credit.base import Credit
from entroflow.rewards.base import AnyReward, Scores
from entroflow.rewards.mixture import Mixture, total
from entroflow.sampling.plan import Role
from entroflow.sampling.rollouts import Rollouts


def mixed_advantages(
    credit: Credit, reward: AnyReward, rollouts: Rollouts, scores: Mapping[str, Scores]
) -> Tensor:
    """[B, S] advantages as the mixture combines them; those of a single reward are the credit's.

    Args:
        scores: by the name of the reward.
    """
    if not isinstance(reward, Mixture):
        return credit.advantages(rollouts, total(reward, scores))
    floored = {
        name: replace(found, floor=reward.floors.get(name, found.floor))
        for name, found in scores.items()
    }
    if reward.combine == "sum_then_normalise":
        return credit.advantages(rollouts, reward.summed(floored))
    parts = [
        reward.weight(name) * credit.advantages(rollouts, found) for name, found in floored.items()
    ]
    advantages = torch.stack(parts).sum(dim=0)
    return _standardised(advantages, rollouts) if reward.combine == "gdpo" else advantages


def _standardised(advantages: Tensor, rollouts: Rollouts) -> Tensor:
    """Mean 0 and standard deviation 1 over what is trained; a group without any signal keeps 0."""
    plan = rollouts.plan
    trained = plan.trained & (plan.role == Role.ROLLOUT)[:, None]
    known = advantages[trained & ~advantages.isnan()]
    if not len(known) or not (spread := known.std(correction=0)) > 0:
        return advantages
    return torch.where(advantages == 0, advantages, (advantages - known.mean()) / (spread + 1e-8))
