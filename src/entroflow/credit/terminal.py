"""The reward of the final image is the credit of every step that led to it."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.credit.normalise import Scale, group_advantages
from entroflow.rewards.base import Scores
from entroflow.sampling.plan import Plan, Role


class Terminal(Component):
    """Group-normalised final reward, the same for all steps of a row (GRPO)."""

    type: Literal["terminal"] = "terminal"
    scale: Scale = Field(
        "group", description="whose standard deviation divides: group, global, none"
    )
    ddof: Literal[0, 1] = Field(0, description="0: divide the variance by n; 1: by n - 1")
    epsilon: float = Field(1e-4, ge=0, description="added to the standard deviation")
    advantage_clip: float = Field(5.0, gt=0, description="bound on the size of an advantage")

    def complete(self, plan: Plan) -> Plan:
        """The plan itself: rollouts end in the images that are scored."""
        return plan

    def advantages(self, plan: Plan, scores: Scores) -> Tensor:
        """[B, S]; see `Credit.advantages`."""
        rollout = plan.role == Role.ROLLOUT
        per_row = torch.zeros(plan.rows, dtype=torch.float64)
        per_row[rollout] = group_advantages(
            scores.values[rollout],
            plan.group[rollout],
            scale=self.scale,
            ddof=self.ddof,
            epsilon=self.epsilon,
            clip=self.advantage_clip,
            floor=scores.floor,
        )
        return per_row[:, None].expand(plan.std.shape)
