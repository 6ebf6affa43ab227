"""A reward of the user's for texts: called as TRL calls it, while training and when judging.

It is given `completions`, `prompts`, `completion_ids`, every column of the data, and what TRL gives
of the training: `trainer_state`, `log_extra` and `log_metric`. What it may return is said in
`rewards/contract.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from entroflow.errors import InputError
from entroflow.rewards.awaiting import awaited
from entroflow.rewards.contract import numbers_of, own_copy, told, undisturbed

Reward = Callable[..., Sequence[float | None]]

OF_TRAINING = ("trainer_state", "log_extra", "log_metric")
GIVEN = ("prompts", "completions", "completion_ids", *OF_TRAINING)
"""Arguments that are no columns."""
NOT_GIVEN = (*GIVEN, "completion", "environments", "image", "images")
"""Columns that TRL would take for something else, or refuse."""


def guarded(reward: Any, name: str) -> Reward:
    """A reward of the user's, whose values are numbers, and whose failure is said in one line.

    It returns one number per completion, None where there is none; how many those are is logged.

    Args:
        name: what messages call it.

    Raises:
        InputError: it can't be called; or when it is called and raises, or returns no numbers, or
            another number of them.
    """
    who, metric = f"task.reward: {name}", f"rewards/{_short(reward)}/failed"
    if inspect.isclass(reward) or not callable(reward):
        raise InputError(f"{who} is no function; name one, or an instance that can be called.")

    def safe(completions: Sequence[Any], **given: Any) -> Sequence[float | None]:
        own = {key: _own(key, value) for key, value in given.items()}
        try:
            # Answers are sampled from the state of torch's generators.
            with undisturbed(), torch.random.fork_rng(_devices()):
                returned = awaited(reward(completions=own_copy(completions), **own))
                values = numbers_of(returned, len(completions), who, "completion")
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise InputError(f"{who} failed: {told(error)}") from error
        if log_metric := given.get("log_metric"):
            log_metric(metric, values.isnan().double().mean().item())
        return [None if math.isnan(value) else value for value in values.tolist()]

    # TRL's metrics are called by it.
    safe.__name__ = _short(reward)
    return safe


def check_arguments(reward: Any, name: str, columns: Collection[str]) -> None:
    """Whether a reward can be called with these columns, as far as its signature says.

    Raises:
        InputError: it needs another argument, or can't do with all of them.
    """
    try:
        # Not of what a decorator hides: that may give more, or take less.
        parameters = inspect.signature(reward, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):
        return
    given = [*GIVEN, *columns]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for p in parameters:
        if p.kind is p.POSITIONAL_ONLY and p.default is p.empty:
            raise InputError(
                f"task.reward: {name} takes {p.name} by its place alone, but arguments are given "
                "by name."
            )
        needed = p.name in named and p.default is p.empty
        if needed and p.name not in given:
            raise InputError(
                f"task.reward: {name} needs {p.name!r}, which is no column of the data that "
                f"rewards are given: {', '.join(columns)}."
            )
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):
        more = [key for key in given if key not in named]
        if more:
            raise InputError(
                f"task.reward: {name} takes no {', '.join(more)}; end its arguments with **_ for "
                "those that it does not use."
            )


def _short(reward: Any) -> str:
    while isinstance(reward, partial):
        reward = reward.func
    return str(getattr(reward, "__name__", type(reward).__name__))


def _own(key: str, value: Any) -> Any:
    """What the reward may change."""
    if key in OF_TRAINING:
        return value
    if key == "completion_ids":
        return [[*ids] for ids in value]
    return own_copy(value)


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
