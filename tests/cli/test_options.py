"""Options that belong together as one argument of a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from entroflow.cli.options import grouped


@dataclass(frozen=True)
class Size:
    """Of a picture."""

    width: Annotated[int, typer.Option(min=1, help="From left to right.")] = 4
    height: Annotated[int | None, typer.Option(help="From top to bottom.")] = None


def command(calls):
    app = typer.Typer()

    @app.command()
    @grouped
    def draw(
        name: Annotated[str, typer.Argument()],
        before: Annotated[int, typer.Option()] = 0,
        size: Size = Size(),
        after: Annotated[int, typer.Option()] = 0,
    ) -> None:
        """Draw it."""
        calls.append((name, before, size, after))

    return app


def test_a_dataclass_is_an_option_for_each_of_its_fields():
    calls = []
    for arguments in (["x"], ["x", "--height", "3", "--after", "7", "--width", "2"]):
        assert CliRunner().invoke(command(calls), arguments).exit_code == 0
    assert calls == [("x", 0, Size(), 0), ("x", 0, Size(2, 3), 7)]


def test_they_are_checked_and_stand_in_their_place():
    assert CliRunner().invoke(command([]), ["x", "--width", "0"]).exit_code == 2
    shown = CliRunner().invoke(command([]), ["--help"]).output
    places = [shown.index(f"--{name}") for name in ("before", "width", "height", "after")]
    assert places == sorted(places)
    assert "Draw it." in shown
    assert "From top to bottom." in shown
