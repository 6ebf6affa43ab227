"""What is known of a batch that lies on several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Processes(Protocol):
    """Those that share a batch."""

    def sum(self, values: Tensor) -> Tensor:
        """[...] the sum over all of them, element by element."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """[m] the values [n] of all of them, whose n may differ, in one row."""
        ...


class Alone:
    """One process."""

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values


@dataclass(frozen=True)
class Spread:
    """How many values there are, their mean, and their standard deviation (of n), in float64."""

    count: int
    mean: float
    std: float


def spread_of(values: Tensor, valid: Tensor, processes: Processes) -> Spread:
    """Of the valid values of all processes; what is not valid has no influence.

    Args:
        values: [...].
        valid: [...] bool.
    """
    known = values[valid].double()
    totals = torch.stack([valid.sum().double(), known.sum()])
    count, total = processes.sum(totals).tolist()
    if not count:
        return Spread(0, 0.0, 0.0)
    mean = total / count
    squares = processes.sum((known - mean).square().sum()).item()
    return Spread(int(count), mean, (squares / count) ** 0.5)
