"""Numbers written for people: 1.2M, 8 min 20 s, 0.53 [0.49, 0.57]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_DIGITS = 1e9
"""From here on numbers are written with an exponent."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, score: Mapping[str, Any]) -> Interval:
        """From an entry with `value`, `low` and `high`, as `evaluation.json` has them.

        What was no number there is NaN.
        """
        numbers = [score[key] for key in ("value", "low", "high")]
        return cls(*(math.nan if x is None else x for x in numbers))

    @property
    def middle(self) -> str:
        """The value alone: 0.53."""
        return self._digits(self.value)

    @property
    def reach(self) -> str:
        """The interval alone: [0.49, 0.57]."""
        return f"[{self._digits(self.low)}, {self._digits(self.high)}]"

    @property
    def signed(self) -> str:
        """With signs, for a difference: +0.33 [+0.28, +0.38]."""
        value, low, high = (self._digits(v, "+") for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def _digits(self, value: float, sign: str = "") -> str:
        """A number of this interval: as exact as the width asks for."""
        if math.isnan(value):
            return "–"
        half, largest = (self.high - self.low) / 2, max(map(abs, (self.low, self.high, self.value)))
        if largest >= MOST_DIGITS:
            return f"{value:{sign}.3g}".replace("-", "−")
        # Two where the numbers are below 1, as most scores; fewer only for larger ones.
        least = 2 if largest <= 1 else 0
        needed = math.ceil(-math.log10(half)) if half > 0 else 2
        places = min(max(least, needed), 6)
        # Adding 0.0 turns -0.0 into 0.0.
        return f"{round(value, places) + 0.0:{sign}.{places}f}".replace("-", "−")

    def __str__(self) -> str:
        return f"{self.middle} {self.reach}"


def count(number: float) -> str:
    """950, 9,500, 95.0k, 9.5M."""
    for limit, divisor, unit in ((1e4, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        # Below the limit also after rounding: 999,960 is 1.0M, not 1000.0k.
        if number < limit - divisor / 20:
            return f"{number / divisor:,.{1 if unit else 0}f}{unit}"
    return f"{number / 1e9:.1f}G"


def size(bytes_: float) -> str:
    """950 B, 4.2 MiB, 31.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if bytes_ < 999.5:
            return f"{bytes_:.3g} {unit}"
        bytes_ /= 1024
    return f"{bytes_:,.0f} GiB" if bytes_ >= 99.5 else f"{bytes_:.3g} GiB"


def duration(seconds: float) -> str:
    """4.2 s, 42 s, 8 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:#.3g}".rstrip(".").replace("-", "−")
