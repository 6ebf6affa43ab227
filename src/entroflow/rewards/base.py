"""Rewards: one value and one status per image. A reward that failed is NaN, never 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.prompts import Prompt
from entroflow.sampling.rollouts import Rollouts

log = logging.getLogger(__name__)


class Status(StrEnum):
    """How the scoring of an image ended."""

    OK = "ok"
    ERROR = "error"
    UNPARSED = "unparsed"


@dataclass(frozen=True)
class Scores:
    """Values [n] in float64, NaN where the status is not ok, and a status per image."""

    values: Tensor
    statuses: tuple[Status, ...]


class Reward(Protocol):
    """Scores images one by one."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of images [n, 3, H, W] in [0, 1], each against its prompt."""
        ...


RewardFunction = Callable[[Tensor, Sequence[str], Sequence[object]], Sequence[float]]
"""A user's reward: (images [n, 3, H, W] in [0, 1], prompts, metadata) -> n numbers."""


@dataclass(frozen=True)
class FunctionReward:
    """A plain function as a reward. What it raises, or returns that is not finite, is masked."""

    function: RewardFunction

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """See `Reward.score`.

        Raises:
            InputError: the function returned the wrong number of values: a bug, not a failure.
        """
        name = getattr(self.function, "__qualname__", repr(self.function))
        try:
            with torch.no_grad():
                returned = self.function(
                    images, [p.text for p in prompts], [dict(p.metadata) for p in prompts]
                )
        except Exception as error:
            log.warning(
                "reward %s failed on %d images: %s: %s",
                name, len(images), type(error).__name__, error,
            )  # fmt: skip
            return Scores(
                torch.full((len(images),), torch.nan, dtype=torch.float64),
                (Status.ERROR,) * len(images),
            )
        try:
            values = torch.as_tensor(returned, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"reward {name} must return one number per image, not {returned!r:.80}."
            ) from None
        if values.shape != (len(images),):
            raise InputError(
                f"reward {name} must return one number per image: {len(images)} images, "
                f"but a result of shape {tuple(values.shape)}."
            )
        finite = values.isfinite()
        statuses = tuple(Status.OK if ok else Status.UNPARSED for ok in finite.tolist())
        return Scores(values.where(finite, torch.nan), statuses)


def score(
    reward: Reward, rollouts: Rollouts, finished: Iterable[Tensor], ledger: Ledger | None = None
) -> Scores:
    """Consume a stream of finished rows and score their images as they come.

    Args:
        finished: row numbers, as `sampling.sample` yields them while it fills `rollouts`.

    Returns:
        Scores [B] of all rows of the plan; NaN for rows that are not scored. A value that is not
        finite, or whose status is not ok, is NaN whatever the reward put there.

    Raises:
        InputError: the reward returned the wrong number of values or statuses.
    """
    plan = rollouts.plan
    values = torch.full((plan.rows,), torch.nan, dtype=torch.float64)
    statuses = [Status.OK] * plan.rows
    for rows in finished:
        assert rollouts.images is not None
        images = rollouts.images[rollouts.image_of(rows)]
        prompts = [plan.prompts[p] for p in plan.prompt[rows].tolist()]
        if ledger is None:
            scores = reward.score(images, prompts)
        else:
            with ledger.timed("score"):
                scores = reward.score(images, prompts)
            ledger.reward_calls += len(rows)
        if scores.values.shape != (len(rows),) or len(scores.statuses) != len(rows):
            raise InputError(
                f"reward {type(reward).__name__} must return one value and one status per image: "
                f"{len(rows)} images, but values of shape {tuple(scores.values.shape)} and "
                f"{len(scores.statuses)} statuses."
            )
        for row, value, status in zip(
            rows.tolist(), scores.values.tolist(), scores.statuses, strict=True
        ):
            good = status == Status.OK and math.isfinite(value)
            values[row] = value if good else math.nan
            statuses[row] = Status.UNPARSED if status == Status.OK and not good else status
    return Scores(values, tuple(statuses))


def join_scores(rounds: Sequence[Scores]) -> Scores:
    """The scores of several rounds as one."""
    return Scores(
        torch.cat([scores.values for scores in rounds]),
        tuple(status for scores in rounds for status in scores.statuses),
    )
