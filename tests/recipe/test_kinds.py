"""Runs and recipes of one kind that are given to the commands for the other kind."""

from __future__ import annotations

import re
import sys

import pytest

from entroflow.cli import main as cli
from entroflow.recipe.kinds import SECTIONS_OF_ONE, Kind, kind_of
from entroflow.recipe.load import load_recipe
from entroflow.recipe.registry import SECTIONS
from entroflow.recipe.text import parse_yaml
from entroflow.runs.folder import RunFolder

LANGUAGE_MODEL = """\
name: mine
model: {path: embedded, dtype: float32, lora_rank: null, lora_alpha: 64}
task: {type: countdown}
clip: {type: none}
evaluation: {every: 20}
run: {updates: 200, seed: 0}
trainer: {}
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """One of each kind: `images` and `texts`."""
    monkeypatch.chdir(tmp_path)
    texts = {"images": load_recipe("quickstart").to_yaml(), "texts": LANGUAGE_MODEL}
    for name, recipe in texts.items():
        RunFolder.create(tmp_path / name, recipe)
        (tmp_path / name / "checkpoints" / "00000001").mkdir()
    return tmp_path


@pytest.mark.parametrize(("arguments", "says"), [
    *((command, r"texts is a run of a language model: `entroflow llm train --resume texts` .* "
       r"`entroflow llm evaluate texts`") for command in (
        "train --resume texts", "sample x --run texts", "evaluate texts", "export texts",
        "doctor texts", "train texts", "reward test texts", "compare texts",
    )),
    *((command, r"texts/recipe\.yaml is a recipe for a language model; `entroflow llm train`")
      for command in ("doctor texts/recipe.yaml", "train texts/recipe.yaml")),
    ("doctor images", r"images is a run folder, not a recipe: images/recipe\.yaml is its recipe"),
    *(pytest.param(
        command, r"images is a run of an image generator: `entroflow train --resume images` .* "
        r"`entroflow evaluate images`") for command in (
        "llm train --resume images", "llm evaluate images", "llm train images",
        "llm train model.path=images",
    )),
    pytest.param("llm train images/recipe.yaml", r"is a recipe for an image generator; "
                 r"`entroflow train` takes it"),
])  # fmt: skip
def test_a_command_for_the_other_kind_names_the_right_one(
    runs, monkeypatch, capsys, arguments, says
):
    if arguments.startswith("llm"):
        pytest.importorskip("trl")
    monkeypatch.setattr(sys, "argv", ["entroflow", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "error:" in row]
    assert stopped.value.code == 2
    # A path may be absolute once it is read.
    assert re.search(says, line.replace(f"{runs}/", ""))


def test_every_run_tells_its_kind(runs):
    assert RunFolder.open(runs / "images").kind is Kind.IMAGES
    assert RunFolder.open(runs / "texts").kind is Kind.LANGUAGE_MODEL
    assert {*SECTIONS_OF_ONE[Kind.IMAGES]} <= {*SECTIONS}
    assert not {*SECTIONS_OF_ONE[Kind.LANGUAGE_MODEL]} & {*SECTIONS}
    # What only the shared sections are of may be either.
    assert kind_of(parse_yaml("run: {seed: 1}\nevaluation: {}", "")) is None
