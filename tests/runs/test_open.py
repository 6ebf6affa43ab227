"""The policy of a run, and the parts of its recipe."""

from __future__ import annotations

from entroflow.recipe import read
from entroflow.runs.open import open_policy


def test_the_recipe_is_parsed_once_for_all_parts(monkeypatch):
    parsed = []
    parse = read.parse_yaml
    monkeypatch.setattr(
        read, "parse_yaml", lambda text, where: parsed.append(where) or parse(text, where)
    )
    opened = open_policy(None)
    for section in ("evaluation", "run", "sampling", "reward"):
        opened.part(section)
    assert parsed == ["quickstart"]
