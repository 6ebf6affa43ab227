"""Is the reward being hacked? It rises, while what nothing trains on leaves the base's range.

Everything is measured on held-out images, with the same prompts and noise at every evaluation; the
first, before any training, is that of the base.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

VISIBLE = 0.01
"""A change that hardly shows, of what lies in [0, 1]: the least standard deviation that counts."""
Z = 1.96
"""Standard errors of a 95% interval."""


@dataclass(frozen=True)
class Reading:
    """What a quantity is over held-out images: mean and standard deviation of `count` values."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Reading | None:
        """Of those values that are numbers; None of fewer than two."""
        known = values.double()[~values.isnan()]
        if len(known) < 2:
            return None
        return cls(known.mean().item(), known.std().item(), len(known))


def drift(base: Reading, now: Reading) -> float:
    """How far a mean has moved, in standard deviations of the base's images.

    Not in standard errors: training changes images, and with enough of them any change shows. Where
    the base's images are all alike, a change counts by what can be seen.
    """
    return (now.mean - base.mean) / max(base.deviation, VISIBLE)


def moved_surely(base: Reading, now: Reading) -> int:
    """1 or -1 where a mean is higher or lower beyond the 95% interval of the difference, else 0."""
    moved = now.mean - base.mean
    reach = Z * math.hypot(
        base.deviation / math.sqrt(base.count), now.deviation / math.sqrt(now.count)
    )
    return int(math.copysign(abs(moved) > reach, moved))


@dataclass(frozen=True)
class Sighting:
    """What the sentinel saw at an evaluation.

    Attributes:
        drifts: by name of a statistic, its `drift`.
        alarms: what is wrong, in words by name; empty while the reward has not risen.
    """

    drifts: Mapping[str, float]
    alarms: Mapping[str, str]


class Sentinel:
    """Compares every evaluation with the first one, and remembers that.

    Args:
        band: drift up to which a statistic may move either way.
    """

    def __init__(self, band: float) -> None:
        self.band = band
        self._base: dict[str, Reading] = {}

    def look(
        self, reward: Tensor, statistics: Mapping[str, Tensor], monitors: Mapping[str, Tensor]
    ) -> Sighting:
        """Look at an evaluation; the first one is taken as the base's.

        Args:
            reward: [n] what is trained on, of held-out images.
            statistics: by name, numbers that are neither good nor bad.
            monitors: by name [n], rewards that nothing trains on.
        """
        asked = {"reward": reward, **statistics, **monitors}
        now = {name: found for name, v in asked.items() if (found := Reading.of(v)) is not None}
        for name, found in now.items():
            self._base.setdefault(name, found)
        drifts = {n: drift(self._base[n], now[n]) for n in statistics if n in now}
        if "reward" not in now or moved_surely(self._base["reward"], now["reward"]) < 1:
            return Sighting(drifts, {})
        far = {
            name: f"{name} is {moved:+.1f} standard deviations from the base's"
            for name, moved in drifts.items()
            if abs(moved) > self.band
        }
        return Sighting(drifts, far | self._fallen(now, monitors))

    def _fallen(self, now: Mapping[str, Reading], monitors: Collection[str]) -> dict[str, str]:
        return {
            name: f"{name} has fallen from {self._base[name].mean:.3g} to {now[name].mean:.3g}"
            for name in monitors
            if name in now and moved_surely(self._base[name], now[name]) < 0
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {name: asdict(found) for name, found in self._base.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` gave."""
        self._base = {name: Reading(**found) for name, found in state.items()}
