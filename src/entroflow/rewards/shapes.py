"""The verifiable reward of the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores, Status
from entroflow.shapes.grammar import Spec, parse
from entroflow.shapes.scoring import score

read = lru_cache(maxsize=4096)(parse)


class ShapesReward(Component):
    """How well an image shows its caption: `graded` gives partial credit, `strict` is 0 or 1."""

    type: Literal["shapes"] = "shapes"
    value: Literal["graded", "strict"] = Field(
        "graded", description="graded: partial credit in [0, 1]; strict: 1 if all is right, else 0"
    )

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """See `Reward.score`.

        Raises:
            InputError: a prompt is outside the grammar of the shapes world.
        """
        specs: list[Spec] = [read(prompt.text) for prompt in prompts]
        verdict = score(images, specs)
        values = verdict.graded if self.value == "graded" else verdict.strict
        return Scores(values.to(torch.float64), (Status.OK,) * len(prompts))
