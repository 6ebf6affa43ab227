"""Evaluation: how good are the weights now, on prompts that training never sees?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.rewards.base import Reward
from entroflow.shapes.grammar import Split


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
        monitors: by name, numbers that nothing trains on; see `shapes.blind_spots`.
        images: [n, 3, H, W] examples, the same prompts and noise at every evaluation; may be none.
        captions: [n] their prompts.
        passed: [n] whether each is strictly right.
    """

    scores: Mapping[str, SkillScore]
    reward: float
    monitors: Mapping[str, float]
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


class HeldOutEvaluation(Component):
    """An evaluation on one split of the prompts.

    Who derives from it, and heeds its fields in `run`, lets the same evaluation be repeated with
    other settings. The comparison with the base at the end of a run needs that.
    """

    split: Split = Field("validation", description="captions evaluated while training")
    steps: int = Field(10, ge=1, description="ODE steps")
    guidance: float = Field(1.0, ge=0, description="guidance scale; 1 is none")
    images_per_skill: int = Field(48, ge=1, description="images judged for each skill")
    test_images_per_skill: int = Field(
        96, ge=1, description="in the comparison on test prompts when the run is complete"
    )

    def on_test_prompts(self) -> Self:
        """This evaluation as the comparison at the end of a run makes it."""
        settings = {"split": "test", "images_per_skill": self.test_images_per_skill}
        return self.model_copy(update=settings)

    def run(
        self,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        reward: Reward | None = None,
        ledger: Ledger | None = None,
    ) -> Evaluated:
        """See `Evaluation.run`."""
        raise NotImplementedError
