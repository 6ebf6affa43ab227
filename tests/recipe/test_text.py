"""YAML as people write it, nearly write it, and as it is written to do harm."""

from __future__ import annotations

import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from entroflow.errors import RecipeError, one_line, printable, quoted
from entroflow.recipe.load import build_recipe, chosen_type, load_component, load_recipe
from entroflow.recipe.read import LARGEST
from entroflow.recipe.text import MOST, as_yaml, override_of, parse_yaml
from entroflow.runs.folder import folder_name

SECTIONS = ("a", "b")


def laughs(levels, each=9, kind="[{}]"):
    """Lists of lists: each holds the one before so many times."""
    lines = ["v0: &v0 [x]" if kind == "[{}]" else "v0: &v0 {x: 1}"]
    for level in range(1, levels):
        inner = ",".join([f"*v{level - 1}"] * each)
        lines.append(f"v{level}: &v{level} {kind.format(inner)}")
    return "\n".join(lines)


# --- what is no recipe ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: !!int x", "is not valid YAML"),
        ("a: !!int []", "is not valid YAML"),
        ("a: !!bool z", "is not valid YAML"),
        ("a: !!float 1.2.3", "is not valid YAML"),
        ("a: !!binary aGVsbG8=", "is not valid YAML"),
        ("a: !!set {x, y}", "is not valid YAML"),
        ("a: !!omap [x: 1]", "is not valid YAML"),
        ("a: !!pairs [x: 1]", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [touch RAN]", "is not valid YAML"),
        ("a: !thing {}", "is not valid YAML"),
        ("a: =", "is not valid YAML"),
        ("a: *nowhere", "undefined alias"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("%YAML 7.7\n---\na: 1", "is not valid YAML"),
        ("%TAG ! tag:x\n%TAG ! tag:y\n---\na: 1", "is not valid YAML"),
        ("a:\t{b: 1}\n\tc: 2", "is not valid YAML"),
        ("a: 'never closed", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
        ("a: \x1b[2J", "is not valid YAML"),
        ('a: "\\0"', r"control character '\x00'"),
        ('a: "\\e[2J"', r"control character '\x1b'"),
        ('"\\e": 1', r"control character '\x1b'"),
        ('a: "\\ud800"', r"control character '\ud800'"),
        ('a: "\\N"', r"control character '\x85'"),
        ("a: " + "9" * 5000, "beyond 64 bits"),
        ("a: -" + "9" * 30, "beyond 64 bits"),
        ("a: 0x" + "f" * 5000, "beyond 64 bits"),
        ("a: 9223372036854775808", "beyond 64 bits"),
        ("a: &b [*b]", "inside of what it is an alias of"),
        ("a: &b {c: {d: *b}}", "inside of what it is an alias of"),
        ("&b {*b : 1}", "inside of what it is an alias of"),
        ("&b a: {<<: *b}", "is not valid YAML"),
        ("a: &b {<<: *b}", "inside of what it is an alias of"),
        ("[a]: 1", "a key is a list or a mapping"),
        ("{a: 1}: 1", "a key is a list or a mapping"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        ("a: {b: 1, b: 2}", 'duplicate key "b"'),
        ("a: {1: 1, '1': 2}", 'duplicate key "1"'),
        ("x: &x {c: 1}\na: {<<: *x, b: 1, b: 2}", 'duplicate key "b"'),
        ("x: &x {c: 1}\na: {<<: *x, <<: *x}", 'duplicate key "<<"'),
        ("a: {<<: 5}", "is not valid YAML"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested more than"),
        ("- " * 100 + "a", "nested more than"),
        ("a: [" + "1, " * MOST + "]", "more than 8,000 values"),
        ("a: " + "x" * 10 * MOST, "more than 8,000 values"),
        (laughs(8), "more than 8,000 values"),
        (laughs(30, 2), "more than 8,000 values"),
        (laughs(8, 9, "{{<<: [{}]}}"), "more than 8,000 values"),
        ("v0: &v0 [x]\n" + "\n".join(f"v{i}: &v{i} [*v{i - 1}]" for i in range(1, 60)), "nested"),
        ("a", "must be a mapping of sections, not a str"),
        ("5", "must be a mapping of sections, not a int"),
        ("[]", "must be a mapping of sections, not a list"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_short_line(text, said):
    with pytest.raises(RecipeError) as refused:
        parse_yaml(text, "mine")
    assert said in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 2026-01-01", "2026-01-01"),
        ("a: 2026-99-99", "2026-99-99"),
        ("a: 2026-01-01 12:00:00", "2026-01-01 12:00:00"),
        ("a: !!timestamp x", "x"),
        ("a: {2026-01-01: 1, true: 2, null: 3, 1.50: 4, ~: 5}",
         {"2026-01-01": 1, "true": 2, "null": 3, "1.50": 4, "~": 5}),
        ("a: 9223372036854775807", 2**63 - 1),
        ("a: -9223372036854775807", 1 - 2**63),
        ("a: 0x10", 16),
        ("a: 1_000", 1000),
        ("a: .inf", float("inf")),
        ("a: [yes, no, on, ~, null, true]", ["yes", "no", "on", None, None, True]),
        ("x: &x {b: 1, c: 2}\na: {<<: *x, c: 3}", {"b": 1, "c": 3}),
        ("x: &x {b: 1}\ny: &y {c: 2}\na: {<<: [*x, *y]}", {"b": 1, "c": 2}),
        ("x: &x [1]\na: [*x, *x]", [[1], [1]]),
        ("x: &x 1\nx2: &x 2\na: *x", 2),
        ("a: |\n  one\n  two\n", "one\ntwo\n"),
        ('a: "\\t"', "\t"),
        ("a: " + "[" * 47 + "1" + "]" * 47, json.loads("[" * 47 + "1" + "]" * 47)),
    ],
)  # fmt: skip
def test_what_yaml_may_say_is_read_as_plain_data(text, value):
    assert parse_yaml(text, "mine")["a"] == value


simple = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text("abc 1-:#", max_size=9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.text("abc", max_size=3),
        st.recursive(
            simple, lambda x: st.lists(x) | st.dictionaries(st.text("ab"), x), max_leaves=6
        ),
        max_size=3,
    )
)
def test_plain_data_is_read_as_the_library_reads_it(data):
    from io import StringIO

    out = StringIO()
    YAML().dump(data, out)
    assert parse_yaml(out.getvalue(), "mine") == data
    assert parse_yaml(json.dumps(data), "mine") == data


def test_depth_is_bounded_where_it_is_met():
    """Not where it ends, which recursion may not reach."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        with pytest.raises(RecipeError, match="nested more than"):
            parse_yaml("a: " + "[" * 3000 + "]" * 3000, "mine")
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("levels", [8, 200])
def test_little_text_does_not_make_much_memory(levels):
    text = laughs(levels) if levels == 8 else laughs(40, 3, "{{<<: [{}]}}")
    tracemalloc.start()
    with pytest.raises(RecipeError):
        parse_yaml(text, "mine")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize(
    "text",
    ["[" * 500_000, "a: [" + "1," * 400_000, "&a " * 300_000, "? " * 400_000, "- " * 400_000,
     "{" * 900_000, "a: " + "b " * 450_000, "#" * 1_000_000, "\n" * 1_000_000, "'" * 900_001],
    ids=lambda text: repr(text[:6]),
)  # fmt: skip
def test_much_text_does_not_take_long(text):
    start = time.monotonic()
    try:
        parse_yaml(text, "mine")
    except RecipeError as error:
        text = str(error)
    assert len(text) < 300 or not text.strip("#\n")
    assert time.monotonic() - start < 60


# --- files ----------------------------------------------------------------------------------------


def test_what_is_no_file_is_not_read(tmp_path):
    """A device or a pipe may never end; a folder holds nothing."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    link = tmp_path / "link.yaml"
    link.symlink_to("/dev/zero")
    for path in (pipe, link, Path("/dev/zero"), Path("/dev/null"), tmp_path):
        for read in (load_recipe, lambda place: load_component(place, "run"),
                     lambda place: chosen_type(place, "policy")):  # fmt: skip
            with pytest.raises(RecipeError, match="is not a YAML file"):
                read(path)


def test_what_can_not_be_read_is_said(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"there is no recipe file .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(tmp_path / f"{'x' * 300}.yaml")
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(f"{tmp_path}/a\0b.yaml")
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe(loop)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# " + b"x" * LARGEST, "more than 1,048,576 bytes"),
        ("run: {seed: 1}".encode("utf-16"), "is not a YAML file in UTF-8"),
        ("title: é".encode("latin-1"), "is not a YAML file in UTF-8"),
        (b"\xff\xfe\x00", "is not a YAML file in UTF-8"),
        (b"PK\x03\x04\x00\x00", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_a_byte_order_mark_and_other_line_ends_do_no_harm(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("\ufeffrun:\r\n  seed: 5\r\n".encode())
    assert load_recipe(path).run.seed == 5


@pytest.mark.parametrize("section", ["policy", "run", "monitors"])
@pytest.mark.parametrize("value", ["[]", "5", "text", "[[a, b]]"])
def test_a_section_that_holds_no_keys_is_refused_however_it_is_read(tmp_path, section, value):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{section}: {value}")
    with pytest.raises(RecipeError, match=f"{section} must hold keys and values"):
        load_component(path, section)
    if section == "policy":
        with pytest.raises(RecipeError, match="policy must hold keys and values"):
            chosen_type(path, section)


# --- changes to a recipe --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("a.b=&b [*b]", "inside of what it is an alias of"),
        ("a.b=" + "[" * 99, "nested more than"),
        ("a.b=[" + "1," * MOST + "]", "more than 8,000 values"),
        ("a.b=\x1b[2J", "control character"),
        ("a.b=\ud800", "control character"),
        ("a.\x00=1", "control character"),
        ("a." + "b." * 60 + "c=1", "more than 50 keys"),
        ("x" * 5000, "an override is section.key=value"),
        ("x" * 5000 + ".a=1", "unknown section"),
    ],
)
def test_a_change_is_bounded_as_a_recipe_is(override, said):
    with pytest.raises(RecipeError, match=said) as refused:
        override_of(override, SECTIONS)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 1010


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("2026-01-01", "2026-01-01"), ("2026-99-99", "2026-99-99"), ("!!int x", "!!int x"),
        ("[a", "[a"), ("@x", "@x"), ("*a", "*a"), ("a: b: c", "a: b: c"), ("{1: 2}", {"1": 2}),
        ("", None), ("=", "="), ("9" * 30, "9" * 30),
    ],
)  # fmt: skip
def test_a_value_that_is_no_yaml_is_a_text(value, read):
    assert override_of(f"a.b={value}", SECTIONS) == (["a", "b"], read)


# --- names and texts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../x", "/x", "a/../b", "..\\x", "./x", "a//b", "x/", " ../x", "..", "../"]
)
def test_a_name_is_no_path(name):
    """Of two dots alone no path is made: something always follows."""
    if name == "..":
        assert folder_name(build_recipe({"name": name}).name) == ".."
        return
    with pytest.raises(RecipeError, match="is a path, but must be the name"):
        build_recipe({"name": name})


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 101, "\u202e", "a\tb"])
def test_a_name_can_be_printed(tmp_path, name):
    with pytest.raises(RecipeError, match="can't be named") as refused:
        build_recipe({"name": name})
    assert str(refused.value).isprintable()
    path = tmp_path / f"{name}.yaml"
    path.write_text("")
    with pytest.raises(RecipeError, match="can't be named"):
        load_recipe(path)
    path.write_text("name: mine")
    assert load_recipe(path).name == "mine"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mine", "mine"), ("[/]", "___"), ("a b", "a_b"),
        ("SD3.5+LoRA,lr=1e-4", "SD3.5+LoRA,lr=1e-4"), ("größer", "größer"), ("a/b", "a_b"),
        ("$(touch x)", "__touch_x_"), ("a:b*?", "a_b__"),
    ],
)  # fmt: skip
def test_a_folder_is_called_by_what_of_a_name_a_folder_can_have(name, folder):
    assert folder_name(build_recipe({"name": name}).name) == folder


@pytest.mark.parametrize("key", ["title", "paper", "notes", "name"])
def test_a_text_is_no_list_and_no_mapping(key):
    for value in ([], ["a"], {"a": 1}):
        with pytest.raises(RecipeError, match=f"{key} must be a text"):
            build_recipe({key: value})
    assert getattr(build_recipe({key: 2505.05470}), key) == "2505.0547"


# --- what is quoted -------------------------------------------------------------------------------


def test_what_is_quoted_is_short_and_obeyed_by_no_terminal():
    assert quoted("a\x1b[2Jb") == r"'a\x1b[2Jb'"
    assert quoted([1, "a"]) == "[1, 'a']"
    assert len(quoted("x" * 10**6)) < 110
    assert len(one_line("x y\n" * 10**6)) < 1010
    assert one_line(" a \n b\t c ") == "a b c"
    assert one_line("start" + "x" * 5000 + "end").startswith("start")
    assert one_line("start" + "x" * 5000 + "end").endswith("end")
    assert printable("é−😀\u202e\x07\ud800") == r"é−😀\u202e\x07\ud800"


@pytest.mark.parametrize(
    "text",
    [
        "x" * 3000 + ": 1", "run: {" + "x" * 3000 + ": 1}", "run: {seed: " + "x" * 3000 + "}",
        "policy: {type: " + "x" * 3000 + "}", "policy: {type: a." + "x" * 3000 + "}",
        "optimizer: {betas: [" + "1, " * 3000 + "]}", "policy: [" + "1, " * 3000 + "]",
        "monitors: {rewards: {" + "x" * 3000 + ": {type: y}}}",
        "monitors: {rewards: {a: " + "x" * 3000 + "}}", "prompts: {skills: [" + "x" * 3000 + "]}",
        "reward: {type: mixture, rewards: {a: {type: shapes}}, weights: {" + "x" * 3000 + ": 1}}",
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_long_values_make_no_long_messages(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert len(str(refused.value)) <= 1010


PIECES = ["a", "word", "x" * 90, " ", "  ", "\n", "\t", ":", "#", "-", "'", '"', "\\"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
def test_what_is_written_reads_back(text):
    """Wrapped lines must not change the spaces of a text, as of a judge's question."""
    assert parse_yaml(as_yaml({"a": {"b": text}}), "it") == {"a": {"b": text}}


def test_a_long_text_is_written_in_lines_that_can_be_read():
    written = as_yaml({"notes": "plain words " * 60 + "end"})
    assert max(map(len, written.splitlines())) <= 110


def test_a_name_too_long_for_a_file_is_no_recipe():
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe("x" * 300)
