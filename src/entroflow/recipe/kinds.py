"""The two kinds of recipes, and so of runs: of image generators and of language models.

Each kind has commands of its own, which refuse the other kind and name the command for it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

LANGUAGE_MODELS = Path(str(resources.files("entroflow"))) / "llm" / "recipes"
"""Folder of the shipped recipes for language models."""
RECIPE = "recipe.yaml"
"""The recipe in a run folder."""


class Kind(StrEnum):
    """What a recipe trains."""

    IMAGES = "an image generator"
    LANGUAGE_MODEL = "a language model"


SECTIONS_OF_ONE = {
    Kind.IMAGES: ("policy", "prompts", "sampling", "exploration", "reward", "credit", "objective"),
    Kind.LANGUAGE_MODEL: ("model", "task", "clip", "trainer"),
}
"""Sections that recipes of one kind alone have; a run's recipe has all of them."""
TRAIN = {Kind.IMAGES: "entroflow train", Kind.LANGUAGE_MODEL: "entroflow llm train"}


def kind_of(recipe: Mapping[str, Any]) -> Kind | None:
    """The kind that the sections of a recipe tell; None if they tell none, or both."""
    kinds = [kind for kind, names in SECTIONS_OF_ONE.items() if any(n in recipe for n in names)]
    return kinds[0] if len(kinds) == 1 else None


def other_run(folder: Path, recipe: Mapping[str, Any], kind: Kind) -> str:
    """The message about a run of the other kind; nothing for one of this kind."""
    actual = kind_of(recipe)
    if actual is None or actual is kind:
        return ""
    run = shlex.quote(str(folder))
    if actual is Kind.IMAGES:
        return (
            f"{folder} is a run of {actual}: `entroflow train --resume {run}` goes on with it, "
            f"`entroflow evaluate {run}` evaluates it, `entroflow sample PROMPT --run {run}` draws "
            "with it."
        )
    return (
        f"{folder} is a run of {actual}: `entroflow llm train --resume {run}` goes on with it, "
        f"`entroflow llm evaluate {run}` evaluates it, and transformers loads its model from "
        f"{folder / 'checkpoints'}."
    )


def other_recipe(name: str, recipe: Mapping[str, Any], kind: Kind) -> str:
    """The message about a recipe of the other kind; nothing for one of this kind."""
    actual = kind_of(recipe)
    if actual is None or actual is kind:
        return ""
    return f"{name} is a recipe for {actual}; `{TRAIN[actual]}` takes it."
