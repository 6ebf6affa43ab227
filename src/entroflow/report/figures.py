"""Plain plotly data: what all figures of the report are made of.

Colours are readable on white and on black; text and grid take theirs from the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from entroflow.writing import finite

Metrics = Sequence[Mapping[str, Any]]
Figure = dict[str, Any]
Values = Sequence[float]

COLORS = BLUE, ORANGE, TEAL, PURPLE, GRAY = "#3b82f6", "#d97706", "#0d9488", "#a855f7", "#8a919e"
BLUE_BAND, FAINT = "rgba(59, 130, 246, 0.18)", "rgba(138, 145, 158, 0.12)"
MOST_POINTS = 2000
"""Of a line, about; a longer one shows the lowest and the highest of half as many stretches."""


def is_finite(value: object) -> bool:
    """Whether this is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of one key, where it is there and finite."""
    points = [(line["iteration"], line[key]) for line in metrics if is_finite(line.get(key))]
    return [x for x, _ in points], [y for _, y in points]


def plan_of(metrics: Metrics) -> Mapping[str, Any]:
    """The plan of the first iteration, empty where none was written down; `grid` is [S + 1]."""
    plan: Mapping[str, Any] = (metrics[0].get("plan") or {}) if metrics else {}
    return {"grid": [], "steps": [], "rows": [], **plan}


def step_label(step: int, grid: Values) -> str:
    """A step and its sigma: 3 · 0.70."""
    return f"{step} · {grid[step]:.2f}" if step < len(grid) else str(step)


def moving_mean(values: Values, window: int) -> list[float]:
    """Mean over up to `window` neighbours on either side."""
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - window), min(len(values), i + window + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def line(name: str, color: str, x: Values, y: Values) -> dict[str, Any]:
    """A trace: a line with its points, if they are few."""
    return {
        "x": x, "y": y, "name": name, "mode": "lines+markers" if len(x) <= 40 else "lines",
        "line": {"color": color, "width": 2}, "marker": {"color": color, "size": 5},
        "hovertemplate": f"{name}: %{{y:.3~g}}<extra></extra>",
    }  # fmt: skip


def band(x: Values, low: Values, high: Values) -> list[dict[str, Any]]:
    """Two traces with the area between them filled."""
    quiet = {"x": x, "mode": "lines", "line": {"width": 0, "color": BLUE}, "hoverinfo": "skip",
             "showlegend": False}  # fmt: skip
    return [{"y": low, **quiet}, {"y": high, **quiet, "fill": "tonexty", "fillcolor": BLUE_BAND}]


def heat_map(x: Values, labels: Sequence[str], rows: Sequence[Any], diverging: bool) -> Figure:
    """Rows of values with a label each; a diverging one has colours on both sides of 0."""
    bar = {"thickness": 8, "len": 1.0, "outlinewidth": 0, "nticks": 5, "exponentformat": "power"}
    trace: dict[str, Any] = {
        "type": "heatmap", "x": list(x), "y": list(labels), "z": rows, "colorbar": bar, "ygap": 1,
        "hovertemplate": "iteration %{x}, step %{y}: %{z:.3g}<extra></extra>",
    }  # fmt: skip
    if diverging:
        trace |= {"colorscale": [[0, ORANGE], [0.5, FAINT], [1, BLUE]], "zmid": 0}
    else:
        most = max(value for row in rows for value in row if value is not None)
        trace |= {"colorscale": [[0, FAINT], [1, BLUE]], "zmin": 0, "zmax": most}
    title = {"text": "step · sigma" if "·" in labels[0] else "step", "standoff": 16}
    axis = {"type": "category", "autorange": "reversed", "showgrid": False, "title": title}
    over = {"showgrid": False, "dtick": 1 if len(x) < 10 else None}
    return figure_of([trace], min(420, 130 + 22 * len(labels)), xaxis=over, yaxis=axis)


def figure_of(traces: Sequence[Mapping[str, Any]], height: int = 230, **layout: Any) -> Figure:
    """Traces, `thinned`, with the layout that all figures share; a legend where two have names."""
    several = len([t for t in traces if t.get("name") and t.get("showlegend", True)]) > 1
    clear = "rgba(0,0,0,0)"
    axis = {"automargin": True, "zeroline": False, "exponentformat": "power"}
    shared = {
        "height": height, "margin": {"l": 8, "r": 8, "t": 30 if several else 8, "b": 8},
        "paper_bgcolor": clear, "plot_bgcolor": clear, "hovermode": "x", "showlegend": several,
        "font": {"size": 12, "family": "system-ui, sans-serif"},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "bgcolor": clear,
                   "traceorder": "normal"},
        "xaxis": {**axis, "title": {"text": "iteration"}, **layout.pop("xaxis", {})},
        "yaxis": {**axis, **layout.pop("yaxis", {})},
    }  # fmt: skip
    # JSON has no NaN; a figure leaves out what is None.
    return {"data": finite([thinned(trace) for trace in traces]), "layout": shared | layout}


def rule(color: str, dash: str = "solid", **at: object) -> dict[str, Any]:
    """A straight line across a whole figure: at `y`, or at `x`."""
    ((along, value),) = at.items()
    across = "x" if along == "y" else "y"
    ends = {f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}
    style = {"color": color, "width": 1, "dash": dash}
    return {"type": "line", **ends, f"{along}0": value, f"{along}1": value, "line": style}


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


def _extremes(values: Values) -> list[int]:
    """The ends, and where each of `MOST_POINTS` / 2 stretches is lowest and highest, in order."""
    stretches = MOST_POINTS // 2
    ends = [round(i * len(values) / stretches) for i in range(stretches + 1)]
    kept = {0, len(values) - 1}
    for places in (range(start, end) for start, end in pairwise(ends)):
        kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(kept)
