"""A panel: what it reads, how that is drawn, and how to read it; one function draws a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from entroflow.report import figures
from entroflow.report.figures import Figure, Metrics, is_finite, series
from entroflow.wording import Interval, number

Drawing = tuple[Figure | None, str]
"""A figure, and what is found in words, which may stand without a figure."""
NOTHING: Drawing = (None, "")
ROUNDING, RELATIVE_ROUNDING = 1e-7, 1e-9
"""Differences up to this, in numbers near 1, are rounding of float32, and not drawn; and as a share
of the largest value, for means in float64."""


@dataclass(frozen=True)
class Panel:
    """What a panel of the report is to show.

    `keys` are what it reads, one metric or several with their names for the legend; `draw` is the
    kind of drawing, with its `options`; a `wide` panel is as wide as the page.
    """

    title: str
    reading: str
    keys: str | Mapping[str, str]
    draw: Callable[[Any, Panel], Drawing]
    options: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False

    @property
    def names(self) -> Mapping[str, str]:
        """Metric -> its name in the legend."""
        return {self.keys: self.title} if isinstance(self.keys, str) else self.keys


def drawn(panels: Sequence[Panel], source: Any) -> list[tuple[Panel, Figure | None, str]]:
    """The panels for which the source (mostly the metrics) has something to show, and that."""
    every = [(panel, *panel.draw(source, panel)) for panel in panels]
    return [(panel, figure, finding) for panel, figure, finding in every if figure or finding]


def lines(metrics: Metrics, panel: Panel) -> Drawing:
    """Metrics over iterations; those that never change are given in words.

    Options: `per`, the name of an iteration; `curve`, never in words; `band`, an interval from
    `KEY_low` to `KEY_high` around the first metric; `smooth`, its moving mean; `colors`, `height`,
    `axis`; `levels`, lines across.
    """
    option = panel.options.get
    per, colors = option("per", "iteration"), cycle(option("colors", figures.COLORS))
    traces = [
        figures.line(name, next(colors), *series(metrics, key)) for key, name in panel.names.items()
    ]
    traces = [trace for trace in traces if trace["x"]]
    constants = {trace["name"]: constant(trace["y"], per) for trace in traces}
    if traces and all(constants.values()) and not option("curve"):
        alone = len(constants) == 1
        return None, " ".join(s if alone else f"{name}: {s}" for name, s in constants.items())
    if all(len(trace["x"]) < 2 for trace in traces):
        return NOTHING
    few = max(trace["x"][-1] for trace in traces) < 10
    if option("smooth") and (window := len(traces[0]["x"]) // 10) > 1:
        name, (x, y) = f"mean of {2 * window + 1} {per}s", (traces[0][key] for key in "xy")
        smooth = figures.line(name, figures.BLUE, x, figures.moving_mean(y, window))
        marker = {"size": 4, "color": figures.GRAY, "opacity": 0.6}
        traces[:1] = [traces[0] | {"mode": "markers", "marker": marker}, smooth]
    if option("band"):
        traces = [*_interval(metrics, next(iter(panel.names))), *traces]
    over = {"title": {"text": per}, "dtick": 1 if few else None}
    axes = {"xaxis": over, "yaxis": option("axis", {"rangemode": "tozero"})}
    return figures.figure_of(traces, option("height", 230), **axes, shapes=option("levels", [])), ""


def _interval(metrics: Metrics, key: str) -> list[dict[str, Any]]:
    """The band of a metric, where all its values have an interval."""
    there = [entry for entry in metrics if is_finite(entry.get(key))]
    (x, low), (_, high) = (series(there, f"{key}_{end}") for end in ("low", "high"))
    return figures.band(x, low, high) if len(low) == len(high) == len(there) else []


def by_step(metrics: Metrics, panel: Panel) -> Drawing:
    """A quantity of `by_step` as a heat map, step x iteration.

    Options: `zero`, the value drawn as 0; `diverging`, both sides of it, known up to rounding.
    """
    entries = [entry for entry in metrics if entry.get("by_step")]
    values = [entry["by_step"].get(panel.keys) or {} for entry in entries]
    steps = sorted({int(step) for by in values for step in by})
    zero, diverging = (panel.options.get(name, 0) for name in ("zero", "diverging"))
    rows = [
        [by[step] - zero if is_finite(by.get(step)) else None for by in values]
        for step in map(str, steps)
    ]
    flat = [value for row in rows for value in row if value is not None]
    finding = constant(flat, "step and iteration", ROUNDING if diverging else 0.0)
    if not flat or finding:
        return None, finding
    labels = [figures.step_label(step, figures.plan_of(metrics)["grid"]) for step in steps]
    x = [entry["iteration"] for entry in entries]
    return figures.heat_map(x, labels, rows, bool(diverging)), ""


def constant(values: Sequence[float], per: str, rounding: float = 0.0) -> str:
    """A sentence if all values are equal up to rounding, else nothing."""
    rounding = max(rounding, RELATIVE_ROUNDING * max(map(abs, values), default=0.0))
    if not values or max(values) - min(values) > rounding:
        return ""
    level = "0" if max(map(abs, values)) <= rounding else number(values[0])
    exact = "" if len(set(values)) == 1 else " up to rounding"
    return f"{level}{exact} at {f'every {per}' if len(values) > 1 else f'the only {per} so far'}."


def scatter(points: Mapping[str, tuple[Sequence[float], ...]], panel: Panel) -> Figure:
    """Clouds of points by name. Options: `axes`, the titles of both; `hover`; `colors`."""
    option = panel.options
    traces = [
        {"name": name, "mode": "markers", "hovertemplate": f"{option['hover']}<extra></extra>",
         "x": list(x), "y": list(y), "marker": {"color": color, "size": 5, "opacity": 0.6}}
        for (name, (x, y)), color in zip(points.items(), option["colors"], strict=False) if x
    ]  # fmt: skip
    xaxis, yaxis = ({"title": {"text": title}} for title in option["axes"])
    return figures.figure_of(traces, xaxis=xaxis, yaxis=yaxis)


def bars(scores: Mapping[str, Mapping[str, Interval]], panel: Panel) -> Drawing:
    """Scores of models beside each other: model -> what was scored -> score; of several alone."""
    if all(len(of_model) < 2 for of_model in scores.values()):
        return NOTHING
    # The base is gray, the last (the tuned) blue.
    colors = [figures.GRAY, *[figures.ORANGE] * (len(scores) - 2), figures.BLUE]
    traces = []
    for (name, of_model), color in zip(scores.items(), colors, strict=False):
        each = of_model.values()
        traces.append({
            "type": "bar", "name": name, "marker": {"color": color}, "x": list(of_model),
            "y": [score.value for score in each],
            "hovertemplate": f"{name}: %{{y:.3g}}<extra></extra>",
            "error_y": {"type": "data", "symmetric": False, "color": "#6b7280", "thickness": 1.5,
                        "array": [score.high - score.value for score in each], "width": 3,
                        "arrayminus": [score.value - score.low for score in each]},
        })  # fmt: skip
    axes = {"xaxis": {"title": None}, "yaxis": panel.options}
    grouped: Any = {"barmode": "group", "bargap": 0.25, "bargroupgap": 0.06, "showlegend": True}
    return figures.figure_of(traces, 340, **axes, **grouped), ""
