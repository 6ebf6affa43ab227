"""The figures of the report over iterations and over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from entroflow.evaluation.base import Measure
from entroflow.report.figures import (
    BLUE,
    BLUE_BAND,
    GRAY,
    MOST_POINTS,
    ORANGE,
    PURPLE,
    TEAL,
    Figure,
    Metrics,
    Panel,
    constant,
    figure_of,
    has_a_line,
    heat_map,
    is_finite,
    series,
    trace_of,
    trace_style,
)
from entroflow.report.wording import Interval

ROUNDING = 1e-7
"""Differences up to this, in numbers near 1, are rounding of float32, and not drawn."""
SMALLEST_DEVIATION = 1e-9


# --- score and reward -----------------------------------------------------------------------------


def score_and_reward(metrics: Metrics, measure: Measure, prompts: str) -> list[Panel]:
    """Score, training reward and its spread, where there are two points or more.

    Args:
        prompts: what the evaluations were on, as in "validation prompts".
    """
    panels = [_score(metrics, measure, prompts), _reward(metrics, prompts), _spread(metrics)]
    return [panel for panel in panels if panel is not None]


def _score(metrics: Metrics, measure: Measure, prompts: str) -> Panel | None:
    judged = [line for line in metrics if is_finite(line.get("eval/score"))]
    traces = []
    if all(is_finite(line.get(f"eval/score_{end}")) for line in judged for end in ("low", "high")):
        iterations, low = series(judged, "eval/score_low")
        _, high = series(judged, "eval/score_high")
        outline = {"width": 0, "color": BLUE}
        quiet = {"mode": "lines", "line": outline, "hoverinfo": "skip", "showlegend": False}
        traces += [
            {"x": iterations, "y": low, **quiet},
            {"x": iterations, "y": high, **quiet, "fill": "tonexty", "fillcolor": BLUE_BAND},
        ]
    traces.append(trace_of(metrics, "eval/score", f"{measure.name}, with 95% interval", BLUE))
    if not has_a_line(traces):
        return None
    return Panel(
        f"Score on {prompts}",
        f"Always the same {prompts} and noise, drawn with the averaged weights (EMA).",
        figure_of(traces, height=340, yaxis={"range": [-0.02, 1.02]} if measure.share else {}),
        wide=True,
    )


def _reward(metrics: Metrics, prompts: str) -> Panel | None:
    iterations, values = series(metrics, "reward/mean")
    window = len(values) // 10
    raw = trace_of(metrics, "reward/mean", "training", GRAY if window > 1 else BLUE)
    traces = [raw]
    if window > 1:
        raw |= {"mode": "markers", "marker": {"size": 4, "color": GRAY, "opacity": 0.6}}
        smooth = trace_style(f"mean of {2 * window + 1} iterations", BLUE, len(values)) | {
            "mode": "lines"
        }
        traces += [{"x": iterations, "y": _moving_mean(values, window), **smooth}]
    evaluated = trace_of(metrics, "eval/reward", prompts, ORANGE, dash="dot")
    traces += [evaluated] if evaluated["x"] else []
    if not has_a_line(traces[:1]):
        return None
    return Panel(
        "Reward",
        "What the training raises: the mean over an iteration's rollouts. Prompts change from "
        f"iteration to iteration, so single points scatter; images of {prompts} are sampled "
        "without step noise.",
        figure_of(traces),
    )


def _spread(metrics: Metrics) -> Panel | None:
    trace = trace_of(metrics, "reward/std", "within-group std", PURPLE)
    if not has_a_line([trace]):
        return None
    return Panel(
        "Spread of the reward within a group",
        "Standard deviation among images of one group, averaged over groups. This contrast is all "
        "the training learns from: at 0 it has nothing left to learn.",
        figure_of([trace], yaxis={"rangemode": "tozero"}),
    )


def _moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over up to `window` neighbours on either side."""
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - window), min(len(values), i + window + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


# --- models beside each other ---------------------------------------------------------------------


def by_skill(models: Mapping[str, Mapping[str, Interval]], measure: Measure) -> Figure:
    """Grouped bars of the score with intervals: model -> skill -> score."""
    colors = dict(zip(models, _model_colors(len(models)), strict=True))
    traces = [
        {
            "type": "bar",
            "name": label,
            "x": [skill.replace("_", " ") for skill in scores],
            "y": [score.value for score in scores.values()],
            "marker": {"color": colors[label]},
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [score.high - score.value for score in scores.values()],
                "arrayminus": [score.value - score.low for score in scores.values()],
                "color": "#6b7280",
                "thickness": 1.5,
                "width": 3,
            },
            "hovertemplate": f"{label}: %{{y:.3g}}<extra></extra>",
        }
        for label, scores in models.items()
    ]
    axis = {"range": [0, 1.02]} if measure.share else {}
    figure = figure_of(traces, height=340, xaxis={"title": None}, yaxis=axis)
    figure["layout"] |= {
        "barmode": "group",
        "bargap": 0.25,
        "bargroupgap": 0.06,
        "showlegend": True,
    }
    return figure


def _model_colors(count: int) -> list[str]:
    """Gray for the base, blue for the tuned (the last), orange between."""
    return [GRAY, *[ORANGE] * (count - 2), BLUE][:count]


# --- what the reward can't see --------------------------------------------------------------------


NO_MONITORS = ("eval/score", "eval/score_low", "eval/score_high", "eval/reward", "eval/win_rate")
"""What an evaluation measures besides its monitors and the scores of single skills."""

NAMES = {
    "texture": "background texture",
    "diversity": "diversity within a prompt",
    "black": "black pixels",
    "white": "white pixels",
    "saturated": "saturated pixels",
    "colors": "entropy of the colours",
}
"""Names of monitors that need more words than their metric has."""

Drifts = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Statistic -> iterations, and how far it has moved from the base's."""

IN_COLOR = (BLUE, ORANGE, TEAL, PURPLE)
"""Colours of the statistics that have moved farthest; the others are gray."""


def monitor_names(metrics: Metrics) -> dict[str, str]:
    """Metric -> name of every monitor, in the order in which they were written."""
    return {
        key: monitor_name(key)
        for key in _keys(metrics)
        if key.startswith("eval/")
        and key not in NO_MONITORS
        and not key.startswith(("eval/score/", "eval/win_rate/"))
    }


def monitor_name(key: str) -> str:
    """The name of a metric `eval/...` or `drift/...` for people."""
    name = key.partition("/")[2]
    return NAMES.get(name, name.replace("_", " "))


def drifts(found: Drifts, band: float) -> Figure:
    """How far statistics have moved; the band as dashed lines, the farthest in colour."""
    by_reach = sorted(found, key=lambda key: max(map(abs, found[key][1])), reverse=True)
    colors = dict(zip(by_reach, IN_COLOR, strict=False))
    traces = []
    for key in by_reach:
        x, y = found[key]
        style = trace_style(monitor_name(key), colors.get(key, GRAY), len(x))
        traces.append({"x": list(x), "y": list(y), **style})
    title = "sd of the base's images"
    figure = figure_of(traces, height=340, yaxis={"title": {"text": title}})
    bounds = [_level(sign * band, GRAY, "dash") for sign in (-1, 1)]
    figure["layout"]["shapes"] = [*bounds, _level(0, GRAY, "dot")]
    return figure


def _level(y: float, color: str, dash: str) -> dict[str, Any]:
    line = {"color": color, "width": 1, "dash": dash}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def held_out_rewards(metrics: Metrics, monitors: Sequence[str]) -> list[Panel]:
    """Rewards over held-out images that nothing trains on, and win rates over the base."""
    rates = [key for key in _keys(metrics) if key.startswith("eval/win_rate")]
    readings = [
        (
            key,
            "Win rate over the base" + key.removeprefix("eval/win_rate").replace("/", ", "),
            BLUE,
            "How often a held-out image is better than the base's of the same noise, by the judge "
            "that is trained on. It begins at 0.5.",
        )
        for key in rates
    ]
    readings += [
        (
            f"eval/{name}",
            f"Monitor: {name.replace('_', ' ')}",
            TEAL,
            "A reward that nothing trains on: it should not fall while the others rise.",
        )
        for name in monitors
    ]
    return over_iterations(metrics, readings)


def _keys(metrics: Metrics) -> list[str]:
    return [*dict.fromkeys(key for line in metrics for key in line)]


# --- under the hood -------------------------------------------------------------------------------

OVER_ITERATIONS = (
    (
        "policy/clip_fraction",
        "Clip fraction",
        BLUE,
        "Share of transitions whose ratio left the clip range. With one optimizer step per "
        "iteration it is 0 by construction; large values say that the steps are too big.",
    ),
    (
        "policy/kl",
        "KL to the reference",
        TEAL,
        "How far the policy has moved from the base model, per latent value.",
    ),
    (
        "policy/gradient_norm",
        "Gradient norm",
        BLUE,
        "Before it is limited to optimizer.max_grad_norm. Sudden peaks are a sign of instability.",
    ),
    (
        "reward/tied_groups",
        "Tied groups",
        PURPLE,
        "Groups whose images all earned the same reward: they teach nothing.",
    ),
    (
        "reward/failed",
        "Failed rewards",
        ORANGE,
        "Images that could not be scored. They are left out, never counted as 0.",
    ),
    (
        "policy/skipped",
        "Skipped transitions",
        PURPLE,
        "Transitions without any gradient, on which no network pass was spent.",
    ),
)
"""Metric, title, colour, how to read it."""

BY_STEP = (
    ("ratio", "Ratio − 1", "Mean over the update. Blue is above 0, orange below.", 1.0),
    ("clipped", "Clip fraction", "Share of transitions outside the clip range.", 0.0),
    (
        "advantage_size",
        "Size of the advantage",
        "Mean absolute value: how strong the signal is. Tied groups count as 0.",
        0.0,
    ),
    ("loss", "Loss", "Mean of the loss term. Blue is above 0, orange below.", 0.0),
    ("kl", "KL to the reference", "Where along the way the policy leaves the base model.", 0.0),
    (
        "weighted_kl",
        "Weighted KL",
        "The same times the step length, as the loss has it.",
        0.0,
    ),
)
"""Metric of `by_step`, title, how to read it, and the value that is drawn as 0."""

DIVERGING = ("ratio", "loss")
"""Metrics of `by_step` that lie on both sides of that value, known up to rounding."""


def under_the_hood(metrics: Metrics) -> list[Panel]:
    """Is the training sound? One panel per quantity over iterations."""
    deviation = _ratio_deviation(metrics)
    return [*([deviation] if deviation else []), *over_iterations(metrics, OVER_ITERATIONS)]


def over_iterations(metrics: Metrics, which: Sequence[tuple[str, str, str, str]]) -> list[Panel]:
    """One panel per quantity that was measured: metric, title, colour, how to read it."""
    panels = []
    for key, title, color, reading in which:
        trace = trace_of(metrics, key, title, color)
        if not trace["x"]:
            continue
        finding = constant(trace["y"], "iteration")
        axis: dict[str, Any] = {"rangemode": "tozero"}
        few = len(trace["x"]) <= MOST_POINTS
        if few and all(isinstance(value, int) for value in trace["y"]):
            kept = {name: trace[name] for name in ("x", "y", "name", "hovertemplate")}
            trace = kept | {"type": "bar", "marker": {"color": color}}
            axis |= {"dtick": 1} if max(trace["y"]) <= 5 else {}
        figure = None if finding else figure_of([trace], yaxis=axis)
        panels.append(Panel(title, reading, figure, finding))
    return panels


def _ratio_deviation(metrics: Metrics) -> Panel | None:
    title, reading = (
        "Ratio before the first step",
        "Largest |ratio − 1| before the first optimizer step, when rollout and training see the "
        "same weights. It should be 0 up to rounding; anything near the clip range is a fault.",
    )
    trace = trace_of(metrics, "policy/ratio_max_deviation", "largest |ratio − 1|", ORANGE)
    if not trace["x"]:
        return None
    if not any(trace["y"]):
        return Panel(title, reading, finding="0 at every iteration.")
    trace |= {
        "customdata": trace["y"],
        "y": [max(value, SMALLEST_DEVIATION) for value in trace["y"]],
        "mode": "markers",
        "hovertemplate": "%{customdata:.1e}<extra></extra>",
    }
    powers = range(-9, 1)
    axis = {
        "type": "log",
        "tickvals": [10.0**power for power in powers],
        "ticktext": ["≤1e−9", *(f"1e−{-power}" for power in powers[1:-1]), "1"],
    }
    return Panel(title, reading, figure_of([trace], yaxis=axis))


def by_step(
    metrics: Metrics, which: Sequence[tuple[str, str, str, float]] = BY_STEP
) -> list[Panel]:
    """Quantities of each denoising step as heat maps, step x iteration; see `BY_STEP`."""
    lines = [line for line in metrics if line.get("by_step")]
    grid = (metrics[0].get("plan") or {}).get("grid", []) if metrics else []
    panels = []
    for key, title, reading, zero in which:
        values = [line["by_step"].get(key) or {} for line in lines]
        steps = sorted({int(step) for by in values for step in by})
        if not steps:
            continue
        rows = [[_shifted(by.get(str(step)), zero) for by in values] for step in steps]
        flat = [value for row in rows for value in row if value is not None]
        if not flat:
            continue
        rounding = ROUNDING if key in DIVERGING else 0.0
        finding = constant(flat, "step and iteration", rounding)
        iterations = [line["iteration"] for line in lines]
        labels = [f"{step} · {grid[step]:.2f}" if step < len(grid) else str(step) for step in steps]
        figure = None if finding else heat_map(iterations, labels, rows, key in DIVERGING)
        panels.append(Panel(title, reading, figure, finding))
    return panels


def _shifted(value: object, zero: float) -> float | None:
    return float(value) - zero if is_finite(value) else None  # type: ignore[arg-type]


# --- the plan of an iteration ---------------------------------------------------------------------

MOST_ROWS = 32
"""Kinds of rows that are drawn."""


def plan_panels(metrics: Metrics) -> list[Panel]:
    """Which steps of which rows are random, and their entropy, as planned at the start."""
    plan = metrics[0].get("plan") if metrics else None
    if not plan or not plan.get("steps"):
        return []
    entropies = figure_of(
        [
            {
                "type": "bar",
                "x": [f"{step['start']}–{step['end']}" for step in plan["steps"]],
                "y": [math.exp(step["entropy"]) for step in plan["steps"]],
                "customdata": [
                    [step["sigma"], step["sigma_next"], step["std"], step["entropy"]]
                    for step in plan["steps"]
                ],
                "marker": {"color": BLUE},
                "hovertemplate": "sigma %{customdata[0]:.3f} to %{customdata[1]:.3f}<br>"
                "std %{customdata[2]:.3f}, %{customdata[3]:.2f} nats<extra></extra>",
            }
        ],
        xaxis={"title": {"text": "step (start–end)"}, "type": "category"},
        yaxis={"rangemode": "tozero"},
    )
    return [
        Panel(
            "Which rows are random where",
            "Rows of one prompt, from noise on the left to the image on the right: as many as the "
            "number at the left are alike. Gray follows the ODE, blue is random and trained, "
            "orange random only. The plan of the first iteration.",
            _rows_drawn(plan),
        ),
        Panel(
            "Entropy of each stochastic step",
            "The exponential of the entropy per latent value: how far the images of a group can "
            "come apart at this step.",
            entropies,
        ),
    ]


def _rows_drawn(plan: Mapping[str, Any]) -> Figure:
    kinds = plan["rows"][:MOST_ROWS]
    names = {"ODE": (GRAY, 2), "random, trained": (BLUE, 6), "random": (ORANGE, 6)}
    drawn: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in names}
    for y, kind in enumerate(kinds):
        for step, (start, end) in enumerate(pairwise(kind["points"])):
            random = step in kind["stochastic"]
            trained = step in kind["trained"]
            name = ("random, trained" if trained else "random") if random else "ODE"
            # None ends a line.
            drawn[name][0].extend([start, end, None])
            drawn[name][1].extend([y, y, None])
    traces = [
        {"x": x, "y": y, "mode": "lines", "name": name, "hoverinfo": "skip",
         "line": {"color": names[name][0], "width": names[name][1]}}
        for name, (x, y) in drawn.items()
        if x
    ]  # fmt: skip
    labels = ["anchor" if kind["role"] == "anchor" else f"{kind['count']} ×" for kind in kinds]
    axis = {
        "tickvals": list(range(len(kinds))), "ticktext": labels, "showgrid": False,
        "range": [len(kinds) - 0.4, -0.6], "zeroline": False,
    }  # fmt: skip
    return figure_of(
        traces,
        height=min(520, 130 + 16 * len(kinds)),
        xaxis={"title": {"text": "step"}, "showgrid": False},
        yaxis=axis,
    )
