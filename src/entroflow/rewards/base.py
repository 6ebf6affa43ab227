"""Rewards: one value and one status per image. A reward that failed is NaN, never 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.prompts import Prompt


class Status(StrEnum):
    """How the scoring of an image ended.

    Of an answer: cut is one that ended at a limit, empty one without text, refused one that the
    model or a filter held back, tool_call a call in place of an answer, contradictory one with
    several verdicts, and unparsed one without any.
    """

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    CUT = "cut"
    EMPTY = "empty"
    REFUSED = "refused"
    TOOL_CALL = "tool_call"
    CONTRADICTORY = "contradictory"
    UNPARSED = "unparsed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Scores:
    """What a reward says of n images.

    Attributes:
        values: [n] in float64, NaN where the status is not ok.
        statuses: [n].
        floor: a standard deviation within a group below this is the noise of the reward.
        facts: by name, numbers about the judging itself; of groups, their means.
    """

    values: Tensor
    statuses: tuple[Status, ...]
    floor: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """Scores images one by one."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of images [n, 3, H, W] in [0, 1], each against its prompt."""
        ...


@runtime_checkable
class GroupReward(Protocol):
    """Scores the images of a group against each other.

    As any reward, it is called in threads where an attribute `waits` is true.
    """

    def score_group(self, images: Tensor, prompt: Prompt, source: np.random.Generator) -> Scores:
        """Scores of images [n, 3, H, W] in [0, 1] of one prompt.

        Args:
            source: for whatever is drawn, as who is shown first; a function of the address of the
                group (stream `JUDGE`).
        """
        ...

    def score_against(
        self,
        images: Tensor,
        others: Tensor,
        prompts: Sequence[Prompt],
        source: np.random.Generator,
    ) -> Scores:
        """Scores of images [n, 3, H, W], each against its counterpart in `others`, as a base's."""
        ...


@runtime_checkable
class Cancellable(Protocol):
    """A reward that waits for others, and can be told that nobody waits for it any more."""

    def cancel(self) -> None:
        """Give up what is being scored now; returns at once."""
        ...


AnyReward = Reward | GroupReward

RewardFunction = Callable[[Tensor, Sequence[str], Sequence[object]], Sequence[float]]
"""A user's reward: (images [n, 3, H, W] in [0, 1], prompts, metadata) -> n numbers."""


@dataclass(frozen=True)
class FunctionReward:
    """A plain function as a reward. What it returns that is not finite is masked."""

    function: RewardFunction

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """See `Reward.score`.

        Raises:
            InputError: the function returned the wrong number of values: a bug, not a failure.
        """
        name = name_of(self)
        with torch.no_grad():
            returned = self.function(
                images, [p.text for p in prompts], [dict(p.metadata) for p in prompts]
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


def name_of(reward: AnyReward) -> str:
    """What messages call a reward."""
    if isinstance(reward, FunctionReward):
        return getattr(reward.function, "__qualname__", repr(reward.function))
    return type(reward).__name__


def failures(statuses: Iterable[Status]) -> dict[str, int]:
    """How often each status is among them, without those that are ok."""
    return dict(sorted(Counter(s.value for s in statuses if s is not Status.OK).items()))


def failed(count: int, status: Status) -> Scores:
    """Scores of images of which none has one."""
    return Scores(torch.full((count,), torch.nan, dtype=torch.float64), (status,) * count)
