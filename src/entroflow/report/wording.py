"""Numbers written for people: 1.2M, 8 min 20 s, 0.53 [0.49, 0.57]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, score: Mapping[str, Any]) -> Interval:
        """From an entry with `strict`, `low` and `high`, as `evaluation.json` has them."""
        return cls(score["strict"], score["low"], score["high"])

    @property
    def middle(self) -> str:
        """The value alone: 0.53."""
        return _two_digits(self.value)

    @property
    def reach(self) -> str:
        """The interval alone: [0.49, 0.57]."""
        return f"[{_two_digits(self.low)}, {_two_digits(self.high)}]"

    @property
    def signed(self) -> str:
        """With signs, for a difference: +0.33 [+0.28, +0.38]."""
        value, low, high = (_two_digits(v, "+") for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        return f"{self.middle} {self.reach}"


def count(number: float) -> str:
    """950, 9,500, 95.0k, 9.5M."""
    for limit, divisor, unit in ((1e4, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        # Below the limit also after rounding: 999,960 is 1.0M, not 1000.0k.
        if number < limit - divisor / 20:
            return f"{number / divisor:,.{1 if unit else 0}f}{unit}"
    return f"{number / 1e9:.1f}G"


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


def _two_digits(value: float, sign: str = "") -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{round(value, 2) + 0.0:{sign}.2f}".replace("-", "−")
