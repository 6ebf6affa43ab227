"""What a comparison shows: means over seeds, and the least difference it could have shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import scipy.stats


@dataclass(frozen=True)
class Row:
    """An arm over its seeds, on test prompts.

    Attributes:
        iterations, weighted_evaluations, minutes: means of what training took.
        measure: what the score is.
        score, gain: means over seeds; `spread`: standard deviation (of n - 1) of the score.
        monitors: by name, means of tuned over base.
        versions: of the package, that began the runs.
    """

    name: str
    seeds: int
    iterations: float
    weighted_evaluations: float
    measure: str
    score: float
    spread: float
    gain: float
    monitors: Mapping[str, float]
    minutes: float
    versions: frozenset[str]

    def ratio(self, monitor: str) -> float:
        """A monitor of tuned over base; NaN where it is not known."""
        return self.monitors.get(monitor, math.nan)


def rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row per arm, the best first."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        arm = result["arm"]
        arms.setdefault(",".join([arm["recipe"], *arm["overrides"]]), []).append(result)
    return sorted((_row(name, of) for name, of in arms.items()), key=lambda row: -row.score)


def _row(name: str, results: Sequence[Mapping[str, Any]]) -> Row:
    def mean(value: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.fmean(value(result) for result in results)

    def ratio(monitor: str) -> float:
        def of(result: Mapping[str, Any]) -> float:
            models = result["test"]["models"]
            tuned, base = (models[name]["monitors"].get(monitor) for name in ("tuned", "base"))
            return float(tuned / base) if tuned is not None and base else math.nan

        return mean(of)

    tests = [result["test"] for result in results]
    scores = [test["models"]["tuned"]["scores"]["overall"]["value"] for test in tests]
    monitors = dict.fromkeys(name for test in tests for name in test["models"]["base"]["monitors"])
    return Row(
        name=name,
        seeds=len(results),
        iterations=mean(lambda r: r["iterations"]),
        weighted_evaluations=mean(lambda r: r["ledger"]["ledger/weighted_evaluations"]),
        measure=tests[0]["measure"]["name"],
        score=statistics.fmean(scores),
        spread=statistics.stdev(scores) if len(scores) > 1 else math.nan,
        gain=mean(lambda r: r["test"]["gain"]["value"]),
        monitors={name: ratio(name) for name in monitors},
        minutes=mean(lambda r: r["training_seconds"]) / 60,
        versions=frozenset(result["version"] for result in results),
    )


def smallest_difference(table: Sequence[Row]) -> float:
    """The difference between two of its rows that would have shown; see `detectable`."""
    return detectable([(row.seeds, row.spread) for row in table])


def detectable(arms: Sequence[tuple[int, float]], power: float = 0.8, level: float = 0.05) -> float:
    """The difference between two arms that a comparison would have shown with given power.

    Two-sided t-test of two arms with as many seeds as the smallest has, and the spread pooled over
    all arms: (t_(1 - level / 2) + t_power) s sqrt(2 / n). NaN with fewer than two seeds.

    Args:
        arms: of each how many seeds, and their standard deviation (any number for one seed).
    """
    n = min((seeds for seeds, _ in arms), default=0)
    if n < 2:
        return math.nan
    freedom = sum(seeds - 1 for seeds, _ in arms)
    pooled = sum((seeds - 1) * spread**2 for seeds, spread in arms) / freedom
    quantiles = [float(scipy.stats.t.ppf(q, freedom)) for q in (1 - level / 2, power)]
    return sum(quantiles) * math.sqrt(2 * pooled / n)


def best_by_validation(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The result whose last evaluation on validation prompts is the best."""

    def last_score(result: Mapping[str, Any]) -> float:
        score = result["curve"][-1]["eval/score"]
        return -math.inf if score is None else float(score)

    return max(results, key=last_score)
