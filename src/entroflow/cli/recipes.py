"""The command `entroflow recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe with every key written out.")
    ] = None,
) -> None:
    """List the shipped recipes, or print one.

    Nothing that a recipe names is imported: the keys of your own parts stand as they are.
    """
    from entroflow.recipe.load import described
    from entroflow.recipe.read import titles
    from entroflow.recipe.registry import IMAGES

    if name is not None:
        print(described(name), end="")
        return
    shown = titles(IMAGES)
    width = max(map(len, shown))
    for recipe, (title, paper) in shown.items():
        print(f"{recipe:<{width}}  {title}" + (f" [{paper}]" if paper else ""))
