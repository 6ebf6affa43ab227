"""Pref-GRPO's reward: the share of the other images of the group that a judge finds worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.prompts import Prompt
from entroflow.rewards.awaiting import awaited
from entroflow.rewards.base import Cancellable, Scores, Status, called, failed, valued
from entroflow.rewards.contract import own, undisturbed
from entroflow.rewards.win_rates import (
    OnDisagree,
    Order,
    circulant,
    random_pairs,
    round_robin,
    settled,
    shown,
    trust,
    win_rates,
)

ROUNDING = 1e-6
"""By so much probabilities may lie beyond [0, 1]."""

Schedule = Literal["round_robin", "circulant", "random"]

UNREADABLE = (Status.UNPARSED, Status.CONTRADICTORY)
"""Of whole answers, those without one verdict."""


@dataclass(frozen=True)
class Answers:
    """What a judge says of m comparisons.

    Attributes:
        points: [m] of the image that was shown first, in [0, 1]: 1 where it is better, 0.5 where
            both are as good, or the probability that it is better; NaN where the status is not ok.
            What a judge hands over may be anything that `contract.numbers_of` reads.
        statuses: [m]; of a judge, names will do.
    """

    points: Tensor
    statuses: tuple[Status, ...]


class Judge(Protocol):
    """Says which of two images of a prompt is better.

    One that waits for others, as for a server, says so with an attribute `waits`. What it is given
    is its own, and may be changed. Instead of `Answers` it may return the points alone, and an
    awaitable of either; see `contract`.
    """

    def compare(self, images: Tensor, sides: Tensor, prompts: Sequence[Prompt]) -> Answers:
        """Answers to m comparisons.

        Args:
            images: [n, 3, H, W] in [0, 1]; what is computed of one, is computed once.
            sides: [m, 2] indices of the image that is shown first, and of the other.
            prompts: [m] what the two should show.
        """
        ...


class Pairwise(Component):
    """The win rate of an image against the others of its group, by a judge of pairs.

    Pref-GRPO (2508.20751): sum of points over comparisons. Only images of one group meet. The
    published settings are `schedule: round_robin`, `order: fixed`, `on_unparsed: tie` and
    `decimals: 3`; a judge that prefers a place is undone by `order: swap`, which asks twice.
    """

    parts: ClassVar[Mapping[str, str]] = {"judge": "judge"}

    type: Literal["pairwise"] = "pairwise"
    judge: Any = Field(None, description="the judge, with its type and keys")
    schedule: Schedule = Field(
        "round_robin",
        description="who meets whom: all; or each image `comparisons` others, neighbours on a ring "
        "in the order of the group (circulant) or in one drawn anew (random)",
    )
    comparisons: int = Field(4, ge=1, description="of circulant and random: others that each meets")
    order: Order = Field(
        "swap",
        description="what is shown first: each once (swap, two questions a pair), by a coin, or "
        "the first of the group",
    )
    on_disagree: OnDisagree = Field(
        "tie", description="of swap: what two answers make that contradict each other"
    )
    on_unparsed: Literal["mask", "tie"] = Field(
        "mask",
        description="a whole answer without one verdict: no comparison, or a tie as published",
    )
    min_valid: float = Field(
        0.5, ge=0, le=1, description="least share of a group's comparisons, or none of it counts"
    )
    decimals: int | None = Field(None, ge=0, description="win rates are rounded to; published: 3")

    @property
    def waits(self) -> bool:
        """Whether the judge waits for others, so that sampling had better go on."""
        return bool(getattr(self.judge, "waits", False))

    def cancel(self) -> None:
        """See `Cancellable.cancel`."""
        if isinstance(self.judge, Cancellable):
            self.judge.cancel()

    def score_group(self, images: Tensor, prompt: Prompt, source: np.random.Generator) -> Scores:
        """See `GroupReward.score_group`. A group of one is skipped."""
        n = len(images)
        if n < 2:
            return failed(n, Status.SKIPPED)
        pairs = self._pairs(n, source)
        sides = shown(pairs, self.order, source)
        start = perf_counter()
        said = self._compared(images, sides, [prompt] * len(sides))
        seconds = perf_counter() - start
        answers = self._answers(said)
        points = settled(answers, pairs, sides, self.order, self.on_disagree)
        rates = win_rates(n, pairs, points, self.min_valid)
        found = asdict(trust(n, pairs, sides, answers, points, rates))
        triads, circles = found.pop("triads"), found.pop("intransitive")
        unparsed = sum(status in UNREADABLE for status in said.statuses)
        cut = sum(status is Status.CUT for status in said.statuses)
        facts = {
            **found,
            "intransitive": circles / triads if triads else math.nan,
            "unparsed": unparsed / len(sides),
            "cut": cut / len(sides),
            "questions": float(len(sides)),
            "seconds": seconds,
        }
        if self.decimals is not None:
            rates = rates.round(decimals=self.decimals)
        return Scores(rates, _statuses(rates, sides, said), facts=facts)

    def score_against(
        self,
        images: Tensor,
        others: Tensor,
        prompts: Sequence[Prompt],
        source: np.random.Generator,
    ) -> Scores:
        """See `GroupReward.score_against`: the points against one other image each.

        Always asked in both orders, or a preference for a place would pass for a gain.
        """
        n = len(images)
        pairs = torch.stack([torch.arange(n), torch.arange(n, 2 * n)], dim=1)
        sides = shown(pairs, "swap", source)
        asked = [prompts[i % n] for i in sides[:, 0].tolist()]
        said = self._compared(torch.cat([images, others]), sides, asked)
        points = settled(self._answers(said), pairs, sides, "swap", self.on_disagree)
        return Scores(points, _statuses(points, sides % n, said))

    def _pairs(self, n: int, source: np.random.Generator) -> Tensor:
        if self.schedule == "circulant":
            return circulant(n, self.comparisons)
        if self.schedule == "random":
            return random_pairs(n, self.comparisons, source)
        return round_robin(n)

    def _compared(self, images: Tensor, sides: Tensor, prompts: Sequence[Prompt]) -> Answers:
        """What the judge says, with points in float64 on the CPU.

        Raises:
            InputError: it returned no points, the wrong number of them, or some beyond [0, 1].
        """
        who = f"judge {called(self.judge)}"
        with undisturbed():
            said = awaited(self.judge.compare(images, sides.clone(), own(prompts)))
            whole = isinstance(said, Answers)
            given, named = (said.points, said.statuses) if whole else (said, None)
            points, statuses = valued(given, named, len(sides), who, "comparison")
        beyond = points[(points < -ROUNDING) | (points > 1 + ROUNDING)]
        if len(beyond):
            raise InputError(
                f"{who} must return points in [0, 1], 1 where the first image is better, not "
                f"{beyond[0].item():g}."
            )
        return Answers(points.clamp(0, 1), statuses)

    def _answers(self, said: Answers) -> Tensor:
        """[m] points; NaN where an answer does not count."""
        points = said.points
        if self.on_unparsed == "tie":
            unparsed = torch.tensor([s in UNREADABLE for s in said.statuses], dtype=torch.bool)
            points = points.masked_fill(unparsed, 0.5)
        return points


def _statuses(values: Tensor, sides: Tensor, said: Answers) -> tuple[Status, ...]:
    """[n] ok where there is a value; else what went wrong with one of the image's comparisons."""
    wrong = dict.fromkeys(range(len(values)), Status.SKIPPED)
    for (first, second), status in zip(sides.tolist(), said.statuses, strict=True):
        if status is not Status.OK:
            wrong[first] = wrong[second] = status
    known = (~values.isnan()).tolist()
    return tuple(Status.OK if ok else wrong[i] for i, ok in enumerate(known))
