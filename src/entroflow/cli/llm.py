"""`entroflow llm`: parse, call, print. Imports what the extra `llm` brings where it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from entroflow.cli.trust import Trust, is_trusted
from entroflow.errors import InputError
from entroflow.recipe.text import names_and_changes

app = typer.Typer(
    no_args_is_help=True,
    help="Control the entropy of language models: Clip_B and Clip_V in TRL's GRPO.",
)


class Control(StrEnum):
    """Which tokens an update leaves out."""

    NONE = "none"
    B = "b"
    V = "v"


@contextmanager
def _extra() -> Iterator[None]:
    """Within, what is not installed is said in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in (
            "trl",
            "transformers",
            "tokenizers",
            "datasets",
            "accelerate",
            "peft",
        ):
            raise
        raise InputError(
            f"entroflow llm needs the extra: pip install 'entroflow[llm]' ({error})."
        ) from None


@app.command(
    epilog="Examples: `entroflow llm train` · `entroflow llm train --clip b` · "
    "`entroflow llm train run.updates=50 trainer.learning_rate=1e-4` · "
    "`entroflow llm train --resume runs/mine run.updates=400` · "
    "`accelerate launch -m entroflow.cli.main llm train qwen_dapo`"
)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [SECTION.KEY=VALUE]...",
            help="A shipped recipe (see `entroflow llm recipes`) or a file; then changes to it. "
            "Without a recipe: countdown.",
            show_default=False,
        ),
    ] = None,
    clip: Annotated[
        Control | None, typer.Option(help="Short for clip.type=...: none, Clip_B or Clip_V.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder; runs/RECIPE-TIME if not given.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Train a language model by a recipe.

    Ctrl-C finishes the update, judges, and saves; `--resume` goes on.
    """
    names, overrides = names_and_changes(arguments)
    if resume is not None and (names or run is not None or clip is not None):
        raise InputError(
            "--resume takes recipe and folder from the run; leave RECIPE, --run and --clip out."
        )
    if clip is not None:
        overrides.append(f"clip.type={clip.value}")
    with _extra():
        from entroflow.cli.show import llm_progress
        from entroflow.llm import recipe as recipes
        from entroflow.llm import run as runs
        from entroflow.recipe.imports import search_beside
        from entroflow.recipe.kinds import RECIPE, Kind
        from entroflow.runs.folder import REPORT, RunFolder

        name = names[0] if names else "countdown"
        if resume is not None:
            name = str(RunFolder.open(resume, Kind.LANGUAGE_MODEL).path / RECIPE)
        recipe = recipes.load(name, overrides, trust=trust)
        trust = is_trusted(trust, recipe.refuse_strangers)
        search_beside(recipe.found_in, trust)
        with llm_progress(recipe.run.updates) as watch:
            if resume is not None:
                folder = runs.resume(resume, overrides, watch, trust=trust)
            else:
                folder = runs.train(recipe, run, watch)
    print(f"run     {folder.path}")
    print(f"report  {folder.path / REPORT}")


@app.command(
    epilog="Examples: `entroflow llm evaluate` · `entroflow llm evaluate runs/mine --each 64` · "
    "`entroflow llm evaluate runs/mine --temperature 0.7 --json`"
)
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run folder, or a model that plays Countdown.")
    ] = "embedded",
    problems: Annotated[int, typer.Option(min=2, help="Test problems.")] = 200,
    each: Annotated[int, typer.Option(min=1, help="Answers to each.")] = 16,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust: Trust = False,
) -> None:
    """Avg@k and Pass@k with 95% intervals over problems."""
    from entroflow.cli.show import pass_table, print_table, working
    from entroflow.writing import to_json

    with _extra():
        from entroflow.llm.run import evaluate as evaluate_model
        from entroflow.llm.run import recipe_of

        trust = is_trusted(trust, lambda: recipe_of(model).refuse_strangers())
    with _extra(), working("evaluating", quiet=as_json):
        passing = evaluate_model(
            model, problems=problems, each=each, temperature=temperature, seed=seed, trust=trust
        )
    if as_json:
        print(to_json(passing, indent=1))
    else:
        print_table(pass_table(passing))


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe with every key written out.")
    ] = None,
) -> None:
    """List the shipped recipes for language models, or print one."""
    with _extra():
        from entroflow.llm.recipe import LAYOUT, load
        from entroflow.recipe.read import titles

        if name is not None:
            print(load(name).to_yaml(), end="")
            return
    shown = titles(LAYOUT)
    width = max(map(len, shown))
    for each, (title, _) in shown.items():
        print(f"{each:<{width}}  {title}")


@app.command(epilog="Example: `entroflow llm pretrain --folder base`")
def pretrain(
    folder: Annotated[Path, typer.Option(help="Where the model is written.")] = Path(
        "runs/pretrain-llm"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Updates, if not all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and puzzles.")] = 0,
) -> None:
    """Train the language model in the package from nothing, as its weights were made."""
    from entroflow.cli.show import steps_progress

    with _extra():
        from entroflow.llm.pretrain import Reading, read

        settings = Reading(seed=seed) if steps is None else Reading(seed=seed, steps=steps)
        with steps_progress("reading", settings.steps, "loss") as advance:
            for step, loss in read(settings, folder):
                advance(step, loss)
    print(f"model   {folder}")
    print(f"use it: entroflow llm train model.path={folder}")
