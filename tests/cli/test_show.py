"""What the command line shows while it works."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

from entroflow.cli import show
from entroflow.evaluation.base import Evaluated
from entroflow.recipe.load import load_recipe
from entroflow.runs.events import Events

UNMEASURED = (
    "reward/mean", "reward/std", "policy/loss", "policy/ratio_max_deviation",
    "policy/clip_fraction", "policy/kl", "policy/gradient_norm",
)  # fmt: skip


PLAN = {
    "network_evaluations": 1012,
    "weighted_evaluations": 1036,
    "reward_calls": 96,
    "steps": [
        {"start": 0, "end": 1, "entropy": math.log(2.893)},
        {"start": 2, "end": 4, "entropy": math.log(3.117)},
    ],
}


def line(iteration):
    """Metrics of an iteration in which nothing could be measured."""
    counts = {"ledger/network_evaluations": 1234, "ledger/weighted_evaluations": 2_500_000}
    nothing = dict.fromkeys(UNMEASURED)
    return {"iteration": iteration, "seconds": 1.0, **nothing, **counts, "by_step": {}}


def test_progress_copes_with_what_was_not_measured_and_shows_every_monitor(capsys):
    scores = {"eval/score": 0.5, "eval/score_low": 0.4, "eval/score_high": 0.6}
    first = line(0) | scores | {"eval/reward": 0.7}
    first |= {"policy/clip_range": 1e-4, "policy/dimensions": 3072, "plan": PLAN}
    monitors = {"sharpness": 0.25, "contrast": math.nan}
    found = Evaluated({}, 0.5, monitors, torch.zeros(0), [], [])
    with show.TrainingProgress(load_recipe("quickstart")) as progress:
        progress.watch(first, found)
        progress.watch(line(1), None)
    said = capsys.readouterr().out
    assert "score 0.500 [0.40, 0.60]" in said
    assert "an iteration: 1,012 network evaluations, 1,036 weighted, 96 rewards" in said
    assert "per value): 0-1 2.89  2-4 3.12" in said
    assert "sharpness 0.25  contrast nan  2.5M weighted evaluations" in said


def test_the_bar_of_a_resumed_run_begins_there_and_ends_with_the_comparison(monkeypatch):
    """The time left comes from what was seen pass: a jump of 60 iterations counts for nothing."""
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(show, "console", Console(force_terminal=True, file=io.StringIO()))
    with show.TrainingProgress(load_recipe("quickstart", ["run.iterations=100"])) as progress:
        progress._progress.get_time = lambda: next(clock)
        (task,) = progress._progress.tasks
        progress.watch(line(60), None)
        assert task.completed == 0.6
        for iteration in (61, 62, 63):
            progress.watch(line(iteration), None)
        # Each reading of the clock is five seconds on, so an iteration takes that or more.
        assert 0 < task.speed <= 0.01 / 5 + 1e-9
        progress.watch(line(100), None)
        assert "comparing with the base" in task.fields["numbers"]


def test_the_table_has_a_dash_where_a_monitor_is_unknown(capsys):
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "images": 6}
    model = {
        "scores": {"colors": score, "overall": score},
        "monitors": {"contrast": None},
        "reward": None,
    }
    summary = {
        "measure": {"name": "strict score"},
        "split": "test", "steps": 10, "guidance": 1.0, "best_guidance": 3.0,
        "models": {"base": model, "base_guided": model},
    }  # fmt: skip
    show.print_table(show.evaluation_table(summary))
    rows = capsys.readouterr().out
    assert "base, guidance 3" in rows
    assert rows.count("–") == 4


def test_events_hold_what_was_measured(tmp_path):
    events = Events(tmp_path)
    events.numbers(line(1) | {"reward/mean": 0.5, "policy/kl": math.nan})
    events.close()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == [
        "ledger/network_evaluations", "ledger/weighted_evaluations", "reward/mean", "seconds",
    ]  # fmt: skip


def test_an_objective_without_a_clip_range_shows_none(monkeypatch):
    lines = []
    monkeypatch.setattr(show.console, "print", lambda *given, **_: lines.extend(map(str, given)))
    progress = show.TrainingProgress(load_recipe("quickstart"))
    start = {"policy/clip_range": None, "policy/dimensions": 12, "plan": PLAN}
    progress.begin(start)
    progress.begin({**start, "policy/clip_range": 0.5})
    assert [line for line in lines if "clip range" in line] == [
        "clip range 0.5 per dimension, 6 in all (D = 12)"
    ]
