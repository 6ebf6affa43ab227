"""The HTML report of an image model's run.

    RunFolder -> sections of panels, pictures and tables -> one page that works offline

Every part shows what the run folder has and leaves out what it has not.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from entroflow.checkpoints import read_run_state
from entroflow.contents import RunError, read_object, read_text
from entroflow.errors import RecipeError
from entroflow.evaluation.base import Measure
from entroflow.recipe.identity import warn_of_another_recipe
from entroflow.recipe.kinds import RECIPE
from entroflow.recipe.load import Recipe
from entroflow.recipe.registry import LATER_SECTIONS, SECTIONS
from entroflow.recipe.text import TEXTS, parse_yaml
from entroflow.report import curves, examples, outcome
from entroflow.report.attention import attention
from entroflow.report.figures import Metrics
from entroflow.report.panels import drawn
from entroflow.report.rendering import Section, write_page
from entroflow.report.thinning import thinned_metrics, thinning
from entroflow.report.trajectories import credit
from entroflow.runs.files import METRICS, Comparison
from entroflow.runs.folder import EVALUATION, RunFolder, spent
from entroflow.settings import ENDS, Monitors, Run
from entroflow.wording import count

log = logging.getLogger(__name__)


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from what the run folder has, and return its path."""
    made_by, text, run = _read_recipe(folder.path / RECIPE)
    metrics, path = thinned_metrics(folder), folder.path / EVALUATION
    evaluation = read_object(path, Comparison) if path.exists() else {}
    if evaluation and "measure" not in evaluation:
        raise RunError(f"{path} is of an older version; remove it to do without.")
    state = _latest_state(folder, made_by, metrics)
    prompts = outcome.prompts_of(made_by.resolved["evaluation"])
    measure = outcome.measure_of(metrics, evaluation)
    watching = Monitors.model_construct(**made_by.resolved["monitors"])
    done = metrics[-1]["iteration"] if metrics else 0
    stopped = bool(metrics) and "hacking" in metrics[-1] and watching.on_hacking == "stop"
    complete = bool(metrics) and (stopped or run.share_done(spent(metrics[-1])) >= 1)
    longer = " ".join(f"run.{key}={2 * end or 100:g}" for key, end in run.ends.items())
    progress = examples.over_iterations(folder, done)
    headline = outcome.headline(metrics, evaluation, complete, made_by.resolved["evaluation"])
    lead = f"{measure.reading} Brackets hold 95% intervals.".lstrip()
    blocks = [("headline", headline), *outcome.costs(metrics, evaluation, state)]
    sections = [
        Section("outcome", "Outcome and cost", "What was run and what it cost", lead, blocks),
        _curves(metrics, measure, prompts, done),
        Section("examples", "Examples", "The same prompts and noise over the training",
                f"A row is one of the {prompts}; what changes from left to right is the training.",
                [("examples", progress)]),
        *outcome.skills(folder, evaluation, measure, made_by.resolved),
        *outcome.blind_spots(metrics, evaluation, watching, prompts, stopped),
        *_rewards(metrics),
        *attention(metrics),
        *credit(folder, metrics, done),
        _under_the_hood(metrics),
        _commands(folder, text, progress, longer if complete else ""),
    ]  # fmt: skip
    names = [
        ("recipe", made_by.name), ("paper", made_by.paper), ("hash", made_by.hash),
        ("seed", run.seed), ("", _extent(run, metrics) + ("" if complete else ", not complete")),
    ]  # fmt: skip
    title, kind = made_by.title or made_by.name, "report of a training run"
    return write_page(folder, sections, kind=kind, title=title, run=names, notes=made_by.notes)


def _read_recipe(path: Path) -> tuple[Recipe, str, Run]:
    """A run's recipe, its text, and its section `run`.

    Its components are left unbuilt: a report needs none of the user's code.

    Raises:
        RunError: the file is torn.
    """
    text = read_text(path)
    try:
        resolved = parse_yaml(text, str(path))
    except RecipeError:
        raise RunError(f"{path} is torn: it is not YAML.") from None
    for later in LATER_SECTIONS:
        resolved.setdefault(later, {})
    for section in SECTIONS:
        if not isinstance(resolved.get(section), dict):
            raise RunError(f"{path} is torn: it has no section {section!r}.")
    try:
        run = Run(**resolved["run"])
    except ValidationError:
        raise RunError(f"{path} is torn: its section 'run' is not whole.") from None
    name = resolved.pop("name", "recipe")
    texts: dict[str, Any] = {key: str(resolved.get(key, "")) for key in TEXTS}
    unbuilt: dict[str, Any] = dict.fromkeys(SECTIONS)
    return Recipe(name=name, **texts, **unbuilt, resolved=resolved), text, run


def _latest_state(folder: RunFolder, made_by: Recipe, metrics: Metrics) -> dict[str, Any]:
    """State of the latest checkpoint, empty if there is none; warns of one of another run."""
    latest = folder.all_checkpoints()[-1:]
    state = read_run_state(latest[0]) if latest else {}
    if state:
        warn_of_another_recipe(state, made_by.resolved, folder.latest())
        of_state = (entry for entry in metrics if entry["iteration"] == state["iteration"])
        if round(next(of_state, state)["seconds"], 3) != round(state["seconds"], 3):
            log.warning("%s is not of the run of %s.", folder.path / METRICS, folder.latest())
    return state


def _curves(metrics: Metrics, measure: Measure, prompts: str, done: int) -> Section:
    title = "Score and reward over iterations"
    panels = drawn(curves.score_and_reward(measure, prompts), metrics)
    if not panels:
        why = f"There is nothing to plot yet: a curve needs two points; this is iteration {done}."
        return Section("curves", "Curves", title, "", [("soft", why)])
    lead = "Trust the score: a reward that rises while the score stays is being exploited."
    if measure.name == "reward":
        lead = "The score is the reward itself, on other prompts: look at the images as well."
    blocks = [("soft", thinning(metrics)), ("pairs", panels)]
    return Section("curves", "Curves", title, lead, blocks)


def _rewards(metrics: Metrics) -> list[Section]:
    mixture, judges = (drawn(each(metrics), metrics) for each in (curves.mixture, curves.judges))
    lead = "What is trained on, part by part: one that falls while others rise is traded for them."
    trust = "A judge of pairs always finds winners; these numbers say whether it sees differences."
    return [
        Section("rewards", "Rewards", "The rewards of the mixture", lead, [("panels", mixture)]),
        Section("judge", "The judge", "How far to trust the judge", trust, [("panels", judges)]),
    ]


def _under_the_hood(metrics: Metrics) -> Section:
    plan, steps = drawn(curves.PLAN, metrics), drawn(curves.BY_STEP, metrics)
    explained = (
        "Rows are steps of the sampling grid, from pure noise on: which does an update move?"
    )
    blocks = [
        ("panels", drawn([*curves.HOOD, curves.failures(metrics)], metrics)),
        ("part", ("The plan of an iteration", "") if plan else None),
        ("pairs", plan),
        ("part", ("By denoising step", explained) if steps else None),
        ("pairs", steps),
    ]
    lead = "Is the training sound? Look here when the score does not rise, or falls."
    return Section("hood", "Under the hood", "Under the hood", lead, blocks)


def _commands(
    folder: RunFolder, text: str, progress: examples.ExampleGrid | None, longer: str
) -> Section:
    path = shlex.quote(str(folder.path))
    caption = shlex.quote(progress.rows[0][0] if progress else "a caption")
    commands = [
        ("Train for longer:" if longer else "Go on from the last checkpoint:",
         f"entroflow train --resume {path} {longer}".rstrip()),
        ("Score base and tuned weights on test prompts:", f"entroflow evaluate {path}"),
        ("Sample a caption with both:", f"entroflow sample {caption} --run {path}"),
    ]  # fmt: skip
    lead = "The recipe below, with every default written out, is all it takes to run this again."
    blocks = [("recipe", text), ("commands", commands)]
    return Section("recipe", "Recipe", "Recipe and commands", lead, blocks)


def _extent(run: Run, metrics: Metrics) -> str:
    """How far it is: 12 of 100 iterations; 42 iterations, 290k of 300k weighted evaluations."""
    used = spent(metrics[-1]) if metrics else dict.fromkeys(ENDS, 0.0)
    parts = [f"{count(used[key])} of {count(end)} {ENDS[key]}" for key, end in run.ends.items()]
    alone = [] if "iterations" in run.ends else [f"{count(used['iterations'])} iterations"]
    return ", ".join([*alone, *parts])
