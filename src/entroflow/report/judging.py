"""What rewards say of themselves: each of a mixture, and how far to trust a judge of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from entroflow.report.figures import (
    BLUE,
    GRAY,
    ORANGE,
    PURPLE,
    TEAL,
    Metrics,
    Panel,
    constant,
    figure_of,
    has_a_line,
    series,
    trace_style,
)

ROUNDING = 1e-9
"""Differences up to this are rounding: win rates have the same mean in every group."""
COLORS = (BLUE, ORANGE, TEAL, PURPLE, GRAY)

FACTS = (
    (
        ("discriminability",),
        "What the judge can tell apart",
        "Where the spread of the win rates lies between a judge that tosses coins (0) and a strict "
        "ranking (1). Near 0 it sees no difference, whatever the spread is.",
    ),
    (
        ("spread",),
        "Spread of the win rates",
        "Standard deviation within a group. Coins have one, too: 0.20 for 8 images, 0.13 for 16.",
    ),
    (
        ("first",),
        "Points of what is shown first",
        "0.5 without preference for a place. Asked in both orders, a preference makes ties; asked "
        "in one, it makes winners.",
    ),
    (
        ("ties", "disagreements", "failed", "unparsed", "cut"),
        "Comparisons without a winner",
        "Shares of pairs that are ties, or whose two answers contradict each other; of questions "
        "that failed in any way, or got an answer that can't be read or was cut off.",
    ),
    (
        ("intransitive",),
        "Circles",
        "Of three images that were all compared, how often each beats the next in a circle: 0 for "
        "a consistent judge, a quarter for coins.",
    ),
    (
        ("seconds",),
        "Time per group",
        "Seconds that the judge took for the questions of one group.",
    ),
)
"""Facts of one panel, its title, and how to read it."""


def mixture(metrics: Metrics) -> list[Panel]:
    """One panel per reward of a mixture: its mean over the iterations."""
    names = [name for name in _names(metrics, "reward/", depth=3) if name != "failed"]
    panels = []
    for name, color in zip(names, cycle(COLORS), strict=False):
        panel = _panel(
            metrics, f"reward/{name}/", ("mean",), name.replace("_", " "),
            "Mean over an iteration's rollouts, in the units of the reward.", (color,),
        )  # fmt: skip
        panels += [panel] if panel else []
    return panels


def judges(metrics: Metrics) -> list[Panel]:
    """How far judges of pairs are to be trusted, panel by panel."""
    names = _names(metrics, "judge/", depth=3)
    panels = []
    for name in names:
        for facts, title, reading in FACTS:
            of = f"{title} ({name.replace('_', ' ')})" if len(names) > 1 else title
            panel = _panel(metrics, f"judge/{name}/", facts, of, reading, COLORS)
            panels += [panel] if panel else []
    return panels


def failures(metrics: Metrics) -> list[Panel]:
    """Why images could not be scored, where some could not: one panel, a line for each status."""
    prefix = "reward/failed/"
    kinds = sorted(
        {key.removeprefix(prefix) for line in metrics for key in line if key.startswith(prefix)}
    )
    # A status is written down where there is one.
    none = {prefix + kind: 0 for kind in kinds}
    filled = [{**none, **line} if "reward/failed" in line else line for line in metrics]
    panel = _panel(
        filled, prefix, kinds, "Failed rewards by status",
        "Images without a reward: what became of the questions, or of the call.", COLORS,
    )  # fmt: skip
    return [panel] if panel else []


def _names(metrics: Metrics, prefix: str, depth: int) -> list[str]:
    keys = [key.split("/") for line in metrics for key in line if key.startswith(prefix)]
    return list(dict.fromkeys(parts[1] for parts in keys if len(parts) == depth))


def _panel(
    metrics: Metrics,
    prefix: str,
    facts: Sequence[str],
    title: str,
    reading: str,
    colors: Sequence[str],
) -> Panel | None:
    traces = []
    for fact, color in zip(facts, cycle(colors), strict=False):
        x, y = series(metrics, prefix + fact)
        if x:
            traces.append({"x": x, "y": y, **trace_style(fact, color, len(x))})
    if not has_a_line(traces):
        return None
    if all(constant(trace["y"], "iteration", ROUNDING) for trace in traces):
        found = [(t["name"], constant(t["y"], "iteration", ROUNDING)) for t in traces]
        alone = len(found) == 1
        return Panel(
            title,
            reading,
            finding=found[0][1] if alone else " ".join(f"{n}: {s}" for n, s in found),
        )
    return Panel(title, reading, figure_of(traces, yaxis={"rangemode": "tozero"}))
