"""A part of the rewards of a run: a reward of any kind, and what there is to know of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from entroflow.errors import InputError
from entroflow.rewards.base import Cancellable, FunctionReward, GroupReward, Reward, called
from entroflow.rewards.mixture import Mixture


@dataclass(frozen=True)
class Part:
    """A reward or monitor as a run sees it. Its traits are looked at once, by `as_part`.

    Attributes:
        reward: a `GroupReward` where it compares, else a `Reward`.
        key: where it stands in a recipe, as `reward.rewards.clip`.
        name: what messages call it: a function's or a class's.
        compares: whether it scores the images of a group against each other.
        waits: whether it waits for others, as for a server, so that sampling had better go on.
        cancel: gives up what is being scored now, as nobody waits for it; returns at once.
    """

    reward: Any
    key: str
    name: str
    compares: bool
    waits: bool
    cancel: Callable[[], None]


def as_part(given: Any, key: str) -> Part:
    """What a recipe or a caller names as one reward: an object, or whatever can be called.

    Args:
        key: where it stands in a recipe, also for messages.

    Raises:
        InputError: it is a mixture, a class, or no reward.
    """
    if isinstance(given, Mixture):
        raise InputError(f"{key} is a mixture itself; name its rewards here.")
    if inspect.isclass(given):
        raise InputError(
            f"{key}: {given.__name__} is a class; give an instance: {given.__name__}(...)."
        )
    is_object = isinstance(given, Reward | GroupReward)
    if not is_object and not callable(given):
        raise InputError(
            f"{key}: {type(given).__name__} is no reward: it has neither score nor both "
            "score_group and score_against, and can't be called."
        )
    return Part(
        reward=given if is_object else FunctionReward(given),
        key=key,
        name=called(given),
        compares=isinstance(given, GroupReward),
        waits=bool(getattr(given, "waits", False)),
        cancel=given.cancel if isinstance(given, Cancellable) else _nothing,
    )


def as_parts(given: Mapping[str, Any], key: str) -> dict[str, Part]:
    """Rewards by name as parts; see `as_part`.

    Args:
        key: where they stand in a recipe.
    """
    return {name: as_part(each, f"{key}.{name}") for name, each in given.items()}


def _nothing() -> None:
    """Cancels what can't be cancelled."""
