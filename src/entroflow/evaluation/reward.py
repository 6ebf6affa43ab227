"""Evaluation by the reward that is trained on, with held-out prompts: for models of any kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from entroflow.errors import InputError
from entroflow.evaluation.base import (
    Drawn,
    Evaluated,
    HeldOutEvaluation,
    Measure,
    Score,
    mean_over_prompts,
)
from entroflow.evaluation.image_statistics import NAMES, statistics
from entroflow.evaluation.images import draw, shares
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt, read_prompts
from entroflow.rewards.combined import Rewards
from entroflow.shapes.grammar import Split

FEWEST = 4
"""Prompts of a file: an interval needs two of each split."""
EXAMPLES = 8


class RewardEvaluation(HeldOutEvaluation):
    """Mean reward of ODE samples of held-out prompts, the same prompts and noise every time.

    The prompts of the file are dealt in turn: the first is for validation, the second for the test.
    Every prompt counts alike, however many of its images have a reward. Where there are too few
    images for two of each prompt, prompts are left out: diversity needs two.
    """

    measure: ClassVar[Measure] = Measure(
        "reward",
        "The score is the mean reward over held-out prompts.",
        over="prompts and noise",
    )
    prompts_from: ClassVar[str | None] = "path"
    monitor_names: ClassVar[tuple[str, ...]] = NAMES

    type: Literal["reward"] = "reward"
    path: Path = Field(description="file of held-out prompts, read as by the prompts of type text")
    key: str = Field("prompt", description="key or column of the prompt in records")

    def model_post_init(self, _: Any) -> None:
        """Refuse what is not held out."""
        if self.split == "train":
            raise ValueError("split is validation or test: an evaluation is on held-out prompts")

    def run(
        self,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        reward: Rewards | None = None,
        ledger: Ledger | None = None,
    ) -> Evaluated:
        """See `Evaluation.run`.

        Raises:
            InputError: there is no reward, or the file has too few prompts.
        """
        if reward is None:
            raise InputError("an evaluation by reward needs the reward of the run.")
        prompts = _spread(self.prompts(self.split), self.images // 2)
        drawn = draw(
            policy, prompts, shares(self.images, len(prompts)),
            steps=self.steps, guidance=self.guidance, seed=seed, batch_size=batch_size,
            reward=reward, ledger=ledger,
        )  # fmt: skip
        return self.judged(drawn)

    def judged(self, drawn: Drawn) -> Evaluated:
        """The evaluation of images that have their rewards."""
        numbers = range(len(drawn.prompts))
        by_prompt = torch.stack([drawn.rewards[drawn.prompt == p].nanmean() for p in numbers])
        examples = [int((drawn.prompt == p).nonzero()[0]) for p in drawn.prompt.unique().tolist()]
        examples = examples[:EXAMPLES]
        return Evaluated(
            scores={"overall": Score(*mean_over_prompts(by_prompt), images=len(drawn.images))},
            reward=by_prompt.nanmean().item(),
            monitors=statistics(drawn.images, drawn.prompt),
            images=drawn.images[examples],
            captions=[drawn.prompts[p].text for p in drawn.prompt[examples].tolist()],
            passed=[None] * len(examples),
            by_prompt=by_prompt,
            drawn=drawn,
        )

    def held_out(self) -> Mapping[Split, Sequence[Prompt]]:
        """See `HeldOutEvaluation.held_out`."""
        return self._dealt

    def check(self) -> None:
        """See `Component.check`."""
        super().check()
        self.prompts(self.split)

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of one split.

        Raises:
            InputError: no such file, or too few prompts in it.
        """
        return self._dealt[split]

    @cached_property
    def _dealt(self) -> dict[Split, list[Prompt]]:
        found = read_prompts(self.path, self.key)
        if len(found) < FEWEST:
            raise InputError(
                f"evaluation.path: {self.path} has {len(found)} prompt{'s' * (len(found) != 1)}, "
                f"but an evaluation needs at least {FEWEST}, half of them for the test."
            )
        return {"validation": found[::2], "test": found[1::2]}


def _spread(prompts: list[Prompt], most: int) -> list[Prompt]:
    """At most so many of the prompts, and at least two, evenly over the list."""
    number = min(len(prompts), max(2, most))
    return [prompts[i * len(prompts) // number] for i in range(number)]
