"""A control: images earn the rewards of other images of their group."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from entroflow.credit.terminal import Terminal
from entroflow.rewards.base import Scores
from entroflow.sampling.plan import Plan, Role


class Shuffled(Terminal):
    """Terminal credit with the rewards of each group handed on by one place, all but the first's.

    Rollouts of a group are exchangeable, so in expectation the gradient is zero (groups of three or
    more), and everything else is as it was: what is still learnt is no effect of the reward.
    """

    type: Literal["shuffled"] = "shuffled"  # type: ignore[assignment]

    def advantages(self, plan: Plan, scores: Scores) -> Tensor:
        """[B, S]; see `Credit.advantages`."""
        values = scores.values.clone()
        for group in plan.group.unique():
            mine = ((plan.group == group) & (plan.role == Role.ROLLOUT)).nonzero()[:, 0]
            # The first keeps its own. A group's advantages sum to 0: if none were its own, those of
            # the others would lean against each image, and the policy would learn the opposite.
            values[mine[1:]] = scores.values[torch.roll(mine[1:], 1)]
        return super().advantages(plan, replace(scores, values=values))
