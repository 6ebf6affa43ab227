"""The final comparison: the tuned weights beside the base, also at the base's best guidance scale.

Guidance is the base model's own way to follow a prompt more closely, at twice the cost; a gain that
guidance would have given for free is none. The scale is chosen on validation prompts.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from entroflow.evaluation.base import Evaluated
from entroflow.evaluation.shapes import ShapesEvaluation
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.shapes.grammar import Split

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)


def best_guidance(
    policy: Policy, *, seed: int, batch_size: int, steps: int, images_per_skill: int
) -> tuple[float, dict[float, float]]:
    """The guidance scale with the best strict score on validation prompts, and all of them."""
    strict = {}
    for guidance in GUIDANCE_SCALES:
        evaluation = ShapesEvaluation(
            steps=steps, guidance=guidance, images_per_skill=images_per_skill
        )
        found = evaluation.run(policy, seed=seed, batch_size=batch_size)
        strict[guidance] = found.scores["overall"].strict
    return max(strict, key=lambda scale: strict[scale]), strict


def compare_with_base(
    policy: Policy,
    *,
    seed: int,
    batch_size: int,
    split: Split = "test",
    steps: int = 10,
    guidance: float = 1.0,
    images_per_skill: int = 96,
    with_tuned: bool = True,
    ledger: Ledger | None = None,
) -> tuple[dict[str, Any], dict[str, Evaluated]]:
    """Evaluate the reference weights (also at their best guidance) and the moving average.

    Returns:
        A summary ready for JSON, and the evaluations: `base`, `base_guided` and, unless left out,
        `tuned`.
    """
    with policy.weights("reference"):
        best, _ = best_guidance(
            policy,
            seed=seed,
            batch_size=batch_size,
            steps=steps,
            images_per_skill=max(1, images_per_skill // 4),
        )
    found = {}
    for name, weights, scale in (
        ("base", "reference", guidance),
        ("base_guided", "reference", best),
        ("tuned", "ema", guidance),
    ):
        if name == "tuned" and not with_tuned:
            continue
        evaluation = ShapesEvaluation(
            split=split, steps=steps, guidance=scale, images_per_skill=images_per_skill
        )
        with policy.weights(weights):
            found[name] = evaluation.run(policy, seed=seed, batch_size=batch_size, ledger=ledger)
    summary: dict[str, Any] = {
        "split": split,
        "steps": steps,
        "seed": seed,
        "guidance": guidance,
        "best_guidance": best,
        "models": {name: summary_of(evaluated) for name, evaluated in found.items()},
    }
    if with_tuned:
        summary["gain"] = _gain(found["base"], found["tuned"])
    return summary, found


def summary_of(evaluated: Evaluated) -> dict[str, Any]:
    """The numbers of an evaluation, without its images, ready for JSON."""
    return {
        "scores": {name: asdict(score) for name, score in evaluated.scores.items()},
        "diversity": evaluated.diversity,
        "texture": evaluated.texture,
        "contrast": evaluated.contrast,
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
