"""What the command line shows while it works: progress, and tables."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from time import perf_counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from entroflow.checks.findings import Finding, Verdict
from entroflow.checks.noise_floors import Floor
from entroflow.comparison.jobs import Job
from entroflow.comparison.table import Row, smallest_difference
from entroflow.contents import read_object
from entroflow.errors import one_line, printable
from entroflow.evaluation.base import Evaluated
from entroflow.recipe.load import Recipe
from entroflow.runs.files import Comparison
from entroflow.runs.folder import EVALUATION, RunFolder, spent
from entroflow.settings import ENDS, Run
from entroflow.training.metrics import Metrics
from entroflow.wording import Interval

console = Console(emoji=False)
"""What is printed may hold names and texts of users: none is markup, see `plain`."""


def plain(text: str) -> str:
    """A text of the user's or of others, as it stands between markup."""
    return escape(printable(text))


class TrainingProgress:
    """A live bar with score, reward, evaluations and time left, and a line per evaluation.

    Where nobody watches (no terminal) only the lines are printed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(recipe.name, total=1.0, numbers="setting up")
        self._score = math.nan

    def __enter__(self) -> TrainingProgress:
        run = self._recipe.run
        console.print(
            f"[bold]{plain(self._recipe.name)}[/] {self._recipe.hash}  "
            f"{plain(one_line(self._recipe.title))}",
            highlight=False,
        )
        console.print(f"{length(run)}, seed {run.seed}", highlight=False)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, start: Metrics) -> None:
        """Show what the run is about to do, from the line of iteration 0."""
        clip, D = start["policy/clip_range"], start["policy/dimensions"]
        if clip is not None:
            console.print(
                f"clip range {clip:.2g} per dimension, {clip * D:.3g} in all (D = {D})",
                highlight=False,
            )
        console.print(expectation(start["plan"]), highlight=False, soft_wrap=True)

    def watch(self, metrics: Metrics, evaluated: Evaluated | None) -> None:
        """Show one iteration."""
        if metrics["iteration"] == 0:
            self.begin(metrics)
        if evaluated is not None:
            self._score = metrics["eval/score"]
            score = Interval(self._score, metrics["eval/score_low"], metrics["eval/score_high"])
            watched = _watched(metrics, evaluated.monitor_means())
            console.print(
                f"iteration {metrics['iteration']:>4}  "
                f"score [bold]{_decimals(self._score, 3)}[/] {escape(score.reach)}  "
                f"{plain(''.join(f'{each}  ' for each in watched))}"
                f"{compact(metrics['ledger/weighted_evaluations'])} weighted evaluations  "
                f"{metrics['seconds']:.0f} s",
                highlight=False,
                soft_wrap=True,
            )
        mean = metrics.get("reward/mean")
        reward = "" if mean is None else f"reward {_decimals(mean, 3)}  "
        evaluations = compact(metrics["ledger/network_evaluations"])
        numbers = (
            f"iteration {metrics['iteration']}  score {_decimals(self._score, 3)}  {reward}"
            f"{evaluations} evaluations"
        )
        share = self._recipe.run.share_done(spent(metrics))
        if share >= 1:
            numbers += "  comparing with the base on test prompts"
        self._progress.update(self._task, completed=share, numbers=numbers)

    def close_with(self, folder: RunFolder) -> None:
        """The final table, if the run is complete."""
        path = folder.path / EVALUATION
        if path.exists():
            print_table(evaluation_table(read_object(path, Comparison)))


def length(run: Run) -> str:
    """What ends a run: 100 iterations; about 300k weighted evaluations or 2 minutes."""
    ends = [
        f"{'' if key == 'iterations' else 'about '}{compact(end)} {ENDS[key]}"
        for key, end in run.ends.items()
    ]
    return " or ".join(ends)


def expectation(plan: Mapping[str, Any]) -> str:
    """What an iteration costs and which steps are stochastic, from `forecast.expected_of`."""
    steps = "  ".join(
        f"{step['start']}-{step['end']} {math.exp(step['entropy']):.3g}" for step in plan["steps"]
    )
    return (
        f"an iteration: {plan['network_evaluations']:,} network evaluations, "
        f"{plan['weighted_evaluations']:,} weighted, {plan['reward_calls']:,} rewards\n"
        f"stochastic steps (start-end, exp of the entropy per value): {steps}"
    )


def _watched(metrics: Metrics, monitors: Mapping[str, float]) -> list[str]:
    """What an evaluation says besides its score: of the drifts only the farthest."""
    drifts = {k.removeprefix("drift/"): v for k, v in metrics.items() if k.startswith("drift/")}
    rewards = {
        key.removeprefix("eval/").replace("_", " "): metrics[key]
        for key in metrics
        # One that only compares is its own win rate.
        if key.startswith("eval/win_rate")
        or (key == "eval/reward" and "eval/win_rate" not in metrics)
    }
    shown = {
        name: value
        for name, value in rewards.items()
        if value is not None and not math.isnan(value)
    }
    shown |= {name: value for name, value in monitors.items() if name not in drifts}
    texts = [f"{name} {value:.3g}" for name, value in shown.items()]
    if drifts and metrics["iteration"]:
        farthest = max(drifts, key=lambda name: abs(drifts[name]))
        texts.append(f"{farthest} {drifts[farthest]:+.1f} sd")
    return texts


def evaluation_table(summary: dict[str, Any]) -> Table:
    """Score by skill with 95% intervals, a column per model, then reward and monitors."""
    titles = {
        "base": "base",
        "base_guided": f"base, guidance {summary['best_guidance']:g}",
        "tuned": "tuned",
    }
    models = dict(summary["models"])
    if summary["best_guidance"] == summary["guidance"]:
        # Nothing suits the base better: the column would only repeat it.
        models.pop("base_guided")
    images = models["base"]["scores"]["overall"]["images"]
    table = Table(
        title=f"{plain(summary['measure']['name'])} on {summary['split']} prompts, "
        f"{images} images, {summary['steps']} ODE steps, guidance {summary['guidance']:g}, "
        "[95% interval]",
        title_justify="left",
    )
    table.add_column("")
    for name in models:
        table.add_column(titles[name], justify="right")
    skills = list(models["base"]["scores"])
    for skill in skills:
        cells = []
        for model in models.values():
            score = Interval.of(model["scores"][skill])
            cells.append(f"{_decimals(score.value, 3)} {escape(score.reach)}")
        table.add_row(plain(skill), *cells, end_section=skill in skills[-2:])
    if list(models["base"].get("win_rates", {})) != ["reward"]:
        table.add_row("reward", *(_decimals(model["reward"], 3) for model in models.values()))
    for monitor in models["base"]["monitors"]:
        values = [model["monitors"][monitor] for model in models.values()]
        table.add_row(plain(monitor), *(_decimals(value, 4) for value in values))
    for name in models["base"].get("win_rates", {}):
        rates = [Interval.of(model["win_rates"][name]) for model in models.values()]
        label = "win rate" if name == "reward" else f"win rate, {name}"
        table.add_row(plain(label), *(f"{_decimals(r.value, 3)} {escape(r.reach)}" for r in rates))
    if "gain" in summary:
        if (iteration := summary.get("iteration")) is not None:
            table.title = f"{table.title}\ntuned: after iteration {iteration}"
        gain = (summary["gain"][key] for key in ("value", "low", "high"))
        value, low, high = (_decimals(number, 3, "+") for number in gain)
        table.caption = f"gain {value} \\[{low}, {high}]"
    return table


def _decimals(value: float | None, places: int, sign: str = "") -> str:
    """A number with the minus sign that intervals have; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:{sign}.{places}f}".replace("-", "−")


class _ComparisonProgress:
    """A bar over runs, and a line for each that is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("comparing", total=0)

    def begin(self, jobs: Sequence[Job]) -> None:
        """See `compare.Progress`."""
        self._progress.update(self._task, total=len(jobs), completed=0)

    def done(self, job: Job, result: Mapping[str, Any] | None) -> None:
        """See `compare.Progress`."""
        self._progress.update(self._task, advance=1)
        outcome = "failed"
        if result is not None:
            models = result["test"]["models"]
            before, after = (
                models[name]["scores"]["overall"]["value"] for name in ("base", "tuned")
            )
            outcome = f"score {before:.3f} -> {after:.3f} in {result['training_seconds']:.0f} s"
            outcome += f" ({result['version']})"
        console.print(
            f"{plain(job.arm.name)}  seed {job.seed}  {plain(outcome)}",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def comparison_progress() -> Iterator[_ComparisonProgress]:
    """A bar over the runs of a comparison; without a terminal, their lines alone."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        yield _ComparisonProgress(progress)


def comparison_table(table: Sequence[Row]) -> Table:
    """One line per arm, the best first, and the smallest difference that would have shown."""
    measures = sorted({row.measure for row in table})
    monitors = [
        name
        for name in ("texture", "diversity", "detail")
        if any(name in r.monitors for r in table)
    ]
    shown = Table(
        title=f"{plain(' or '.join(measures))} on test prompts: mean over seeds, and standard "
        "deviation",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    # Narrow enough for 80 columns, where a terminal's width is not known.
    shown.add_column("recipe", overflow="fold", min_width=14)
    headings = [name if len(name) < 8 else f"{name[:6]}." for name in monitors]
    for heading in ("n", "iter", "spent", "score", "gain", *headings, "min"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in table:
        spread = "" if math.isnan(row.spread) else f" ±{row.spread:.3f}"
        shown.add_row(
            plain(row.name), str(row.seeds), f"{row.iterations:.0f}",
            compact(row.weighted_evaluations), f"{row.score:.3f}{spread}", f"{row.gain:+.3f}",
            *("–" if math.isnan(x) else f"×{x:.2f}" for x in map(row.ratio, monitors)),
            f"{row.minutes:.1f}",
        )  # fmt: skip
    least = smallest_difference(table)
    versions = sorted(frozenset[str]().union(*(row.versions for row in table)))
    shown.caption = (
        "one seed shows no differences: give more"
        if math.isnan(least)
        else f"differences below {least:.3f} would likely not have shown (5%, power 80%)"
    )
    if len(versions) > 1:
        shown.caption += f"\nmade by several versions of the package: {plain(', '.join(versions))}"
    return shown


MARKS = {
    Verdict.OK: "[green]ok     [/]",
    Verdict.WARNING: "[yellow]warning[/]",
    Verdict.FAILED: "[red]failed [/]",
    Verdict.SKIPPED: "[dim]skipped[/]",
}


def print_findings(findings: Iterator[Finding]) -> list[str]:
    """Print findings as they come; returns the checks that failed."""
    failed: list[str] = []
    while True:
        with working("examining"):
            finding = next(findings, None)
        if finding is None:
            return failed
        row = Table.grid(padding=(0, 2))
        row.add_row(MARKS[finding.verdict], f"{finding.check:<9}", plain(finding.said))
        console.print(row, highlight=False)
        failed += [finding.check] if finding.verdict is Verdict.FAILED else []


def floors_table(floors: Mapping[str, Floor]) -> Table:
    """A line for each reward: its noise, spread, signal and floor."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("reward")
    for heading in ("noise", "spread in a group", "signal", "floor", "failed"):
        table.add_column(heading, justify="right")
    for name, floor in floors.items():
        table.add_row(
            plain(name), f"{floor.noise:.3g}", f"{floor.spread:.3g}", f"{floor.signal:.0%}",
            f"{floor.floor:.2g}", f"{floor.failed:.0%}" if floor.failed else "",
        )  # fmt: skip
    return table


def print_table(table: Table) -> None:
    """Print a table."""
    console.print(table)


@contextmanager
def working(what: str, quiet: bool = False) -> Iterator[None]:
    """A spinner with the time, on a terminal.

    Args:
        quiet: standard output is for what is printed afterwards alone; what a reward prints within
            goes to standard error.
    """
    if quiet:
        with redirect_stdout(sys.stderr):
            yield
        return
    if not console.is_terminal:
        yield
        return
    with console.status(f"{plain(what)} ..."):
        yield


@contextmanager
def steps_progress(what: str, total: int, number: str) -> Iterator[Callable[[int, float], None]]:
    """A bar over many short steps with one running number; without a terminal, a line every 500."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[number]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task(what, total=total, number="")
    start, mean = perf_counter(), math.nan

    def advance(step: int, value: float) -> None:
        nonlocal mean
        mean = value if math.isnan(mean) else 0.98 * mean + 0.02 * value
        progress.update(task, completed=step, number=f"{number} {mean:.4f}")
        if not console.is_terminal and step % 500 == 0:
            seconds = perf_counter() - start
            console.print(f"{what} {step}/{total}  {number} {mean:.4f}  {seconds:.0f} s")

    with progress:
        yield advance


@contextmanager
def llm_progress(updates: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar over the updates of a language model, and a line for every evaluation."""
    with steps_progress("training", updates, "reward") as advance:

        def watch(line: Mapping[str, Any]) -> None:
            if "reward" in line:
                advance(line["iteration"], line["reward"])
            judged = {k: v for k, v in line.items() if k.startswith("eval/") and "_" not in k}
            if judged:
                n = max(int(key.partition("@")[2]) for key in judged)
                values = [
                    f"{kind}@{n} {judged[f'eval/{kind}@{n}']:.3f}" for kind in ("avg", "pass")
                ]
                entropy = (
                    f"  entropy {line['token_entropy']:.3f}" if "token_entropy" in line else ""
                )
                console.print(f"update {line['iteration']:>5}  {'  '.join(values)}{entropy}")

        yield watch


def pass_table(passing: Mapping[str, Any]) -> Table:
    """Avg@k and Pass@k of a model."""
    table = Table(title=f"{passing['problems']} test problems", title_justify="left")
    for heading in ("measure", "value", "95% interval"):
        table.add_column(heading)
    for name, values in passing.items():
        if name != "problems":
            value, low, high = values
            table.add_row(name.capitalize(), f"{value:.3f}", f"[{low:.3f}, {high:.3f}]")
    return table


def compact(count: float) -> str:
    """1234567 as 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"
