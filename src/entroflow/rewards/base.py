"""Rewards: one value and one status per image. A reward that failed is NaN, never 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from entroflow.callables import uncached
from entroflow.errors import InputError
from entroflow.prompts import Prompt
from entroflow.rewards.contract import number_of, numbers_of, shown


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
        values: [n] in float64, NaN where the status is not ok. What a reward hands over may be
            anything that `contract.numbers_of` reads.
        statuses: [n]; of a reward, names will do.
        floor: a standard deviation within a group below this is the noise of the reward.
        facts: by name, numbers about the judging itself; of groups, their means.
    """

    values: Tensor
    statuses: tuple[Status, ...]
    floor: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Reward(Protocol):
    """Scores images one by one.

    What it is given is its own, and may be changed. Instead of `Scores` it may return the numbers
    alone, and an awaitable of either; see `contract`. As a `GroupReward`, it is called in threads
    where an attribute `waits` is true.
    """

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of images [n, 3, H, W] in [0, 1], each against its prompt."""
        ...


@runtime_checkable
class GroupReward(Protocol):
    """Scores the images of a group against each other."""

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


RewardFunction = Callable[[Tensor, Sequence[str], Sequence[object]], Any]
"""A user's reward: (images [n, 3, H, W] in [0, 1], prompts, metadata) -> n numbers, see `contract`.

It may be async, and anything that can be called: a partial, an instance with `__call__`.
"""


@dataclass(frozen=True)
class FunctionReward:
    """What can be called as a reward."""

    function: RewardFunction

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        """What the function returns; see `Reward.score`."""
        texts, metadata = [p.text for p in prompts], [dict(p.metadata) for p in prompts]
        return uncached(self.function)(images, texts, metadata)


def scores_of(returned: Any, count: int, who: str) -> Scores:
    """What a reward has returned of `count` images: `Scores`, or their numbers alone.

    Args:
        who: returned it, for messages.

    Raises:
        InputError: it is neither, or not of this number.
    """
    if not isinstance(returned, Scores):
        return Scores(*valued(returned, None, count, who))
    values, statuses = valued(returned.values, returned.statuses, count, who)
    floor = number_of(returned.floor, who, "floor")
    facts = {name: number_of(fact, who, name) for name, fact in returned.facts.items()}
    # One that is no number is none.
    return Scores(values, statuses, max(0.0, floor), facts)


def valued(
    values: Any, statuses: Any, count: int, who: str, of: str = "image"
) -> tuple[Tensor, tuple[Status, ...]]:
    """Values [count] as `contract.numbers_of`, NaN where the status is not ok, and their statuses.

    Args:
        statuses: [count] each a `Status` or its name; None where all that have a value are ok.

    Raises:
        InputError: as `numbers_of`; or no statuses, or not of this number.
    """
    if statuses is None:
        found = numbers_of(values, count, who, of)
        named = [Status.OK] * count
    else:
        each = "one value and one status"
        found = numbers_of(values, count, who, of, each)
        named = _statuses(statuses, count, f"{who} must return {each} per {of}")
    known = found.isfinite().tolist()
    named = [
        Status.UNPARSED if status is Status.OK and not there else status
        for status, there in zip(named, known, strict=True)
    ]
    good = torch.tensor([status is Status.OK for status in named], dtype=torch.bool, device="cpu")
    return found.where(good, torch.nan), tuple(named)


def _statuses(given: Any, count: int, must: str) -> list[Status]:
    if isinstance(given, str | Mapping | Set) or not isinstance(given, Iterable):
        raise InputError(f"{must}, not the statuses {shown(given)}.")
    named = []
    for each in islice(given, count + 1):
        try:
            named.append(Status(each))
        except ValueError:
            raise InputError(
                f"{must}, not the status {shown(each)}; there are {', '.join(Status)}."
            ) from None
    if len(named) != count:
        raise InputError(f"{must}: {count} values, but another number of statuses.")
    return named


def called(part: Any) -> str:
    """What messages call a function, what a partial is of, or else an object: by its class."""
    while isinstance(part, partial):
        part = part.func
    return str(getattr(part, "__qualname__", type(part).__name__))


def failures(statuses: Iterable[Status]) -> dict[str, int]:
    """How often each status is among them, without those that are ok."""
    return dict(sorted(Counter(s.value for s in statuses if s is not Status.OK).items()))


def failed(count: int, status: Status) -> Scores:
    """Scores of images of which none has one."""
    return Scores(torch.full((count,), torch.nan, dtype=torch.float64), (status,) * count)
