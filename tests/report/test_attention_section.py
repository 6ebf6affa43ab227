"""What the report says of attention, from metrics made by hand."""

from __future__ import annotations

import math

import plotly.graph_objects as go
import pytest
from scipy import stats

from entroflow.report.attention import CURVES, MOST_PROMPTS, PANELS, attention
from entroflow.report.panels import drawn

GRID = [1.0, 0.75, 0.5, 0.25, 0.0]


def line(iteration, correlation=0.5, **changed):
    found = {
        "prompt": ["a ring", "a cross", "two circles", "a star"],
        "entropy": [0.5 + 0.01 * iteration, 0.6, 0.7, 0.8],
        "explored": [1, 2],
        "shift": [0.001 * iteration, 0.004, 0.002, 0.003],
        "size": [4, 8, 4, 8],
        "spread": [0.1, 0.4, 0.2, 0.3],
    }
    return {"iteration": iteration, "attention/rank_correlation": correlation,
            "attention": found | changed}  # fmt: skip


def run(*lines):
    return [{"iteration": 0, "plan": {"grid": GRID}}, *lines]


def panel(metrics, title):
    ((figure, finding),) = [
        drawing for panel, *drawing in drawn(PANELS, metrics) if panel.title.startswith(title)
    ]
    if figure is not None:
        go.Figure(figure)
    return figure or {}, finding


def test_without_a_measurement_there_is_no_section():
    assert attention([]) == []
    assert attention(run({"iteration": 1})) == []


def test_curves_are_of_iterations_from_first_to_last_with_what_explored():
    metrics = run(*(line(n) for n in range(1, 21)))
    traces = panel(metrics, "Attention entropy")[0]["data"]
    assert len(traces) == CURVES
    assert traces[0]["name"] == "iteration 1"
    assert traces[-1]["name"] == "iteration 20"
    assert traces[-1]["y"] == [0.7, 0.6, 0.7, 0.8]
    sizes = traces[0]["marker"]["size"]
    assert sizes[1] == sizes[2] > sizes[0] == sizes[3]
    assert len({trace["opacity"] for trace in traces}) == CURVES


def test_steps_that_never_change_are_said_and_those_that_do_are_drawn():
    _, said = panel(run(line(1), line(2)), "Steps that explored")
    assert said == "1, 2 at every iteration."
    metrics = run(line(1), line(2, explored=[0, 2]))
    (heat,) = panel(metrics, "Steps that explored")[0]["data"]
    assert heat["z"] == [[0, 1], [1, 0], [1, 1], [0, 0]]
    assert heat["y"][1] == "1 · 0.75"


def test_shifts_are_bands_around_their_median():
    metrics = run(line(1, shift=[0.0, 0.2, 0.1, None]), line(2, shift=[0.3, 0.5, 0.4, 9.0]))
    least, most, *_, median = panel(metrics, "How far attention")[0]["data"]
    assert least["y"] == [0.0, 0.3]
    assert most["y"] == [0.2, 9.0]
    assert median["y"] == [0.1, 0.5]


def test_prompts_are_placed_by_rank_and_relative_spread():
    """By hand: ranks 0, 1, 1/3, 2/3 of shifts 1, 4, 2, 3; spreads over their mean of 0.25."""
    dots = panel(run(line(1)), "Do they have")[0]["data"]
    fewer, more = dots
    assert fewer["x"] == pytest.approx([0, 1 / 3])
    assert fewer["y"] == pytest.approx([0.4, 0.8])
    assert more["x"] == pytest.approx([1, 2 / 3])
    assert more["y"] == pytest.approx([1.6, 1.2])
    # Nobody moved: no rank.
    titles = [one.title for one, *_ in drawn(PANELS, run(line(1, shift=[0.0] * 4)))]
    assert not any(title.startswith("Do they") for title in titles)


def test_correlations_have_a_mean_with_its_interval():
    values = [0.5, -0.1, 0.3]
    metrics = run(*(line(n, correlation=v) for n, v in enumerate(values, 1)),
                  line(4, correlation=None))  # fmt: skip
    reach = stats.t.ppf(0.975, 2) * math.sqrt(sum((v - 0.7 / 3) ** 2 for v in values) / 2 / 3)
    low, high = 0.7 / 3 - reach, 0.7 / 3 + reach
    finding = panel(metrics, "Do they have")[1]
    interval = f"[{low:+.2f}, {high:+.2f}]".replace("-", "−")
    assert f"over 3 iterations [95% interval]: +0.23 {interval}." in finding


def table(metrics):
    """The rows of the table of prompts, and what is said of it."""
    (section,) = attention(metrics)
    blocks = dict(section.blocks)
    return section.title, blocks["table"][1], blocks["soft"]


def test_prompts_are_listed_by_shift_and_the_middle_ones_left_out():
    title, rows, left_out = table(run(line(3)))
    assert title == "Where attention sent the rollouts"
    assert [text for text, *_ in rows] == ["a cross", "a ring", "a star", "two circles"]
    assert rows[0] == ("a cross", "0.00400", 8, "0.400")
    assert not left_out
    many = 40
    title, rows, left_out = table(run(line(
        1, prompt=[f"prompt {n}" for n in range(many)], shift=[float(n) for n in range(many)],
        size=[4] * many, spread=[None] * many, correlation=None,
    )))  # fmt: skip
    assert title == "What attention says"
    assert len(rows) == MOST_PROMPTS
    assert f"; {many - MOST_PROMPTS} in between are left out." in left_out
    assert [rows[0][0], rows[-1][0]] == ["prompt 39", "prompt 0"]
    assert rows[0][3] == "–"
