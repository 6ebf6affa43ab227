"""The HTML report of a run: one page that works offline.

    RunFolder -> outcome (words), curves (figures), examples (pictures) -> report.html.j2

Every part shows what the run folder has and leaves out what it has not.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from entroflow.checkpoints import read_run_state
from entroflow.contents import (
    RunError,
    read_object,
    read_text,
)
from entroflow.errors import RecipeError
from entroflow.recipe.identity import warn_of_another_recipe
from entroflow.recipe.kinds import RECIPE
from entroflow.recipe.load import Recipe
from entroflow.recipe.registry import LATER_SECTIONS, SECTIONS
from entroflow.recipe.text import TEXTS, parse_yaml
from entroflow.report import attention, curves, examples, judging, outcome, trajectories
from entroflow.report.rendering import rendered
from entroflow.report.thinning import thinned_metrics, thinning
from entroflow.report.wording import count
from entroflow.runs.files import METRICS, Comparison
from entroflow.runs.folder import EVALUATION, REPORT, RunFolder, spent
from entroflow.settings import ENDS, Monitors, Run
from entroflow.writing import write_text

log = logging.getLogger(__name__)

TEMPLATE = "report.html.j2"


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from what the run folder has; an older one is replaced.

    Returns:
        Its path.
    """
    page = rendered(TEMPLATE, _content(folder))
    write_text(folder.path / REPORT, page)
    return folder.path / REPORT


def _content(folder: RunFolder) -> dict[str, Any]:
    """What the template shows."""
    recipe, recipe_yaml, run = _read_recipe(folder.path / RECIPE)
    settings = recipe.resolved["evaluation"]
    prompts = outcome.prompts_of(settings)
    metrics = thinned_metrics(folder)
    if gap := folder.gap(metrics):
        log.warning("%s %s; the report shows the others.", folder.path / METRICS, gap)
    done = metrics[-1]["iteration"] if metrics else 0
    watching = Monitors.model_construct(**recipe.resolved["monitors"])
    stopped = bool(metrics) and "hacking" in metrics[-1] and watching.on_hacking == "stop"
    complete = bool(metrics) and (stopped or run.share_done(spent(metrics[-1])) >= 1)
    path = folder.path / EVALUATION
    evaluation = read_object(path, Comparison) if path.exists() else {}
    if evaluation and "measure" not in evaluation:
        raise RunError(f"{path} is of an older version; remove it to do without.")
    names, measure = outcome.model_names(evaluation), outcome.measure_of(metrics, evaluation)
    moved = outcome.drifts(metrics)
    checkpointed, state = _latest_state(folder)
    if state:
        warn_of_another_recipe(state, recipe.resolved, folder.latest())
        line = next((line for line in metrics if line["iteration"] == checkpointed), state)
        if round(line["seconds"], 3) != round(state["seconds"], 3):
            log.warning("%s is not of the run of %s.", folder.path / METRICS, folder.latest())
    scores = outcome.scores_by_skill(evaluation)
    progress = examples.over_iterations(folder, done)
    return {
        "recipe": recipe,
        "recipe_yaml": recipe_yaml,
        "run": run,
        "run_path": shlex.quote(str(folder.path)),
        "done": done,
        "extent": _extent(run, metrics),
        "longer": _longer(run),
        "complete": complete,
        "thinning": thinning(metrics),
        "prompts": prompts,
        "measure": measure,
        "headline": outcome.headline(metrics, evaluation, complete, settings),
        "costs": outcome.costs(metrics, evaluation),
        "stages": outcome.stages(state, evaluation),
        "checkpointed": checkpointed,
        "curves": curves.score_and_reward(metrics, measure, prompts),
        "progress": progress,
        "caption": shlex.quote(progress.rows[0][0] if progress else "a caption"),
        "scores": scores,
        "compared_prompts": outcome.prompts_of(evaluation),
        "unseen": outcome.is_unseen(evaluation, recipe.resolved) if scores else False,
        "guidance_note": outcome.guidance_note(evaluation) if scores else "",
        "compared_setting": outcome.setting(evaluation) if scores else "",
        "skill_figure": curves.by_skill(scores, measure) if _has_skills(scores) else None,
        "compared_examples": examples.example_grid(
            folder, [(f"test_{model}", name) for model, name in names.items()]
        ),
        "monitors": outcome.monitors(metrics),
        "compared_monitors": outcome.compared_monitors(evaluation),
        "drift_figure": curves.drifts(moved, watching.band) if _is_curve(moved) else None,
        "held_out_rewards": curves.held_out_rewards(metrics, list(watching.rewards)),
        "alarms": outcome.alarms(metrics, stopped),
        "attention": attention.attention(metrics),
        "credit": trajectories.credit(folder, metrics, done),
        "rewards": judging.mixture(metrics),
        "judges": judging.judges(metrics),
        "under_the_hood": [*curves.under_the_hood(metrics), *judging.failures(metrics)],
        "plan": curves.plan_panels(metrics),
        "by_step": curves.by_step(metrics),
    }


def _extent(run: Run, metrics: Sequence[Mapping[str, Any]]) -> str:
    """How far it is: 12 of 100 iterations; 42 iterations, 290k of 300k weighted evaluations."""
    taken = spent(metrics[-1]) if metrics else dict.fromkeys(ENDS, 0.0)
    parts = [f"{count(taken[key])} of {count(end)} {ENDS[key]}" for key, end in run.ends.items()]
    alone = [] if "iterations" in run.ends else [f"{count(taken['iterations'])} iterations"]
    return ", ".join([*alone, *parts])


def _longer(run: Run) -> str:
    """The change that lets a complete run go on for as long again."""
    return " ".join(f"run.{key}={2 * end or 100:g}" for key, end in run.ends.items())


def _has_skills(scores: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether there is more than one score of each model."""
    return any(len(by_skill) > 1 for by_skill in scores.values())


def _is_curve(moved: curves.Drifts) -> bool:
    return any(len(iterations) > 1 for iterations, _ in moved.values())


def _read_recipe(path: Path) -> tuple[Recipe, str, Run]:
    """A run's recipe with its components left unbuilt: a report needs none of the user's code.

    Returns:
        The recipe, its text, and its section `run`.

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


def _latest_state(folder: RunFolder) -> tuple[int, dict[str, Any]]:
    """Iteration and state of the latest checkpoint; empty if there is none."""
    latest = folder.all_checkpoints()[-1:]
    state = read_run_state(latest[0]) if latest else {}
    return state.get("iteration", 0), state
