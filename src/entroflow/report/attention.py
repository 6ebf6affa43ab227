"""What attention entropy chose: the steps that explore, the prompts that get more rollouts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from entroflow.report import figures
from entroflow.report.figures import BLUE, GRAY, Metrics, figure_of, is_finite, line, step_label
from entroflow.report.panels import NOTHING, Drawing, Panel, drawn, scatter
from entroflow.report.rendering import Section, table
from entroflow.wording import number

CURVES = 5
"""Iterations whose curve is drawn."""
MOST_PROMPTS = 16
"""Prompts of an iteration that are listed."""


def attention(metrics: Metrics) -> list[Section]:
    """The section; nothing where no attention was measured."""
    measured = _measured(metrics)
    if not measured:
        return []
    iteration, last = measured[-1]
    columns = (last[key] for key in ("prompt", "shift", "size", "spread"))
    order = sorted(zip(*columns, strict=True), key=lambda row: -(row[1] or 0.0))
    rows = [(prompt, _number(shift), size, _number(std)) for prompt, shift, size, std in order]
    half = MOST_PROMPTS // 2
    shown = rows if len(rows) <= MOST_PROMPTS else [*rows[:half], *rows[-half:]]
    left_out = f"The most and the least moved; {len(rows) - len(shown)} in between are left out."
    blocks = [
        ("pairs", drawn(PANELS, metrics)),
        ("part", (f"The prompts of iteration {iteration}", "")),
        table(["prompt", "shift of attention", "rollouts", "standard deviation of the reward"],
              shown),
        ("soft", left_out if len(shown) < len(rows) else ""),
    ]  # fmt: skip
    title = "Where attention sent the rollouts" if _allocated(measured) else "What attention says"
    lead = (
        "Attention entropy is high where image tokens look at much at once. AEGPO takes it for a "
        "sign of what there is to learn: where, and from which prompts."
    )
    return [Section("attention", "What attention says", title, lead, blocks)]


def _number(value: Any) -> str:
    return number(value) if is_finite(value) else "–"


def _measured(metrics: Metrics) -> list[tuple[int, Mapping[str, Any]]]:
    """Iterations that measured attention, and what was measured."""
    return [(entry["iteration"], entry["attention"]) for entry in metrics if entry.get("attention")]


def _allocated(measured: Sequence[tuple[int, Mapping[str, Any]]]) -> bool:
    """Whether groups are of different size."""
    return any(len({*each["size"]}) > 1 for _, each in measured)


def _curves(metrics: Metrics, panel: Panel) -> Drawing:
    """From pale to full as the training goes on; what explored is marked."""
    measured, grid = _measured(metrics), figures.plan_of(metrics)["grid"]
    places = sorted({round(i * (len(measured) - 1) / (CURVES - 1)) for i in range(CURVES)})
    traces = []
    for rank, place in enumerate(places):
        iteration, each = measured[place]
        steps = list(range(len(each["entropy"])))
        sizes = [9 if step in each["explored"] else 3 for step in steps]
        marked = {"mode": "lines+markers", "marker": {"color": BLUE, "size": sizes}}
        fresh = {"opacity": 0.3 + 0.7 * rank / max(len(places) - 1, 1)}
        traces.append(line(f"iteration {iteration}", BLUE, steps, each["entropy"]) | marked | fresh)
    steps = list(range(len(grid) - 1))
    ticks = {"tickvals": steps, "ticktext": [step_label(step, grid) for step in steps]}
    return figure_of(traces, 340, xaxis={"title": {"text": "step · sigma"}, **ticks}), ""


def _explored(metrics: Metrics, panel: Panel) -> Drawing:
    measured, grid = _measured(metrics), figures.plan_of(metrics)["grid"]
    only, *others = dict.fromkeys(tuple(each["explored"]) for _, each in measured)
    if not others:
        return None, f"{', '.join(map(str, only))} at every iteration."
    steps = range(len(grid) - 1)
    rows = [[float(step in each["explored"]) for _, each in measured] for step in steps]
    labels = [step_label(step, grid) for step in steps]
    figure = figures.heat_map([iteration for iteration, _ in measured], labels, rows, False)
    figure["data"][0]["showscale"] = False
    return figure, ""


def _shifts(metrics: Metrics, panel: Panel) -> Drawing:
    """Median, quartiles and ends over the prompts of an iteration."""
    every = {n: sorted(filter(is_finite, each["shift"])) for n, each in _measured(metrics)}
    x = [n for n, shifts in every.items() if shifts]
    if len(x) < 2:
        return NOTHING
    low, lower, median, upper, high = (
        [every[n][round(share * (len(every[n]) - 1))] for n in x]
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    bands = [*figures.band(x, low, high), *figures.band(x, lower, upper)]
    traces = [*bands, line("median", BLUE, x, median)]
    return figure_of(traces, yaxis={"rangemode": "tozero"}), ""


def _deviations(metrics: Metrics, panel: Panel) -> Drawing:
    """Within iterations, which differ in both: rank of the shift, deviation over their mean."""
    measured = _measured(metrics)
    names = ("fewer rollouts", "more rollouts") if _allocated(measured) else ("prompts",) * 2
    points: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for _, each in measured:
        rows = zip(each["shift"], each["spread"], each["size"], strict=True)
        whole = [row for row in rows if is_finite(row[0]) and is_finite(row[1])]
        shifts, deviations, sizes = zip(*whole, strict=True) if whole else ((), (), ())
        if len({*shifts}) < 2 or not any(deviations):
            continue
        mean, middle = statistics.mean(deviations), (min(sizes) + max(sizes)) / 2
        for rank, deviation, size in zip(stats.rankdata(shifts), deviations, sizes, strict=True):
            x, y = points[names[size > middle]]
            x.append((rank - 1) / (len(whole) - 1))
            y.append(deviation / mean)
    if not any(x for x, _ in points.values()):
        return NOTHING
    return scatter(points, panel), _correlation(metrics)


def _correlation(metrics: Metrics) -> str:
    """Spearman's over the prompts of an iteration, and its mean over iterations."""
    _, values = figures.series(metrics, "attention/rank_correlation")
    if not values:
        return ""
    mean, interval = statistics.mean(values), ""
    if len(values) > 1:
        reach = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
        interval = f" [{mean - reach:+.2f}, {mean + reach:+.2f}]"
    over = f"{len(values)} iterations [95% interval]" if interval else "one iteration"
    words = f"Mean of the rank correlations over {over}: {mean:+.2f}{interval}."
    return words.replace("-", "−")


PANELS = (
    Panel("Attention entropy along the way",
          "At each step, from noise on the left to the image on the right, on one rollout of every "
          "prompt; large dots are the steps that explored.", "attention", _curves, wide=True),
    Panel("Steps that explored", "Noise entered at these; the others followed the ODE.",
          "attention", _explored),
    Panel("How far attention has moved",
          "Of the prompts of an iteration: the difference of their attention entropy from the "
          "reference model's on the same states. Line: the median; bands: half of them, and all.",
          "attention", _shifts),
    Panel("Do they have more to teach?",
          "Every dot is a prompt of an iteration: the rank of its shift, from the least to the "
          "most moved, and the standard deviation of the reward within its group over that "
          "iteration's mean. AEGPO expects the dots to rise: Spearman's rank correlations whose "
          "interval, as if iterations were independent, is above 0.", "attention", _deviations,
          {"axes": ("rank of the shift", "standard deviation"), "colors": (GRAY, BLUE),
           "hover": "%{y:.2f} times the mean"}, wide=True),
)  # fmt: skip
