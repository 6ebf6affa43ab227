"""The metrics of very many iterations, without details that no page could show."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from statistics import mean
from typing import Any

from entroflow.report.figures import MOST_POINTS, is_finite
from entroflow.runs.files import METRICS
from entroflow.runs.folder import RunFolder

log = logging.getLogger(__name__)

MOST_DETAILS = 1000
"""Iterations whose details are kept: columns of a heat map."""

BY_STEP, ATTENTION = "by_step", "attention"


def thinned_metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The metrics of a run with all their numbers, but details of `MOST_DETAILS` lines at most.

    What was measured by step is the mean over a stretch of lines, at the last of them; what was
    measured of attention is that of evenly spaced lines and of the last. A gap is warned of.

    Raises:
        RunError: a line is torn.
    """
    counts = _details(folder)
    every = {name: math.ceil(count / MOST_DETAILS) for name, count in counts.items()}
    seen = dict.fromkeys(counts, 0)
    stretch: list[Mapping[str, Any]] = []
    kept = []
    for line in folder.each_metrics():
        for name in counts:
            if not line.get(name):
                continue
            seen[name] += 1
            shown = seen[name] % every[name] == 0 or seen[name] == counts[name]
            if name == BY_STEP:
                stretch.append(line[name])
                if shown:
                    means = mean_by_step(stretch) if len(stretch) > 1 else line[name]
                    line[name], stretch = means, []
            if not shown:
                del line[name]
        # Names of one line are not those of the next, unless they are made so.
        kept.append({sys.intern(key): value for key, value in line.items()})
    if gap := folder.gap(kept):
        log.warning("%s %s; the report shows the others.", folder.path / METRICS, gap)
    return kept


def _details(folder: RunFolder) -> dict[str, int]:
    """How many lines have details of each kind, without parsing them."""
    path = folder.path / METRICS
    counts = {BY_STEP: 0, ATTENTION: 0}
    with path.open("rb") if path.exists() else BytesIO() as file:
        for line in file:
            counts = {name: n + (f'"{name}": {{"'.encode() in line) for name, n in counts.items()}
    return counts


def mean_by_step(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean of every quantity at every step, over the lines that have it."""
    every: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        for name, by in line.items():
            for step, value in (by or {}).items():
                values = every.setdefault(name, {}).setdefault(step, [])
                values += [value] if is_finite(value) else []
    return {
        name: {step: mean(values) if values else None for step, values in by.items()}
        for name, by in every.items()
    }


def thinning(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What a page says of how it shows so many iterations; nothing where it shows all."""
    if len(metrics) <= MOST_DETAILS:
        return ""
    return (
        f"Of {len(metrics):,} iterations, a line with more than {MOST_POINTS:,} points shows the "
        f"lowest and the highest of each of {MOST_POINTS // 2:,} stretches; a map over steps has "
        f"at most {MOST_DETAILS:,} columns, each the mean of its stretch."
    )
