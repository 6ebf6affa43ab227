"""Files of prompts as people have them: what is read by which suffix, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile

import pytest
from PIL import Image

from entroflow.errors import InputError
from entroflow.evaluation.reward import RewardEvaluation
from entroflow.prompts import DatasetPrompts, JSONLPrompts, Prompt, TextPrompts, read_prompts

ROWS = [
    {"caption": 'a lamp, "lit"', "n": 1, "tags": ["x", "y"]},
    {"caption": "zwei Äpfel\nauf einem Tisch", "n": 2, "tags": []},
    {"caption": "[masterpiece] a {red|blue} ball", "n": 3, "tags": ["z"]},
]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path, key="caption"):
    return [(prompt.text, dict(prompt.metadata)) for prompt in read_prompts(path, key)]


def wanted(rows):
    return [(row["caption"], {k: v for k, v in row.items() if k != "caption"}) for row in rows]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".NDJSON", ".Json", ".json"])
def test_objects_keep_the_types_of_their_values(tmp_path, suffix, end, mark):
    """Whether a .json file is one list or, as many programs write it, one object in a line."""
    path = tmp_path / f"data{suffix}"
    text = json.dumps(ROWS, indent=1) if suffix == ".Json" else as_lines(ROWS)
    path.write_text(mark + text.replace("\n", end), encoding="utf-8", newline="")
    assert read(path) == wanted(ROWS)
    assert TextPrompts(path=path, key="caption").load() == read_prompts(path, "caption")
    assert JSONLPrompts(path=path, key="caption").load() == read_prompts(path, "caption")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".TSV", "\t"), (".CsV", ",")])
def test_cells_of_a_table_are_texts(tmp_path, suffix, separator, mark):
    path = tmp_path / f"data{suffix}"
    rows = [[*ROWS[0]], *([row["caption"], row["n"], ",".join(row["tags"])] for row in ROWS)]
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(mark)
        csv.writer(file, delimiter=separator).writerows([*rows[:2], [], ["", " ", ""], *rows[2:]])
    texts = [{**row, "n": str(row["n"]), "tags": ",".join(row["tags"])} for row in ROWS]
    assert read(path) == wanted(texts)


def test_a_parquet_table_keeps_its_types(tmp_path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "data.PARQUET"
    pandas.DataFrame(ROWS).to_parquet(path)
    assert read(path) == wanted(ROWS)


def test_parquet_without_the_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'entroflow\[datasets\]'"):
        read_prompts(tmp_path / "data.parquet", "caption")


@pytest.mark.parametrize("content", [
    ["a lamp", "two"],
    {"version": 2, "prompts": ["a lamp", "two"]},
    {"meta": {"by": "me"}, "data": [{"prompt": "a lamp"}, {"prompt": "two"}]},
    {"prompt": ["a lamp", "two"]},
])  # fmt: skip
def test_json_may_hold_texts_or_one_list_in_an_object(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    assert read(path, "prompt") == [("a lamp", {}), ("two", {})]


def test_one_object_is_one_record_though_it_holds_a_list(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"prompt": "a lamp", "include": [{"class": "lamp"}]}))
    assert read(path, "prompt") == [("a lamp", {"include": [{"class": "lamp"}]})]


@pytest.mark.parametrize("suffix", ["", ".txt", ".TXT", ".lst", ".prompts"])
def test_plain_text_may_look_a_little_like_json(tmp_path, suffix):
    lines = ["[masterpiece] a cat", "{red|blue} ball", "((a:1.2))", "{{{cat}}}", "[cat]", '"hi"']
    path = tmp_path / f"data{suffix}"
    path.write_text("\n".join(["", *lines, "  "]))
    assert read(path, "prompt") == [(line, {}) for line in lines]


def binary(kind):
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a", "a")
    else:
        Image.new("RGB", (2, 2)).save(out, format=kind)
    return out.getvalue()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", binary("png"), "is not a text file in UTF-8"),
    ("a.txt", binary("zip"), "is not a text file in UTF-8"),
    ("a.csv", binary("zip"), "is not a text file in UTF-8"),
    ("a.json", "[]".encode("utf-16"), "is not a text file in UTF-8"),
    ("a.txt", b"one\ntwo\x00\n", r"line 2 holds the character '\\x00'"),
    ("a.txt", b'\n[\n {"prompt": "a"}\n]', r"a\.txt:2 holds JSON"),
    ("a", b'["a", "b"]', "holds JSON"),
    ("a.txt", b'a\n{"prompt": "b"}\n', r"a\.txt:2 holds JSON"),
    ("a.txt", b"{'prompt': 'b'}\n", "holds JSON"),
    ("a.txt", b'[{"prompt": "b",\n "n": 1}', "holds JSON"),
    ("a.txt", b"<!DOCTYPE html>\n<p>Not found</p>", "a page of HTML"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ("a.parquet", b"PAR1 and no more", "is not Parquet, or torn"),
    ("a.yaml", b"- a\n- b\n", r"files that end in \.yaml are not read"),
    ("a.xlsx", b"", r"files that end in \.xlsx are not read"),
    ("a.json.gz", b"", "is packed; unpack it first"),
    ("a.jsonl", b'[{"prompt": "a"}]\n', r"a\.jsonl:1 has no text under 'prompt'"),
    ("a.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "names 'prompt' twice"),
    ("a.json", b"[" * 100_000, r"a\.json is not JSON"),
    ("a.json", b'[{"prompt": "a"},]', r"a\.json is not JSON"),
    ("a.json", b'{"prompt": {"0": "a"}}', r"a\.json\[0\] has no text|must hold a list"),
    ("a.json", b'{"a": ["b"], "c": ["d"]}', "must hold a list .* not dict with 'a', 'c'"),
    ("a.json", b"7", "must hold a list"),
    ("a.json", b'["a", 7]', r"a\.json\[1\] has no text"),
    ("a.json", b'["a", " "]', r"a\.json\[1\]: the prompt is empty"),
    ("a.json", rb'["a", "\ud83d"]', r"a\.json\[1\]: the prompt holds"),
    ("a.json", rb'["a", "b\u0000"]', r"a\.json\[1\]: the prompt holds"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\\t"}\n', r"a\.jsonl:2: the prompt is empty"),
    ("a.csv", b"n,Prompt\n1,a\n", "has no text under 'prompt'; it has: Prompt, n"),
    ("a.csv", b"n;prompt\n1;a\n", "it has: n;prompt"),
    ("a.csv", b"prompt,n,n\na,1,2\n", "two columns are named 'n'"),
    ("a.csv", b"prompt,n\na\n", r"a\.csv:2 has 1 cells, but the header 2: 'prompt', 'n'"),
    ("a.csv", b'prompt,n\n"a\nb",1\nc,2,3\n', r"a\.csv:4 has 3 cells"),
    ("a.csv", b'prompt,n\na,1\n"b,2\n', r"a\.csv:3 is no row of a table"),
    ("a.csv", b'prompt,n\na,1\n"b"c,2\n', r"a\.csv:3 is no row of a table"),
    ("a.csv", b'prompt,n\n"a\n",1\n,2\n', r"a\.csv:4: the prompt is empty"),
])  # fmt: skip
def test_what_a_file_does_not_hold_is_refused_in_a_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path, "prompt")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("value", "message"), [
    (None, r"row 2 has no text under 'caption'.*\('caption' is None\)"),
    (7.5, r"row 2 has no text under 'caption'.*\('caption' is 7\.5\)"),
])  # fmt: skip
def test_cells_of_parquet_that_are_no_text_are_named(tmp_path, value, message):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    column = ["a", None] if value is None else [1.0, value]
    parquet.write_table(pyarrow.table({"caption": column}), path)
    with pytest.raises(InputError, match=message if value is None else "row 1 has no text"):
        read_prompts(path, "caption")


def test_any_text_survives_every_kind_of_file(tmp_path):
    """Random texts of what separates, quotes and breaks lines, written by the libraries."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    source = random.Random(0)
    parts = [
        ",",
        "\t",
        '"',
        "'",
        "\n",
        "\r\n",
        "{",
        "]",
        "\\",
        "ä",
        "画",
        "\u2028",
        "a b",
        ";",
        "#",
    ]
    texts = ["x" + "".join(source.choices(parts, k=8)) for _ in range(200)]
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"data{suffix}").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=separator).writerows([["n", "text"], *enumerate(texts)])
    rows = [{"n": n, "text": text} for n, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text(as_lines(rows), encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    for path in tmp_path.iterdir():
        assert [text for text, _ in read(path, "text")] == texts, path.name
        assert [int(prompt["n"]) for _, prompt in read(path, "text")] == [*range(200)]


def sources(path):
    """Every way in which a recipe names a file of prompts."""
    evaluation = RewardEvaluation(path=path)
    yield TextPrompts(path=path).load()
    yield JSONLPrompts(path=path).load()
    yield DatasetPrompts(name=str(path)).load()
    validation, test = evaluation.prompts("validation"), evaluation.prompts("test")
    yield [prompt for pair in zip(validation, test, strict=True) for prompt in pair]


@pytest.mark.parametrize("name", ["data.txt", "data.LST", "data"])
def test_the_suffix_decides_whatever_names_the_file(tmp_path, name):
    """Prompts to train on, of every type, and held-out prompts: a text has one in a line."""
    path = tmp_path / name
    path.write_text("a\nb\n\nc\nd\n")
    for prompts in sources(path):
        assert prompts == [Prompt(text) for text in "abcd"]
    path.write_text(as_lines([{"prompt": text} for text in "abcd"]), encoding="utf-8")
    for named in (TextPrompts(path=path), JSONLPrompts(path=path), DatasetPrompts(name=str(path))):
        with pytest.raises(InputError, match=r"holds JSON, not a text; .*\.jsonl"):
            named.load()
    with pytest.raises(InputError, match=r"holds JSON, not a text; .*\.jsonl"):
        RewardEvaluation(path=path).check()
