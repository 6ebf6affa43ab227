"""Data of one's own for a language model: read by suffix, beside the recipe, and only as it was."""

from __future__ import annotations

import csv
import json

import pytest

pytest.importorskip("trl")

from pyarrow import Table, parquet

from entroflow.checkpoints import write_digests
from entroflow.errors import InputError
from entroflow.llm import recipe as recipes
from entroflow.llm.countdown import puzzles
from entroflow.llm.problems import problems_of
from entroflow.llm.recipe import Task
from entroflow.llm.run import evaluate, load_model, resume, train

ROWS = [{"question": p.text, "solution": str(n)} for n, p in enumerate(puzzles("train", 30))]


def anything(completions, **_):
    return [float(len(text) % 2) for text in completions]


def as_jsonl(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def as_json(path):
    path.write_text(json.dumps({"problems": ROWS}))


def as_csv(path):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*ROWS[0]], *([*row.values()] for row in ROWS)])


def as_parquet(path):
    parquet.write_table(Table.from_pylist(ROWS), path)


def task(path, **settings):
    settings = {"prompt": "question", "held_out": 5, "reward": f"{__name__}.anything"} | settings
    return Task(type="dataset", path=str(path), **settings)


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("embedded")[1]


@pytest.mark.parametrize(("suffix", "write"), [
    (".JSONL", as_jsonl), (".json", as_json), (".csv", as_csv), (".Parquet", as_parquet),
])  # fmt: skip
def test_a_file_is_read_by_its_suffix(tmp_path, tokenizer, suffix, write):
    write(path := tmp_path / f"data{suffix}")
    found = problems_of(task(path), tokenizer)
    rows = [*found.train.to_list(), *found.validation, *found.test]
    pairs = {(row["prompt"], row["solution"]) for row in rows}
    assert pairs == {(row["question"], row["solution"]) for row in ROWS}
    assert len(rows) == 30
    as_parquet(again := tmp_path / "again.parquet")
    assert problems_of(task(again), tokenizer).digest() == found.digest()


def test_columns_that_begin_in_a_later_row_are_kept(tmp_path, tokenizer):
    rows = [{"question": f"q{n}", **({"solution": f"s{n}"} if n else {})} for n in range(40)]
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = problems_of(task(tmp_path / "late.jsonl"), tokenizer)
    everyone = [*found.train.to_list(), *found.validation, *found.test]
    assert {row["prompt"]: row["solution"] for row in everyone} == {
        row["question"]: row.get("solution") for row in rows
    }


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", "question,solution\nx,1,2\n", r"a\.csv:2 has 3 cells"),
    ("a.jsonl", '{"question": "x", "solution": 1}\n{"question": "y", "solution": "b"}\n',
     "rows that make no table"),
    ("a.jsonl", '{"question": "x", "solution": 100000000000000000000}\n', "make no table"),
    ("a.jsonl", '["x"]\n', "rows that make no table"),
    ("a.yaml", "- x\n", r"files that end in \.yaml are not read"),
    ("a.csv", "asked,solution\nx,1\n", "no column 'question'"),
    *((f"a{suffix}", content, rf"task\.path: .*a{suffix} holds no problems; give it rows with the "
       "columns 'question' and 'solution'") for suffix, content in (
           (".jsonl", ""), (".jsonl", "\n \n"), (".csv", ""), (".csv", "question,solution\n"),
           (".json", "[]"))),
    *((f"a{suffix}", content, rf"task\.path: .*a{suffix} is read as plain text by its name, and a "
       r"text has no columns; give the file the ending \.jsonl") for suffix, content in (
           (".txt", "Make 24\n"), (".TXT", '{"question": "x", "solution": 1}\n'), ("", "x\n"))),
])  # fmt: skip
def test_a_file_that_can_not_be_read_is_one_line(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        problems_of(task(path), tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["problems", "problems/train.jsonl", "./problems", "a/b/c"])
def test_what_is_not_there_is_refused(tmp_path, tokenizer, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load("countdown", ["task.type=dataset", f"task.path={path}"])
    with pytest.raises(InputError, match="there is no data set"):
        problems_of(recipe.task, tokenizer)


def test_an_empty_prompt_is_named(tmp_path, tokenizer):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*ROWS[:3], {"question": " \n", "solution": ""}]))
    with pytest.raises(InputError, match="row 3 is "):
        problems_of(task(path), tokenizer)


def test_problems_on_both_sides_are_counted(tmp_path, tokenizer):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(ROWS + [{**row, "solution": "x"} for row in ROWS]))
    found = problems_of(task(path, held_out=20), tokenizer)
    trained, validation, test = (
        [row["prompt"] for row in rows]
        for rows in (found.train.to_list(), found.validation, found.test)
    )
    counts = [sum(prompt in trained for prompt in held) for held in (validation, test)]
    both = sum(prompt in validation for prompt in test)
    assert all([*counts, both])
    text = "\n".join(found.remarks())
    assert f"{counts[0]} of 20 for the validation, {counts[1]} of 20 for the test" in text
    assert f"{both} of 20 prompts for the test are among" in text


SMALL = (
    "task.type=dataset", "task.prompt=question", "task.held_out=6", "task.path=data.jsonl",
    f"task.reward={__name__}.anything", "run.updates=1", "evaluation.problems=4",
    "evaluation.each=2", "evaluation.every=100", "trainer.per_device_train_batch_size=4",
    "trainer.num_generations=2", "trainer.max_completion_length=6",
)  # fmt: skip


def test_a_run_goes_on_with_the_same_problems_alone(tmp_path, monkeypatch):
    """From another folder, too; and what it was trained on is never what it is evaluated on."""
    monkeypatch.chdir(tmp_path)
    as_jsonl(tmp_path / "data.jsonl")
    run = train(recipes.load("countdown", SMALL), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(run.path, ["run.updates=2"]).metrics()[-1]["iteration"] == 2
    evaluate(str(run.path), problems=4, each=1, temperature=1.0, seed=0)
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*ROWS[:-1], {**ROWS[-1], "solution": "other"}])
    )
    for again in (
        lambda: resume(run.path, ["run.updates=3"]),
        lambda: evaluate(str(run.path), problems=4, each=1, temperature=1.0, seed=0),
    ):
        with pytest.raises(InputError, match=r"task: what .*data\.jsonl holds is not what"):
            again()
    as_jsonl(tmp_path / "data.jsonl")
    progress = run.latest() / "progress.json"
    content = json.loads(progress.read_text())
    content["inputs"]["model"]["digest"] = "other"
    progress.write_text(json.dumps(content))
    write_digests(run.latest())
    with pytest.raises(InputError, match="model: what embedded holds is not what"):
        resume(run.path, ["run.updates=3"])


def test_a_reward_that_was_edited_is_warned_of(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    as_jsonl(tmp_path / "data.jsonl")
    code = tmp_path / "edited_llm_reward.py"
    code.write_text(
        "def odd(completions, **_):\n    return [float(len(text) % 2) for text in completions]\n"
    )
    settings = [*SMALL, "task.reward=edited_llm_reward.odd"]
    run = train(recipes.load("countdown", settings), tmp_path / "run")
    resume(run.path, ["run.updates=2"])
    assert "was changed" not in caplog.text
    code.write_text(code.read_text() + "# quicker\n")
    resume(run.path, ["run.updates=3"])
    assert f"edited_llm_reward.odd: {code} was changed since" in caplog.text
