"""The same number of rollouts for every prompt, in one round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.sampling.rollouts import Rollouts


class Uniform(Component):
    """`group_size` rollouts per prompt."""

    rounds: ClassVar[int] = 1

    type: Literal["uniform"] = "uniform"
    group_size: int = Field(24, ge=2, description="rollouts per prompt")

    def sizes(self, prompts: int, rounds: Sequence[Rollouts]) -> Tensor | None:
        """[P] all equal, then None."""
        return None if rounds else torch.full((prompts,), self.group_size)
