"""A run that is killed at any moment, again and again, ends as one that nobody has disturbed."""

from __future__ import annotations

import json
import random

import psutil
import pytest

from entroflow.runs.folder import RunFolder
from killed_runs import Starter, killed_and_resumed
from tiny_run import assert_same_run

TINY = (
    "prompts.per_iteration=2", "allocation.group_size=4", "sampling.steps=3", "exploration.size=2",
    "run.iterations=6", "run.checkpoint_every=1", "run.evaluate_every=2", "evaluation.images=1",
    "evaluation.test_images=1", "evaluation.steps=1", "evaluation.guidance_tried=[1.0]",
)  # fmt: skip
TIMES = ("seconds", "cost", "version")


@pytest.fixture(scope="module")
def starter():
    return Starter(
        ["torch", "torch._dynamo", "entroflow.training.launch", "entroflow.policies.shapes.policy"]
    )


def assert_no_litter(folder):
    """What a process had begun to write when it was killed is gone."""
    assert {path.name for path in folder.rglob(".*")} <= {".lock"}


def without_times(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in TIMES}


def assert_nobody_is_left(folder):
    opened = {each.pid: opened_by(each) for each in psutil.process_iter()}
    assert [pid for pid, paths in opened.items() if str(folder) in " ".join(paths)] == []


def opened_by(process):
    try:
        return [process.cwd(), *process.cmdline(), *(file.path for file in process.open_files())]
    except psutil.Error:
        return []


@pytest.mark.slow
def test_an_image_run_that_is_killed_loses_nothing(tmp_path, starter):
    def arguments(folder):
        return ["train", "quickstart", *TINY, "--run", folder]

    output = tmp_path / "output.txt"
    starter.run(arguments(tmp_path / "warm"), output)
    seconds = starter.run(arguments(tmp_path / "whole"), output)
    whole, source, ends = RunFolder.open(tmp_path / "whole"), random.Random(0), []
    for n in range(8):
        folder = tmp_path / f"killed{n}"
        ends += killed_and_resumed(
            starter, arguments(folder), ["train", "--resume", folder], folder, output, source,
            0.6 * seconds, kills=8,
        )  # fmt: skip
        assert_no_litter(folder)
        killed = RunFolder.open(folder)
        assert_same_run(whole, killed)
        for name in ("evaluation.json", "checkpoints/best.json"):
            assert without_times(folder / name) == without_times(whole.path / name)
        for picture in whole.path.glob("*/*.png"):
            same = folder / picture.relative_to(whole.path)
            assert same.read_bytes() == picture.read_bytes()
        assert [path.name for path in killed.all_checkpoints()] == [
            path.name for path in whole.all_checkpoints()
        ]
        assert_nobody_is_left(folder)
    assert len(ends) > 8
    assert len({way for way, _ in ends}) > 2
    assert "Traceback" not in output.read_text(encoding="utf-8")


LANGUAGE = (
    "run.updates=5", "evaluation.every=1", "evaluation.problems=4", "evaluation.each=2",
    "trainer.per_device_train_batch_size=16", "task.problems=40",
)  # fmt: skip


@pytest.mark.slow
def test_a_language_model_s_run_that_is_killed_loses_nothing(tmp_path):
    pytest.importorskip("trl")
    starter = Starter(["entroflow.cli.main", "entroflow.llm.run"])

    def arguments(folder):
        return ["llm", "train", *LANGUAGE, "--run", folder]

    output = tmp_path / "output.txt"
    starter.run(arguments(tmp_path / "warm"), output)
    seconds = starter.run(arguments(tmp_path / "whole"), output)
    whole, source, ends = RunFolder.open(tmp_path / "whole"), random.Random(1), []
    for n in range(3):
        folder = tmp_path / f"killed{n}"
        ends += killed_and_resumed(
            starter, arguments(folder), ["llm", "train", "--resume", folder], folder, output,
            source, 0.6 * seconds, kills=8,
        )  # fmt: skip
        assert_no_litter(folder)
        killed = RunFolder.open(folder)
        assert [path.name for path in killed.all_checkpoints()] == ["00000005"]
        files = [path.latest() / "model.safetensors" for path in (whole, killed)]
        assert files[0].read_bytes() == files[1].read_bytes()
        numbers = [[{key: value for key, value in line.items() if not timed(key)}
                    for line in run.metrics()] for run in (whole, killed)]  # fmt: skip
        assert numbers[0] == numbers[1]
        for name in ("evaluation.json", "base.json"):
            assert (folder / name).read_bytes() == (whole.path / name).read_bytes()
        assert_nobody_is_left(folder)
    assert len(ends) > 1
    assert "Traceback" not in output.read_text(encoding="utf-8")


def timed(key):
    """Of a metric: whether it depends on the machine."""
    return "seconds" in key or "time" in key
