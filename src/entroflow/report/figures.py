"""Plain plotly data: what all figures of the report are made of.

Colours are readable on white and on black; text and grid take theirs from the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from entroflow.report.wording import number
from entroflow.writing import finite

Metrics = Sequence[Mapping[str, Any]]
Figure = dict[str, Any]

GRAY, BLUE, ORANGE, TEAL, PURPLE = "#8a919e", "#3b82f6", "#d97706", "#0d9488", "#a855f7"
BLUE_BAND = "rgba(59, 130, 246, 0.18)"
FAINT = "rgba(138, 145, 158, 0.12)"

MOST_POINTS = 2000
"""Of a line, about; a longer one shows the lowest and the highest of half as many stretches."""


@dataclass(frozen=True)
class Panel:
    """One figure with its title and how to read it; or a finding in words that needs no figure."""

    title: str
    reading: str
    figure: Figure | None = None
    finding: str = ""
    wide: bool = False


def series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of one key, where it is there and finite."""
    points = [(line["iteration"], line[key]) for line in metrics if is_finite(line.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def is_finite(value: object) -> bool:
    """Whether this is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def heat_map(
    iterations: Sequence[int], labels: Sequence[str], rows: Sequence[Any], diverging: bool
) -> Figure:
    """Rows of values with a label each; a diverging one has colours on both sides of 0."""
    trace: dict[str, Any] = {
        "type": "heatmap",
        "x": list(iterations),
        "y": list(labels),
        "z": rows,
        "colorbar": {
            "thickness": 8,
            "len": 1.0,
            "outlinewidth": 0,
            "nticks": 5,
            "exponentformat": "power",
        },
        "hovertemplate": "iteration %{x}, step %{y}: %{z:.3g}<extra></extra>",
        "ygap": 1,
    }
    if diverging:
        trace |= {"colorscale": [[0, ORANGE], [0.5, FAINT], [1, BLUE]], "zmid": 0}
    else:
        most = max(value for row in rows for value in row if value is not None)
        trace |= {"colorscale": [[0, FAINT], [1, BLUE]], "zmin": 0, "zmax": most}
    axis = {
        "type": "category",
        "autorange": "reversed",
        "title": {"text": "step · sigma" if "·" in labels[0] else "step", "standoff": 16},
        "showgrid": False,
    }
    height = min(420, 130 + 22 * len(labels))
    # Few iterations would get ticks between them.
    every = {"dtick": 1} if len(iterations) < 10 else {}
    return figure_of([trace], height=height, xaxis={"showgrid": False, **every}, yaxis=axis)


def constant(values: Sequence[float], per: str, rounding: float = 0.0) -> str:
    """A sentence if all values are equal up to rounding, else nothing."""
    if not values or max(values) - min(values) > rounding:
        return ""
    level = "0" if abs(values[0]) <= rounding else number(values[0])
    exact = len(set(values)) == 1
    return f"{level}{'' if exact else ' up to rounding'} at every {per}."


def trace_of(
    metrics: Metrics, key: str, name: str, color: str, dash: str = "solid"
) -> dict[str, Any]:
    """One key of the metrics over iterations."""
    x, y = series(metrics, key)
    return {"x": x, "y": y, **trace_style(name, color, len(x), dash)}


def trace_style(name: str, color: str, points: int, dash: str = "solid") -> dict[str, Any]:
    """How a line of so many points looks."""
    return {
        "name": name,
        "mode": "lines+markers" if points <= 40 else "lines",
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"color": color, "size": 5},
        "hovertemplate": f"{name}: %{{y:.3~g}}<extra></extra>",
    }


def thinned(trace: Mapping[str, Any]) -> dict[str, Any]:
    """A trace with `MOST_POINTS` points, or few more.

    Along a line that goes from left to right, each stretch keeps its lowest and its highest point,
    and the ends stay; of a cloud of points, every n-th is kept.
    """
    x, y = trace.get("x"), trace.get("y")
    if x is None or y is None or len(x) != len(y) or len(x) <= MOST_POINTS:
        return dict(trace)
    rising = all(map(is_finite, (*x, *y))) and all(a <= b for a, b in pairwise(x))
    kept = _extremes(y) if rising else range(0, len(x), math.ceil(len(x) / MOST_POINTS))
    lists = [key for key in ("x", "y", "customdata") if key in trace]
    return {**trace, **{key: [trace[key][i] for i in kept] for key in lists}}


def _extremes(values: Sequence[float]) -> list[int]:
    """The ends, and where each of `MOST_POINTS` / 2 stretches is lowest and highest, in order."""
    stretches = MOST_POINTS // 2
    ends = [round(i * len(values) / stretches) for i in range(stretches + 1)]
    kept = {0, len(values) - 1}
    for start, end in pairwise(ends):
        places = range(start, end)
        kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(kept)


def has_a_line(traces: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one has two points or more."""
    return any(len(trace["x"]) > 1 for trace in traces)


def figure_of(
    traces: Sequence[Mapping[str, Any]],
    height: int = 230,
    xaxis: dict[str, Any] | None = None,
    yaxis: dict[str, Any] | None = None,
) -> Figure:
    """Traces, `thinned`, with the layout that all figures share; a legend where two have names."""
    named = [trace for trace in traces if trace.get("name") and trace.get("showlegend", True)]
    clear = "rgba(0,0,0,0)"
    axis = {"automargin": True, "zeroline": False, "exponentformat": "power"}
    layout = {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 30 if len(named) > 1 else 8, "b": 8},
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"size": 12, "family": "system-ui, sans-serif"},
        "showlegend": len(named) > 1,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yanchor": "bottom",
            "bgcolor": clear,
            "traceorder": "normal",
        },
        "hovermode": "x",
        "xaxis": axis | {"title": {"text": "iteration"}} | (xaxis or {}),
        "yaxis": axis | (yaxis or {}),
    }
    # JSON has no NaN; a figure leaves out what is None.
    return {"data": finite([thinned(trace) for trace in traces]), "layout": layout}
