"""What attention entropy chose: the steps that explore, the prompts that get more rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from entroflow.report.figures import (
    BLUE,
    BLUE_BAND,
    GRAY,
    ORANGE,
    PURPLE,
    Metrics,
    Panel,
    figure_of,
    heat_map,
    is_finite,
    series,
    trace_style,
)
from entroflow.report.wording import number

CURVES = 5
"""Iterations whose curve is drawn."""
MOST_PROMPTS = 16
"""Prompts of an iteration that are listed."""

Measured = Sequence[tuple[int, Mapping[str, Any]]]
"""Iterations that measured attention, and what they found."""


@dataclass(frozen=True)
class Attention:
    """The section's content.

    Attributes:
        allocated: whether groups are of different size.
        prompts: of the last iteration, by shift: words, shift, rollouts, spread of the reward.
        left_out: how many more there were.
    """

    allocated: bool
    panels: Sequence[Panel]
    iteration: int
    prompts: Sequence[tuple[str, str, int, str]]
    left_out: int


def attention(metrics: Metrics) -> Attention | None:
    """What there is to see; None where no attention was measured."""
    measured = [(line["iteration"], line["attention"]) for line in metrics if line.get("attention")]
    if not measured:
        return None
    grid = (metrics[0].get("plan") or {}).get("grid", [])
    allocated = any(len({*found["size"]}) > 1 for _, found in measured)
    panels = [
        _curves(measured, grid), _explored(measured, grid), _shifts(measured),
        _spreads(measured, allocated), _correlation(metrics),
    ]  # fmt: skip
    iteration, last = measured[-1]
    order = sorted(range(len(last["size"])), key=lambda p: -(last["shift"][p] or 0.0))
    rows = [
        (last["prompt"][p], _said(last["shift"][p]), last["size"][p], _said(last["spread"][p]))
        for p in order
    ]
    half = MOST_PROMPTS // 2
    shown = rows if len(rows) <= MOST_PROMPTS else [*rows[:half], *rows[-half:]]
    return Attention(
        allocated, [panel for panel in panels if panel is not None], iteration, shown,
        len(rows) - len(shown),
    )  # fmt: skip


def _said(value: object) -> str:
    return number(float(value)) if is_finite(value) else "–"  # type: ignore[arg-type]


def _curves(measured: Measured, grid: Sequence[float]) -> Panel:
    """From gray to blue as the training goes on; what explored is marked."""
    places = sorted({round(i * (len(measured) - 1) / (CURVES - 1)) for i in range(CURVES)})
    traces = []
    for rank, place in enumerate(places):
        iteration, found = measured[place]
        share = rank / max(len(places) - 1, 1)
        color = _between("#c3c8d0", BLUE, share)
        explored = {*found["explored"]}
        steps = range(len(found["entropy"]))
        name = f"iteration {iteration}"
        traces.append(
            {
                "x": list(steps), "y": found["entropy"], **trace_style(name, color, len(steps)),
                "mode": "lines+markers",
                "marker": {"color": color, "size": [9 if s in explored else 3 for s in steps]},
            }
        )  # fmt: skip
    ticks = {"tickvals": list(range(len(grid) - 1)),
             "ticktext": [f"{s} · {sigma:.2f}" for s, sigma in enumerate(grid[:-1])]}  # fmt: skip
    return Panel(
        "Attention entropy along the way",
        "How spread out attention is at each step, from noise on the left to the image on the "
        "right, on one rollout of every prompt; large dots are the steps that explored.",
        figure_of(traces, height=340, xaxis={"title": {"text": "step · sigma"}, **ticks}),
        wide=True,
    )


def _between(one: str, other: str, share: float) -> str:
    parts = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in parts)


def _explored(measured: Measured, grid: Sequence[float]) -> Panel:
    title, reading = "Steps that explored", "Noise entered at these; the others followed the ODE."
    choices = {tuple(found["explored"]) for _, found in measured}
    if len(choices) == 1:
        (only,) = choices
        return Panel(title, reading, finding=f"{', '.join(map(str, only))} at every iteration.")
    steps = range(len(grid) - 1)
    rows = [[float(step in found["explored"]) for _, found in measured] for step in steps]
    figure = heat_map(
        [iteration for iteration, _ in measured],
        [f"{step} · {grid[step]:.2f}" for step in steps], rows, diverging=False,
    )  # fmt: skip
    figure["data"][0]["showscale"] = False
    return Panel(title, reading, figure)


def _shifts(measured: Measured) -> Panel | None:
    """Median, quartiles and ends over the prompts of an iteration."""
    known = [(n, sorted(v for v in found["shift"] if is_finite(v))) for n, found in measured]
    known = [(n, values) for n, values in known if values]
    if len(known) < 2:
        return None
    x = [n for n, _ in known]

    def level(share: float) -> list[float]:
        return [values[round(share * (len(values) - 1))] for _, values in known]

    quiet = {"mode": "lines", "line": {"width": 0, "color": BLUE}, "hoverinfo": "skip"}
    traces = []
    for low, high in ((0.0, 1.0), (0.25, 0.75)):
        traces += [
            {"x": x, "y": level(low), **quiet, "showlegend": False},
            {"x": x, "y": level(high), **quiet, "fill": "tonexty", "fillcolor": BLUE_BAND,
             "showlegend": False},
        ]  # fmt: skip
    traces.append({"x": x, "y": level(0.5), **trace_style("median", BLUE, len(x))})
    return Panel(
        "How far attention has moved",
        "Of the prompts of an iteration: the difference of their attention entropy from the "
        "reference model's on the same states. Line: the median; bands: half of them, and all.",
        figure_of(traces, yaxis={"rangemode": "tozero"}),
    )


def _spreads(measured: Measured, allocated: bool) -> Panel | None:
    """Within iterations, which differ in both: rank of the shift, and spread over their mean."""
    small: tuple[list[float], list[float]] = ([], [])
    large: tuple[list[float], list[float]] = ([], [])
    for _, found in measured:
        pairs = [
            (shift, spread, size)
            for shift, spread, size in zip(
                found["shift"], found["spread"], found["size"], strict=True
            )
            if is_finite(shift) and is_finite(spread)
        ]
        mean = statistics.mean([spread for _, spread, _ in pairs]) if pairs else 0.0
        if len(pairs) < 2 or not mean or len({shift for shift, _, _ in pairs}) < 2:
            continue
        ranks = stats.rankdata([shift for shift, _, _ in pairs])
        middle = (min(size for *_, size in pairs) + max(size for *_, size in pairs)) / 2
        for rank, (_, spread, size) in zip(ranks, pairs, strict=True):
            into = large if allocated and size > middle else small
            into[0].append((rank - 1) / (len(pairs) - 1))
            into[1].append(spread / mean)
    if not small[0] and not large[0]:
        return None
    names = ("fewer rollouts", "more rollouts") if allocated else ("prompts", "")
    traces = [
        {"x": x, "y": y, "mode": "markers", "name": name,
         "marker": {"color": color, "size": 5, "opacity": 0.55},
         "hovertemplate": "%{y:.2f} times the mean<extra></extra>"}
        for (x, y), name, color in zip((small, large), names, (GRAY, BLUE), strict=True) if x
    ]  # fmt: skip
    return Panel(
        "Do they have more to teach?",
        "Every dot is a prompt of an iteration: the rank of its shift, from the least to the most "
        "moved, and the spread of the reward within its group over that iteration's mean. AEGPO "
        "expects the dots to rise.",
        figure_of(
            traces, xaxis={"title": {"text": "rank of the shift"}},
            yaxis={"title": {"text": "spread of the reward"}, "rangemode": "tozero"},
        ),
    )  # fmt: skip


def _correlation(metrics: Metrics) -> Panel | None:
    x, y = series(metrics, "attention/rank_correlation")
    if not x:
        return None
    mean = statistics.mean(y)
    said = f"Its mean is {mean:+.2f}"
    if len(y) > 1:
        reach = float(stats.t.ppf(0.975, len(y) - 1) * stats.sem(y))
        said += f" [{mean - reach:+.2f}, {mean + reach:+.2f}]"
    figure = figure_of(
        [{"x": x, "y": y, **trace_style("rank correlation", PURPLE, len(x)), "mode": "markers"}],
        yaxis={"range": [-1.05, 1.05]},
    )
    lines = [(0.0, GRAY, "dot"), (mean, ORANGE, "dash")]
    figure["layout"]["shapes"] = [
        {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at,
         "line": {"color": color, "width": 1, "dash": dash}}
        for at, color, dash in lines
    ]  # fmt: skip
    return Panel(
        "Rank correlation of shift and spread",
        f"Spearman's, over the prompts of an iteration. {said} over {len(y)} iterations (95% "
        "interval, as if they were independent); above 0, what has moved more has more to teach.",
        figure,
    )
