"""The command `entroflow compare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from entroflow.cli.options import grouped
from entroflow.cli.trust import Trust, is_trusted_recipe
from entroflow.errors import InputError

app = typer.Typer()


@dataclass(frozen=True)
class End:
    """What every run may take; one of these."""

    budget: Annotated[
        str | None,
        typer.Option(help="Weighted network evaluations of a run, as 1.5M; 300k if none is given."),
    ] = None
    updates: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of a run, instead of a budget.")
    ] = None
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Minutes of training, instead of a budget.")
    ] = None

    def of_each(self) -> dict[str, float | str]:
        """The end of each run, as keys of the section `run`.

        Raises:
            InputError: more than one is given.
        """
        given: dict[str, float | str] = {
            key: value for key, value in asdict(self).items() if value is not None
        }
        if len(given) > 1:
            raise InputError(f"give one of {' and '.join(f'--{key}' for key in given)}.")
        return given or {"budget": "300k"}


@app.command(
    epilog="Examples: `entroflow compare flow_grpo e_grpo` · `entroflow compare "
    "e_grpo e_grpo,exploration.merge=1 --budget 100k --seeds 2` · `entroflow compare mix_grpo "
    "dance_grpo reward.value=strict --learning-rates 5e-5,1e-4,2e-4`"
)
@grouped
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE[,SECTION.KEY=VALUE]... [SECTION.KEY=VALUE]...",
            help="Recipes, each with changes of its own behind commas; then changes to all.",
        ),
    ],
    end: End = End(),
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each recipe, with seeds 0, 1, ...")
    ] = 3,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="Rates to try with the first seed of each recipe; the best on validation prompts "
            "is kept."
        ),
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Runs at once, one thread each; one for each core.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Results, and all runs; the same folder goes on.")
    ] = Path("runs/compare"),
    trust: Trust = False,
) -> None:
    """Run recipes with several seeds at equal cost, and print a table.

    Ctrl-C finishes the iterations, saves, and exits; the same command goes on. A result is never
    made twice.
    """
    from entroflow.cli.show import comparison_progress, comparison_table, print_table
    from entroflow.comparison import runner
    from entroflow.comparison.jobs import Arm, Terms
    from entroflow.comparison.results import RESULTS
    from entroflow.comparison.table import rows

    arms = [Arm.parse(text) for text in arguments if "=" not in text.partition(",")[0]]
    shared = [text for text in arguments if "=" in text.partition(",")[0]]
    if not arms:
        raise InputError("name at least one recipe; `entroflow recipes` lists them.")
    each = end.of_each()
    rates = [] if learning_rates is None else learning_rates.split(",")
    for rate in rates:
        if not _is_rate(rate):
            raise InputError(f"--learning-rates must be numbers above 0 like 1e-4,3e-4: {rate!r}.")
    answers = [is_trusted_recipe(trust, arm.recipe, (*arm.overrides, *shared)) for arm in arms]
    terms = Terms(each, shared, any(answers))
    try:
        with comparison_progress() as progress:
            results, failed = runner.compare(
                arms, range(seeds), terms, out, learning_rates=rates, at_once=at_once,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; the same command goes on.")
        return
    if results:
        print_table(comparison_table(rows(results)))
    print(f"results  {out / RESULTS}")
    if failed:
        logs = ", ".join(str(job.folder(out).with_suffix(".log")) for job in failed)
        raise InputError(f"{len(failed)} runs failed; their output is in {logs}.")


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False
