"""The comparison: the tuned weights beside the base, also at the base's best guidance scale.

Guidance is the base model's own way to follow a prompt more closely, at twice the cost; a gain that
guidance would have given for free is none. The scale is chosen on validation prompts.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from entroflow.evaluation.base import Evaluated, HeldOutEvaluation, SkillScore
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


def try_guidance(
    policy: Policy,
    evaluation: HeldOutEvaluation,
    *,
    seed: int,
    batch_size: int,
    ledger: Ledger | None = None,
) -> dict[float, SkillScore]:
    """Overall scores by guidance scale, on validation prompts and a quarter of the images.

    Scales are tried upwards, that of the evaluation among them, until the strict score has fallen
    at two in a row.
    """
    quick = {"split": "validation", "images_per_skill": max(1, evaluation.images_per_skill // 4)}
    tried: dict[float, SkillScore] = {}
    for scale in sorted({*GUIDANCE_SCALES, evaluation.guidance}):
        varied = evaluation.model_copy(update={**quick, "guidance": scale})
        found = varied.run(policy, seed=seed, batch_size=batch_size, ledger=ledger)
        tried[scale] = found.scores["overall"]
        strict = [score.strict for score in tried.values()]
        if len(strict) >= 3 and strict[-3] > strict[-2] > strict[-1]:
            break
    return tried


def compare_with_base(
    policy: Policy,
    evaluation: HeldOutEvaluation,
    *,
    seed: int,
    batch_size: int,
    with_tuned: bool = True,
    ledger: Ledger | None = None,
) -> tuple[dict[str, Any], dict[str, Evaluated]]:
    """Evaluate the reference weights (also at their best guidance) and the moving average.

    Args:
        evaluation: judges all of them, each with the same prompts and noise.

    Returns:
        A summary ready for JSON, and the evaluations: `base`, `base_guided` and, unless left out,
        `tuned`.
    """
    with policy.weights("reference"):
        tried = try_guidance(policy, evaluation, seed=seed, batch_size=batch_size, ledger=ledger)
    best = max(tried, key=lambda scale: tried[scale].strict)
    found, models = {}, {}
    for name, weights, scale in (
        ("base", "reference", evaluation.guidance),
        ("base_guided", "reference", best),
        ("tuned", "ema", evaluation.guidance),
    ):
        if name == "tuned" and not with_tuned:
            continue
        varied = evaluation.model_copy(update={"guidance": scale})
        with policy.weights(weights):
            found[name] = varied.run(policy, seed=seed, batch_size=batch_size, ledger=ledger)
        models[name] = {
            "guidance": scale,
            "passes": policy.evaluations(scale),
            **summary_of(found[name]),
        }
    summary: dict[str, Any] = {
        "split": evaluation.split,
        "steps": evaluation.steps,
        "seed": seed,
        "guidance": evaluation.guidance,
        "best_guidance": best,
        "guidance_tried": [{"guidance": scale, **asdict(tried[scale])} for scale in tried],
        "models": models,
    }
    if with_tuned:
        summary["gain"] = _gain(found["base"], found["tuned"])
    return summary, found


def summary_of(evaluated: Evaluated) -> dict[str, Any]:
    """The numbers of an evaluation, without its images, ready for JSON."""
    return {
        "scores": {name: asdict(score) for name, score in evaluated.scores.items()},
        "monitors": dict(evaluated.monitors),
    }


def _gain(base: Evaluated, tuned: Evaluated) -> dict[str, float]:
    """Gain in strict score with a 95% interval, as if the two were independent (wide; MOVER)."""
    before, after = base.scores["overall"], tuned.scores["overall"]
    gain = after.strict - before.strict
    return {
        "strict": gain,
        "low": gain - math.hypot(after.strict - after.low, before.high - before.strict),
        "high": gain + math.hypot(after.high - after.strict, before.strict - before.low),
    }
