"""The HTML report of a language model's run: entropy, and what became of it."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy import stats

from entroflow.checkpoints import PROGRESS
from entroflow.contents import RunError, checked, read_object, read_text
from entroflow.errors import InputError
from entroflow.recipe.identity import language_model_identity
from entroflow.recipe.kinds import RECIPE
from entroflow.recipe.text import parse_yaml
from entroflow.report.figures import BLUE, TEAL, Metrics, is_finite
from entroflow.report.panels import NOTHING, Drawing, Panel, bars, drawn, lines, scatter
from entroflow.report.rendering import Section, compared, table, write_page
from entroflow.report.thinning import thinned_metrics, thinning
from entroflow.runs.files import METRICS
from entroflow.runs.folder import EVALUATION, RunFolder
from entroflow.runs.llm_files import LLMRecipeText, PassingComparison, logged_at, read_progress
from entroflow.wording import Interval

log = logging.getLogger(__name__)

CLIPS = {"none": "none", "b": "Clip_B", "v": "Clip_V"}
MOST_ANSWERS = 4
"""Different answers of a model to a problem that are shown."""


def write_llm_report(folder: RunFolder) -> Path:
    """Write `report.html` from what the run folder has, and return its path."""
    text = read_text(folder.path / RECIPE)
    try:
        made_by = checked(parse_yaml(text, RECIPE), LLMRecipeText)
    except ValueError as reason:
        torn = f"{folder.path / RECIPE} is torn ({reason}); restore it from a copy."
        raise RunError(torn) from None
    metrics, path = thinned_metrics(folder), folder.path / EVALUATION
    evaluation = read_object(path, PassingComparison) if path.exists() else {}
    _warn_of_other_runs(folder, language_model_identity(made_by), metrics, evaluation)
    done = metrics[-1]["iteration"] if metrics else 0
    name, seed = made_by.get("name", "recipe"), made_by["run"]["seed"]
    at = shlex.quote(str(folder.path))
    commands = [
        ("Run it again with another seed:",
         f"entroflow llm train {at}/recipe.yaml run.seed={seed + 1}"),
        ("Evaluate the tuned model with more answers:", f"entroflow llm evaluate {at} --each 64"),
    ]  # fmt: skip
    panels = drawn([*_right(metrics), *PANELS], metrics)
    words = thinning(metrics) if panels else "There is nothing to plot yet."
    curves, last = [("soft", words), ("panels", panels)], [("recipe", text), ("commands", commands)]
    sections = [
        *_outcome(evaluation),
        Section("curves", "Curves", "Over the training", "", curves),
        *_answers(evaluation),
        Section("recipe", "Recipe", "Recipe and commands", "", last),
    ]
    run = [
        ("recipe", name), ("paper", made_by.get("paper", "")), ("model", made_by["model"]["path"]),
        ("entropy control", CLIPS[made_by["clip"]["type"]]), ("seed", seed),
        ("", f"{done} of {made_by['run']['updates']} updates"),
    ]  # fmt: skip
    head = {"title": made_by.get("title") or name, "notes": made_by.get("notes", ""), "run": run}
    return write_page(folder, sections, kind="report of a language model's run", **head)


def _warn_of_other_runs(
    folder: RunFolder, identity: str, metrics: Metrics, evaluation: Mapping[str, Any]
) -> None:
    """Warn where the recipe's identity, metrics, evaluation and checkpoint are not of one run."""
    if evaluation and evaluation.get("recipe") not in (None, identity):
        log.warning("the recipe was changed since %s was made by it.", folder.path / EVALUATION)
    for checkpoint in folder.all_checkpoints()[-1:]:
        # Of shards there is the model alone.
        if not (checkpoint / PROGRESS).is_file():
            continue
        try:
            maker, logged = read_progress(checkpoint).get("recipe"), logged_at(checkpoint)
        except InputError as error:
            log.warning("%s", str(error))
            continue
        if maker not in (None, identity):
            log.warning("the recipe was changed since %s was made by it.", checkpoint)
        for entry in metrics:
            same = all(entry.get(key, value) == value for key, value in logged.items())
            if entry["iteration"] == int(checkpoint.name) and not same:
                log.warning("%s is not of the run of %s.", folder.path / METRICS, checkpoint)


def _outcome(evaluation: Mapping[str, Any]) -> list[Section]:
    """Every number of both models, and what was gained."""
    if not evaluation:
        return []
    ends = ("value", "low", "high")
    scores = {
        model: {name.capitalize(): Interval.of(dict(zip(ends, values, strict=True)))
                for name, values in evaluation[model].items()}
        for model in ("base", "tuned", "gain")
    }  # fmt: skip
    gains = {name: gain.signed for name, gain in scores.pop("gain").items()}
    title = f"Base and tuned model on {evaluation['problems']} test problems"
    lead = (
        "Avg@k is the share of right answers, Pass@k the probability that one of k is right. "
        "Brackets hold 95% intervals over problems; gains are paired by problem."
    )
    blocks = [("panels", drawn([BASE_AND_TUNED], scores)),
              compared("measure", {**scores, "gain": gains})]  # fmt: skip
    return [Section("outcome", "Base and tuned", title, lead, blocks)]


BASE_AND_TUNED = Panel(
    "Avg@k and Pass@k",
    "What control of entropy is for shows on the right, where one answer of many is enough.",
    "scores", bars, {"range": [0, 1.02]}, True,
)  # fmt: skip


def _answers(evaluation: Mapping[str, Any]) -> list[Section]:
    """Of every problem shown: each model's different answers, the most frequent first."""
    blocks = []
    for row in evaluation.get("answers", []):
        rows = []
        for model in ("base", "tuned"):
            times = Counter((answer, right) for answer, right in row[model])
            rows += [
                (model, answer, n, "yes" if right else "no")
                for (answer, right), n in times.most_common(MOST_ANSWERS)
            ]
        prompt = row["prompt"]
        words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        blocks += [("part", (words, "")), table(["model", "answer", "times", "right"], rows)]
    lead = "The most frequent answers of each model, how often they came, and if they are right."
    return [Section("answers", "Answers", "Some answers to test problems", lead, blocks)]


UPDATE = {"per": "update", "axis": {}}


def _right(metrics: Metrics) -> list[Panel]:
    """Avg@n with its interval, and Pass@n."""
    prefix = "eval/avg@"
    keys = [key.removeprefix(prefix) for key in (metrics or [{}])[0] if key.startswith(prefix)]
    options = {"per": "update", "band": True, "curve": True, "height": 300,
               "axis": {"range": [0, 1.02]}, "colors": (BLUE, TEAL)}  # fmt: skip
    return [
        Panel("How often it is right",
              "On held-out problems: the share of right answers, and of problems that one of all "
              "answers solves. Where the first rises and the second falls, the policy has lost "
              "ways to be right.",
              {f"{prefix}{n}": f"Avg@{n}", f"eval/pass@{n}": f"Pass@{n}"}, lines, options, True)
        for n in keys if n.isdecimal()
    ]  # fmt: skip


def change_correlation(metrics: Metrics) -> tuple[int, float | None]:
    """Number of updates with both changes of entropy, and their rank correlation; None if none."""
    predicted, measured = _changes(metrics)
    if len(predicted) < 3 or len({*predicted}) == 1 or len({*measured}) == 1:
        return len(predicted), None
    return len(predicted), float(stats.spearmanr(predicted, measured).statistic)


def _changes(metrics: Metrics) -> tuple[list[float], list[float]]:
    """Of the updates that have both: predicted changes of entropy, and measured ones."""
    keys = list(CHANGES.names)
    whole = [entry for entry in metrics if all(is_finite(entry.get(key)) for key in keys)]
    return [entry[keys[0]] for entry in whole], [entry[keys[1]] for entry in whole]


def _change(metrics: Metrics, panel: Panel) -> Drawing:
    updates, correlation = change_correlation(metrics)
    if updates < 3:
        return NOTHING
    figure = scatter({"updates": _changes(metrics)}, panel)
    finding = f"Rank correlation over {updates} updates: {correlation or 0.0:+.2f}."
    return figure, "" if correlation is None else finding.replace("-", "−")


CHANGES = Panel(
    "Did entropy go where it should?",
    "Every dot is an update: the change of its tokens' entropy that the first order predicts of a "
    "unit step on the logits, and what came. A shared network adds its own.",
    {"entropy_change/predicted": "predicted", "entropy_change/measured": "measured, in nats"},
    _change, {"axes": ("predicted", "measured, in nats"), "colors": (BLUE,),
              "hover": "predicted %{x:.3~g}, measured %{y:.3~g}"},
)  # fmt: skip

PANELS = (
    Panel("Entropy",
          "Of the next token, in nats, over the tokens of an update. Near 0 nothing new is tried.",
          "token_entropy", lines, UPDATE),
    Panel("Reward",
          "Mean over the answers of an update. If it rises while held-out problems are not solved "
          "more often, the policy learns the training problems by heart.",
          "reward", lines, UPDATE),
    Panel("Tokens left out", "Share of an update's tokens that it did not see.",
          {"entropy_clip/share": "of all", "entropy_clip/penalised": "of penalised"}, lines,
          UPDATE),
    CHANGES,
    Panel("Mean of S − S̄",
          "Over sampled tokens 0 in expectation (corollary 3.5). A value that stays on one side "
          "says that tokens were not sampled from the policy whose entropy is computed.",
          "discriminator/centred", lines, UPDATE),
)  # fmt: skip
