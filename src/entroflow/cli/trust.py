"""Whether code that a stranger's recipe or run folder names may run, and it may send API keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entroflow.errors import InputError, UntrustedError

if TYPE_CHECKING:
    from entroflow.recipe.load import Recipe

Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Let code run that lies beside the recipe, and the recipe send API keys, also "
        "elsewhere than below the current folder.",
    ),
]


def is_trusted(trust: bool, refuse: Callable[[], None]) -> bool:
    """Whether a recipe may do what needs trust: run code of a folder that is not below the current
    one, or send an API key to another machine where it lies in such a folder.

    Where someone sits at a terminal they are asked; elsewhere it must have been said beforehand.

    Args:
        trust: what was said.
        refuse: raises UntrustedError if trust is needed.

    Raises:
        UntrustedError: the answer is no.
    """
    if trust or not _is_terminal():
        return trust
    try:
        refuse()
    except UntrustedError as error:
        if not typer.confirm(f"{error}\nDo you trust it?", err=True):
            raise
        return True
    except InputError:
        # Whoever loads the recipe says so.
        return False
    return False


def loaded(trust: bool, recipe: str | Path, changes: Sequence[str]) -> tuple[Recipe, bool]:
    """A recipe with changes to it, and whether it may do what needs trust; see `is_trusted`."""
    from entroflow.recipe.load import recipe_of
    from entroflow.recipe.read import read
    from entroflow.recipe.registry import IMAGES

    written = read(recipe, changes, IMAGES)
    trust = is_trusted(trust, written.refuse_strangers)
    return recipe_of(written, trust=trust), trust


def is_trusted_recipe(trust: bool, recipe: str | Path, changes: Sequence[str] = ()) -> bool:
    """The same where the recipe itself is of no use."""
    from entroflow.recipe.read import read
    from entroflow.recipe.registry import IMAGES

    return is_trusted(trust, lambda: read(recipe, changes, IMAGES).refuse_strangers())


def is_trusted_run(trust: bool, run: Path | None) -> bool:
    """Whether a run folder may do what needs trust."""
    from entroflow.recipe.kinds import RECIPE

    return trust if run is None else is_trusted_recipe(trust, run / RECIPE)


def _is_terminal() -> bool:
    """Whether a question can be answered; of several processes no one knows which."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    # A stream that was closed before the start is None.
    return alone and all(s is not None and s.isatty() for s in (sys.stdin, sys.stderr))
