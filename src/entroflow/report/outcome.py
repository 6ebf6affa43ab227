"""What a run achieved and what it cost, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from entroflow.evaluation.base import Measure
from entroflow.report.curves import Drifts, monitor_name, monitor_names
from entroflow.report.figures import Metrics, is_finite, series
from entroflow.report.wording import Interval, count, duration, number


@dataclass(frozen=True)
class Headline:
    """The outcome in one line: `measure`: `before` -> `after`, the gain, and what to make of it."""

    measure: str
    before: Interval
    after: Interval | None
    before_name: str
    after_name: str
    gain: Interval | None
    verdict: str


@dataclass(frozen=True)
class Stage:
    """A share of the wall time."""

    name: str
    seconds: str
    percent: float


@dataclass(frozen=True)
class Monitor:
    """A monitor before and after training, and their ratio if the first is not 0."""

    name: str
    before: str
    after: str
    ratio: str

    @classmethod
    def of(cls, key: str, before: float, after: float) -> Monitor:
        """From a metric `eval/...` and its two values."""
        ratio = f"× {after / before:.2f}" if before > 0 else "–"
        return cls(monitor_name(key), number(before), number(after), ratio)


# --- headline -------------------------------------------------------------------------------------


def prompts_of(settings: Mapping[str, Any]) -> str:
    """What an evaluation is on, as in "validation prompts", from its part of a recipe."""
    return f"{settings.get('split', 'held-out')} prompts"


def measure_of(metrics: Metrics, evaluation: Mapping[str, Any]) -> Measure:
    """What was measured, by the first line of the metrics or the comparison."""
    said = [content.get("measure") for content in (*metrics[:1], evaluation)]
    return next((_measure(found) for found in said if found), Measure("score"))


def _measure(said: Mapping[str, Any]) -> Measure:
    return Measure(
        **{field.name: said[field.name] for field in fields(Measure) if field.name in said}
    )


def headline(
    metrics: Metrics, evaluation: Mapping[str, Any], complete: bool, settings: Mapping[str, Any]
) -> Headline | None:
    """The comparison with the base if it was made, else the run's evaluations, if there were any.

    Args:
        settings: of the evaluation, from the recipe.
    """
    models = evaluation.get("models", {})
    if "base" in models and "tuned" in models:
        return _compared(evaluation, measure_of(metrics, evaluation), complete)
    judged = [line for line in metrics if is_finite(line.get("eval/score"))]
    if not judged:
        return None
    first, last = judged[0], judged[-1]
    if len(judged) == 1:
        verdict = "Only one evaluation so far: there is nothing to compare it with yet."
    else:
        verdict = f"These are {prompts_of(settings)}, with the same noise at both ends"
        to_come = "split" in settings and not complete
        verdict += "; test prompts are judged when the run is complete." if to_come else "."
    return Headline(
        measure=_titled(measure_of(metrics, evaluation), prompts_of(settings)),
        before=_score(first),
        after=_score(last) if len(judged) > 1 else None,
        before_name=f"iteration {first['iteration']}",
        after_name=f"iteration {last['iteration']}",
        gain=None,
        verdict=verdict,
    )


def _compared(evaluation: Mapping[str, Any], measure: Measure, complete: bool) -> Headline:
    models = evaluation["models"]
    before, after = (Interval.of(models[name]["scores"]["overall"]) for name in ("base", "tuned"))
    gain = Interval.of(evaluation["gain"])
    if gain.low > 0:
        verdict = "A clear gain: the 95% interval of the difference lies above 0."
    elif gain.high < 0:
        verdict = "A clear loss: the 95% interval of the difference lies below 0."
    elif math.isnan(gain.low):
        verdict = "Too few prompts could be judged under both to say what the gain is worth."
    else:
        verdict = "No clear difference: the 95% interval of the difference includes 0."
    verdict += f" Intervals are over {measure.over} of this one run, not over training seeds."
    guided = guided_name(evaluation)
    if guided:
        score = Interval.of(models["base_guided"]["scores"]["overall"])
        cost = f"{models['base_guided']['passes']} network passes per step"
        verdict += f" With guidance {guided} the base itself reaches {score} ({cost}; "
        verdict += f"tuned: {models['tuned']['passes']})."
    if not complete:
        verdict += (
            " The run has gone on since these scores were taken; they are renewed at its end."
        )
    title = _titled(measure, prompts_of(evaluation))
    return Headline(title, before, after, "base", "tuned", gain, verdict)


def _titled(measure: Measure, prompts: str) -> str:
    return f"{measure.name[:1].upper()}{measure.name[1:]} on {prompts}"


def _score(line: Mapping[str, Any]) -> Interval:
    score = line["eval/score"]
    low, high = (line.get(f"eval/score_{end}", score) for end in ("low", "high"))
    return Interval.of({"value": score, "low": low, "high": high})


# --- cost -----------------------------------------------------------------------------------------


def costs(metrics: Metrics, evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The ledger at the latest iteration and of the comparison: name and amount, where known."""
    # Not every line has every count: evaluations are counted where there was one.
    latest = {key: value for line in metrics for key, value in line.items()}
    named = {
        "network_evaluations": "network evaluations",
        "weighted_evaluations": "weighted evaluations",
        "check_evaluations": "evaluations for run-time checks",
        "reward_calls": "images scored",
        "decodes": "images decoded",
        "optimizer_steps": "optimizer steps",
        "held_out_network_evaluations": "evaluations for held-out scores",
        "held_out_reward_calls": "images scored for them",
    }
    amounts = [
        (name, count(latest[f"ledger/{key}"]))
        for key, name in named.items()
        if f"ledger/{key}" in latest
    ]
    if "cost" in evaluation:
        compared = count(evaluation["cost"]["network_evaluations"])
        amounts.append(("evaluations for the comparison with the base", compared))
    if "seconds" in latest:
        amounts.append(("training time", duration(latest["seconds"])))
    return amounts


def stages(state: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[Stage]:
    """Wall time by stage, from a checkpoint's state and the comparison."""
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
    return [
        Stage(name, duration(spent), round(100 * spent / total, 1))
        for name, spent in seconds.items()
        if spent > 0
    ]


# --- models beside each other ---------------------------------------------------------------------


def guided_name(evaluation: Mapping[str, Any]) -> str:
    """The base's best guidance scale, or nothing if it is the one of all models."""
    best = evaluation["best_guidance"]
    return f"{best:g}" if best != evaluation["guidance"] else ""


def guidance_note(evaluation: Mapping[str, Any]) -> str:
    """Which guidance scale suits the base best, and what it costs."""
    models = evaluation["models"]
    scales = ", ".join(f"{found['guidance']:g}" for found in evaluation["guidance_tried"])
    tried = f"on validation prompts (tried: {scales})"
    if len(evaluation["guidance_tried"]) == 1:
        return ""
    if not guided_name(evaluation):
        return f"No other guidance scale suits the base better {tried}."
    guided, plain = models["base_guided"]["passes"], models["base"]["passes"]
    cost = f"; it takes {guided} network passes per step, the others {plain}"
    best = f"Guidance {guided_name(evaluation)} suits the base best {tried}"
    return f"{best}{cost if guided != plain else ''}."


def is_unseen(evaluation: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether the run can have learnt or chosen nothing on the prompts of the comparison."""
    training, watched = recipe["prompts"], recipe["evaluation"]
    splits = (training.get("split"), watched.get("split"))
    known = training.get("type") == watched.get("type") == "shapes" and None not in splits
    return known and evaluation["split"] not in splits


def model_names(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Model -> its name for people, in the order they are shown."""
    models = evaluation.get("models", {})
    names = {"base": "base"}
    if "base_guided" in models and guided_name(evaluation):
        names["base_guided"] = f"base, guidance {guided_name(evaluation)}"
    names["tuned"] = "tuned"
    return {model: name for model, name in names.items() if model in models}


def setting(evaluation: Mapping[str, Any]) -> str:
    """How the models were compared, in one sentence."""
    images = evaluation["models"]["base"]["scores"]["overall"]["images"]
    guidance = f", guidance {evaluation['guidance']:g}" if evaluation["guidance"] != 1 else ""
    return (
        f"{count(images)} images per model, {evaluation['steps']} steps without noise{guidance}, "
        "the same start for each."
    )


def scores_by_skill(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Interval]]:
    """Name of the model -> skill -> score, `overall` first."""
    scores = {}
    for model, name in model_names(evaluation).items():
        found = evaluation["models"][model]["scores"]
        order = sorted(found, key=lambda skill: skill != "overall")
        scores[name] = {skill: Interval.of(found[skill]) for skill in order}
    return scores


# --- what the reward can't see --------------------------------------------------------------------


def drifts(metrics: Metrics) -> Drifts:
    """How far each statistic has moved, where that is a number at all evaluations."""
    keys = dict.fromkeys(key for line in metrics for key in line if key.startswith("drift/"))
    found = {key: series(metrics, key) for key in keys}
    return {key: curve for key, curve in found.items() if curve[0]}


def monitors(metrics: Metrics) -> list[Monitor]:
    """Each monitor at the first and the latest evaluation."""
    found = {key: series(metrics, key)[1] for key in monitor_names(metrics)}
    return [Monitor.of(key, values[0], values[-1]) for key, values in found.items() if values]


def compared_monitors(evaluation: Mapping[str, Any]) -> list[Monitor]:
    """Each monitor under the base and the tuned weights, if they were compared."""
    models = evaluation.get("models", {})
    if "base" not in models or "tuned" not in models:
        return []
    base, tuned = models["base"]["monitors"], models["tuned"]["monitors"]
    return [
        Monitor.of(f"eval/{name}", base[name], tuned[name])
        for name in base
        if is_finite(base[name]) and is_finite(tuned.get(name))
    ]


def alarms(metrics: Metrics, stopped: bool) -> list[str]:
    """What should make a reader doubt the reward: each alarm as last given, and since when."""
    end = max((line["iteration"] for line in metrics if "eval/score" in line), default=0)
    by_name: dict[str, list[tuple[int, str]]] = {}
    for line in metrics:
        for name, words in line.get("hacking", {}).items():
            by_name.setdefault(name, []).append((line["iteration"], words))
    found = []
    for given in by_name.values():
        (first, _), (last, words) = given[0], given[-1]
        since = f", since iteration {first}" if first < last else ""
        rises = "The reward rises" if last == end else f"At iteration {last} the reward had risen"
        found.append(f"{rises}, but {words}{since}.")
    if stopped:
        found.append(f"The run was stopped at iteration {end}.")
    return found
