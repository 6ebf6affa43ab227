"""Entropy(t): the attention entropy at every step of the grid, averaged over iterations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class EntropyCurve:
    """A moving average; a step that was never measured is NaN.

    Attributes:
        values: [T] float64, None before the first measurement.
    """

    def __init__(self, decay: float) -> None:
        """`decay` of the average, per measurement; the first one counts in full."""
        self.decay = decay
        self.values: Tensor | None = None

    def follow(self, measured: Tensor) -> None:
        """Take in a measurement [T]; NaN where there is none."""
        before = torch.full_like(measured, torch.nan) if self.values is None else self.values
        followed = torch.lerp(measured, before, self.decay)
        self.values = torch.where(before.isnan(), measured, followed)
        self.values = torch.where(measured.isnan(), before, self.values)

    def state(self) -> Mapping[str, Any]:
        """Ready for JSON."""
        if self.values is None:
            return {}
        return {"values": [None if math.isnan(v) else v for v in self.values.tolist()]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        values = state.get("values")
        self.values = None
        if values is not None:
            known = [torch.nan if value is None else value for value in values]
            self.values = torch.tensor(known, dtype=torch.float64)
