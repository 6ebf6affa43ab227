"""What the metrics say of attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from entroflow.attention.probe import (
    SHIFT,
    entropy_by_step,
)
from entroflow.rewards.base import Scores
from entroflow.sampling.plan import Plan, Role
from entroflow.sampling.rollouts import Rollouts


def attention_metrics(
    rollouts: Rollouts, scores: Scores, *, relative: bool = False
) -> dict[str, Any]:
    """Of an iteration that measured attention, ready for JSON; else nothing.

    Args:
        relative: whether a reward compares an image with the others of its group.

    Returns:
        `attention/shift`: the median over prompts; `attention/rank_correlation`: of that shift and
        the spread of rewards, as AEGPO takes the one for a sign of the other; None where it is
        undefined. `attention`: `entropy`, [T], None where it was not measured; `explored`, the
        steps that were stochastic; and of every `prompt` the `shift`, its number of rollouts as
        `size`, and the `spread` of their rewards, see `reward_spread`.
    """
    plan, shift = rollouts.plan, rollouts.prompt_measurements.get(SHIFT)
    if shift is None:
        return {}
    rollout = plan.role == Role.ROLLOUT
    spread = reward_spread(plan, scores, relative=relative)
    random = (plan.std > 0) & rollout[:, None]
    known = ~(shift.isnan() | spread.isnan())
    (median,) = _for_json(shift.nanmedian()[None])
    return {
        "attention/shift": median,
        "attention/rank_correlation": rank_correlation(shift[known], spread[known]),
        "attention": {
            "prompt": plan.texts,
            "entropy": _for_json(entropy_by_step(rollouts)),
            "explored": plan.points[:, :-1][random].unique().tolist(),
            "shift": _for_json(shift),
            "size": torch.bincount(plan.prompt[rollout], minlength=len(plan.prompts)).tolist(),
            "spread": _for_json(spread),
        },
    }


def reward_spread(plan: Plan, scores: Scores, *, relative: bool) -> Tensor:
    """[P] standard deviation of the rewards within the groups of a prompt, their mean.

    That of a large group is larger in expectation. So of all groups as many members count as the
    smallest has, or the size that a prompt was given would show as its spread.

    Args:
        relative: whether a reward compares an image with the others of its group. Its values depend
            on the size, too: where groups differ in it, all are NaN.
    """
    rollout = plan.role == Role.ROLLOUT
    spread = torch.full((len(plan.prompts),), torch.nan, dtype=torch.float64)
    sizes = plan.group[rollout].unique(return_counts=True)[1]
    if not len(sizes) or (relative and (sizes != sizes[0]).any()):
        return spread
    rated = rollout & plan.scored & ~scores.values.isnan() & (plan.member < sizes.min())
    for prompt in range(len(plan.prompts)):
        mine = rated & (plan.prompt == prompt)
        groups = [scores.values[mine & (plan.group == g)] for g in plan.group[mine].unique()]
        if groups:
            spread[prompt] = torch.stack([g.double().std(correction=0) for g in groups]).mean()
    return spread


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's; None where one of them is the same everywhere."""
    if len(one) < 2 or any(bool((v == v[0]).all()) for v in (one, other)):
        return None
    return float(stats.spearmanr(one.numpy(), other.numpy()).statistic)


def _for_json(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
