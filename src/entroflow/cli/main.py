"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from entroflow.cli.llm import app as llm
from entroflow.cli.trust import Trust, is_trusted
from entroflow.errors import InputError, one_line, printable
from entroflow.recipe.text import names_and_changes
from entroflow.redaction import without_secrets
from entroflow.streams import lasting_output

if TYPE_CHECKING:
    from entroflow.recipe.load import Recipe


class _Commands(TyperGroup):
    """All commands; what is called in one can't end the program as if all were well."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Raises:
            InputError: the user's own code raised SystemExit or the like.
        """
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            from entroflow.recipe.imports import raised

            raise InputError(f"what was called {raised(error)}.") from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-train flow-matching image generators with reinforcement learning.\n\n"
    "Start here: `entroflow train` trains the embedded model on two cores in minutes.",
)
pretrain_app = typer.Typer(no_args_is_help=True, help="Make base weights.")
app.add_typer(pretrain_app, name="pretrain")
app.add_typer(llm, name="llm")


class Weights(StrEnum):
    """Which weights of a run to use."""

    EMA = "ema"
    LIVE = "live"


class StandIn(StrEnum):
    """Kinds of policies that a tiny pipeline can stand in for."""

    SD3 = "sd3"
    FLUX = "flux"


MOST = 2**63 - 2
"""Seeds are 64 bits, and one more is used."""
Seed = Annotated[int, typer.Option(min=0, max=MOST, help="Seed of all noise.")]


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
    from entroflow.recipe.load import load_recipe
    from entroflow.runs.folder import REPORT, RunFolder
    from entroflow.training import launch

    place = name if resume is None else RunFolder.open(resume, Kind.IMAGES).path / RECIPE
    trust = _trusts(trust, place, overrides)
    recipe = load_recipe(place, overrides, trust=trust)
    with TrainingProgress(recipe) as progress:
        if resume is not None:
            if (start := RunFolder.open(resume).start()) is not None:
                progress.begin(start)
            folder = launch.resume(
                resume, overrides, stop_after=stop_after, watch=progress.watch, trust=trust
            )
        else:
            folder = launch.train(
                name, overrides, run=run, stop_after=stop_after, watch=progress.watch, trust=trust
            )
    progress.close_with(folder)
    print(f"run     {folder.path}")
    print(f"report  {folder.path / REPORT}")


@app.command(
    epilog='Example: `entroflow sample "a red circle left of a blue square" --run runs/mine`'
)
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more captions.")],
    run: Annotated[
        Path | None, typer.Option(help="A run; its images are shown below the base model's.")
    ] = None,
    weights: Annotated[Weights, typer.Option(help="Which weights of the run.")] = Weights.EMA,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help="ODE steps; as in the run's evaluation, else 10.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Guidance scale; as in the run's evaluation, else 1 (none)."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("samples.png"),
    trust: Trust = False,
) -> None:
    """Draw captions: a PNG grid, one row per prompt and model, the same noise for each model.

    The weights of a run are those of its best checkpoint.
    """
    from entroflow.runs.sample import draw, open_policy

    opened = open_policy(run, weights.value, trust=_trusts_run(trust, run))
    draw(opened, prompts, count=count, steps=steps, guidance=guidance, seed=seed, out=out)
    rows = "base"
    if opened.iteration is not None:
        rows += f", tuned ({opened.iteration} iterations)"
    print(f"{out}  ({count} images a row; rows: {rows})")


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

    trust = _trusts_run(trust, run)
    with working("evaluating", quiet=as_json):
        summary = evaluate_run(
            run, split=split, steps=steps, guidance=guidance, images=images, seed=seed, trust=trust
        )
    if as_json:
        print(to_json(summary, indent=1))
    else:
        print_table(evaluation_table(summary))


@app.command(
    epilog="Examples: `entroflow compare flow_grpo e_grpo` · `entroflow compare "
    "e_grpo e_grpo,exploration.merge=1 --budget 100k --seeds 2` · `entroflow compare mix_grpo "
    "dance_grpo reward.value=strict --learning-rates 5e-5,1e-4,2e-4`"
)
def compare(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE[,SECTION.KEY=VALUE]... [SECTION.KEY=VALUE]...",
            help="Recipes, each with changes of its own behind commas; then changes to all.",
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(help="Weighted network evaluations of a run, as 1.5M; 300k if none is given."),
    ] = None,
    updates: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of a run, instead of a budget.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Minutes of training, instead of a budget.")
    ] = None,
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
    from entroflow.comparison import runner as comparing
    from entroflow.comparison.table import rows

    arms = [comparing.Arm.parse(text) for text in arguments if "=" not in text.partition(",")[0]]
    shared = [text for text in arguments if "=" in text.partition(",")[0]]
    if not arms:
        raise InputError("name at least one recipe; `entroflow recipes` lists them.")
    ends = {"budget": budget, "updates": updates, "minutes": minutes}
    end = {key: value for key, value in ends.items() if value is not None} or {"budget": "300k"}
    if len(end) > 1:
        raise InputError(f"give one of {' and '.join(f'--{key}' for key in end)}.")
    rates = [] if learning_rates is None else learning_rates.split(",")
    for rate in rates:
        if not _is_rate(rate):
            raise InputError(f"--learning-rates must be numbers above 0 like 1e-4,3e-4: {rate!r}.")
    answers = [_trusts(trust, arm.recipe, (*arm.overrides, *shared)) for arm in arms]
    try:
        with comparison_progress() as progress:
            results, failed = comparing.compare(
                arms, range(seeds), end, out, shared=shared, learning_rates=rates,
                at_once=at_once, progress=progress, trust=any(answers),
            )  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; the same command goes on.")
        return
    if results:
        print_table(comparison_table(rows(results)))
    print(f"results  {out / comparing.RESULTS}")
    if failed:
        logs = ", ".join(str(job.folder(out).with_suffix(".log")) for job in failed)
        raise InputError(f"{len(failed)} runs failed; their output is in {logs}.")


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


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

    trust = _trusts_run(trust, run)
    with working("exporting"):
        folder = write(run, out, weights=weights.value, merged=merged, trust=trust)
    print(folder)


@app.command(
    epilog="Examples: `entroflow doctor my_recipe.yaml` · `entroflow doctor sd35_flow_grpo "
    "policy.model=models/sd35 --devices 8`"
)
def doctor(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [SECTION.KEY=VALUE]...", help="A recipe, and changes to it."
        ),
    ],
    devices: Annotated[
        int, typer.Option(min=1, help="That are to share the groups of an iteration.")
    ] = 1,
    trust: Trust = False,
) -> None:
    """Examine a recipe before a long run: does it start, is it right, what does it take?

    It loads the model, compares it with its own pipeline, scores two images, and makes one small
    iteration. Nothing is written. Memory is computed before any weights are loaded.
    """
    from entroflow.checks.doctor import examine
    from entroflow.cli.show import print_findings
    from entroflow.recipe.load import load_recipe

    name, changes = _one_name(arguments, "name one recipe; `entroflow recipes` lists them.")
    recipe = load_recipe(name, changes, trust=_trusts(trust, name, changes))
    failed = print_findings(examine(recipe, devices))
    if failed:
        raise InputError(f"not ready to run: {', '.join(failed)}.")


def _trusts(trust: bool, recipe: str | Path, changes: Sequence[str] = ()) -> bool:
    """Whether a recipe may do what needs trust; see `trust.is_trusted`."""
    from entroflow.recipe.load import refuse_strangers

    return is_trusted(trust, lambda: refuse_strangers(recipe, changes))


def _trusts_run(trust: bool, run: Path | None) -> bool:
    """Whether a run folder may do what needs trust."""
    from entroflow.recipe.kinds import RECIPE

    return trust if run is None else _trusts(trust, run / RECIPE)


def _one_name(arguments: list[str], otherwise: str) -> tuple[str, list[str]]:
    """The one argument that is no `section.key=value`, and those that are."""
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1:
        raise InputError(otherwise)
    return names[0], [argument for argument in arguments if "=" in argument]


rewards = typer.Typer(no_args_is_help=True, help="Look into a reward before training on it.")
app.add_typer(rewards, name="reward")

RewardArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME [SECTION.KEY=VALUE]...",
        help="A type of reward, the dotted path of your own, or a recipe; and changes to it.",
    ),
]


@rewards.command(
    "test",
    epilog="Examples: `entroflow reward test shapes` · `entroflow reward test my_reward.blue` · "
    "`entroflow reward test my_recipe.yaml reward.weights.style=0`",
)
def try_reward(
    arguments: RewardArguments,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose images are scored.")] = 4,
    images: Annotated[int, typer.Option(min=2, help="Images of each.")] = 4,
    trust: Trust = False,
) -> None:
    """Try a reward on images of the untrained model: is it fit to be trained on?

    Whether every image has one, whether it is the same when asked again and in other batches,
    whether it tells images from noise and from each other, and what it takes.
    """
    from entroflow.checks.examination import examine_recipe
    from entroflow.cli.show import print_findings

    failed = print_findings(examine_recipe(_recipe_with(arguments, trust), prompts, images))
    if failed:
        raise InputError(f"not fit to be trained on: {', '.join(failed)}.")


@rewards.command(
    "floors",
    epilog="Examples: `entroflow reward floors mixed_rewards` · "
    "`entroflow reward floors my_recipe.yaml --prompts 16`",
)
def calibrate(
    arguments: RewardArguments,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts whose images are scored.")] = 8,
    images: Annotated[int, typer.Option(min=2, help="Images of each.")] = 8,
    trust: Trust = False,
) -> None:
    """Calibrate the floors of a mixture: how much of each reward is noise?

    Scores images of the untrained model again under changes that no one would mind (JPEG, a shift
    by a pixel, 2% smaller or larger). A floor is twice the standard deviation that this alone
    makes; normalisation must not turn it into advantages.
    """
    from entroflow.checks.examination import all_rewards, untrained
    from entroflow.checks.noise_floors import as_yaml, floor_of
    from entroflow.cli.show import floors_table, print_table, working
    from entroflow.rewards.mixture import Mixture

    recipe = _recipe_with(arguments, trust)
    with working("drawing images"):
        groups, chosen = untrained(recipe, prompts, images)
    found = {}
    for name, reward in all_rewards(recipe).items():
        with working(f"scoring, {name}"):
            found[name] = floor_of(reward, groups, chosen)
    print_table(floors_table(found))
    if isinstance(recipe.reward, Mixture):
        print(as_yaml({name: found[name] for name in recipe.reward.trained}))
    else:
        print("floors are keys of a mixture; one of this reward alone will do.")


def _recipe_with(arguments: list[str], trust: bool) -> Recipe:
    """The recipe that is named; of a reward, quickstart with it."""
    from entroflow.recipe.load import load_recipe, shipped_recipes
    from entroflow.recipe.registry import COMPONENTS

    name, changes = _one_name(arguments, "name one reward, or a recipe.")
    own = "." in name and not os.path.exists(name) and not name.endswith((".yaml", ".yml"))
    if own or (name in COMPONENTS["reward"] and name not in shipped_recipes()):
        name, changes = "quickstart", [f"reward.type={name}", *changes]
    return load_recipe(name, changes, trust=_trusts(trust, name, changes))


@app.command(
    "stand-in",
    epilog="Example: `entroflow stand-in sd3 --out tiny`, then `entroflow doctor sd35_flow_grpo "
    "policy.model=tiny policy.resolution=32 policy.precision=fp32`",
)
def stand_in(
    kind: Annotated[StandIn, typer.Argument(help="Which model it stands in for.")],
    out: Annotated[Path, typer.Option(help="The new folder.")] = Path("stand-in"),
) -> None:
    """Write a tiny pipeline with random weights, to try commands without a model or a GPU.

    It is of the real classes, from tokenizers to VAE, but its images are noise.
    """
    from entroflow.recipe.imports import imported
    from entroflow.writing import whole_folder

    stand_ins = imported("entroflow.policies.diffusers.stand_ins.STAND_INS", "stand-in")
    with whole_folder(out) as made:
        stand_ins[kind.value]().save_pretrained(made)
    print(out)


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


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe with every key written out.")
    ] = None,
) -> None:
    """List the shipped recipes, or print one.

    Nothing that a recipe names is imported: the keys of your own parts stand as they are.
    """
    from entroflow.recipe.load import described, recipe_titles

    if name is not None:
        print(described(name), end="")
        return
    titles = recipe_titles()
    width = max(map(len, titles))
    for recipe, title in titles.items():
        print(f"{recipe:<{width}}  {title}")


@pretrain_app.command("shapes", epilog="Example: `entroflow pretrain shapes --folder base`")
def pretrain_shapes(
    folder: Annotated[Path, typer.Option(help="Where to train; the same folder goes on.")] = Path(
        "runs/pretrain-shapes"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Shorten or stretch all phases to about this total.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Train the embedded model from nothing, as the shipped weights were.

    Ctrl-C finishes the step, saves, and exits; the same command goes on.
    """
    from contextlib import closing

    from entroflow.cli.show import steps_progress
    from entroflow.locks import one_writer
    from entroflow.policies.shapes.pretrain import Pretraining, export_weights, pretrain
    from entroflow.signals import asked_to_stop

    settings = Pretraining(seed=seed)
    if steps is not None:
        settings = settings.scaled_to(steps)
    with (
        one_writer(folder),
        steps_progress("pretraining", settings.steps, "loss") as advance,
        closing(pretrain(settings, folder)) as training,
        asked_to_stop() as stopping,
    ):
        for step, loss in training:
            advance(step, loss)
            if stopping() and step < settings.steps:
                print(f"stopped at step {step}; the same command goes on.")
                return
    print(f"weights  {export_weights(folder)}")
    print(f"use them: entroflow train policy.weights={folder / 'base.safetensors'}")


@pretrain_app.command("preferences", epilog="Example: `entroflow pretrain preferences`")
def pretrain_preferences(
    folder: Annotated[Path, typer.Option(help="Where the weights are written.")] = Path(
        "runs/pretrain-preferences"
    ),
    seed: Seed = 0,
) -> None:
    """Learn the preferences that come with the package anew, from noisy comparisons.

    Some minutes on one core. Writes the weights of the score and of the judge, and how often they
    are right about held-out pairs.
    """
    from entroflow.cli.show import steps_progress
    from entroflow.rewards.preferences.learn import Learning, make

    found = make(Learning(seed=seed), folder, steps_progress)
    for kind, shares in found.items():
        print(f"{kind}: right about {shares['order']:.1%} of the held-out pairs")
    print(f"weights  {folder}")
    print(
        "use them: entroflow train pointwise_preference "
        f"reward.weights={folder / 'pointwise.safetensors'}"
    )


DISK = (
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES,
    errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
)  # fmt: skip
"""Failures of files and disks; others, as of a network, are not the user's input."""


INTERRUPTED = 130
"""Exit code after Ctrl-C."""


OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")
"""What PyTorch says of it."""


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at the time: a live bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        try:
            lines = without_secrets(self.format(record)).splitlines()
            sys.stderr.write("\n".join(map(printable, lines)) + "\n")
        except Exception:
            self.handleError(record)


def _show_failure(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a traceback without the secrets that messages in it may quote."""
    lines = traceback.format_exception(kind, error, trace)
    print(without_secrets("".join(lines)), file=sys.stderr, end="")


def main() -> None:
    """Entry point: wrong input ends with one line and exit code 2, an interrupt with 130."""
    # At its import it warns of optional packages that nothing here uses.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[_StandardError()]
    )
    # A shell expands `~` where a word begins, but not in `--run=~/mine`.
    sys.argv[1:] = [
        re.sub(r"^(--[\w-]+=)(~.*)", lambda m: m[1] + os.path.expanduser(m[2]), argument)
        for argument in sys.argv[1:]
    ]
    with lasting_output():
        try:
            app()
        except InputError as error:
            _end_with(str(error))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                # A folder that can't be written, a full disk: nothing a traceback would explain.
                _end_with(str(error))
            of_torch = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
            if isinstance(error, MemoryError) or of_torch:
                reason = one_line(str(error), 200) or type(error).__name__
                _end_with(
                    f"there is not enough memory for this ({reason}); `entroflow doctor RECIPE` "
                    "says what takes it."
                )
            # Here, as typer has a hook of its own.
            sys.excepthook = _show_failure
            raise
        except SystemExit as end:
            if end.code != INTERRUPTED:
                raise
            # All is closed and written by now. A thread that still waits, as for the name of a
            # server or in a reward of the user's, must not hold up the end.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)


def _end_with(reason: str) -> NoReturn:
    print(f"error: {one_line(without_secrets(reason))}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
