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
from entroflow.contents import (
    RunError,
    checked,
    read_object,
    read_text,
)
from entroflow.errors import InputError
from entroflow.recipe.identity import language_model_identity
from entroflow.recipe.kinds import RECIPE
from entroflow.recipe.text import parse_yaml
from entroflow.report.figures import (
    BLUE,
    BLUE_BAND,
    GRAY,
    ORANGE,
    PURPLE,
    TEAL,
    Metrics,
    Panel,
    figure_of,
    has_a_line,
    series,
    trace_of,
    trace_style,
)
from entroflow.report.rendering import rendered
from entroflow.report.thinning import thinned_metrics, thinning
from entroflow.report.wording import Interval
from entroflow.runs.files import METRICS
from entroflow.runs.folder import EVALUATION, REPORT, RunFolder
from entroflow.runs.llm_files import LLMRecipeText, PassingComparison, logged_at, read_progress
from entroflow.writing import write_text

log = logging.getLogger(__name__)

TEMPLATE = "llm.html.j2"
UPDATES = {"title": {"text": "update"}}
MOST_ANSWERS = 4
"""Different answers of a model to a problem that are shown."""


def write_llm_report(folder: RunFolder) -> Path:
    """Write `report.html` from what the run folder has; an older one is replaced.

    Returns:
        Its path.
    """
    write_text(folder.path / REPORT, rendered(TEMPLATE, _content(folder)))
    return folder.path / REPORT


def _content(folder: RunFolder) -> dict[str, Any]:
    text = read_text(folder.path / RECIPE)
    try:
        recipe = checked(parse_yaml(text, RECIPE), LLMRecipeText)
    except ValueError as reason:
        raise RunError(
            f"{folder.path / RECIPE} is torn ({reason}); restore it from a copy."
        ) from None
    metrics = thinned_metrics(folder)
    if gap := folder.gap(metrics):
        log.warning("%s %s; the report shows the others.", folder.path / METRICS, gap)
    path = folder.path / EVALUATION
    evaluation = read_object(path, PassingComparison) if path.exists() else {}
    _warn_of_other_runs(folder, language_model_identity(recipe), metrics, evaluation)
    done = metrics[-1]["iteration"] if metrics else 0
    panels = [
        _right(metrics), _entropy(metrics), _reward(metrics), _left_out(metrics),
        _change(metrics), _centred(metrics), _length(metrics), _gradient(metrics),
    ]  # fmt: skip
    return {
        "recipe": {"title": recipe.get("title", ""), "name": recipe.get("name", "recipe")},
        "paper": recipe.get("paper", ""),
        "notes": recipe.get("notes", ""),
        "model": recipe["model"]["path"],
        "clip": {"none": "none", "b": "Clip_B", "v": "Clip_V"}[recipe["clip"]["type"]],
        "seed": recipe["run"]["seed"],
        "done": done,
        "thinning": thinning(metrics),
        "updates": recipe["run"]["updates"],
        "panels": [panel for panel in panels if panel is not None],
        "outcome": outcome(evaluation),
        "problems": evaluation.get("problems", 0),
        "by_k": _by_k(evaluation),
        "answers": _answers(evaluation),
        "recipe_yaml": text,
        "run_path": shlex.quote(str(folder.path)),
    }


def _warn_of_other_runs(
    folder: RunFolder,
    identity: str,
    metrics: Metrics,
    evaluation: Mapping[str, Any],
) -> None:
    """Warn where recipe, metrics, evaluation and the latest checkpoint are not of one run.

    Args:
        identity: of the recipe.
    """
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
        for line in metrics:
            same = all(line.get(key, value) == value for key, value in logged.items())
            if line["iteration"] == int(checkpoint.name) and not same:
                log.warning("%s is not of the run of %s.", folder.path / METRICS, checkpoint)


def outcome(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Of every number that both models have: its name, base, tuned and gain."""
    found = []
    for name, base in evaluation.get("base", {}).items():
        gain = evaluation["gain"].get(name)
        both = [str(_interval(values)) for values in (base, evaluation["tuned"][name])]
        found.append((name, *both, _interval(gain).signed if gain else ""))
    return found


def _answers(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every problem shown: each model's different answers, the most frequent first."""
    found = []
    for row in evaluation.get("answers", []):
        said = []
        for model in ("base", "tuned"):
            times = Counter((answer, right) for answer, right in row[model])
            said += [(model, a, n, right) for (a, right), n in times.most_common(MOST_ANSWERS)]
        found.append({"prompt": row["prompt"], "said": said})
    return found


def _interval(values: list[float | None]) -> Interval:
    return Interval.of(dict(zip(("value", "low", "high"), values, strict=True)))


def _right(metrics: Metrics) -> Panel | None:
    """Avg@n and Pass@n with the interval of the first."""
    if not metrics:
        return None
    averages = [key for key in metrics[0] if key.startswith("eval/avg@")]
    average = next((key for key in averages if not key.endswith(("_low", "_high"))), None)
    if average is None:
        return None
    last = f"eval/pass@{average.partition('@')[2]}"
    x, high = series(metrics, f"{average}_high")
    _, low = series(metrics, f"{average}_low")
    band = {
        "x": [*x, *reversed(x)], "y": [*high, *reversed(low)], "fill": "toself", "mode": "none",
        "fillcolor": BLUE_BAND, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    traces = [
        band,
        trace_of(metrics, average, average.removeprefix("eval/").capitalize(), BLUE),
        trace_of(metrics, last, last.removeprefix("eval/").capitalize(), TEAL),
    ]
    return Panel(
        "How often it is right",
        "On held-out problems: the share of right answers, and of problems that one of all answers "
        "solves. Where the first rises and the second falls, the policy has lost ways to be right.",
        figure_of(traces, height=300, xaxis=UPDATES, yaxis={"range": [0, 1.02]}),
        wide=True,
    )


def _by_k(evaluation: Mapping[str, Any]) -> Panel | None:
    """Pass@k of both models."""
    if not evaluation:
        return None
    traces = []
    for name, color in (("base", GRAY), ("tuned", BLUE)):
        points = [
            (int(key.partition("@")[2]), values[0])
            for key, values in evaluation[name].items() if key.startswith("pass@")
        ]  # fmt: skip
        x, y = zip(*sorted(points), strict=True)
        traces.append({"x": list(x), "y": list(y), **trace_style(name, color, len(x))})
    return Panel(
        "Pass@k",
        "Whether one of k answers is right. What control of entropy is for shows on the right.",
        figure_of(
            traces, xaxis={"title": {"text": "k"}, "type": "log", "tickvals": traces[0]["x"]},
            yaxis={"range": [0, 1.02]},
        ),
    )  # fmt: skip


def _line(
    metrics: Metrics, title: str, reading: str, named: Mapping[str, tuple[str, str]]
) -> Panel | None:
    """A panel of some keys: key -> name and colour."""
    traces = [trace_of(metrics, key, name, color) for key, (name, color) in named.items()]
    traces = [trace for trace in traces if trace["x"]]
    figure = figure_of(traces, xaxis=UPDATES)
    return Panel(title, reading, figure) if has_a_line(traces) else None


def _entropy(metrics: Metrics) -> Panel | None:
    return _line(
        metrics, "Entropy",
        "Of the next token, in nats, over the tokens of an update. Near 0 nothing new is tried.",
        {"token_entropy": ("entropy", BLUE)},
    )  # fmt: skip


def _reward(metrics: Metrics) -> Panel | None:
    return _line(metrics, "Reward", "Mean over the answers of an update.",
                 {"reward": ("reward", BLUE)})  # fmt: skip


def _left_out(metrics: Metrics) -> Panel | None:
    keys = {
        "entropy_clip/share": ("of all", BLUE),
        "entropy_clip/penalised": ("of penalised", ORANGE),
    }
    return _line(
        metrics, "Tokens left out", "Share of an update's tokens that it did not see.", keys
    )


def _centred(metrics: Metrics) -> Panel | None:
    return _line(
        metrics, "Mean of S − S̄",
        "Over sampled tokens 0 in expectation (corollary 3.5). A value that stays on one side says "
        "that tokens were not sampled from the policy whose entropy is computed.",
        {"discriminator/centred": ("mean", PURPLE)},
    )  # fmt: skip


def _length(metrics: Metrics) -> Panel | None:
    return _line(metrics, "Length", "Tokens of an answer, mean.",
                 {"completions/mean_length": ("tokens", BLUE)})  # fmt: skip


def _gradient(metrics: Metrics) -> Panel | None:
    return _line(metrics, "Gradient norm", "Before it is limited.",
                 {"grad_norm": ("norm", BLUE)})  # fmt: skip


def change_correlation(metrics: Metrics) -> tuple[int, float | None]:
    """Number of updates with both changes of entropy, and their rank correlation; None if none."""
    pairs = _changes(metrics)
    if len(pairs) < 3 or any(len(set(side)) == 1 for side in zip(*pairs, strict=True)):
        return len(pairs), None
    predicted, measured = zip(*pairs, strict=True)
    return len(pairs), float(stats.spearmanr(list(predicted), list(measured)).statistic)


def _changes(metrics: Metrics) -> list[tuple[float, float]]:
    keys = ("entropy_change/predicted", "entropy_change/measured")
    found = [tuple(line.get(key) for key in keys) for line in metrics]
    return [pair for pair in found if None not in pair]  # type: ignore[misc]


def _change(metrics: Metrics) -> Panel | None:
    pairs = _changes(metrics)
    if len(pairs) < 3:
        return None
    updates, correlation = change_correlation(metrics)
    said = (
        ""
        if correlation is None
        else f" Rank correlation over {updates} updates: {correlation:+.2f}."
    )
    x, y = zip(*pairs, strict=True)
    trace = {
        "x": list(x), "y": list(y), "mode": "markers",
        "marker": {"color": BLUE, "size": 5, "opacity": 0.6},
        "hovertemplate": "predicted %{x:.3~g}, measured %{y:.3~g}<extra></extra>",
    }  # fmt: skip
    return Panel(
        "Did entropy go where it should?",
        "Every dot is an update: the change of its tokens' entropy that the first order predicts "
        f"of a unit step on the logits, and what came. A shared network adds its own.{said}",
        figure_of(
            [trace], xaxis={"title": {"text": "predicted"}},
            yaxis={"title": {"text": "measured, in nats"}},
        ),
    )  # fmt: skip
