"""Runs of language models that go on where they stopped, on one process and on two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from safetensors.torch import load_file

from entroflow.cli.main import main
from entroflow.errors import InputError
from entroflow.llm import recipe as recipes
from entroflow.llm.embedded import BASE, Sampling
from entroflow.llm.problems import judge, problems_of, solved
from entroflow.llm.run import load_model, resume, train
from entroflow.report.llm_page import write_llm_report
from entroflow.runs.folder import RunFolder

SMALL = (
    "evaluation.every=100", "evaluation.problems=6", "evaluation.each=4",
    "trainer.per_device_train_batch_size=64", "task.problems=40",
)  # fmt: skip
"""Five updates are an epoch."""


def run_of(folder, *changes):
    return train(recipes.load("countdown", [*SMALL, *changes]), folder)


def weights(folder):
    return load_file(folder.latest() / "model.safetensors")


def curve(folder, key):
    return [line[key] for line in folder.metrics() if key in line]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    [],
    *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
        ["trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=32",
         "clip.type=b", "clip.mu=0.3", "trainer.beta=0.1"],
        ["trainer.num_iterations=2"],
        ["trainer.optim=adafactor"],
        ["trainer.beta=0.1", "trainer.sync_ref_model=true", "trainer.ref_model_sync_steps=2"],
        ["trainer.use_adaptive_entropy=true", "trainer.entropy_target=0.35",
         "trainer.entropy_coef=0.01", "trainer.entropy_coef_delta=0.003"],
    )),
])  # fmt: skip
def test_a_resumed_run_is_one_that_never_stopped(tmp_path, changes):
    """To the bit, over the end of an epoch, whose prompts come in another order than before."""
    whole = run_of(tmp_path / "whole", "run.updates=8", *changes)
    # The library's own random state must come from the checkpoint.
    run_of(tmp_path / "parts", "run.updates=6", *changes)
    torch.manual_seed(1234)
    parts = resume(tmp_path / "parts", ["run.updates=8"])
    assert same(weights(whole), weights(parts))
    for key in ("iteration", "reward", "loss", "token_entropy", "num_tokens"):
        assert curve(parts, key) == curve(whole, key), key
    assert curve(parts, "iteration") == [*range(9)]
    seconds = curve(parts, "seconds")
    assert seconds == sorted(seconds)
    one, other = (json.loads((run.path / "evaluation.json").read_text()) for run in (whole, parts))
    assert one == other
    assert [path.name for path in parts.all_checkpoints()] == ["00000008"]


def test_a_run_that_was_interrupted_goes_on_along_its_schedule(tmp_path):
    """Of the learning rate, with warm-up; nothing is a pickle."""
    changes = ("run.updates=5", "trainer.lr_scheduler_type=cosine", "trainer.warmup_steps=2")
    whole = run_of(tmp_path / "whole", *changes)

    def interrupt(line):
        if line["iteration"] == 2:
            signal.raise_signal(signal.SIGINT)

    parts = train(recipes.load("countdown", [*SMALL, *changes]), tmp_path / "parts", interrupt)
    assert curve(parts, "iteration") == [0, 1, 2, 3]
    pickles = [p for p in parts.path.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not pickles
    resume(tmp_path / "parts")
    assert curve(parts, "learning_rate") == curve(whole, "learning_rate")
    assert len({*curve(whole, "learning_rate")}) > 3
    assert same(weights(whole), weights(parts))


@pytest.mark.slow
def test_what_is_asked_to_stop_ends_its_batch_first(tmp_path):
    """Of answers that serve two updates; so it can go on as if it had not been asked."""
    changes = ("run.updates=4", "trainer.num_iterations=2", "evaluation.every=1")

    def interrupt(line):
        if line["iteration"] == 0:
            signal.raise_signal(signal.SIGINT)

    parts = train(recipes.load("countdown", [*SMALL, *changes]), tmp_path / "parts", interrupt)
    assert curve(parts, "iteration") == [0, 1, 2]
    assert [path.name for path in parts.all_checkpoints()] == ["00000002"]
    resume(tmp_path / "parts")
    assert same(weights(run_of(tmp_path / "whole", *changes)), weights(parts))


def test_a_run_that_lacks_only_its_end_gets_it(tmp_path):
    """Killed while the tuned model was judged on test or on validation problems."""
    run = run_of(tmp_path / "run", "run.updates=2")
    before = (run.path / "evaluation.json").read_text(), run.metrics(), weights(run)
    assert "eval/avg@4" in before[1][-1]
    lacking = {key: value for key, value in before[1][-1].items() if "eval/" not in key}
    for lines in (before[1], [*before[1][:-1], lacking]):
        (run.path / "evaluation.json").unlink()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.path / "metrics.jsonl").write_text(text, encoding="utf-8")
        resume(run.path)
        after = (run.path / "evaluation.json").read_text(), run.metrics(), weights(run)
        assert before[:2] == after[:2]
        assert same(before[2], after[2])


def test_a_checkpoint_that_was_not_judged_is_judged_when_the_run_goes_on(tmp_path):
    """With its own weights, and the run goes on as if it had been."""
    changes = ("evaluation.every=2", "trainer.learning_rate=1e-2")
    whole = run_of(tmp_path / "whole", "run.updates=3", *changes)
    parts = run_of(tmp_path / "parts", "run.updates=2", *changes)
    lines = parts.metrics()
    lines[-1] = {key: value for key, value in lines[-1].items() if "eval/" not in key}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (parts.path / "metrics.jsonl").write_text(text, encoding="utf-8")
    resume(parts.path, ["run.updates=3"])
    for key in ("eval/avg@4", "eval/pass@4_low"):
        assert curve(parts, key) == curve(whole, key)
    assert curve(whole, "eval/avg@4")[0] != curve(whole, "eval/avg@4")[1]
    assert len(curve(parts, "eval/avg@4")) == 3
    assert same(weights(whole), weights(parts))


@pytest.mark.slow
def test_a_lora_is_all_that_is_trained_and_saved(tmp_path):
    changes = ("model.lora_rank=4", "trainer.learning_rate=1e-2", "trainer.beta=0.05")
    whole = run_of(tmp_path / "whole", "run.updates=4", *changes)
    run_of(tmp_path / "parts", "run.updates=2", *changes)
    parts = resume(tmp_path / "parts", ["run.updates=4"])
    one, other = (load_file(run.latest() / "adapter_model.safetensors") for run in (whole, parts))
    assert same(one, other)
    assert not (whole.latest() / "model.safetensors").exists()
    assert all("lora" in name for name in one)
    # What is loaded again says what was judged.
    model, tokenizer = load_model(str(whole.path))
    again = judge(
        model, tokenizer, problems_of(recipes.load("countdown").task, tokenizer).test[:6], solved,
        Sampling(each=4, most_words=18),
    )  # fmt: skip
    found = json.loads((whole.path / "evaluation.json").read_text())
    assert [[said for said, _ in row["tuned"]] for row in found["answers"]] == again.said
    assert found["tuned"] != found["base"]
    # And can be trained as a whole.
    more = run_of(
        tmp_path / "more", "run.updates=1", f"model.path={whole.path}", "trainer.beta=0.1"
    )
    assert not same(weights(more), model.state_dict())
    # The reference of its KL is where it began, not the model that the LoRA was made for.
    assert curve(more, "kl") == pytest.approx([0.0], abs=1e-6)
    # And that is what it goes on from, wherever the other run has come to.
    assert recipes.load(more.path / "recipe.yaml").model.path == str(whole.latest().resolve())


def right(completions, solution, **_):
    return [float(text == str(wanted)) for text, wanted in zip(completions, solution, strict=True)]


def test_what_was_moved_is_named_by_an_override(tmp_path, monkeypatch):
    """The model and the problems, as long as they are the same."""
    rows = [{"prompt": "1 2 3 4 -> 10 :", "solution": str(n)} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(BASE, tmp_path / "model")
    changes = (
        "task.type=dataset", f"task.path={tmp_path / 'asked.jsonl'}", "task.held_out=6",
        f"task.reward={__name__}.right", "task.problems=20", f"model.path={tmp_path / 'model'}",
        "trainer.per_device_train_batch_size=16",
    )  # fmt: skip
    run_of(tmp_path / "run", "run.updates=1", *changes)
    (tmp_path / "new").mkdir()
    for name in ("asked.jsonl", "model"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    monkeypatch.chdir(tmp_path)
    further = "run.updates=2"
    with pytest.raises(InputError, match=r"^model\.path: .*; if it was moved, add model\.path=NEW"):
        resume(tmp_path / "run", [further])
    with pytest.raises(InputError, match=r"^task\.path: .* is not there; .* add task\.path=NEW to"):
        resume(tmp_path / "run", [further, "model.path=new/model"])
    moved = [further, "model.path=new/model", "task.path=new/asked.jsonl"]
    rows[0]["solution"] = "other"
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"task: what .* holds is not what"):
        resume(tmp_path / "run", [*moved, "task.path=other.jsonl"])
    run = resume(tmp_path / "run", moved)
    assert curve(run, "iteration") == [0, 1, 2]
    written = recipes.load(run.path / "recipe.yaml")
    assert written.task.path == str(tmp_path / "new/asked.jsonl")


# --- wrong input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("llm") / "run", "run.updates=2")


@pytest.mark.parametrize(("overrides", "said"), [
    ([], "has made its 2 updates; go further with run.updates=N"),
    (["run.seed=2"], "can change run.updates, .*, not 'run.seed=2'"),
    (["clip.type=b"], "can change run.updates, .*, not 'clip.type=b'"),
])  # fmt: skip
def test_what_can_not_go_on(done, overrides, said):
    with pytest.raises(InputError, match=said):
        resume(done.path, overrides)


def test_a_torn_checkpoint_is_said(done, tmp_path, monkeypatch, capsys):
    for name, said in (
        ("progress.json", "progress.json is torn"), ("trainer_state.json", "is torn"),
        ("optimizer.safetensors", "is torn"),
    ):  # fmt: skip
        copy = tmp_path / name
        shutil.copytree(done.path, copy)
        torn = copy / "checkpoints" / "00000002" / name
        torn.write_bytes(torn.read_bytes()[:20])
        monkeypatch.setattr(
            "sys.argv",
            ["entroflow", "llm", "train", "--resume", str(copy), "run.updates=3"],
        )  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2, name
        assert said in error
        assert "Traceback" not in error


def test_a_report_tells_files_of_another_run(done, tmp_path, caplog):
    """By the checkpoint that they lie beside; of what is of one run it has nothing to say."""
    write_llm_report(done)
    assert not caplog.text
    for name, before, after, says in (
        ("recipe.yaml", "seed: 0", "seed: 5", "the recipe was changed since {}/checkpoints/"),
        ("recipe.yaml", "seed: 0", "seed: 5", "the recipe was changed since {}/evaluation.json"),
        ("metrics.jsonl", '"loss": ', '"loss": 7', "{}/metrics.jsonl is not of the run of"),
        ("evaluation.json", '"recipe": "', '"recipe": "x', "since {}/evaluation.json was made"),
        ("checkpoints/00000002/progress.json", "{", "[", "progress.json is torn"),
    ):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(done.path, folder)
        text = (folder / name).read_text()
        assert before in text
        (folder / name).write_text(text.replace(before, after))
        caplog.clear()
        write_llm_report(RunFolder.open(folder))
        assert says.format(folder) in caplog.text, name


# --- two processes --------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_judge_and_go_on(tmp_path):
    source = Path(sys.modules["entroflow"].__file__).parents[1]

    def launched(processes, *arguments):
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
             "--standalone", "-m", "--", "entroflow.cli.main", "llm", "train", *arguments],
            capture_output=True, text=True, check=False, timeout=500,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": str(source)},
        )  # fmt: skip

    # Three batches of answers, which two processes can't share evenly.
    changes = (
        *SMALL,
        "evaluation.batch_size=8",
        "clip.type=b",
        "clip.mu=0.3",
        "clip.denominator=shrink",
    )
    for name, updates in (("whole", 6), ("parts", 4)):
        found = launched(2, *changes, f"run.updates={updates}", "--run", str(tmp_path / name))
        assert found.returncode == 0, found.stderr
    found = launched(1, "--resume", str(tmp_path / "parts"), "run.updates=6")
    assert found.returncode != 0
    assert "was written by 2 processes, not 1" in found.stderr
    found = launched(2, "--resume", str(tmp_path / "parts"), "run.updates=6")
    assert found.returncode == 0, found.stderr
    whole, parts = (RunFolder.open(tmp_path / name) for name in ("whole", "parts"))
    assert same(weights(whole), weights(parts))
    assert curve(whole, "iteration") == curve(parts, "iteration") == [*range(7)]
    assert curve(whole, "entropy_clip/share") == curve(parts, "entropy_clip/share")
    # Processes share the judging, which changes nothing.
    model, tokenizer = load_model("embedded")
    alone = judge(
        model, tokenizer, problems_of(recipes.load("countdown").task, tokenizer).test[:6], solved,
        Sampling(each=4, most_words=18, batch_size=8),
    )  # fmt: skip
    assert json.loads((whole.path / "base.json").read_text())["said"] == alone.said
