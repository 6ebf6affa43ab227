"""Evaluation: how good are the weights now, on prompts that training never sees?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol, Self

import torch
from pydantic import Field
from scipy import stats
from torch import Tensor

from entroflow.component import Component
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt
from entroflow.rewards.combined import Rewards
from entroflow.shapes.grammar import Split


@dataclass(frozen=True)
class Measure:
    """What an evaluation measures, for people.

    Attributes:
        name: as "strict score".
        reading: a sentence that says what it means; may be empty.
        share: whether it is a share of images, in [0, 1].
        over: what its intervals are over.
    """

    name: str
    reading: str = ""
    share: bool = False
    over: str = "images and noise"


@dataclass(frozen=True)
class Drawn:
    """Held-out images.

    Attributes:
        prompts: [P].
        images: [n, 3, H, W] in [0, 1].
        prompt: [n] number of each image's prompt.
        rewards: [n] what is trained on, NaN where there is none.
    """

    prompts: Sequence[Prompt]
    images: Tensor
    prompt: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Score:
    """A mean over `images` images, with its 95% interval, in the units of the measure."""

    value: float
    low: float
    high: float
    images: int


def mean_over_prompts(by_prompt: Tensor) -> tuple[float, float, float]:
    """Mean of the values [P] that are numbers, and its 95% interval by a t-test; else NaN."""
    known = by_prompt[~by_prompt.isnan()]
    mean, half = known.mean().item(), math.nan
    if len(known) > 1:
        error = known.std().item() / math.sqrt(len(known))
        half = float(stats.t.ppf(0.975, len(known) - 1)) * error
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        scores: `overall`, and by skill if there are any.
        reward: mean of the reward that is trained on; NaN without one.
        monitors: by name, what nothing trains on: one number per image, or a single one; NaN where
            there is none. See `shapes.blind_spots`.
        images: [n, 3, H, W] examples, the same prompts and noise at every evaluation; may be none.
        captions: [n] their prompts.
        passed: [n] whether each is strictly right; None where that can't be judged.
        by_prompt: [P] the score of each prompt, always in the same order. Where it is given, a gain
            is judged prompt by prompt; else as if the two evaluations were independent.
        drawn: all images that were judged, always in the same order; without them there are no
            monitors of the recipe and no win rates.
        by_image: [n] the score of each image that was drawn, NaN where it has none. Where it is
            given, a score that falls while the trained reward rises is warned of.
        win_rates: by name of a reward that compares, [n] points of each image over the base's.
    """

    scores: Mapping[str, Score]
    reward: float
    monitors: Mapping[str, Tensor | float]
    images: Tensor
    captions: Sequence[str]
    passed: Sequence[bool | None]
    by_prompt: Tensor | None = None
    drawn: Drawn | None = None
    by_image: Tensor | None = None
    win_rates: Mapping[str, Tensor] = field(default_factory=dict)

    def monitor_means(self) -> dict[str, float]:
        """Each monitor as one number; NaN where no image has one."""
        return {
            name: torch.as_tensor(values, dtype=torch.float64).nanmean().item()
            for name, values in self.monitors.items()
        }


class Evaluation(Protocol):
    """Judges a policy under the weights that are active.

    It may say what its scores are with an attribute `measure`.
    """

    def run(
        self,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        reward: Rewards | None = None,
        ledger: Ledger | None = None,
    ) -> Evaluated:
        """Sample held-out prompts without step noise and judge the images."""
        ...


class HeldOutEvaluation(Component):
    """An evaluation on one split of the prompts.

    Who derives from it, and heeds its fields in `run`, lets the same evaluation be repeated with
    other settings. The comparison with the base at the end of a run needs that.
    """

    measure: ClassVar[Measure] = Measure("score")
    prompts_from: ClassVar[str | None] = None
    """The field that names the held-out prompts, where they are not in the package."""
    monitor_names: ClassVar[tuple[str, ...]] = ()
    """Names of the monitors that `run` returns, as far as they are known before: a reward that is
    to be watched has another name, so that a recipe is refused when it is read."""

    split: Split = Field("validation", description="captions evaluated while training")
    steps: int = Field(10, ge=1, description="ODE steps")
    guidance: float = Field(1.0, ge=0, description="guidance scale; 1 is none")
    images: int = Field(
        48, ge=1, description="images judged while training; for each skill, if there are several"
    )
    test_images: int = Field(
        96, ge=1, description="the same, in the comparison on test prompts when the run is complete"
    )
    guidance_tried: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
        description="scales of which the comparison finds the base's best; its own is always tried",
    )

    def on_test_prompts(self) -> Self:
        """This evaluation as the comparison at the end of a run makes it."""
        settings = {"split": "test", "images": self.test_images}
        return self.model_copy(update=settings)

    def held_out(self) -> Mapping[Split, Sequence[Prompt]]:
        """All held-out prompts by split, where they can be listed."""
        return {}

    def run(
        self,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        reward: Rewards | None = None,
        ledger: Ledger | None = None,
    ) -> Evaluated:
        """See `Evaluation.run`."""
        raise NotImplementedError


def measure_of(evaluation: Evaluation) -> Measure:
    """What an evaluation measures: what it says, or else a score."""
    found = getattr(evaluation, "measure", None)
    return found if isinstance(found, Measure) else Measure("score")
