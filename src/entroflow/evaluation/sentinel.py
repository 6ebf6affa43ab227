"""Is the reward being hacked? It rises, while what nothing trains on leaves the base's range.

Everything is measured on held-out images, with the same prompts and noise at every evaluation; the
first, before any training, is that of the base.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VISIBLE = 0.01
"""A change that hardly shows, of what lies in [0, 1]: the least standard deviation that counts."""
Z = 1.96
"""Standard errors of a 95% interval."""


def drift(base: Tensor, now: Tensor) -> float | None:
    """How far a mean has moved, in standard deviations of the base's images [n].

    Not in standard errors: training changes images, and with enough of them any change shows. Where
    the base's images are all alike, a change counts by what can be seen. None without any number.
    """
    known, found = base[~base.isnan()], now[~now.isnan()]
    if len(known) < 2 or not len(found):
        return None
    return float((found.mean() - known.mean()) / known.std().clamp(min=VISIBLE))


def moved_surely(base: Tensor, now: Tensor) -> int:
    """1 or -1 where a mean is higher or lower beyond the 95% interval of the difference, else 0.

    Both [n] are of the same prompts and noise, so it is of paired differences.
    """
    if base.shape != now.shape:
        return 0
    moved = (now - base)[~(now - base).isnan()]
    if len(moved) < 2:
        return 0
    reach = Z * float(moved.std()) / math.sqrt(len(moved))
    return int(math.copysign(abs(float(moved.mean())) > reach, moved.mean()))


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
        self._base: dict[str, Tensor] = {}

    def look(
        self,
        reward: Tensor,
        statistics: Mapping[str, Tensor],
        monitors: Mapping[str, Tensor],
        *,
        first: bool = False,
    ) -> Sighting:
        """Look at an evaluation. What the first one did not have is not watched.

        Args:
            reward: [n] what is trained on, of held-out images.
            statistics: by name, numbers that are neither good nor bad.
            monitors: by name [n], rewards that nothing trains on.
            first: this is the base.
        """
        now = {"reward": reward, **statistics, **monitors}
        if first:
            self._base = {name: values.double() for name, values in now.items()}
        now = {name: values.double() for name, values in now.items() if name in self._base}
        drifts = {
            name: moved
            for name in statistics
            if name in now and (moved := drift(self._base[name], now[name])) is not None
        }
        if "reward" not in now or moved_surely(self._base["reward"], now["reward"]) < 1:
            return Sighting(drifts, {})
        far = {
            name: f"{name} is {moved:+.1f} standard deviations from the base's"
            for name, moved in drifts.items()
            if abs(moved) > self.band
        }
        return Sighting(drifts, far | self._fallen(now, monitors))

    def _fallen(self, now: Mapping[str, Tensor], monitors: Collection[str]) -> dict[str, str]:
        mean = {name: (self._base[name].nanmean(), now[name].nanmean()) for name in now}
        return {
            name: f"{name} has fallen from {mean[name][0]:.3g} to {mean[name][1]:.3g}"
            for name in monitors
            if name in now and moved_surely(self._base[name], now[name]) < 0
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {name: values.tolist() for name, values in self._base.items()}

    def forget(self, names: Collection[str]) -> None:
        """Watch these no longer: they are not what they were."""
        self._base = {name: v for name, v in self._base.items() if name not in names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` gave."""
        self._base = {
            name: torch.tensor([math.nan if x is None else x for x in values], dtype=torch.float64)
            for name, values in state.items()
        }
