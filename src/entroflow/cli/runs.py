"""Commands for runs: train, sample, evaluate, export, report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from entroflow.cli.options import MOST, Seed, Weights, grouped
from entroflow.cli.trust import Trust, is_trusted_run, loaded
from entroflow.errors import InputError
from entroflow.recipe.text import names_and_changes

app = typer.Typer()


@app.command(
    epilog="Examples: `entroflow train` · `entroflow train flow_grpo run.iterations=50` · "
    "`entroflow train my_recipe.yaml --run runs/mine` · `entroflow train --resume runs/mine`"
)
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [SECTION.KEY=VALUE]...",
            help="A shipped recipe (see `entroflow recipes`) or a file; then changes to it. "
            "Without a recipe: quickstart.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder; runs/RECIPE-TIME if not given.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with the run in this folder.")
    ] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Stop after iteration N; resumable.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Train by a recipe. Ctrl-C finishes the iteration, saves, and exits; `--resume` goes on."""
    names, overrides = names_and_changes(arguments)
    name = names[0] if names else "quickstart"
    if resume is not None and (names or run is not None):
        raise InputError(
            "--resume takes recipe and folder from the run; leave RECIPE and --run out."
        )
    from entroflow.cli.show import TrainingProgress
    from entroflow.recipe.kinds import RECIPE, Kind
    from entroflow.runs.folder import REPORT, RunFolder
    from entroflow.training import launch

    begun = None if resume is None else RunFolder.open(resume, Kind.IMAGES)
    place = name if begun is None else begun.path / RECIPE
    recipe, trust = loaded(trust, place, overrides)
    with TrainingProgress(recipe) as progress:
        if begun is not None:
            if (start := begun.start()) is not None:
                progress.begin(start)
            folder = launch.resume(
                begun.path, overrides, stop_after=stop_after, watch=progress.watch, trust=trust
            )
        else:
            folder = launch.train(
                name, overrides, run=run, stop_after=stop_after, watch=progress.watch, trust=trust
            )
    progress.close_with(folder)
    print(f"run     {folder.path}")
    print(f"report  {folder.path / REPORT}")


@dataclass(frozen=True)
class Images:
    """Which images are drawn of a prompt."""

    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 8
    steps: Annotated[
        int | None, typer.Option(min=1, help="ODE steps; as in the run's evaluation, else 10.")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Guidance scale; as in the run's evaluation, else 1 (none)."),
    ] = None
    seed: Seed = 0


@app.command(
    epilog='Example: `entroflow sample "a red circle left of a blue square" --run runs/mine`'
)
@grouped
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more captions.")],
    run: Annotated[
        Path | None, typer.Option(help="A run; its images are shown below the base model's.")
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Which weights of the run.")] = Weights.EMA,
    images: Images = Images(),
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    trust: Trust = False,
) -> None:
    """Draw captions: a PNG grid, one row per prompt and model, the same noise for each model.

    The weights of a run are those of its best checkpoint.
    """
    from entroflow.runs.open import open_policy
    from entroflow.runs.sample import draw

    opened = open_policy(run, weights.value, trust=is_trusted_run(trust, run))
    draw(opened, prompts, **asdict(images), out=out)
    rows = "base"
    if opened.iteration is not None:
        rows += f", tuned ({opened.iteration} iterations)"
    print(f"{out}  ({images.count} images a row; rows: {rows})")


@app.command(epilog="Examples: `entroflow evaluate` · `entroflow evaluate runs/mine --json`")
def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="A run folder; without it, the base model.")
    ] = None,
    split: Annotated[str, typer.Option(help="Prompts: validation or test.")] = "test",
    steps: Annotated[int | None, typer.Option(min=1, help="ODE steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance scale of base and tuned; 1 is none.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Images, per skill if there are any.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MOST, help="Seed of all noise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust: Trust = False,
) -> None:
    """Score with 95% intervals: base, base with its best guidance, and tuned.

    The weights are those of the best checkpoint. What is not given is as in the comparison at the
    end of the run.
    """
    from entroflow.cli.show import evaluation_table, print_table, working
    from entroflow.runs.evaluate import evaluate as evaluate_run
    from entroflow.writing import to_json

    trust = is_trusted_run(trust, run)
    with working("evaluating", quiet=as_json):
        summary = evaluate_run(
            run, split=split, steps=steps, guidance=guidance, images=images, seed=seed, trust=trust
        )
    if as_json:
        print(to_json(summary, indent=1))
    else:
        print_table(evaluation_table(summary))


@app.command(
    epilog="Examples: `entroflow export runs/mine --out lora` · `entroflow export runs/mine "
    "--out pipeline --merged`"
)
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="The new folder.")] = Path("exported"),
    weights: Annotated[Weights, typer.Option(help="Which weights of the run.")] = Weights.EMA,
    merged: Annotated[
        bool, typer.Option("--merged", help="A whole pipeline, with the LoRA in its weights.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Write the weights of a run for other programs: a LoRA or a pipeline that diffusers loads.

    The weights are those of its best checkpoint.
    """
    from entroflow.cli.show import working
    from entroflow.runs.export import export as write

    trust = is_trusted_run(trust, run)
    with working("exporting"):
        folder = write(run, out, weights=weights.value, merged=merged, trust=trust)
    print(folder)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the report of a run anew: one HTML page that works offline."""
    from entroflow.recipe.kinds import Kind
    from entroflow.report.llm_page import write_llm_report
    from entroflow.report.page import write_report
    from entroflow.runs.folder import RunFolder

    folder = RunFolder.open(run)
    write = write_llm_report if folder.kind is Kind.LANGUAGE_MODEL else write_report
    print(write(folder))
