"""The comparison: the tuned weights beside the base, also at the base's best guidance scale.

Guidance is the base model's own way to follow a prompt more closely, at twice the cost; a gain that
guidance would have given for free is none. The scale is chosen on validation prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from entroflow.evaluation.base import (
    Evaluated,
    HeldOutEvaluation,
    Score,
    mean_over_prompts,
)
from entroflow.evaluation.reward import RewardEvaluation
from entroflow.evaluation.watching import watched
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.rewards.combined import Rewards
from entroflow.rewards.parts import Part


def try_guidance(
    policy: Policy,
    evaluation: HeldOutEvaluation,
    *,
    seed: int,
    batch_size: int,
    reward: Rewards | None = None,
    ledger: Ledger | None = None,
) -> dict[float, Score]:
    """Overall scores by guidance scale, on validation prompts and a quarter of the images.

    Scales are tried upwards, that of the evaluation among them, until the score has fallen at two
    in a row.
    """
    quick = {"split": "validation", "images": max(1, evaluation.images // 4)}
    tried: dict[float, Score] = {}
    for scale in sorted({*evaluation.guidance_tried, evaluation.guidance}):
        varied = evaluation.model_copy(update={**quick, "guidance": scale})
        found = varied.run(policy, seed=seed, batch_size=batch_size, reward=reward, ledger=ledger)
        tried[scale] = found.scores["overall"]
        scores = [score.value for score in tried.values()]
        if len(scores) >= 3 and scores[-3] > scores[-2] > scores[-1]:
            break
    return tried


def compare_with_base(
    policy: Policy,
    evaluation: HeldOutEvaluation,
    *,
    seed: int,
    batch_size: int,
    reward: Rewards | None = None,
    monitors: Mapping[str, Part] | None = None,
    with_tuned: bool = True,
    ledger: Ledger | None = None,
) -> tuple[dict[str, Any], dict[str, Evaluated]]:
    """Evaluate the reference weights (also at their best guidance) and the moving average.

    Args:
        evaluation: judges all of them, each with the same prompts and noise.
        monitors: rewards that nothing trains on, by name.

    Returns:
        A summary ready for JSON, and the evaluations: `base`, `base_guided` and, unless left out,
        `tuned`.
    """
    only_compares = reward is not None and not reward.pointwise
    if only_compares and isinstance(evaluation, RewardEvaluation):
        # Its score is a win rate over what the base draws at one scale.
        evaluation = evaluation.model_copy(update={"guidance_tried": ()})
    with policy.weights("reference"):
        tried = try_guidance(
            policy, evaluation, seed=seed, batch_size=batch_size, reward=reward, ledger=ledger
        )
    # A score that is no number compares with none: such a scale is never the best.
    known = {scale: score.value for scale, score in tried.items() if not math.isnan(score.value)}
    best = max(known, key=lambda scale: known[scale], default=evaluation.guidance)
    found: dict[str, Evaluated] = {}
    models = {}
    for name, weights, scale in (
        ("base", "reference", evaluation.guidance),
        ("base_guided", "reference", best),
        ("tuned", "ema", evaluation.guidance),
    ):
        if name == "tuned" and not with_tuned:
            continue
        varied = evaluation.model_copy(update={"guidance": scale})
        if name == "base_guided" and scale == evaluation.guidance:
            found[name] = found["base"]
        else:
            with policy.weights(weights):
                drawn = varied.run(
                    policy, seed=seed, batch_size=batch_size, reward=reward, ledger=ledger
                )
            base = found["base"].drawn if found else drawn.drawn
            found[name] = watched(
                evaluation, drawn, reward, monitors or {}, base,
                seed=seed, batch_size=batch_size, ledger=ledger,
            )  # fmt: skip
        models[name] = {
            "guidance": scale,
            "passes": policy.evaluations(scale),
            **summary_of(found[name]),
        }
    summary: dict[str, Any] = {
        "measure": asdict(evaluation.measure),
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
        "reward": evaluated.reward,
        "monitors": evaluated.monitor_means(),
        "win_rates": {
            name: dict(zip(("value", "low", "high"), mean_over_prompts(points), strict=True))
            for name, points in evaluated.win_rates.items()
        },
    }


def _gain(base: Evaluated, tuned: Evaluated) -> dict[str, float]:
    """Gain in score with a 95% interval.

    By a paired t-test over prompts where both say the score of each; else as if the two evaluations
    were independent, which is wide (MOVER).
    """
    if base.by_prompt is not None and tuned.by_prompt is not None:
        gain, low, high = mean_over_prompts(tuned.by_prompt - base.by_prompt)
        return {"value": gain, "low": low, "high": high}
    before, after = base.scores["overall"], tuned.scores["overall"]
    gain = after.value - before.value
    return {
        "value": gain,
        "low": gain - math.hypot(after.value - after.low, before.high - before.value),
        "high": gain + math.hypot(after.high - after.value, before.value - before.low),
    }
