"""Files of a run folder that are torn, gone, of another run, or left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import entroflow
from entroflow import checkpoints, locks, writing
from entroflow.checkpoints import (
    CheckpointError,
    check_digests,
    checkpoints_of,
    load_optimizer_tensors,
    read_tensors,
    write_checkpoint,
)
from entroflow.contents import RunError, read_object
from entroflow.errors import InputError
from entroflow.locks import one_writer
from entroflow.report.page import write_report
from entroflow.runs.best import best_of
from entroflow.runs.export import export
from entroflow.runs.files import (
    Best,
    Comparison,
    TrajectoriesFile,
)
from entroflow.runs.folder import RunFolder
from entroflow.writing import (
    part_of,
    whole_folder,
    write_bytes,
    write_text,
)
from tiny_run import PixelPolicy, Shift, assert_same_run, train

RUN = {"iterations": 6, "evaluate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run stopped at iteration 4 of 6 whose best is iteration 1."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    return train(folder, stop_after=4, run=RUN, evaluation={"type": f"{__name__}.Falling"}).path


@pytest.fixture
def run(kept, tmp_path):
    """A copy of it."""
    shutil.copytree(kept, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


class Falling:
    """The best is iteration 1, whatever the policy is; later ones are worse and worse."""

    def run(self, policy, *, seed, batch_size, reward=None, ledger=None):
        found = Shift().run(policy, seed=seed, batch_size=batch_size)
        moved = policy.shift.detach().abs().sum().item()
        return replace(found, reward=0.5 if moved == 0 else 1 / (1 + moved))


def resumed(folder):
    return entroflow.resume(folder.path, policy=PixelPolicy())


def names(folder):
    return [path.name for path in folder.all_checkpoints()]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --- the best checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [None, b"", b"[]", b'{"iteration": 1}', b'{"iteration": 1, "score": "0.9"}', b"\xfe\xff",
     b'{"iteration": 1, "score": NaN}', b'{"iteration": 3, "score": 0.25, "by": "reward"}',
     b'{"iteration": 77, "score": 0.25, "by": "reward"}', b"[" * 10_000],
)  # fmt: skip
def test_the_best_is_named_again_before_anything_is_removed(run, caplog, content):
    """Torn, gone, of another run, or naming what is not there: the metrics know it."""
    scores = {line["iteration"]: line["eval/reward"] for line in run.metrics()}
    there = {int(name) for name in names(run)}
    wanted = max(there, key=lambda n: scores[n])
    path = run.checkpoints / "best.json"
    marked = json.loads(path.read_text())
    assert marked == {"iteration": wanted, "score": scores[wanted], "by": "reward"}
    assert wanted not in sorted(there)[-2:]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert run.best().name == f"{wanted:08d}"
    assert [line for line in warnings_of(caplog) if f"checkpoint {wanted:08d} is the best" in line]
    resumed(run)
    assert json.loads(path.read_text()) == marked
    assert names(run) == [f"{wanted:08d}", "00000005", "00000006"]


def test_nothing_is_removed_where_the_best_can_not_be_told(run, caplog):
    """In the midst of a run: neither the file nor the metrics can be read."""
    (run.checkpoints / "best.json").write_text("{")
    (run.path / "metrics.jsonl").write_text("7\n")
    before = names(run)
    run.prune(keep=1)
    assert names(run) == before
    assert "no checkpoint is removed" in warnings_of(caplog)[-1]
    with pytest.raises(RunError, match="is torn"):
        run.best_score()


def test_what_a_user_puts_beside_checkpoints_is_none(run):
    for name in ("00000002-kept", "00000009.bak", "99", "²²²²²²²²"):
        (run.checkpoints / name).mkdir()
        (run.images / f"{name}.png").touch()
    before = names(run)
    resumed(run)
    assert (run.checkpoints / "00000002-kept").is_dir()
    assert (run.checkpoints / "00000009.bak").is_dir()
    assert "00000009.bak" not in before


def test_the_best_by_metrics_is_the_first_of_equals():
    lines = [{"iteration": n, "eval/reward": r, "eval/score": s} for n, r, s in (
        (0, None, 0.1), (2, 0.5, 0.3), (4, 0.5, 0.9), (6, 0.7, 0.2),
    )]  # fmt: skip
    assert best_of(lines, "reward", [0, 2, 4]) == {"iteration": 2, "score": 0.5, "by": "reward"}
    assert best_of(lines, "score", [0, 2, 4])["iteration"] == 4
    assert best_of(lines, "style", [0, 2, 4]) is None
    assert best_of(lines, "reward", [0]) is None
    by_score = [line | {"selected_by": "score"} for line in lines]
    assert best_of(by_score, "reward", [0, 2, 4, 6])["score"] == 0.9


# --- metrics --------------------------------------------------------------------------------------


def rewritten(run, change):
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[:3], "lacks 2 of the 5 iterations .* the first of them 3; .*after 1"),
        (lambda lines: lines[:1] + lines[2:], "lacks 1 of the 5 .* the first of them 1"),
        (lambda lines: lines[1:], "lacks 1 of the 5 .* the first of them 0"),
        (lambda lines: [], "lacks 5 of the 5"),
        (lambda lines: [*lines[:4], lines[4][:30]], "lacks 1 of the 5 .* first of them 4"),
        (lambda lines: [*lines[:2], "{\n", *lines[2:]], r"metrics.jsonl:3 is torn"),
        (lambda lines: [*lines, lines[2].replace('"seconds": ', '"seconds": 1')], "two lines of"),
        (lambda lines: [*lines[:-1], re.sub(r'"seconds": [0-9.]+', '"seconds": 9e5', lines[-1])],
         "is of another run, or was changed: seconds of iteration 4"),
        (lambda lines: [each.replace('"policy/loss": ', '"policy/loss": "x", "y": ')
                        for each in lines],
         "is torn .policy/loss is no number"),
    ],
)  # fmt: skip
def test_metrics_that_are_cut_or_of_another_run_are_refused(run, change, words):
    """And nothing is changed then, neither them nor a checkpoint."""
    rewritten(run, change)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=words):
        resumed(run)
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}


def test_metrics_that_are_gone_are_noticed(run, caplog):
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"metrics\.jsonl lacks 5 of the 5"):
        resumed(run)
    write_report(run)
    assert "lacks 5 of 5 iterations" in warnings_of(caplog)[-1]


def test_lines_out_of_order_or_twice_are_put_in_order(kept, run, tmp_path, caplog):
    whole = train(tmp_path / "whole", run=RUN, evaluation={"type": f"{__name__}.Falling"})
    rewritten(run, lambda lines: [lines[0], *lines[:0:-1], lines[2]])
    assert_same_run(whole, resumed(run))
    assert [line["iteration"] for line in run.metrics()] == list(range(7))
    assert any("put in order" in line for line in warnings_of(caplog))


def test_a_last_line_that_a_crash_has_torn_is_no_loss(run, tmp_path, caplog):
    """It comes after the checkpoint; some file systems leave zeros."""
    whole = train(tmp_path / "whole", run=RUN, evaluation={"type": f"{__name__}.Falling"})
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"iteration": 5, "sec' + bytes(300))
    assert_same_run(whole, resumed(run))
    assert not warnings_of(caplog)


# --- digests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["live.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("place", [0.45, 0.995])
def test_a_flipped_bit_is_refused_with_how_to_go_on(run, name, place):
    path = run.latest() / name
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is torn.*remove .*00000004 to go on from iter"):
        resumed(run)
    shutil.rmtree(run.latest())
    assert resumed(run).latest().name == "00000006"


def test_the_best_is_read_whole_before_others_are_removed_for_it(run):
    path = run.best() / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    before = names(run)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is torn .* to do without"):
        resumed(run)
    assert names(run) == before
    shutil.rmtree(path.parent)
    resumed(run)
    assert names(run)[-2:] == ["00000005", "00000006"]


def test_a_checkpoint_of_an_older_version_is_read_with_a_warning(run, caplog):
    (run.latest() / "digests.json").unlink()
    resumed(run)
    assert sum("has no digests.json" in line for line in warnings_of(caplog)) == 1


@pytest.mark.parametrize("content", ["[]", '{"sha256": {}}', '{"sha256": {"w.safetensors": 7}}'])
def test_digests_that_are_torn_let_nothing_through(tmp_path, content):
    folder = tmp_path / "00000003"
    write_checkpoint(folder, {"w": {"a": torch.zeros(2)}}, {"iteration": 3})
    check_digests(folder)
    (folder / "digests.json").write_text(content)
    with pytest.raises(CheckpointError, match="is torn"):
        read_tensors(folder / "w.safetensors")


def test_every_file_is_compared(tmp_path):
    folder = tmp_path / "00000003"
    write_checkpoint(folder, {"w": {"a": torch.zeros(2)}}, {"iteration": 3})
    (folder / "w.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"w\.safetensors is missing; restore it"):
        check_digests(folder)


def test_the_state_of_another_iteration_is_refused(run):
    one, other = run.all_checkpoints()[-2:]
    shutil.rmtree(other)
    shutil.copytree(one, other)
    with pytest.raises(CheckpointError, match=r"is of another iteration: state\.json says 3"):
        resumed(run)


def test_moments_of_another_model_are_refused():
    optimizer = torch.optim.AdamW([torch.zeros(3, requires_grad=True)])
    for tensors in ({"1.exp_avg": torch.zeros(3)}, {"exp_avg": torch.zeros(3)},
                    {"0.exp_avg": torch.zeros(4)}, {"x.exp_avg": torch.zeros(3)}):  # fmt: skip
        with pytest.raises(CheckpointError, match="the moments are of another"):
            load_optimizer_tensors(optimizer, tensors)


def test_a_recipe_that_was_changed_is_said_to_be_so(run, caplog):
    path = run.path / "recipe.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.02", "learning_rate: 0.03"))
    resumed(run)
    assert any("the recipe was changed since" in line for line in warnings_of(caplog))


# --- the reader -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        (Best, '{"iteration": -1, "score": 0.5}', "iteration: input should be greater"),
        (Best, '{"iteration": true, "score": 0.5}', "iteration: input should be a valid integer"),
        (Best, '{"iteration": 1e999, "score": 0.5}', "iteration: "),
        (Best, '{"iteration": ' + "9" * 30 + ', "score": 0.5}', "iteration: "),
        (Best, '{"iteration": ' + "9" * 9999 + ', "score": 0.5}', "is torn"),
        (Best, '{"iteration": 1, "score": 1e999}', "score: input should be a finite number"),
        (Comparison, "null", "it holds no JSON object"),
        (TrajectoriesFile, '{"trajectories": [], "prompts": [], "map": {}}', "trajectories: "),
    ],
)
def test_another_shape_is_torn_in_one_line(tmp_path, kind, content, words):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(RunError, match="is torn") as refused:
        read_object(path, kind)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_keys_of_others_are_let_through(tmp_path):
    content = {"iteration": 3, "score": 1, "by": "style", "note": {"mine": [None]}}
    write_text(tmp_path / "best.json", json.dumps(content))
    assert read_object(tmp_path / "best.json", Best) == content


def test_what_can_not_be_read_is_not_to_be_removed(tmp_path):
    (tmp_path / "best.json").mkdir()
    with pytest.raises(RunError, match=r"can't be read \(Is a directory\)\.$"):
        read_object(tmp_path / "best.json", Best)


# --- modes, locks and litter ----------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_what_is_made_follows_the_umask(tmp_path, mask):
    """Of files that safetensors would keep to the owner, and of folders."""
    from safetensors.torch import save_file

    before = os.umask(mask)
    try:
        with whole_folder(tmp_path / "deep" / "out") as made:
            (made / "part").mkdir()
            save_file({"a": torch.zeros(1)}, made / "part" / "a.safetensors")
            (made / "part" / "a.safetensors").chmod(0o600)
        write_checkpoint(tmp_path / "checkpoint", {"w": {"a": torch.zeros(1)}}, {})
        write_bytes(tmp_path / "bytes", b"x")
        with one_writer(tmp_path / "run"):
            pass
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in made if path.is_file()} == {0o666 & ~mask}
    assert {path.stat().st_mode & 0o777 for path in made if path.is_dir()} == {0o777 & ~mask}
    assert len(made) == 11


def test_an_export_is_as_readable_as_what_lies_beside_it(tmp_path):
    run = train_embedded(tmp_path / "run")
    before = os.umask(0o022)
    try:
        out = export(run.path, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def train_embedded(folder):
    small = ["prompts.per_iteration=1", "allocation.group_size=2", "sampling.steps=2",
             "exploration.size=1", "evaluation.images=1", "evaluation.steps=1"]  # fmt: skip
    return entroflow.train("quickstart", small, run=folder, stop_after=0)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_file_keeps_others_out(tmp_path, monkeypatch, caplog, number):
    """As on folders that are shared over a network."""

    def none(*_):
        raise OSError(number, os.strerror(number))

    if number == errno.ENOLCK:
        monkeypatch.setattr(fcntl, "flock", none)
    else:
        # Which later versions of the library may get round by themselves.
        monkeypatch.setattr(locks, "FileLock", Without(number))
    owner = tmp_path / ".owner"
    with one_writer(tmp_path):
        assert owner.read_text().endswith(f"-{os.getpid()}")
    assert not owner.exists()
    assert "without locks" in warnings_of(caplog)[0]
    alive = f"{re.sub('[^A-Za-z0-9]', '-', socket.gethostname())}-{os.getppid()}"
    for name in (alive, "elsewhere-17", "", "no name"):
        owner.write_text(name)
        with (
            pytest.raises(InputError, match=r"another process is writing .* remove .*\.owner"),
            one_writer(tmp_path),
        ):
            pass
        assert owner.read_text() == name
    owner.write_text(f"{alive.rpartition('-')[0]}-{dead()}")
    with one_writer(tmp_path):
        pass
    assert not owner.exists()


class Without:
    """`FileLock` on a file system without locks."""

    def __init__(self, number):
        self.number = number

    def __call__(self, *_, **__):
        return self

    def acquire(self):
        raise OSError(self.number, os.strerror(self.number))


def dead():
    """The number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def named_as(path, process):
    """Where another process of this machine would write a file."""
    mine = part_of(path)
    return mine.with_name(mine.name.replace(f"-{os.getpid()}.part", f"-{process}.part"))


def test_what_killed_processes_left_is_cleared(run):
    """Everywhere in a run folder, as soon as the run is gone on with."""
    left = []
    for folder in (run.path, run.checkpoints, run.images, run.examples, run.trajectories):
        folder.mkdir(exist_ok=True)
        left += [named_as(folder / "x.png", dead()), folder / ".y.json.17.part", folder / ".z.part",
                 named_as(folder / "me.png", os.getpid()), folder / ".w.host-17.part"]  # fmt: skip
    for path in left:
        path.write_text("half")
    whole = named_as(run.checkpoints / "00000009", dead())
    (whole / "deep").mkdir(parents=True)
    living = named_as(run.path / "report.html", os.getppid())
    living.write_text("half")
    with run.held():
        assert living.exists()
        assert not [path for path in (*left, whole) if path.exists()]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_litter_beside_what_is_written_is_cleared_if_it_is_ours_and_dead(tmp_path, kind):
    gone = named_as(tmp_path / "sheet.png", dead())
    others = [named_as(tmp_path / "a.png", os.getppid()), tmp_path / ".b.png.elsewhere-17.part",
              tmp_path / ".download.17.part", tmp_path / ".part"]  # fmt: skip
    gone.mkdir()
    for path in others:
        path.write_text("half")
    if kind == "file":
        write_bytes(tmp_path / "sheet.png", b"whole")
    else:
        with whole_folder(tmp_path / "out"):
            pass
    assert not gone.exists()
    assert all(path.exists() for path in others)


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    gone = pytest.raises(InputError, match=r"/out can't be written \(No such file")
    with gone, whole_folder(tmp_path / "out") as made:
        (made / "deep" / "half").touch()
    assert not list(tmp_path.iterdir())


def test_a_picture_that_is_not_what_was_written_is_torn(run):
    """Of another run, or with a chunk that Pillow alone would show."""
    name = sorted(run.examples.glob("0*.png"))[0]
    whole = name.read_bytes()
    other = sorted(run.examples.glob("0*.png"))[1].read_bytes() + b"x"
    for content in (other, whole[:-20] + bytes(20), whole[:40]):
        name.write_bytes(content)
        with pytest.raises(RunError, match=r"\.png is torn"):
            write_report(run)
        old = json.loads(name.with_suffix(".json").read_text())
    del old["picture"]
    name.with_suffix(".json").write_text(json.dumps(old))
    with pytest.raises(RunError, match=r"\.png is torn"):
        write_report(run)
    name.write_bytes(whole)
    write_report(run)


def test_a_picture_without_its_captions_is_said_to_be_left_out(run, caplog):
    name = sorted(run.examples.glob("0*.json"))[1]
    name.unlink()
    write_report(run)
    assert any(f"{name} is missing" in line for line in warnings_of(caplog))


def test_checkpoints_are_in_the_order_of_their_iterations(tmp_path):
    for name in ("100000000", "99999999", "00000005", "5", "00000006.part"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["00000005", "99999999", "100000000"]


# --- what can't be written ------------------------------------------------------------------------


def refuse(monkeypatch, number, *methods):
    """Let what makes hidden files and folders fail, as in a read-only folder, or on a full disk."""
    for name in methods:
        usual = getattr(Path, name)

        def fails(self, *given, usual=usual, **named):
            if self.name.startswith("."):
                raise OSError(number, os.strerror(number), str(self))
            return usual(self, *given, **named)

        monkeypatch.setattr(Path, name, fails)


def write_a_text(folder):
    writing.write_text(folder / "thing", "x")


def write_a_folder(folder):
    with writing.whole_folder(folder / "thing"):
        pass


def write_within_a_folder(folder):
    with writing.whole_folder(folder / "thing") as made:
        writing.write_text(made / "inner.json", "x")


def write_the_checkpoint(folder):
    write_checkpoint(folder / "thing", {"a": {"b": torch.zeros(2)}}, {})


WRITERS = [write_a_text, write_a_folder, write_within_a_folder, write_the_checkpoint]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("number", "way_out"), [
    (errno.EACCES, r"Permission denied\); allow writing into \S+, or choose a folder"),
    (errno.EROFS, r"Read-only file system\); its file system is read-only; choose another folder"),
    (errno.ENOSPC, r"No space left on device\); free some space on the disk"),
])  # fmt: skip
def test_what_can_not_be_written_is_named_by_its_own_name(
    tmp_path, monkeypatch, write, number, way_out
):
    methods = ["open"] if write in (write_a_text, write_within_a_folder) else ["mkdir"]
    refuse(monkeypatch, number, *methods)
    with pytest.raises(InputError, match=rf"^{tmp_path}/thing can't be written \({way_out}") as one:
        write(tmp_path)
    assert ".part" not in str(one.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_checkpoint(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/thing can't be written \(No space left .*;"
    ):
        write_the_checkpoint(tmp_path)


def test_a_run_folder_that_is_read_only_is_named(tmp_path, monkeypatch):
    """Not the hidden file by which others are kept out."""
    monkeypatch.setattr(locks, "FileLock", Without(errno.EROFS))
    with (
        pytest.raises(
            InputError, match=rf"^{tmp_path} can't be written \(Read-only file system\);"
        ),
        one_writer(tmp_path),
    ):
        pass


def test_other_failures_stay_what_they_are(tmp_path):
    """As of a server that is asked while a folder is filled, or of a file that is read for it."""
    for error in (ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
                  FileNotFoundError(errno.ENOENT, "gone", "/elsewhere/weights")):  # fmt: skip
        with pytest.raises(type(error)), writing.whole_folder(tmp_path / "thing"):
            raise error
