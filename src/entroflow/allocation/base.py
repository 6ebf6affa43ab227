"""Allocation answers: how many rollouts does each prompt get?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from entroflow.sampling.rollouts import Rollouts


class Allocation(Protocol):
    """Hands out rollouts in rounds.

    Attributes:
        rounds: how many there are.
    """

    rounds: ClassVar[int]

    def sizes(self, prompts: int, rounds: Sequence[Rollouts]) -> Tensor | None:
        """[P] rollouts per prompt in the next round, given the rounds so far; None ends them."""
        ...
