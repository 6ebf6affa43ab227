"""Prompts: every source, what it hands out when, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from entroflow.errors import InputError
from entroflow.prompts import (
    DatasetPrompts,
    JSONLPrompts,
    Prompt,
    TextPrompts,
)
from entroflow.shapes import grammar
from entroflow.shapes.prompts import ShapesPrompts

GENEVAL = Path(os.environ.get("ENTROFLOW_TEST_DATA", ""), "geneval", "evaluation_metadata.jsonl")
RECORDS = [
    {"prompt": "a photo of a cow", "tag": "single_object", "include": [{"class": "cow"}]},
    {"prompt": "ein Apfel, größer als ½ Birne", "tag": "two", "include": []},
    {"prompt": "  spaces stay  ", "tag": "three", "include": [{"class": "a"}, {"class": "b"}]},
]


def texts(prompts):
    return [prompt.text for prompt in prompts]


def epochs(source, seed, total, epoch_length):
    """The first `total` prompts, cut into epochs."""
    flat = []
    iteration = 0
    while len(flat) < total:
        flat += texts(source.batch(seed, iteration))
        iteration += 1
    return [tuple(flat[i : i + epoch_length]) for i in range(0, total, epoch_length)]


def numbered(tmp_path, count, per_iteration):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(count)))
    return TextPrompts(path=path, per_iteration=per_iteration)


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_iteration", [1, 3, 7, 10, 23])
def test_every_epoch_visits_each_prompt_once_in_a_new_order(tmp_path, per_iteration):
    """Whether batches divide the epoch, straddle it, or hold more than two of it."""
    source = numbered(tmp_path, 10, per_iteration)
    seen = epochs(source, seed=3, total=60, epoch_length=10)
    everything = {f"prompt {n}" for n in range(10)}
    assert len(seen) == 6
    assert all(set(epoch) == everything for epoch in seen)
    assert len(set(seen)) == 6
    assert all(len(source.batch(3, i)) == per_iteration for i in range(4))


def test_the_order_does_not_depend_on_the_batch(tmp_path):
    one, many = numbered(tmp_path, 7, 1), numbered(tmp_path, 7, 5)
    assert epochs(one, 0, 35, 35) == epochs(many, 0, 35, 35)


def test_every_prompt_comes_at_every_place(tmp_path):
    """Over 400 epochs of 4 prompts each (prompt, place) comes up 100 times, give or take 5 sd."""
    seen = epochs(numbered(tmp_path, 4, 4), seed=0, total=1600, epoch_length=4)
    counts = Counter((text, place) for epoch in seen for place, text in enumerate(epoch))
    assert len(counts) == 16
    assert all(abs(count - 100) < 5 * 75**0.5 for count in counts.values())


def test_a_batch_is_a_function_of_seed_and_iteration(tmp_path):
    """Whatever was asked before, and by whichever object."""
    source = numbered(tmp_path, 9, 4)
    forward = [texts(source.batch(1, i)) for i in range(8)]
    fresh = numbered(tmp_path, 9, 4)
    backward = [texts(fresh.batch(1, i)) for i in reversed(range(8))]
    assert forward == backward[::-1]
    assert [texts(source.batch(2, i)) for i in range(8)] != forward


# --- text -----------------------------------------------------------------------------------------


def test_text_has_a_prompt_per_line_and_skips_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n  a cow \n\t\nein Apfel, größer\r\nthe last one", encoding="utf-8")
    loaded = TextPrompts(path=path).load()
    assert loaded == [Prompt("a cow"), Prompt("ein Apfel, größer"), Prompt("the last one")]


# --- JSONL ----------------------------------------------------------------------------------------


def jsonl(tmp_path, records, **fields):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return JSONLPrompts(path=path, **fields)


def test_jsonl_keeps_everything_else_as_metadata(tmp_path):
    loaded = jsonl(tmp_path, RECORDS).load()
    assert [{"prompt": prompt.text, **prompt.metadata} for prompt in loaded] == RECORDS
    assert all("prompt" not in prompt.metadata for prompt in loaded)


def test_jsonl_reads_another_key_and_skips_blank_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"caption": "a cow", "prompt": 7}\n\n')
    (loaded,) = JSONLPrompts(path=path, key="caption").load()
    assert loaded == Prompt("a cow", {"prompt": 7})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a cow"', r"prompts\.jsonl:2 is not JSON"),
        ('{"text": "a cow", "tag": 1}', r"prompts\.jsonl:2 has no text under 'prompt'.*tag, text"),
        ('{"prompt": 7}', r"prompts\.jsonl:2 has no text under 'prompt'"),
        ('{"prompt": null}', "has no text under 'prompt'"),
        ('["a cow"]', "has no text under 'prompt'; it has: none"),
        ('"a cow"', "has no text under 'prompt'"),
        ("{}", "has no text under 'prompt'; it has: none"),
    ],
)
def test_a_line_without_a_prompt_is_named(tmp_path, line, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=said):
        JSONLPrompts(path=path).batch(0, 0)


def test_geneval_loads_with_its_metadata():
    if not GENEVAL.is_file():
        pytest.skip("set ENTROFLOW_TEST_DATA to a folder with geneval/evaluation_metadata.jsonl")
    source = JSONLPrompts(path=GENEVAL, per_iteration=79)
    loaded = source.load()
    tags = Counter(prompt.metadata["tag"] for prompt in loaded)
    assert tags == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
        "color_attr": 100,
    }  # fmt: skip
    assert loaded[0] == Prompt(
        "a photo of a bench", {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    )
    epoch = [prompt for i in range(7) for prompt in source.batch(0, i)]
    assert Counter(texts(epoch)) == Counter(texts(loaded))
    by_text = {prompt.text: prompt for prompt in loaded}
    assert len(by_text) == 553
    assert all(prompt == by_text[prompt.text] for prompt in epoch)


# --- datasets -------------------------------------------------------------------------------------


@pytest.fixture
def local_datasets(tmp_path, monkeypatch):
    """The real library, with its cache in a folder of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_a_dataset_of_a_json_file(tmp_path, local_datasets):
    path = jsonl(tmp_path, RECORDS).path
    source = DatasetPrompts(name="json", data_files=(str(path),), per_iteration=3)
    loaded = source.load()
    assert texts(loaded) == [record["prompt"] for record in RECORDS]
    assert [prompt.metadata["tag"] for prompt in loaded] == ["single_object", "two", "three"]
    assert sorted(texts(source.batch(0, 0))) == sorted(texts(loaded))


def test_a_dataset_of_a_csv_file_by_another_key(tmp_path, local_datasets):
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["caption", "level"], ["a cow, brown", 1], ["an apple", 2]])
    source = DatasetPrompts(name="csv", data_files=(str(path),), key="caption")
    assert source.load() == [Prompt("a cow, brown", {"level": 1}), Prompt("an apple", {"level": 2})]


def test_a_dataset_without_the_key_is_refused(tmp_path, local_datasets):
    path = jsonl(tmp_path, RECORDS).path
    source = DatasetPrompts(name="json", data_files=(str(path),), key="caption")
    with pytest.raises(InputError, match=r"json\[0\] has no text under 'caption'.*prompt"):
        source.batch(0, 0)


def test_a_dataset_without_the_library_asks_for_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'entroflow\[datasets\]'"):
        DatasetPrompts(name="json").batch(0, 0)


# --- errors of all files --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TextPrompts, JSONLPrompts])
def test_a_missing_empty_or_binary_file_is_named(tmp_path, kind):
    with pytest.raises(InputError, match=r"there is no prompt file .*none\.txt"):
        kind(path=tmp_path / "none.txt").batch(0, 0)
    with pytest.raises(InputError, match="is not a text file"):
        kind(path=tmp_path).batch(0, 0)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="is not a text file in UTF-8"):
        kind(path=tmp_path / "binary").batch(0, 0)
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(InputError, match="prompt list is empty"):
        kind(path=tmp_path / "empty").batch(0, 0)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_jsonl_ends_at_a_line_feed_only(tmp_path, separator):
    path = tmp_path / "prompts.jsonl"
    text = f"one{separator}two"
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts(JSONLPrompts(path=path).load()) == [text]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cow\n", encoding="utf-8-sig")
    assert texts(TextPrompts(path=path).load()) == ["a cow"]


def test_a_missing_file_of_a_dataset_is_wrong_input(tmp_path, local_datasets):
    with pytest.raises(InputError, match=r"none\.json"):
        DatasetPrompts(name="json", data_files=(str(tmp_path / "none.json"),)).batch(0, 0)


# --- shapes ---------------------------------------------------------------------------------------


def skills_of(batch):
    return Counter(grammar.parse(prompt.text).skill for prompt in batch)


@pytest.mark.parametrize("split", grammar.SPLITS)
def test_shapes_stay_in_their_split(split):
    source = ShapesPrompts(split=split, per_iteration=24)
    seen = [prompt for i in range(40) for prompt in source.batch(0, i)]
    assert {grammar.split_of(grammar.parse(prompt.text)) for prompt in seen} == {split}
    assert all(prompt.metadata == {} for prompt in seen)


@pytest.mark.parametrize("per_iteration", [1, 4, 6, 8, 24])
@pytest.mark.parametrize("skills", [grammar.SKILLS, ("counting", "position"), ("colors",)])
def test_skills_are_dealt_evenly(per_iteration, skills):
    """In a batch their numbers differ by one at most; over many batches none is preferred."""
    source = ShapesPrompts(per_iteration=per_iteration, skills=skills)
    total = Counter()
    for i in range(60):
        batch = source.batch(5, i)
        dealt = skills_of(batch)
        counts = [dealt[skill] for skill in skills]
        assert len(batch) == sum(counts) == per_iteration
        assert max(counts) - min(counts) <= 1
        total += dealt
    share = 60 * per_iteration / len(skills)
    extra = per_iteration % len(skills) / len(skills)
    spread = (60 * extra * (1 - extra)) ** 0.5
    assert all(abs(total[skill] - share) <= 4.5 * spread for skill in skills)


def test_shapes_are_a_function_of_seed_and_iteration():
    source, other = ShapesPrompts(), ShapesPrompts()
    forward = [texts(source.batch(1, i)) for i in range(5)]
    assert [texts(other.batch(1, i)) for i in reversed(range(5))] == forward[::-1]
    assert len({tuple(batch) for batch in forward}) == 5
    assert texts(source.batch(2, 0)) != forward[0]


def test_unknown_skills_are_refused():
    with pytest.raises(ValueError, match=r"unknown skills \['circles'\]; known: single_object"):
        ShapesPrompts(skills=("colors", "circles"))
