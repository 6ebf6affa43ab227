"""Which checkpoints stay."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

import entroflow
from entroflow.runs.folder import RunFolder
from tiny_run import PixelPolicy, Shift, train


class Scripted(Shift):
    """Reports the given rewards one after the other; the scores stay those of the shift."""

    def __init__(self, scores):
        self.scores = iter(scores)

    def run(self, policy, **options):
        return replace(super().run(policy, **options), reward=next(self.scores))


@pytest.mark.parametrize(
    ("keep", "scores", "best"),
    [
        (1, [0.1, 0.9, 0.5, 0.4, 0.3, 0.2], 1),
        (2, [0.1, 0.2, 0.9, 0.4, 0.3, 0.2], 2),
        (3, [0.9, 0.1, 0.2, 0.3, 0.4, 0.9], 0),
        (9, [0.1, 0.2, 0.3, 0.4, 0.5, 0.4], 4),
    ],
)
def test_the_latest_checkpoints_and_the_best_stay(tmp_path, keep, scores, best):
    """A tie is no improvement."""
    folder = train(
        tmp_path / "run",
        run={
            "iterations": 5, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": keep
        },
        evaluation={"type": f"{__name__}.Scripted", "scores": scores},
    )  # fmt: skip
    kept = {int(path.name) for path in folder.all_checkpoints()}
    assert kept == set(range(max(0, 6 - keep), 6)) | {best}
    assert int(folder.best().name) == best
    assert json.loads((folder.checkpoints / "best.json").read_text())["score"] == scores[best]


def test_an_outdated_best_goes_when_the_last_iteration_is_the_best(tmp_path):
    folder = train(
        tmp_path / "run",
        run={"iterations": 2, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1},
        evaluation={"type": f"{__name__}.Scripted", "scores": [0.1, 0.2, 0.3]},
    )
    assert [path.name for path in folder.all_checkpoints()] == ["00000002"]


def test_the_best_is_remembered_over_a_pause(tmp_path):
    """A worse score after resuming does not become the best."""
    scores = [0.1, 0.9, 0.5, 0.4, 0.3, 0.2]
    settings = {"iterations": 5, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    evaluation = {"type": f"{__name__}.Scripted", "scores": scores}
    folder = train(tmp_path / "run", stop_after=2, run=settings, evaluation=evaluation)
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert int(folder.best().name) == 1
    assert {int(path.name) for path in folder.all_checkpoints()} == {1, 5}


def test_a_crash_before_the_mark_does_not_lose_the_best(tmp_path, monkeypatch):
    """The checkpoint is there, and its score is in the metrics: resuming marks it. The script then
    begins anew, so the last evaluation ties with it.
    """
    mark = RunFolder.mark_best

    def crash(self, iteration, score, by):
        if iteration == 1:
            raise KeyboardInterrupt
        mark(self, iteration, score, by)

    settings = {"iterations": 3, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    scores = {"type": f"{__name__}.Scripted", "scores": [0.1, 0.9]}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "mark_best", crash)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", run=settings, evaluation=scores)
    folder = RunFolder.open(tmp_path / "run")
    assert (int(folder.best().name), int(folder.latest().name)) == (0, 1)
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert folder.metrics()[-1]["iteration"] == 3
    assert int(folder.best().name) == 1
    assert folder.best_score() == 0.9


def test_a_run_that_is_stopped_at_its_best_has_it_marked(tmp_path):
    """Between two checkpoints, by whoever watches."""

    def watch(metrics, evaluated):
        if metrics["iteration"] == 1:
            raise KeyboardInterrupt

    settings = {"iterations": 3, "evaluate_every": 1, "checkpoint_every": 2}
    scores = {"type": f"{__name__}.Scripted", "scores": [0.1, 0.9]}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", run=settings, evaluation=scores, watch=watch)
    folder = RunFolder.open(tmp_path / "run")
    assert (int(folder.best().name), folder.best_score()) == (1, 0.9)


@pytest.mark.parametrize("failed", [math.nan, math.inf, None])
def test_without_held_out_rewards_nothing_is_best_and_it_is_said(tmp_path, caplog, failed):
    scores = {"type": f"{__name__}.Scripted", "scores": [failed] * 3}
    folder = train(tmp_path / "run", evaluation=scores)
    assert folder.best() is None
    said = [record.message for record in caplog.records]
    for message, n in zip(said, (0, 2, 3), strict=True):
        assert message.startswith(f"iteration {n}: no held-out image has a reward")


def test_a_run_that_chooses_by_another_evaluation_compares_with_all_that_are_there(
    tmp_path, caplog
):
    folder = train(
        tmp_path / "run", stop_after=3,
        run={"iterations": 4, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 9},
        evaluation={"type": f"{__name__}.Scripted", "scores": [0.9, 0.1, 0.2, 0.3]},
    )  # fmt: skip
    assert int(folder.best().name) == 0
    entroflow.resume(folder.path, ["monitors.best=score"], policy=PixelPolicy())
    scores = [line["eval/score"] for line in folder.metrics()]
    assert int(folder.best().name) == scores.index(max(scores))
    assert "chosen by eval/score from now on" in caplog.text
