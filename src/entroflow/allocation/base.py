"""Allocation answers: how many rollouts does each prompt get?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from entroflow.sampling.rollouts import Rollouts


class Allocation(Protocol):
    """Hands out rollouts in rounds.

    Attributes that it may have: `rounds`, how many there are, lets groups be compared while the
    last one is still being sampled; `typical(prompts)` are sizes of every round that are to be
    expected, where there is more than the first; with a true `needs_attention`, the rollouts of the
    first round hold the prompt measurement `attention_shift`.
    """

    def sizes(self, prompts: int, rounds: Sequence[Rollouts]) -> Tensor | None:
        """[P] rollouts per prompt in the next round, given the rounds so far; None ends them."""
        ...
