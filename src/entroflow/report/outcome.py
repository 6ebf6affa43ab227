"""What a run achieved and what it cost: in words, and model beside model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from entroflow.evaluation.base import Measure
from entroflow.report.curves import drifts, held_out_rewards, monitor_name, monitored
from entroflow.report.examples import example_grid
from entroflow.report.figures import Metrics, is_finite, series
from entroflow.report.panels import Panel, bars, drawn
from entroflow.report.rendering import Block, Section, compared, table
from entroflow.runs.folder import RunFolder
from entroflow.settings import Monitors
from entroflow.wording import Interval, count, duration, number

Evaluation = Mapping[str, Any]
"""A comparison of base and tuned weights, as `evaluation.json` has it; empty if there is none."""

SCORE = {"value": "eval/score", "low": "eval/score_low", "high": "eval/score_high"}
LEDGER = {
    "network_evaluations": "network evaluations", "weighted_evaluations": "weighted evaluations",
    "check_evaluations": "evaluations for run-time checks", "reward_calls": "images scored",
    "decodes": "images decoded", "optimizer_steps": "optimizer steps",
    "held_out_network_evaluations": "evaluations for held-out scores",
    "held_out_reward_calls": "images scored for them",
}  # fmt: skip
COUNTED = (
    "One network evaluation is one image once through the network, on any machine; weighted ones "
    "count a forward and backward pass as three. Held-out scores are counted apart."
)


def prompts_of(settings: Mapping[str, Any]) -> str:
    """What an evaluation is on, as in "validation prompts", from its part of a recipe."""
    return f"{settings.get('split', 'held-out')} prompts"


def measure_of(metrics: Metrics, evaluation: Evaluation) -> Measure:
    """What was measured, by the first line of the metrics or the comparison."""
    named = (entry.get("measure") for entry in (*metrics[:1], evaluation))
    measure = dict(next((each for each in named if each), {"name": "score"}))
    names = [each.name for each in fields(Measure)]
    return Measure(**{name: measure[name] for name in names if name in measure})


def headline(
    metrics: Metrics, evaluation: Evaluation, complete: bool, settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The comparison with the base if it was made, else the run's evaluations, if there were any.

    `settings` are those of the evaluation, from the recipe.
    """
    measure = measure_of(metrics, evaluation)
    if {"base", "tuned"} <= evaluation.get("models", {}).keys():
        return _compared(evaluation, measure, complete)
    scored = [entry for entry in metrics if is_finite(entry.get("eval/score"))]
    if not scored:
        return None
    if len(scored) == 1:
        verdict = "Only one evaluation so far: there is nothing to compare it with yet."
    else:
        verdict = f"These are {prompts_of(settings)}, with the same noise at both ends"
        to_come = "split" in settings and not complete
        verdict += "; test prompts are evaluated when the run is complete." if to_come else "."
    scores = []
    for entry in (scored[0], *scored[1:][-1:]):
        score = {end: entry.get(key, entry["eval/score"]) for end, key in SCORE.items()}
        scores.append((f"iteration {entry['iteration']}", Interval.of(score)))
    title = _titled(measure, prompts_of(settings))
    return {"measure": title, "scores": scores, "verdict": verdict, "gain": None}


def _compared(evaluation: Evaluation, measure: Measure, complete: bool) -> dict[str, Any]:
    models, gain = evaluation["models"], Interval.of(evaluation["gain"])
    scores = {name: Interval.of(model["scores"]["overall"]) for name, model in models.items()}
    if gain.low > 0:
        verdict = "A clear gain: the 95% interval of the difference lies above 0."
    elif gain.high < 0:
        verdict = "A clear loss: the 95% interval of the difference lies below 0."
    elif math.isnan(gain.low):
        verdict = "Too few prompts could be scored under both to say what the gain is worth."
    else:
        verdict = "No clear difference: the 95% interval of the difference includes 0."
    verdict += f" Intervals are over {measure.over} of this one run, not over training seeds."
    if guided := _guided(evaluation):
        passes = [models[name]["passes"] for name in ("base_guided", "tuned")]
        verdict += f" With guidance {guided} the base itself reaches {scores['base_guided']} "
        verdict += f"({passes[0]} network passes per step; tuned: {passes[1]})."
    if not complete:
        verdict += " The run has gone on since this comparison; it is made anew at the end."
    both = [(name, scores[name]) for name in ("base", "tuned")]
    title = _titled(measure, prompts_of(evaluation))
    return {"measure": title, "scores": both, "verdict": verdict, "gain": gain}


def _titled(measure: Measure, prompts: str) -> str:
    return f"{measure.name[:1].upper()}{measure.name[1:]} on {prompts}"


def costs(metrics: Metrics, evaluation: Evaluation, state: Mapping[str, Any]) -> list[Block]:
    """The ledger at the latest iteration and of the comparison, and the time of a checkpoint."""
    # Not every line has every count: evaluations are counted where there was one.
    latest = {key: value for entry in metrics for key, value in entry.items()}
    counts = {name: latest.get(f"ledger/{key}") for key, name in LEDGER.items()}
    amounts = [(name, count(each)) for name, each in counts.items() if each is not None]
    also = ""
    if "cost" in evaluation:
        spent = count(evaluation["cost"]["network_evaluations"])
        amounts.append(("evaluations for the comparison with the base", spent))
        also = ", and of the comparison with the base"
    if "seconds" in latest:
        amounts.append(("training time", duration(latest["seconds"])))
    timed = (
        f"Wall time up to the checkpoint of iteration {state.get('iteration', 0)}{also}; the "
        "longest stretch is where more speed would help most."
    )
    stages = _stages(state, evaluation)
    return [
        ("costs", amounts), ("soft", COUNTED if amounts else ""),
        ("part", ("Time by stage", timed) if stages else None), ("stages", stages),
    ]  # fmt: skip


def _stages(state: Mapping[str, Any], evaluation: Evaluation) -> list[tuple[str, str, float]]:
    """Wall time by stage, from a checkpoint's state and the comparison: name, time, percent."""
    timed = state.get("ledger", {}).get("seconds", {})
    scoring = timed.get("score", 0.0)
    seconds = {
        # Rollouts are scored as they finish, so their time includes the scoring.
        "sampling": timed.get("rollout", 0.0) - scoring,
        "scoring": scoring,
        "measuring attention": timed.get("attention", 0.0),
        "updating": timed.get("update", 0.0),
        "evaluating": state.get("evaluation_ledger", {}).get("seconds", {}).get("evaluate", 0.0),
        "comparing": evaluation.get("cost", {}).get("seconds", {}).get("compare", 0.0),
    }
    total = sum(seconds.values())
    return [(name, duration(s), round(100 * s / total, 1)) for name, s in seconds.items() if s > 0]


def skills(
    folder: RunFolder, evaluation: Evaluation, measure: Measure, resolved: Mapping[str, Any]
) -> list[Section]:
    """Scores and images of the models that were compared; nothing if none were."""
    names = _model_names(evaluation)
    if not names:
        return []
    scores = {}
    for model, name in names.items():
        of = evaluation["models"][model]["scores"]
        order = sorted(of, key=lambda skill: skill != "overall")
        scores[name] = {skill.replace("_", " "): Interval.of(of[skill]) for skill in order}
    images = count(evaluation["models"]["base"]["scores"]["overall"]["images"])
    guidance = f", guidance {evaluation['guidance']:g}" if evaluation["guidance"] != 1 else ""
    setting = (
        f"{images} images per model, {evaluation['steps']} steps without noise{guidance}, the same "
        "start for each."
    )
    axis = {"range": [0, 1.02]} if measure.share else {}
    by_skill = drawn(
        [Panel(measure.name.capitalize(), setting, "scores", bars, axis, True)], scores
    )
    examples = example_grid(folder, {f"test_{model}": name for model, name in names.items()})
    also = ("Examples", "The same captions and noise for each model.")
    lead = (
        f"{'Bars are scores' if by_skill else 'Scores'}{_unseen(evaluation, resolved)} with 95% "
        "intervals; two differ clearly where theirs don’t overlap. "
    )
    title = f"Score{' by skill' if by_skill else ''} on {prompts_of(evaluation)}"
    blocks = [
        ("panels", by_skill), ("soft", "" if by_skill else setting), compared("skill", scores),
        ("part", also if examples else None), ("examples", examples),
    ]  # fmt: skip
    return [Section("skills", "Base and tuned", title, lead + _guidance_note(evaluation), blocks)]


def _guided(evaluation: Evaluation) -> str:
    """The base's best guidance scale, or nothing if it is the one of all models."""
    best = evaluation["best_guidance"]
    return f"{best:g}" if best != evaluation["guidance"] else ""


def _guidance_note(evaluation: Evaluation) -> str:
    """Which guidance scale suits the base best."""
    tried = [f"{each['guidance']:g}" for each in evaluation["guidance_tried"]]
    if len(tried) <= 1:
        return ""
    best = f"Guidance {evaluation['best_guidance']:g} suits the base best"
    return f"{best} on validation prompts (tried: {', '.join(tried)})."


def _unseen(evaluation: Evaluation, resolved: Mapping[str, Any]) -> str:
    """Whether the run can have learnt or chosen nothing on the prompts of the comparison."""
    splits = [resolved[section].get("split") for section in ("prompts", "evaluation")]
    types = [resolved[section].get("type") for section in ("prompts", "evaluation")]
    if types != ["shapes", "shapes"] or None in splits or evaluation["split"] in splits:
        return ""
    return " on captions that neither training nor any choice has seen"


def _model_names(evaluation: Evaluation) -> dict[str, str]:
    """Model -> its name for people, in the order they are shown."""
    models = evaluation.get("models", {})
    guided = _guided(evaluation) if "base_guided" in models else ""
    names = {"base": "base", "base_guided": guided and f"base, guidance {guided}", "tuned": "tuned"}
    return {model: name for model, name in names.items() if name and model in models}


def blind_spots(
    metrics: Metrics, evaluation: Evaluation, watching: Monitors, prompts: str, stopped: bool
) -> list[Section]:
    """What the monitors measured; nothing if there were none."""
    values = {key: series(metrics, key)[1] for key in monitored(metrics)}
    rows = [_monitor(key, each[0], each[-1]) for key, each in values.items() if each]
    if not rows:
        return []
    base, tuned = (
        evaluation.get("models", {}).get(name, {}).get("monitors", {}) for name in ("base", "tuned")
    )
    both = [name for name in base if is_finite(base[name]) and is_finite(tuned.get(name))]
    of_both = [_monitor(f"eval/{name}", base[name], tuned[name]) for name in both]
    title = "What the reward can’t see"
    lead = "Nothing trains on these numbers, so a policy that cheats its reward shows here first."
    panels = held_out_rewards(metrics, list(watching.rewards))
    blocks = [
        ("warnings", alarms(metrics, stopped)),
        ("panels", drawn([*panels, drifts(metrics, watching.band, prompts)], metrics)),
        table(["monitor", "first evaluation", "latest", "ratio"], rows),
        ("part", (f"On {prompts_of(evaluation)}", "") if of_both else None),
        table(["monitor", "base", "tuned", "ratio"], of_both),
    ]
    return [Section("blind-spots", title, title, lead, blocks)]


def _monitor(key: str, before: float, after: float) -> Sequence[str]:
    """Name, both values, and their ratio if the first is not 0."""
    ratio = f"× {after / before:.2f}" if before > 0 else "–"
    return monitor_name(key), number(before), number(after), ratio


def alarms(metrics: Metrics, stopped: bool) -> list[str]:
    """What should make a reader doubt the reward: each alarm as last given, and since when."""
    end = max((entry["iteration"] for entry in metrics if "eval/score" in entry), default=0)
    by_name: dict[str, list[tuple[int, str]]] = {}
    for entry in metrics:
        for name, words in entry.get("hacking", {}).items():
            by_name.setdefault(name, []).append((entry["iteration"], words))
    alarms = []
    for given in by_name.values():
        (first, _), (last, words) = given[0], given[-1]
        since = f", since iteration {first}" if first < last else ""
        rises = "The reward rises" if last == end else f"At iteration {last} the reward had risen"
        alarms.append(f"{rises}, but {words}{since}.")
    return [*alarms, f"The run was stopped at iteration {end}."] if stopped else alarms
