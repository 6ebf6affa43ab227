"""What a run is trained on: one reward or several, as one type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from entroflow.rewards.base import GroupReward, Reward, RewardFunction, Scores, Status
from entroflow.rewards.mixture import Combine, Mixture
from entroflow.rewards.parts import Part, as_part, as_parts
from entroflow.sampling.plan import Plan, Role
from entroflow.sampling.rollouts import Rollouts

ALONE = "reward"
"""Name of the part where there is one that a recipe gives no name."""


@dataclass(frozen=True)
class Rewards:
    """Named parts, and how they make one value per image and one advantage per step.

    Attributes:
        parts: by name, what is scored.
        weights: by name, of every part.
        combine: how, see `Mixture`; None of a single reward without a name.
        floors: by name, least standard deviation that divides, instead of the reward's own floor.
    """

    parts: Mapping[str, Part]
    weights: Mapping[str, float]
    combine: Combine | None = None
    floors: Mapping[str, float] = field(default_factory=dict)

    @property
    def pointwise(self) -> dict[str, Part]:
        """The parts that score single images."""
        return {name: part for name, part in self.parts.items() if not part.compares}

    @property
    def comparing(self) -> dict[str, Part]:
        """The parts that score the images of a group against each other."""
        return {name: part for name, part in self.parts.items() if part.compares}

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a recipe gives to the parts, by which metrics tell them apart."""
        return () if self.combine is None else tuple(self.parts)

    def total(self, scores: Mapping[str, Scores]) -> Scores:
        """The weighted sum of scores by name; an image has none where one of them failed."""
        weighted = [(self.weights[name], found) for name, found in scores.items()]
        return Scores(
            torch.stack([weight * found.values for weight, found in weighted]).sum(dim=0),
            tuple(map(_worst, *(found.statuses for _, found in weighted))),
            math.hypot(*(weight * found.floor for weight, found in weighted)),
        )

    def advantages(
        self,
        credit: Callable[[Rollouts, Scores], Tensor],
        rollouts: Rollouts,
        scores: Mapping[str, Scores],
    ) -> Tensor:
        """[B, S] advantages: of the parts, which are combined, or of their total.

        Args:
            credit: makes advantages [B, S] of one value per image; see `Credit.advantages`.
            scores: by name, of all parts.
        """
        floored = {
            name: replace(each, floor=self.floors.get(name, each.floor))
            for name, each in scores.items()
        }
        if self.combine in (None, "sum_then_normalise"):
            return credit(rollouts, self.total(floored))
        weighted = [self.weights[name] * credit(rollouts, each) for name, each in floored.items()]
        advantages = torch.stack(weighted).sum(dim=0)
        return _standardised(advantages, rollouts.plan) if self.combine == "gdpo" else advantages


def as_rewards(given: Any, key: str = "reward") -> Rewards:
    """The one place where what a recipe or a caller names becomes what a run is trained on.

    Args:
        given: a reward, a function or anything else that can be called, a `Mixture`, whose parts
            of weight 0 are left out, or `Rewards`, which stay as they are.
        key: where it stands in a recipe, also for messages.

    Raises:
        InputError: it is none of these; see `as_part`.
    """
    if isinstance(given, Rewards):
        return given
    if not isinstance(given, Mixture):
        return Rewards({ALONE: as_part(given, key)}, {ALONE: 1.0})
    weights = {name: given.weights.get(name, 1.0) for name in given.rewards}
    parts = as_parts(given.rewards, f"{key}.rewards")
    return Rewards(
        {name: part for name, part in parts.items() if weights[name]},
        {name: weight for name, weight in weights.items() if weight},
        given.combine,
        given.floors,
    )


AnyReward = Rewards | Mixture | Reward | GroupReward | RewardFunction
"""What a caller may give as the reward of a run; see `as_rewards`."""


def _worst(*statuses: Status) -> Status:
    return next((status for status in statuses if status is not Status.OK), Status.OK)


def _standardised(advantages: Tensor, plan: Plan) -> Tensor:
    """Mean 0 and standard deviation 1 over what is trained; a group without any signal keeps 0."""
    trained = plan.trained & (plan.role == Role.ROLLOUT)[:, None]
    valid = advantages[trained & ~advantages.isnan()]
    if not len(valid) or not (deviation := valid.std(correction=0)) > 0:
        return advantages
    standardised = (advantages - valid.mean()) / (deviation + 1e-8)
    return torch.where(advantages == 0, advantages, standardised)
