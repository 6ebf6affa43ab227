"""A run goes on only with the prompts and files that it began with, by content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import entroflow
from entroflow.checkpoints import DIGESTS, read_state
from entroflow.cli import main as cli
from entroflow.comparison.jobs import Arm, Terms, planned
from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.recipe.load import build_recipe
from entroflow.recipe.text import parse_yaml
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.preferences import models
from entroflow.runs.inputs import check_parts, digest_of_records, files_of
from entroflow.training.trainer import Trainer
from tiny_run import PixelPolicy, recipe, train

RECORDS = [{"prompt": f"p{n}", "level": n} for n in range(6)]
HELD_OUT = [f"h{n}" for n in range(8)]
QUICK = (
    "prompts.per_iteration=1", "allocation.group_size=2", "sampling.steps=3", "exploration.size=1",
    "evaluation.images=2", "evaluation.steps=2",
)  # fmt: skip


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path):
    """A run that was stopped, of prompts with metadata and held-out prompts in files."""
    write(tmp_path / "train.jsonl", RECORDS)
    (tmp_path / "held_out.txt").write_text("\n".join(HELD_OUT))
    return train(
        tmp_path / "run", stop_after=1,
        prompts={"type": "jsonl", "path": str(tmp_path / "train.jsonl")},
        evaluation={
            "type": "reward", "path": str(tmp_path / "held_out.txt"), "images": 4,
            "test_images": 4, "steps": 2, "guidance_tried": [1.0],
        },
    )  # fmt: skip


def resumed(run, *overrides):
    return entroflow.resume(run.path, overrides, policy=PixelPolicy())


@pytest.mark.parametrize("edit", [
    {1: {"prompt": "other", "level": 1}},
    {1: {"prompt": "p1", "level": "1"}},
    {1: {"prompt": "p1"}},
    {1: RECORDS[2], 2: RECORDS[1]},
    {6: {"prompt": "more"}},
])  # fmt: skip
def test_edited_training_prompts_are_refused(run, tmp_path, edit):
    """Text, metadata and its type, order, and number."""
    write(tmp_path / "train.jsonl", {**dict(enumerate(RECORDS)), **edit}.values())
    with pytest.raises(InputError, match=r"prompts: what .*train\.jsonl holds is not what") as one:
        resumed(run)
    assert "restore it to go on, or start a new run" in str(one.value)


def test_edited_held_out_prompts_are_refused(run, tmp_path):
    (tmp_path / "held_out.txt").write_text("\n".join([*HELD_OUT[:-1], "other"]))
    with pytest.raises(InputError, match=r"evaluation, test: what .*held_out\.txt holds"):
        resumed(run)


def test_the_same_content_in_other_bytes_goes_on(run, tmp_path):
    text = "".join(json.dumps(dict(reversed(r.items()))) + "\r\n\r\n" for r in RECORDS)
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8-sig", newline="")
    assert resumed(run).metrics()[-1]["iteration"] == 3


def test_a_checkpoint_without_digests_goes_on_with_a_warning(run, caplog):
    path = run.latest() / "state.json"
    state = json.loads(path.read_text())
    assert set(state["inputs"]) == {"prompts", "evaluation, validation", "evaluation, test"}
    del state["inputs"]
    (run.latest() / DIGESTS).unlink()
    path.write_text(json.dumps(state))
    resumed(run)
    assert "whether prompts and other files have changed since can't be told" in caplog.text
    assert read_state(run.latest())["inputs"]


def test_files_of_parts_are_found_and_others_are_not(tmp_path):
    class Judge(Component):
        read_from = ("template",)
        template: object = tmp_path / "words.txt"
        log: object = tmp_path / "log.txt"

    class Reward(Component):
        parts = {"judge": "judge", "others": "reward"}  # noqa: RUF012
        judge: object = Judge()
        others: object = {"a": Judge()}

    (tmp_path / "words.txt").write_text("which?")
    (tmp_path / "log.txt").write_text("1")
    before = files_of(Reward(), "reward")
    assert set(before) == {"reward.judge.template", "reward.others.a.template"}
    (tmp_path / "log.txt").write_text("2")
    assert files_of(Reward(), "reward") == before
    (tmp_path / "words.txt").write_text("which one?")
    assert files_of(Reward(), "reward") != before


PLACES = {
    "reward": lambda part: {"reward": part},
    "reward.rewards.b": lambda part: {
        "reward": {"type": "mixture", "rewards": {"a": {"type": "jpeg_size"}, "b": part}}
    },
    "monitors.rewards.x": lambda part: {"monitors": {"rewards": {"x": part}}},
}
"""Wherever a recipe may name a reward, by what messages call the place."""


def mine(folder, **sections):
    """A file with a recipe of the embedded model."""
    path = folder / "mine.yaml"
    mapping = {"run": {"iterations": 1}, "evaluation": {"images": 4}, **sections}
    with path.open("w") as file:
        YAML().dump(mapping, file)
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["entroflow", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_is_missing_ends_a_command_before_anything_is_written(
    tmp_path, monkeypatch, command, place
):
    monkeypatch.chdir(tmp_path)
    missing = {"type": "shapes_preference", "weights": "none.safetensors"}
    path = mine(tmp_path, **PLACES[place](missing))
    why = f"{place}: weights: can't read {tmp_path / 'none.safetensors'} (No such file"
    for arguments in (["train", path], ["compare", path, "--budget", "1M"]):
        code, _, err = command(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert why in err
    code, out, _ = command("doctor", path)
    assert code == 2
    assert "can't read" in " ".join(out.split())
    assert os.listdir(tmp_path) == ["mine.yaml"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "shapes_preference", "weights": "."}, r"weights: can't read .*Is a directory"),
        ({"type": "shapes_preference", "weights": "text.txt"}, r"text\.txt is torn, or of another"),
        (
            {"type": "pairwise", "judge": {"type": "shapes_preference", "weights": "none"}},
            r"judge: weights: can't read .*none",
        ),
        ({"type": "openai", "model": "m", "cache": "text.txt"}, r"cache: .*is no cache of answers"),
        ({"type": "clip", "model": "./none"}, r"the CLIP model .*none can't be loaded"),
    ],
)
def test_what_can_not_be_read_is_seen_before_a_run(tmp_path, monkeypatch, place, part, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no weights " * 100)
    with pytest.raises(InputError, match=f"^{place}.*{said}"):
        entroflow.train(mine(tmp_path, **PLACES[place](part)), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reward_without_weight_may_lack_its_files():
    sections = PLACES["reward.rewards.b"]({"type": "clip", "model": "/none"})
    sections["reward"]["weights"] = {"b": 0}
    Trainer(build_recipe(sections)).named.check()


def test_a_monitor_whose_file_is_gone_is_seen_when_a_run_is_resumed(tmp_path):
    weights = tmp_path / "own.safetensors"
    shutil.copy(Path(models.__file__).parent / "pointwise.safetensors", weights)
    monitors = {"rewards": {"x": {"type": "shapes_preference", "weights": str(weights)}}}
    run = entroflow.train(mine(tmp_path, monitors=monitors), run=tmp_path / "run", stop_after=0)
    before = run.metrics()
    weights.unlink()
    with pytest.raises(InputError, match=r"^monitors\.rewards\.x\.weights: .*own\..* is not there"):
        entroflow.resume(run.path)
    assert run.metrics() == before


def test_a_part_of_the_users_reads_what_it_needs_before_a_run(tmp_path):
    class Reward(Component):
        read_from = ("words",)
        words: object = tmp_path / "words.txt"

        def check(self):
            super().check()
            if not self.words.read_text():
                raise InputError("words: the file is empty.")

    with pytest.raises(InputError, match=r"^reward: words: can't read"):
        check_parts(Reward(), "reward")
    (tmp_path / "words.txt").touch()
    with pytest.raises(InputError, match=r"^reward: words: the file is empty"):
        check_parts(Reward(), "reward")
    (tmp_path / "words.txt").write_text("one")
    check_parts(Reward(), "reward")


def test_a_template_that_was_edited_is_refused(tmp_path):
    template = tmp_path / "words.txt"
    template.write_text("How good is this for {prompt}? Score: 0 to 10")
    fields = {
        "type": "openai",
        "model": "m",
        "template": str(template),
        "url": "http://127.0.0.1:9",
    }
    fields |= {"deadline": 0.01, "attempts": 1}
    path = tmp_path / "mine.yaml"
    path.write_text(recipe(reward=fields).to_yaml())
    run = entroflow.train(path, policy=PixelPolicy(), run=tmp_path / "run", stop_after=0)
    template.write_text("How bad is this for {prompt}? Score: 0 to 10")
    with pytest.raises(InputError, match=r"reward\.template: what .*words\.txt holds"):
        resumed(run)


def test_what_was_moved_is_named_by_an_override(run, tmp_path, monkeypatch, caplog):
    """Without it, the error says which; other content is refused, and so is another key."""
    new = tmp_path / "new"
    new.mkdir()
    for name in ("train.jsonl", "held_out.txt"):
        (tmp_path / name).rename(new / name)
    old = tmp_path / "held_out.txt"
    said = f"^evaluation.path: {old} is not there; if it was moved, add evaluation.path=NEW to the"
    with pytest.raises(InputError, match=said):
        resumed(run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^prompts\.path: .* add prompts\.path=NEW"):
        resumed(run, "evaluation.path=new/held_out.txt")
    paths = ["prompts.path=new/train.jsonl", "evaluation.path=new/held_out.txt"]
    for other in ("prompts.type=text", "prompts.per_iteration=3", "optimizer.betas=[0.1, 0.2]"):
        with pytest.raises(InputError, match=r"and paths to what was moved, not '(prompts|optim)"):
            resumed(run, *paths, other)
    with pytest.raises(InputError, match=r"evaluation, validation: what .* holds is not what"):
        resumed(run, paths[0], "evaluation.path=new/train.jsonl")
    assert resumed(run, *paths).metrics()[-1]["iteration"] == 3
    assert "was changed" not in caplog.text
    kept = parse_yaml((run.path / "recipe.yaml").read_text(), "recipe")
    assert kept["prompts"]["path"] == str(new / "train.jsonl")
    assert resumed(run, "run.iterations=4").metrics()[-1]["iteration"] == 4


class Reads(Component):
    """A reward with a file that is no part of the inputs, and one that is."""

    read_from = ("template",)

    file: Path | None = None
    cache: Path | None = None
    template: Path | None = None

    def score(self, images, prompts):
        assert self.file is None or self.file.read_text()
        return Scores(images.mean(dim=(1, 2, 3)), (Status.OK,) * len(images))


def test_of_what_no_digest_tells_a_moved_path_is_warned_of(tmp_path, caplog):
    for name in ("file", "template", "moved", "words"):
        (tmp_path / f"{name}.txt").write_text("same")
    own = {"type": f"{__name__}.Reads", "cache": str(tmp_path / "cache")}
    own |= {key: str(tmp_path / f"{key}.txt") for key in ("file", "template")}
    (tmp_path / "mine.yaml").write_text(recipe(reward=own).to_yaml())
    run = entroflow.train(
        tmp_path / "mine.yaml", policy=PixelPolicy(), run=tmp_path / "run", stop_after=1
    )
    (tmp_path / "template.txt").unlink()
    with pytest.raises(InputError, match=r"reward\.template: .*template\.txt is not there; if it"):
        resumed(run)
    resumed(run, f"reward.file={tmp_path / 'moved.txt'}", f"reward.template={tmp_path}/words.txt")
    (warned,) = [r.getMessage() for r in caplog.records if "can't be told" in r.getMessage()]
    assert warned.startswith(f"reward.file: whether {tmp_path / 'moved.txt'} holds what the run")
    with pytest.raises(InputError, match=r"reward\.file|not 'reward\.file'"):
        resumed(run, "reward.file=null")


def test_results_are_kept_by_place_where_no_digest_tells_the_content(tmp_path):
    keys = []
    for folder, cache in (("a", "x"), ("b", "x"), ("a", "y")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "w.txt").write_text(folder)
        own = [f"reward.type={__name__}.Reads", f"reward.file={tmp_path / folder / 'w.txt'}"]
        own += [f"reward.cache={tmp_path / cache / 'cache'}", *QUICK]
        (job,) = planned([Arm("quickstart", tuple(own))], [0], Terms({"updates": 1}))
        keys.append(job.key)
    assert len({key["recipe_hash"] for key in keys}) == 1
    assert keys[0] == keys[2] != keys[1]


def test_results_of_a_comparison_are_of_what_the_files_held(tmp_path):
    path = tmp_path / "prompts.txt"
    arm = Arm("quickstart", ("prompts.type=text", f"prompts.path={path}"))
    keys = []
    for text in ("a red circle\n", "a blue ring\n", "a red circle\n\n"):
        path.write_text(text)
        (job,) = planned([arm], [0], Terms({"budget": "300k"}))
        keys.append(tuple(job.key.values()))
    assert keys[0] == keys[2] != keys[1]


def test_code_that_was_edited_is_warned_of_and_makes_other_results(tmp_path, monkeypatch, caplog):
    """It may be a fault that was mended, so the run goes on; a result is of what ran."""
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "edited_rewards.py"
    code.write_text(
        "def bright(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"
    )
    own = ["reward.type=edited_rewards.bright", *QUICK]
    (before,) = planned([Arm("quickstart", tuple(own))], [0], Terms({"updates": 1}))
    run = entroflow.train("quickstart", own, run=tmp_path / "run", stop_after=1)
    code.write_text(code.read_text() + "# quicker\n")
    (after,) = planned([Arm("quickstart", tuple(own))], [0], Terms({"updates": 1}))
    assert before.key != after.key
    entroflow.resume(run.path, stop_after=2)
    assert f"edited_rewards.bright: {code} was changed since" in caplog.text
    caplog.clear()
    entroflow.resume(run.path, stop_after=3)
    assert "was changed" not in caplog.text


def test_equal_records_have_one_digest_in_every_process():
    """Whatever the order of keys and of a set's members; values that differ have others."""
    values = [
        {"a": 1, "b": [None, True]}, {"a": 1.5}, {"a": "1"}, {"a": True}, {"a": b"1"}, "a", ["a"],
        {"a": Decimal("1.0")}, {"a": {"x", "y", "z"}}, {"a": "\ud800"}, [["a"], "b"], ["a", ["b"]],
    ]  # fmt: skip
    digests = [digest_of_records([value]) for value in values]
    assert len(set(digests)) == len(values)
    assert digest_of_records(["a", "b"]) != digest_of_records([["a", "b"]])
    program = (
        "from entroflow.runs.inputs import digest_of_records as d;"
        "print(d([{'b': [None, True], 'a': 1}]), d([{'a': {'z', 'y', 'x'}}]), d([{'a': object()}]))"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", program]
    made = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert made.stdout.split() == [digests[0], digests[8], digest_of_records([{"a": object()}])]


def test_an_evaluation_of_other_prompts_than_the_run_had_says_so(tmp_path, caplog):
    path = tmp_path / "held_out.txt"
    path.write_text("a red circle\na blue ring\na green square\ntwo red circles\n")
    small = [
        "run.iterations=0", "evaluation.type=reward", f"evaluation.path={path}",
        "evaluation.images=4", "evaluation.test_images=4", "evaluation.steps=1",
        "evaluation.guidance_tried=[1.0]",
    ]  # fmt: skip
    run = entroflow.train("quickstart", small, run=tmp_path / "run")
    entroflow.evaluate(run.path)
    assert "holds other prompts" not in caplog.text
    path.write_text("a red circle\na blue ring\na green square\nthree red circles\n")
    entroflow.evaluate(run.path)
    assert f"evaluation, test: {path} holds other prompts than when the run began" in caplog.text
