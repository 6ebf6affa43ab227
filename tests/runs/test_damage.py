"""Runs whose files were damaged: nothing is lost without a word, and no traceback tells of it.

A run that is half done is damaged file by file in many ways. Then every command that reads it must
either do what it does with the whole run, or say in a line what is wrong; and no checkpoint goes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys

import pytest

from entroflow.checkpoints import read_tensors
from entroflow.cli import main as cli

SMALL = (
    "prompts.per_iteration=2", "allocation.group_size=4", "sampling.steps=3",
    "run.iterations=8", "run.checkpoint_every=1", "run.evaluate_every=2", "run.keep_checkpoints=2",
    "evaluation.images=2", "evaluation.test_images=2", "evaluation.steps=1",
    "evaluation.guidance_tried=[1.0]", "reward.value=graded",
)  # fmt: skip
OTHER_JSON = (b"[]", b"{}", b"7", b"null", b'"text"', b'{"iteration": 1e999}', b"[" * 5000)
HARMLESS = ("report.html", ".lock")
"""What nobody reads."""
READ_BY_LLM_REPORTS = ("recipe.yaml", "metrics.jsonl", "evaluation.json")


class Command:
    """Runs a command in this process and keeps what it prints."""

    def __init__(self, monkeypatch, capfd, caplog):
        self._patch, self._capfd, self._caplog = monkeypatch, capfd, caplog

    def __call__(self, *arguments):
        """Exit code, standard output, warnings and errors."""
        self._patch.setattr(sys, "argv", ["entroflow", *map(str, arguments)])
        self._caplog.clear()
        try:
            cli.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except Exception as error:  # a traceback, for who calls the command
            code = repr(error)
        out, err = self._capfd.readouterr()
        said = [f"warning: {record.getMessage()}" for record in self._caplog.records]
        return code, out, [*said, *(line for line in err.splitlines() if "error:" in line)]


def link(source, target):
    """A copy that takes no time; of what is appended to, a real one."""
    if source.endswith(".jsonl"):
        shutil.copy2(source, target)
    else:
        os.link(source, target)


def restored(whole, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, copy_function=link)


def replaced(path, content):
    """Write a file anew: the one it was is linked elsewhere."""
    path.unlink()
    path.write_bytes(content)


def damages(path, other, rng):
    """Name and function of every way to damage one file.

    Args:
        other: the same file of another run.
    """
    whole = path.read_bytes()
    middle = rng.randrange(1, max(2, len(whole) - 1))

    def directory():
        path.unlink()
        path.mkdir()

    def flipped(mask):
        def flip():
            changed = bytearray(whole)
            changed[rng.randrange(len(changed))] ^= mask
            replaced(path, bytes(changed))

        return flip

    yield "gone", path.unlink
    yield "empty", lambda: replaced(path, b"")
    yield "cut", lambda: replaced(path, whole[:middle])
    yield "short of its end", lambda: replaced(path, whole[:-3])
    yield "zeros", lambda: replaced(path, bytes(len(whole)))
    yield "zeros at its end", lambda: replaced(path, whole[:middle] + bytes(len(whole) - middle))
    yield "no text", lambda: replaced(path, b"\xff\xfe" + whole)
    yield "a directory", directory
    yield "flipped", flipped(0x80)
    if path.suffix == ".safetensors" or path.name in ("state.json", "digests.json"):
        yield "one bit flipped", flipped(0x01)
    if path.suffix in (".json", ".jsonl"):
        for content in OTHER_JSON:
            yield f"{content[:20]!r}", lambda content=content: replaced(path, content + b"\n")
    if other is not None and other.read_bytes() != whole:
        yield "another run's", lambda: replaced(path, other.read_bytes())
    if path.suffix == ".jsonl":
        lines = whole.splitlines(keepends=True)
        for n in range(len(lines)):
            kept = lines[:n] + lines[n + 1 :]
            yield f"without line {n}", lambda kept=kept: replaced(path, b"".join(kept))
        for name, changed in (
            ("twice", [*lines, *lines]), ("backwards", lines[::-1]), ("first lines", lines[:2]),
        ):  # fmt: skip
            yield name, lambda changed=changed: replaced(path, b"".join(changed))


def tree(folder):
    """Every file and when it was written, but for what nobody reads."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in HARMLESS
    }


def checkpoints_of(folder):
    return {path.name for path in (folder / "checkpoints").glob("0*")}


def plain_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def after_resuming(folder):
    latest = folder / "checkpoints" / "00000004"
    weights = [read_tensors(latest / f"{name}.safetensors") for name in ("live", "ema")]
    values = [(key, tensor.sum().item()) for each in weights for key, tensor in each.items()]
    best = json.loads((folder / "checkpoints" / "best.json").read_text())
    return values, plain_metrics(folder), best, checkpoints_of(folder)


def outcomes(command, folder, which):
    """Code, what was said, and what came of it, by command."""
    scratch = folder.parent
    for name in which:
        if name == "report":
            code, _, said = command("report", folder)
            made = (folder / "report.html").read_bytes() if code == 0 else None
        elif name == "sample":
            out = scratch / "sample.png"
            code, _, said = command(
                "sample", "a red circle", "--run", folder, "--count", 1, "--steps", 1, "--out", out
            )
            made = out.read_bytes() if code == 0 else None
        elif name == "export":
            shutil.rmtree(scratch / "out", ignore_errors=True)
            code, _, said = command("export", folder, "--out", scratch / "out")
            whole = scratch / "out" / "weights.safetensors"
            made = whole.read_bytes() if code == 0 else None
        elif name == "evaluate":
            code, made, said = command("evaluate", folder, "--json", "--images", 2, "--steps", 1)
        else:
            code, _, said = command("train", "--resume", folder, "--stop-after", 4)
            made = after_resuming(folder) if code == 0 else None
        yield name, code, said, made


def read_by(name):
    """The commands that read a file; resuming comes last, as it changes the folder."""
    if name.startswith("checkpoints/"):
        return ("report", "sample", "export", "resume")
    if name in ("metrics.jsonl", "recipe.yaml"):
        return ("report", "sample", "evaluate", "resume")
    return ("report", "resume")


def fault_of(code, said, made, whole_said, whole_made):
    """What is not as it should be; nothing if all is well."""
    new = [line for line in said if line not in whole_said]
    if code not in (0, 2):
        return f"ends with {code}"
    if any(len(line) > 600 for line in new):
        return "says too much"
    if code == 2:
        return "" if any(line.startswith("error:") for line in new) else "ends without a word"
    return "" if new or made == whole_made else "is another, without a word"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_damaged_run_is_said_to_be_so(tmp_path, monkeypatch, capfd, caplog, seed):
    """Every file of a run, in every way."""
    folder = tmp_path / "run"
    # Nothing here is to outlive a failure of the machine.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    command = Command(monkeypatch, capfd, caplog)
    for number, kept in ((0, "whole"), (1, "other")):
        code, _, said = command(
            "train", "tp_grpo", *SMALL, f"run.seed={number}", "--stop-after", 3, "--run", folder
        )
        assert code == 0, said
        folder.rename(tmp_path / kept)
    whole, other = tmp_path / "whole", tmp_path / "other"
    files = [name for name in tree(whole) if "tensorboard" not in name and "images/" not in name]
    restored(whole, folder)
    every = ("report", "sample", "evaluate", "export", "resume")
    before = {name: rest for name, *rest in outcomes(command, folder, every)}
    assert all(code == 0 for code, *_ in before.values()), before
    rng, faults, tried = random.Random(seed), [], 0
    for name in sorted(files):
        theirs = other / name if (other / name).is_file() else None
        for damage, _ in list(damages(whole / name, theirs, rng)):
            restored(whole, folder)
            dict(damages(folder / name, theirs, rng))[damage]()
            start = tree(folder)
            for done, code, said, made in outcomes(command, folder, read_by(name)):
                tried += 1
                _, whole_said, whole_made = before[done]
                fault = fault_of(code, said, made, whole_said, whole_made)
                if not fault and (code == 2 or done != "resume") and tree(folder) != start:
                    fault = "changes the folder"
                # By a recipe with another seed, another checkpoint is the best.
                if code == 0 and done == "resume" and name != "recipe.yaml":
                    fault = fault or ("" if made[-1] >= whole_made[-1] else "loses a checkpoint")
                if fault:
                    faults.append(f"{name}, {damage}: {done} {fault} {said}")
    assert tried > 800
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_damaged_run_of_a_language_model_is_said_to_be_so(tmp_path, monkeypatch, capfd, caplog):
    """Four of the ways for every file, by chance; in any case those of another run's files."""
    pytest.importorskip("trl")
    folder = tmp_path / "run"
    monkeypatch.setattr(os, "fsync", lambda _: None)
    command = Command(monkeypatch, capfd, caplog)
    small = ("evaluation.every=100", "evaluation.problems=2", "evaluation.each=2",
             "trainer.per_device_train_batch_size=16", "task.problems=20")  # fmt: skip
    for number, kept in ((0, "whole"), (1, "other")):
        code, _, said = command("llm", "train", *small, "run.updates=1", f"run.seed={number}",
                                "--run", folder)  # fmt: skip
        assert code == 0, said
        folder.rename(tmp_path / kept)
    whole, other = tmp_path / "whole", tmp_path / "other"

    def outcome(name):
        if name == "report":
            code, _, said = command("report", folder)
            return code, said, (folder / "report.html").read_bytes() if code == 0 else None
        code, _, said = command("llm", "train", "--resume", folder, "run.updates=2")
        latest = folder / "checkpoints" / "00000002" / "model.safetensors"
        return code, said, latest.read_bytes() if code == 0 else None

    def lost():
        return not (checkpoints_of(folder) & {"00000001", "00000002"})

    restored(whole, folder)
    before = {name: outcome(name) for name in ("report", "resume")}
    assert all(code == 0 for code, *_ in before.values()), before
    rng, faults = random.Random(0), []
    for name in sorted(name for name in tree(whole) if "tensorboard" not in name):
        ways = [way for way, _ in damages(whole / name, other / name, rng)]
        others = [way for way in ways if way == "another run's"]
        for way in dict.fromkeys([*rng.sample(ways, 4), *others]):
            restored(whole, folder)
            dict(damages(folder / name, other / name, rng))[way]()
            # Answers, weights and moments of another run are not what a report is made of.
            unread = way == "another run's" and name not in READ_BY_LLM_REPORTS
            absent = unread or (name, way) == ("evaluation.json", "gone")
            for done, (_, whole_said, whole_made) in before.items():
                code, said, made = outcome(done)
                if absent and done == "report" and code == 0:
                    continue
                fault = fault_of(code, said, made, whole_said, whole_made)
                if fault or lost():
                    faults.append(f"{name}, {way}: {done} {fault or 'loses a checkpoint'} {said}")
    assert not faults, "\n".join(faults)
