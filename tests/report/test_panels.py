"""Panels drawn from metrics made by hand: what becomes a figure, a sentence, or nothing."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from entroflow.report.panels import Panel, bars, drawn, lines
from entroflow.wording import Interval


def over(values, **more):
    """Metrics with one value of `a` in every iteration from 0 on."""
    return [{"iteration": n, "a": value, **more} for n, value in enumerate(values)]


def shown(metrics, keys="a", **options):
    """Figure and finding of one panel; None if it is left out."""
    panels = drawn([Panel("Title", "Reading.", keys, lines, options)], metrics)
    return panels[0][1:] if panels else None


def test_what_changes_is_a_figure_and_what_does_not_a_sentence():
    figure, finding = shown(over([1.0, 2.0]))
    go.Figure(figure)
    assert not finding
    assert (figure["data"][0]["name"], figure["data"][0]["y"]) == ("Title", [1.0, 2.0])
    assert shown(over([0.5, 0.5])) == (None, "0.500 at every iteration.")
    assert shown(over([0.0, 0.0]), per="update") == (None, "0 at every update.")
    assert shown(over([0.25])) == (None, "0.250 at the only iteration so far.")


@pytest.mark.parametrize("values", [[], [None, float("nan")]])
def test_what_was_never_measured_is_left_out(values):
    assert shown(over(values)) is None


def test_a_curve_needs_two_points_and_is_drawn_even_where_it_is_flat():
    assert shown(over([0.5]), curve=True) is None
    figure, _ = shown(over([0.5, 0.5]), curve=True)
    assert figure["data"][0]["y"] == [0.5, 0.5]


def test_rounding_is_a_share_of_the_value():
    """A mean in float64 is known to a billionth of itself; a small KL is no rounding."""
    sentence = "0.500 up to rounding at every iteration."
    assert shown(over([0.5, 0.5 + 1e-12])) == (None, sentence)
    figure, _ = shown(over([1e-13, 3e-13]))
    assert figure is not None


def test_several_metrics_share_a_panel_with_their_names():
    keys = {"a": "one", "b": "other", "c": "never measured"}
    figure, _ = shown(over([1.0, 2.0], b=3.0), keys)
    assert [trace["name"] for trace in figure["data"]] == ["one", "other"]
    assert shown(over([2.0, 2.0], b=3.0), keys) == (
        None, "one: 2.00 at every iteration. other: 3.00 at every iteration.",
    )  # fmt: skip


def test_a_band_is_drawn_where_every_value_has_its_interval():
    metrics = over([0.5, 0.6], a_low=0.4, a_high=0.7)
    low, high, curve = shown(metrics, band=True, curve=True)[0]["data"]
    assert (low["y"], high["y"], curve["y"]) == ([0.4, 0.4], [0.7, 0.7], [0.5, 0.6])
    del metrics[0]["a_low"]
    assert len(shown(metrics, band=True, curve=True)[0]["data"]) == 1


def test_models_are_bars_side_by_side_the_base_gray_and_the_tuned_blue():
    score = Interval(0.5, 0.4, 0.7)
    panel = Panel("Score", "Reading.", "scores", bars)
    models = {name: {"overall": score, "colors": score} for name in ("base", "tuned")}
    ((_, figure, _),) = drawn([panel], models)
    go.Figure(figure)
    base, tuned = figure["data"]
    assert base["marker"] != tuned["marker"]
    assert base["error_y"]["array"] == pytest.approx([0.2, 0.2])
    assert drawn([panel], {"base": {"overall": score}}) == [], "a single score needs no figure"
