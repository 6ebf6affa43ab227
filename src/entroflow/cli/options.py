"""Options that several commands have, and options that belong together as one argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any

import typer

MOST = 2**63 - 2
"""Seeds are 64 bits, and one more is used."""
Seed = Annotated[int, typer.Option(min=0, max=MOST, help="Seed of all noise.")]


class Weights(StrEnum):
    """Which weights of a run to use."""

    EMA = "ema"
    LIVE = "live"


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer takes it: for an argument that is a dataclass, an option for each field.

    Args:
        command: its dataclasses declare their fields as a command does its arguments.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }

    @wraps(command)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters += inspect.signature(groups[name], eval_str=True).parameters.values()
        else:
            parameters.append(parameter)
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return called
