"""The sections of a recipe that nothing can be chosen for: how to sample, to step, and to end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from entroflow.component import Component, refuse_names

Decay = Annotated[float, Field(ge=0, lt=1)]


def amount(value: object) -> object:
    """The whole number that `300k`, `1.5M` or `3e5` stands for; what is no text, as it is."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKM]?)", value.strip())
        if not found:
            raise ValueError("must be a number like 300000, 300k or 1.5M")
        value = float(found[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}[found[2]]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Amount = Annotated[int, BeforeValidator(amount)]


class Sampling(Component):
    """How rollouts are sampled."""

    steps: int = Field(10, ge=2, description="steps of the base grid")
    guidance: float = Field(1.0, ge=0, description="guidance scale; 1 is none")
    batch_size: int = Field(
        64,
        ge=1,
        description="most images in one network call, not counting the second pass of guidance",
    )
    state_dtype: Literal["float64", "float32", "bfloat16"] = Field(
        "float32", description="storage type of states; the carried state is rounded to it"
    )


class Scoring(Component):
    """What becomes of images that could not be scored."""

    on_failure: Literal["mask", "raise"] = Field(
        "mask",
        description="mask: they are left out, and counted; raise: the run stops at the first",
    )
    most_masked: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of an iteration's images that may be masked; of more nothing is learnt, "
        "and the run goes on",
    )


class Monitors(Component):
    """What is watched on held-out images and never trained on.

    Reward hacking shows there first: the reward rises, while statistics of the images leave the
    range of the base's, or another reward falls.
    """

    parts: ClassVar[Mapping[str, str]] = {"rewards": "reward"}

    rewards: Any = Field(
        default_factory=dict,
        description="by name, each with its type and keys, as in the section reward",
    )
    best: str | None = Field(
        None,
        description="what the best checkpoint is chosen by: score, or the name of a reward here; "
        "null: the reward that is trained on, over the held-out images",
    )
    on_hacking: Literal["warn", "stop"] = Field(
        "warn", description="what to do where the reward seems to be hacked; stop ends the run"
    )
    band: float = Field(
        1.5,
        gt=0,
        description="how far a statistic may move, in standard deviations of the base's images",
    )

    def check_parts(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ValueError: a name that is taken, or `best` names nothing.
        """
        # Win rates of a mixture's rewards are `win_rate/...`, and looked for by that beginning.
        win_rates = [name for name in self.rewards if name.startswith("win_rate")]
        taken = ("reward", "score", "score_low", "score_high", *win_rates)
        refuse_names(self.rewards, taken, "rewards")
        known = ["score", *self.rewards]
        if self.best is not None and self.best not in known:
            raise ValueError(f"best is {self.best!r}, which is none of: {', '.join(known)}")


class Attention(Component):
    """Which attention entropy is measured, where a part asks for it or `measure` does.

    One number per state: the mean over layers, heads and image tokens of the entropy of the
    softmax over keys. AEGPO (2602.06825) leaves open which attention; what is here is our choice.
    """

    measure: bool = Field(
        False, description="measure it, and how it moves from the reference's, for the report only"
    )
    keys: Literal["all", "text", "image"] = Field(
        "all", description="what the image tokens look at: everything, or one of both alone"
    )
    layer_stride: int = Field(
        4, ge=1, description="every how many layers one is measured, from the first on"
    )
    queries: int = Field(128, ge=1, description="most image tokens measured, spread over the image")
    normalised: bool = Field(
        True, description="divided by its largest value, the logarithm of the number of keys"
    )
    states: int = Field(
        4, ge=1, description="states of a prompt at which policy and reference are compared"
    )
    shift: Literal["absolute", "relative"] = Field(
        "absolute", description="how: their difference, or that over the reference's"
    )
    curve_ema: float = Field(
        0.9, ge=0, lt=1, description="decay of the moving average of its curve, per iteration"
    )
    seed: int = Field(0, ge=0, description="of the choice of image tokens")


class Optimizer(Component):
    """AdamW over the trainable weights, and their moving average."""

    learning_rate: float = Field(1e-4, gt=0, description="step size of AdamW, at its highest")
    warm_up: int = Field(0, ge=0, description="iterations of linear warm-up")
    cool_down_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "share of the run, at its end, in which the rate falls linearly; a run that is resumed "
            "for more iterations goes on at a higher rate"
        ),
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="decays of AdamW's first and second moment, each in [0, 1)"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    max_grad_norm: float = Field(
        1.0, gt=0, description="bound on the gradient norm, of log-probabilities not divided by D"
    )
    micro_batch: int = Field(64, ge=1, description="most states in one forward and backward pass")
    ema: float = Field(
        0.9, ge=0, lt=1, description="decay of the moving average, per iteration; 0 follows at once"
    )

    def rate_at(self, iteration: int, share: float) -> float:
        """The learning rate of one iteration (from 0) with a share of the run, in [0, 1), done."""
        up = (iteration + 1) / self.warm_up if self.warm_up else 1.0
        down = (1 - share) / self.cool_down_share if self.cool_down_share else 1.0
        return self.learning_rate * min(1.0, up, down)


ENDS = {
    "iterations": "iterations",
    "budget": "weighted evaluations",
    "updates": "updates",
    "minutes": "minutes",
}
"""Keys of `run` that end it, and their units."""


class Run(Component):
    """How long, how often, and with which seed.

    The run ends after `iterations`, or with the iteration that comes nearest to `budget`, `updates`
    or `minutes`, whichever is first.
    """

    iterations: int | None = Field(
        100,
        ge=0,
        description="iterations of the whole run; 0 only evaluates, null leaves the end to the "
        "three keys below",
    )
    budget: Amount | None = Field(
        None,
        ge=1,
        description="weighted network evaluations (a forward and backward pass counts three), as "
        "300000 or 300k",
    )
    updates: int | None = Field(None, ge=1, description="optimizer steps")
    minutes: float | None = Field(
        None, gt=0, description="training time, without evaluations and checkpoints"
    )
    # One more, for the test prompts, must still fit the 64 bits of a noise address.
    seed: int = Field(0, ge=0, lt=2**63 - 1, description="run seed, part of every noise address")
    evaluate_every: int = Field(10, ge=1, description="iterations between evaluations")
    checkpoint_every: int = Field(20, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the latest checkpoints stay")

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if not self.ends:
            raise ValueError("give iterations, budget, updates or minutes, or several of them")
        return self

    @property
    def ends(self) -> dict[str, float]:
        """What ends the run, by the keys that are set; whichever comes first does."""
        return {key: value for key in ENDS if (value := getattr(self, key)) is not None}

    def share_done(self, spent: Mapping[str, float]) -> float:
        """How much of the run lies behind: in [0, 1], and 1 only at its end.

        Args:
            spent: `iterations` so far, and the `budget`, `updates` and `minutes` they took.
        """
        done = 0.0
        for key, end in self.ends.items():
            left, of_one = end - spent[key], spent[key] / max(spent["iterations"], 1)
            # Half an iteration more would be past the end: no other comes nearer to it.
            done = max(done, 1.0 if 2 * left <= of_one else spent[key] / end)
        return done

    @property
    def test_seed(self) -> int:
        """Seed of the comparison on test prompts: other noise than the run's evaluations saw."""
        return self.seed + 1
