"""Evaluation: how good are the weights now, on prompts that training never sees?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.rewards.base import Reward


@dataclass(frozen=True)
class SkillScore:
    """The strict and the graded score of one skill, with a 95% interval of the strict score.

    All lie in [0, 1]; `images` is the number of images judged.
    """

    strict: float
    low: float
    high: float
    graded: float
    images: int


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        scores: by skill, and `overall`.
        reward: mean of the reward that is trained on.
        diversity, texture, contrast: monitors; see `shapes.blind_spots`.
        images: [n, 3, H, W] examples, the same prompts and noise at every evaluation; may be none.
        captions: [n] their prompts.
        passed: [n] whether each is strictly right.
    """

    scores: Mapping[str, SkillScore]
    reward: float
    diversity: float
    texture: float
    contrast: float
    images: Tensor
    captions: Sequence[str]
    passed: Sequence[bool]


class Evaluation(Protocol):
    """Judges a policy under the weights that are active."""

    def run(
        self,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        reward: Reward | None = None,
        ledger: Ledger | None = None,
    ) -> Evaluated:
        """Sample held-out prompts without step noise and judge the images."""
        ...
