"""Stopping, crashing and resuming: a run in parts is the run in one go."""

from __future__ import annotations

import shutil
import signal

import pytest
import torch
from pydantic import PrivateAttr

import entroflow
from entroflow.checkpoints import CheckpointError, read_state
from entroflow.errors import InputError
from entroflow.exploration.window import Window
from entroflow.runs.folder import RunError, RunFolder
from entroflow.training import launch
from tiny_run import (
    HERE,
    ROLLOUTS,
    PixelPolicy,
    Shift,
    assert_same_run,
    brightness,
    final_tensors,
    lines,
    recipe,
    train,
)

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SCORED = []
"""Sizes of the calls of the reward below."""


def interrupted_after_three_iterations(images, prompts, metadata):
    SCORED.append(len(images))
    if sum(SCORED) > 3 * ROLLOUTS:
        raise KeyboardInterrupt
    return brightness(images, prompts, metadata)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_and_resumed_is_one_in_one_go(tmp_path, stop):
    """Weights, average, optimizer state and metrics, at a checkpoint and between two; with memory
    in a component, warm-up, minibatches in random order and KL.
    """
    sections = {"run": {"iterations": 4}, "credit": {"type": f"{HERE}.RunningScale"}}
    whole = train(tmp_path / "whole", **sections)
    parts = train(tmp_path / "parts", stop_after=stop, **sections)
    assert parts.metrics()[-1]["iteration"] == stop
    parts = entroflow.resume(parts.path, policy=PixelPolicy())
    assert_same_run(whole, parts)
    assert final_tensors(whole)["optimizer"]["0.step"].item() == 8
    assert [line["iteration"] for line in lines(whole)] == [0, 1, 2, 3, 4]


def test_a_run_of_an_older_version_is_not_continued(tmp_path):
    run = train(tmp_path / "run", stop_after=1)
    start, *others = run.metrics()
    del start["measure"]
    run.cut_after(-1)
    for line in [start, *others]:
        run.append_metrics(line)
    with pytest.raises(InputError, match=f"begun by an older version .{start['version']}"):
        entroflow.resume(run.path, policy=PixelPolicy())


def test_a_crash_is_made_good(tmp_path):
    """What was written after the last checkpoint is forgotten and written again."""
    sections = {"run": {"iterations": 5}}
    whole = train(tmp_path / "whole", **sections)
    SCORED.clear()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "crashed", reward=interrupted_after_three_iterations, **sections)
    crashed = RunFolder.open(tmp_path / "crashed")
    assert crashed.latest().name == "00000002"
    assert crashed.metrics()[-1]["iteration"] == 3
    SCORED.clear()
    crashed = entroflow.resume(
        crashed.path, policy=PixelPolicy(), reward=interrupted_after_three_iterations
    )
    assert_same_run(whole, crashed)


def test_an_error_of_the_watcher_leaves_the_iteration_saved(tmp_path):
    def watch(metrics, evaluated):
        if metrics["iteration"] == 1:
            raise KeyError("watcher")

    with pytest.raises(KeyError, match="watcher"):
        train(tmp_path / "run", watch=watch)
    folder = RunFolder.open(tmp_path / "run")
    assert folder.latest().name == "00000001"
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert_same_run(train(tmp_path / "whole"), folder)


@pytest.fixture
def comparable(monkeypatch):
    """The tiny run's evaluation passes for one that can be compared."""
    monkeypatch.setattr(launch, "HeldOutEvaluation", Shift)


@pytest.mark.parametrize("number", ENDS)
def test_who_asks_to_stop_in_the_last_iteration_waits_for_no_comparison(
    tmp_path, monkeypatch, caplog, comparable, number
):
    def watch(metrics, evaluated):
        if metrics["iteration"] == 3:
            signal.raise_signal(number)

    compared = []
    monkeypatch.setattr(launch, "_compare", lambda folder, trainer: compared.append(folder.path))
    folder = train(tmp_path / "run", watch=watch)
    assert folder.latest().name == "00000003"
    assert compared == []
    assert "the comparison with the base was left out" in caplog.text
    entroflow.resume(folder.path, policy=PixelPolicy())
    assert compared == [folder.path]


@pytest.mark.parametrize("number", ENDS)
def test_the_last_comparison_can_be_cut_short(tmp_path, monkeypatch, caplog, comparable, number):
    """Everything else is there already; resuming makes it."""

    def compare(folder, trainer):
        signal.raise_signal(number)

    handlers = [signal.getsignal(each) for each in ENDS]
    with monkeypatch.context() as patch:
        patch.setattr(launch, "_compare", compare)
        folder = train(tmp_path / "run")
    assert [signal.getsignal(each) for each in ENDS] == handlers
    assert "the comparison with the base was left out" in caplog.text
    assert folder.metrics()[-1]["iteration"] == 3
    assert folder.latest().name == "00000003"
    report = folder.path / "report.html"
    before = report.read_bytes()
    compared = []
    monkeypatch.setattr(launch, "_compare", lambda folder, trainer: compared.append(folder.path))
    report.unlink()
    entroflow.resume(folder.path, policy=PixelPolicy())
    assert compared == [folder.path]
    assert len(report.read_bytes()) == len(before)


def test_a_run_resumed_from_its_start_is_one_in_one_go(tmp_path):
    """The first checkpoint is that of iteration 0; a crash before the second goes back to it."""
    whole = train(tmp_path / "whole")
    parts = train(tmp_path / "parts", stop_after=0)
    parts = entroflow.resume(parts.path, policy=PixelPolicy())
    assert_same_run(whole, parts)


def test_a_crash_between_checkpoint_and_metrics_loses_no_line(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    append = RunFolder.append_metrics

    def crash(self, line):
        if line["iteration"] == 2:
            raise KeyboardInterrupt
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", crash)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "crashed")
    crashed = entroflow.resume(tmp_path / "crashed", policy=PixelPolicy())
    assert [line["iteration"] for line in lines(crashed)] == [0, 1, 2, 3]
    assert_same_run(whole, crashed)


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    one, two = train(tmp_path / "one"), train(tmp_path / "two")
    assert_same_run(one, two)
    other = train(tmp_path / "other", run={"seed": 1})
    for mine, theirs in zip(lines(one)[1:], lines(other)[1:], strict=True):
        assert mine["reward/mean"] != theirs["reward/mean"]
    live = (final_tensors(run)["live"]["shift"] for run in (one, other))
    assert not torch.equal(*live)


def test_a_resumed_run_may_become_longer(tmp_path):
    """Only `run` may change, and the change is written down."""
    short = train(tmp_path / "short", run={"iterations": 2})
    longer = entroflow.resume(short.path, ["run.iterations=4"], policy=PixelPolicy())
    assert_same_run(train(tmp_path / "whole", run={"iterations": 4}), longer)
    assert "iterations: 4" in (longer.path / "recipe.yaml").read_text()


def test_who_stops_a_run_that_can_not_be_compared_hears_of_no_comparison(tmp_path, caplog):
    train(tmp_path / "run", watch=lambda *_: signal.raise_signal(signal.SIGINT), stop_after=0)
    train(
        tmp_path / "whole",
        watch=lambda line, _: line["iteration"] == 3 and signal.raise_signal(signal.SIGINT),
    )
    assert "finishing the iteration" in caplog.text
    assert "comparison" not in caplog.text


def test_an_evaluation_that_fails_where_a_run_was_cut_short_loses_nothing(tmp_path, monkeypatch):
    folder = train(tmp_path / "run", stop_after=1)
    before = lines(folder)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Shift, "run", fail)
        with pytest.raises(KeyboardInterrupt):
            entroflow.resume(folder.path, ["run.iterations=1"], policy=PixelPolicy())
    assert lines(folder) == before
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert_same_run(train(tmp_path / "whole", run={"iterations": 1}), folder)


def test_a_run_cut_to_less_than_it_has_done_ends_where_it_stands(tmp_path):
    folder = train(tmp_path / "run", stop_after=1, run={"iterations": 5, "evaluate_every": 7})
    folder = entroflow.resume(folder.path, ["run.iterations=0"], policy=PixelPolicy())
    assert [line["iteration"] for line in lines(folder)] == [0, 1]
    assert "eval/score" in lines(folder)[-1]


def test_what_could_not_be_written_down_is_in_no_checkpoint(tmp_path, monkeypatch):
    """So a resumed run makes the picture that a full disk has cost."""
    save = RunFolder.save_sheet

    def full(self, name, evaluated):
        if name == "00000002":
            raise OSError("the disk is full")
        return save(self, name, evaluated)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_sheet", full)
        with pytest.raises(OSError, match="the disk is full"):
            train(tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    assert folder.latest().name == "00000000"
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert_same_run(train(tmp_path / "whole"), folder)


def test_a_checkpoint_comes_after_the_watcher_has_seen_the_iteration(tmp_path):
    seen = []

    def watch(metrics, evaluated):
        folder = RunFolder.open(tmp_path / "run")
        seen.append((metrics["iteration"], [int(path.name) for path in folder.all_checkpoints()]))

    train(tmp_path / "run", watch=watch)
    assert seen == [(0, []), (1, [0]), (2, [0]), (3, [0, 2])]


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    """A crash between the two renames leaves the old one under another name."""
    folder = train(tmp_path / "run", stop_after=1)
    latest = folder.latest()
    latest.rename(latest.with_name(f".{latest.name}.old"))
    folder = entroflow.resume(folder.path, policy=PixelPolicy())
    assert_same_run(train(tmp_path / "whole"), folder)
    assert not list(folder.checkpoints.glob(".*"))


def test_a_run_cut_short_to_where_it_stands_ends_with_an_evaluation(tmp_path):
    """Iteration 1 was no end when it was run, and had none."""
    whole = train(tmp_path / "whole", run={"iterations": 1})
    short = train(tmp_path / "short", stop_after=1)
    assert "eval/score" not in short.metrics()[-1]
    short = entroflow.resume(short.path, ["run.iterations=1"], policy=PixelPolicy())
    assert_same_run(whole, short)
    again = entroflow.resume(short.path, policy=PixelPolicy())
    assert_same_run(whole, again)


class CountedPlans(Window):
    """Remembers how many plans it has made."""

    _made: int = PrivateAttr(0)

    def plan(self, request):
        self._made += 1
        return super().plan(request)

    def state(self):
        return {"made": self._made}

    def load_state(self, state):
        self._made = state["made"]


def test_trying_the_inputs_moves_no_memory(tmp_path):
    """An iteration plans once, and before the first nothing has been planned."""
    folder = train(tmp_path / "run", exploration={"type": f"{__name__}.CountedPlans"})
    made = {
        int(path.name): read_state(path)["components"]["exploration"]["made"]
        for path in folder.all_checkpoints()
    }
    assert made
    assert all(count == iteration for iteration, count in made.items())


def test_a_run_folder_has_one_writer(tmp_path):
    """Whoever comes second is refused, and changes nothing; what was half written goes."""
    refused = []

    def watch(metrics, evaluated):
        with pytest.raises(InputError, match="another process is writing into") as error:
            entroflow.resume(tmp_path / "run", policy=PixelPolicy())
        refused.append(error)

    folder = train(tmp_path / "run", stop_after=1, watch=watch)
    half = folder.checkpoints / ".00000002.1.part"
    half.mkdir()
    with folder.held():
        assert not half.exists()
        before = {path: path.read_bytes() for path in folder.path.glob("*.*")}
        with pytest.raises(InputError, match="another process is writing into"):
            entroflow.resume(folder.path, policy=PixelPolicy())
        assert {path: path.read_bytes() for path in folder.path.glob("*.*")} == before
    folder = entroflow.resume(folder.path, policy=PixelPolicy(), watch=watch)
    assert folder.metrics()[-1]["iteration"] == 3
    assert len(refused) == 2 + 2


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted")
    with pytest.raises(
        InputError, match=r"^runs/tiny-.* can't be written \(File exists\); something"
    ):
        launch.new_folder(recipe())
    (tmp_path / "runs").unlink()
    made = [launch.new_folder(recipe()) for _ in range(3)]
    assert len(set(made)) == 3
    assert {path.parent.name for path in made} == {"runs"}
    assert all(path.name.startswith("tiny-") for path in made)
    folder = RunFolder.create(made[0], "")
    with pytest.raises(RunError, match=r"exists already; choose another --run\.$"):
        RunFolder.create(made[0], "")
    (folder.checkpoints / "00000003").mkdir()
    with pytest.raises(RunError, match=r"another --run, or go on with --resume"):
        RunFolder.create(made[0], "")
    # Another process came first, after this one had seen an empty folder.
    (made[1] / "checkpoints").mkdir()
    monkeypatch.setattr(type(made[1]), "iterdir", lambda path: iter(()))
    with pytest.raises(RunError, match="another process has just made"):
        RunFolder.create(made[1], "")


def test_a_torn_recipe_is_refused_wherever_it_is_cut(tmp_path):
    """Sections that are missing would take their defaults in silence."""
    folder = train(tmp_path / "run", stop_after=1)
    path = folder.path / "recipe.yaml"
    whole = path.read_text()
    # Without its last line break it is whole.
    ends = range(0, len(whole.rstrip()), 7)
    for torn in (*(whole[:end] for end in ends), "notes: we train ...\n"):
        path.write_text(torn)
        with pytest.raises(RunError, match=r"recipe.yaml is torn"):
            entroflow.resume(folder.path, policy=PixelPolicy())
    for same in (whole.rstrip(), whole + "\n\n", whole.replace("\n", "\r\n")):
        path.write_bytes(same.encode())
        RunFolder.open(folder.path)
    path.write_text(whole)
    assert entroflow.resume(folder.path, policy=PixelPolicy()).metrics()[-1]["iteration"] == 3


@pytest.mark.parametrize(
    "override",
    ["optimizer.learning_rate=1", "objective.kl=1", "run.seed=1", "kernel.type=ode", "running=1"],
)
def test_resume_refuses_what_would_be_another_run(tmp_path, override):
    folder = train(tmp_path / "run", stop_after=1)
    before = {path: path.read_bytes() for path in folder.path.glob("*.*")}
    with pytest.raises(InputError, match="a resumed run can change keys of 'run' except the seed"):
        entroflow.resume(folder.path, [override], policy=PixelPolicy())
    assert {path: path.read_bytes() for path in folder.path.glob("*.*")} == before


def test_resume_refuses_other_base_weights(tmp_path):
    folder = train(tmp_path / "run", stop_after=1)
    with pytest.raises(CheckpointError, match="other base weights"):
        entroflow.resume(folder.path, policy=PixelPolicy(shift=0.1))
    assert folder.metrics()[-1]["iteration"] == 1


def test_resume_refuses_a_folder_without_a_run_or_checkpoint(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        entroflow.resume(tmp_path)
    folder = train(tmp_path / "run", stop_after=1)
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(CheckpointError, match="has no checkpoint to go on from; remove it"):
        entroflow.resume(folder.path, policy=PixelPolicy())
