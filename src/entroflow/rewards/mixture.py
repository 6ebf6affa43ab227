"""Several rewards at once, with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from entroflow.component import Component, refuse_names
from entroflow.rewards.base import AnyReward, Scores, Status, as_reward

Combine = Literal["normalise_then_sum", "sum_then_normalise", "gdpo"]


class Mixture(Component):
    """A weighted mixture of named rewards.

    Scales differ: a win rate spreads over 0.3 within a group, a similarity over 0.003. So by
    default every reward is turned into advantages by itself, and these are summed.

    - `normalise_then_sum`: A = sum of w_k A_k;
    - `sum_then_normalise`: advantages of the sum of w_k R_k, for rewards on one scale;
    - `gdpo`: the first, then centred and divided by its standard deviation over the batch, so that
      the scale of the weights has no effect.

    An image that one of them could not score is masked for all.
    """

    parts: ClassVar[Mapping[str, str]] = {"rewards": "reward"}

    type: Literal["mixture"] = "mixture"
    rewards: Any = Field(
        default_factory=dict, description="by name, each with its type and keys, as in this section"
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="by name; 1 if not given, and 0 leaves a reward out"
    )
    combine: Combine = Field("normalise_then_sum", description="see above")
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="by name, least standard deviation that divides: what the reward's own noise "
        "makes of equal images",
    )

    def check_parts(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ValueError: no rewards, a name that is taken, a mixture inside, or a weight or floor
                that has no reward.
        """
        if not self.rewards:
            raise ValueError("rewards holds none; name one or more, each with a type")
        refuse_names(self.rewards, ("failed",), "rewards")
        for name, reward in self.rewards.items():
            if isinstance(reward, Mixture):
                raise ValueError(f"rewards.{name} is a mixture itself; name its rewards here")
        for key in ("weights", "floors"):
            for name, value in getattr(self, key).items():
                if name not in self.rewards:
                    known = ", ".join(self.rewards)
                    raise ValueError(f"{key}.{name} is of no reward (known: {known})")
                if key == "floors" and value < 0:
                    raise ValueError(f"floors.{name} is {value:g}, but a floor is 0 or more")
        if not self.trained:
            raise ValueError("weights leave out all rewards")

    @property
    def trained(self) -> dict[str, AnyReward]:
        """The rewards by name, without those of weight 0."""
        return {
            name: as_reward(reward, f"rewards.{name}")
            for name, reward in self.rewards.items()
            if self.weight(name)
        }

    def weight(self, name: str) -> float:
        """The weight of a reward."""
        return self.weights.get(name, 1.0)

    def summed(self, scores: Mapping[str, Scores]) -> Scores:
        """The sum of w_k R_k; an image has none where one of them failed."""
        weighted = [(self.weight(name), found) for name, found in scores.items()]
        return Scores(
            torch.stack([weight * found.values for weight, found in weighted]).sum(dim=0),
            tuple(map(_worst, *(found.statuses for _, found in weighted))),
            math.hypot(*(weight * found.floor for weight, found in weighted)),
        )


def _worst(*statuses: Status) -> Status:
    return next((status for status in statuses if status is not Status.OK), Status.OK)


def rewards_of(reward: AnyReward) -> dict[str, AnyReward]:
    """What is to be scored, by name."""
    return reward.trained if isinstance(reward, Mixture) else {"reward": reward}


def total(reward: AnyReward, scores: Mapping[str, Scores]) -> Scores:
    """One value per image: that of the only reward, or the weighted sum."""
    if isinstance(reward, Mixture):
        return reward.summed(scores)
    (only,) = scores.values()
    return only
