"""AEGPO's global level: prompts whose attention has moved most get the larger groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from entroflow.component import Component
from entroflow.sampling.rollouts import Rollouts

TIE = 1e-8
"""Shifts that differ by no more rank nobody."""


# --- the mathematics ------------------------------------------------------------------------------


def median_split(shift: Tensor, low: int, high: int) -> Tensor:
    """[P] group sizes: `high` for the half of the largest shifts, `low` for the other.

    Ranked by shift, of equals the earlier prompt first. The middle one of an odd number gets the
    mean of both, and all do where all shifts are tied: the sum is always P (low + high) / 2.

    Args:
        shift: [P].
    """
    P = len(shift)
    sizes = torch.full((P,), (low + high) // 2)
    if tied(shift):
        return sizes
    order = torch.argsort(shift, descending=True, stable=True)
    sizes[order[: P // 2]] = high
    sizes[order[P - P // 2 :]] = low
    return sizes


def water_filled(shift: Tensor, low: int, high: int, temperature: float) -> Tensor:
    """[P] group sizes between `low` and `high` that grow with the shift, of the same sum.

    What is left when all have `low` is shared by softmax(shift / (temperature std(shift))). Who
    would get more than `high` gets that, the rest is shared anew; whole numbers by the largest
    remainder. A high temperature gives all the same; a low one `high` to as many as possible.

    Args:
        shift: [P].
    """
    P, cap = len(shift), high - low
    if tied(shift):
        return torch.full((P,), (low + high) // 2)
    scores = shift.double() / (temperature * shift.double().std(correction=0))
    order = torch.argsort(shift, descending=True, stable=True)
    extra = torch.zeros(P, dtype=torch.float64)
    rest, first = P * (cap // 2), 0
    # The best come first: if anybody reaches the cap, they do.
    while first < P:
        share = rest * torch.softmax(scores[order[first:]], dim=0)
        if share[0] <= cap:
            extra[order[first:]] = share
            break
        extra[order[first]] = cap
        rest, first = rest - cap, first + 1
    whole = extra.floor()
    remainder = (extra - whole)[order]
    missing = P * (cap // 2) - int(whole.sum())
    whole[order[torch.argsort(remainder, descending=True, stable=True)[:missing]]] += 1
    return low + whole.long()


def tied(shift: Tensor) -> bool:
    """Whether nobody's shift is larger than another's."""
    return float(shift.max() - shift.min()) <= TIE


# --- the component --------------------------------------------------------------------------------


class AttentionShift(Component):
    """A small group for every prompt; then the rest goes where attention differs from the base's.

    AEGPO (2602.06825): the change of attention entropy against the reference is taken for what a
    prompt has to teach. It is measured on the rollouts of the first round, see the section
    `attention`; the weights are the same in both, so both make one group.
    """

    type: Literal["attention_shift"] = "attention_shift"
    low: int = Field(8, ge=2, description="rollouts of a prompt whose attention has moved less")
    high: int = Field(16, ge=2, description="rollouts of a prompt whose attention has moved more")
    split: Literal["median", "proportional"] = Field(
        "median", description="half of the prompts get high; proportional: all between, by softmax"
    )
    temperature: float = Field(
        1.0, gt=0, description="of split: proportional, in standard deviations of the shift"
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, but must not be more than high ({self.high})")
        if (self.low + self.high) % 2:
            raise ValueError(
                f"low + high is {self.low + self.high}, but must be even: their mean is the group "
                "size of a prompt in the middle"
            )
        return self

    @property
    def rounds(self) -> int:
        """Two, unless all groups are alike."""
        return 1 if self.low == self.high else 2

    @property
    def needs_attention(self) -> bool:
        """Whether groups differ by it."""
        return self.low < self.high

    def typical(self, prompts: int) -> list[Tensor]:
        """Of every round the [P] sizes, where no two prompts have the same shift."""
        first = torch.full((prompts,), self.low)
        shift = torch.arange(prompts, dtype=torch.float64)
        return [first, *[self._split(shift) - self.low] * (self.rounds - 1)]

    def sizes(self, prompts: int, rounds: Sequence[Rollouts]) -> Tensor | None:
        """[P] `low` for all; then what is left, by the shift that the first round showed."""
        if not rounds:
            return torch.full((prompts,), self.low)
        if len(rounds) == self.rounds:
            return None
        shift = rounds[0].prompt_measurements["attention_shift"]
        # Where a network's numbers overflow, nothing is known of the prompt.
        return self._split(shift.nan_to_num(nan=0.0)) - self.low

    def _split(self, shift: Tensor) -> Tensor:
        if self.split == "median":
            return median_split(shift, self.low, self.high)
        return water_filled(shift, self.low, self.high, self.temperature)
