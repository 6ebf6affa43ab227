"""What is written down of an iteration and of an evaluation: the lines of `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from entroflow.credit.normalise import is_tied
from entroflow.credit.trace import Trace, trace_metrics
from entroflow.evaluation.base import Evaluated
from entroflow.objectives.update import UpdateStatistics, means_by_step
from entroflow.rewards.base import Scores, failures
from entroflow.rewards.combined import Rewards
from entroflow.sampling.plan import Plan, Role
from entroflow.sampling.rollouts import Rollouts
from entroflow.training.attention_metrics import attention_metrics

Metrics = dict[str, Any]


def iteration_metrics(
    reward: Rewards,
    rollouts: Rollouts,
    scores: Mapping[str, Scores],
    advantages: Tensor,
    statistics: UpdateStatistics,
    trace: Trace | None,
) -> Metrics:
    """What an iteration did, without what it took."""
    terms, summed = statistics.terms, reward.total(scores)
    credit = {"by_step": {}} if trace is None else trace_metrics(trace)
    by_step = {
        name: {str(step): value for step, value in values.items()}
        for name, values in {
            "advantage_size": advantage_sizes(rollouts.plan, advantages),
            **statistics.by_step,
        }.items()
    }
    return {
        **_reward_metrics(reward, rollouts.plan, scores),
        "policy/loss": terms.get("loss"),
        "policy/clip_fraction": terms.get("clipped"),
        **{f"policy/{name}": value for name, value in statistics.diagnostics.items()},
        "policy/gradient_norm": _mean(statistics.gradient_norm),
        "policy/skipped": statistics.skipped,
        **credit,
        **attention_metrics(rollouts, summed, relative=bool(reward.comparing)),
        "by_step": by_step | credit["by_step"],
    }


def _reward_metrics(reward: Rewards, plan: Plan, scores: Mapping[str, Scores]) -> Metrics:
    """Of the total, and of each part with a name; and what they say of their own judging."""
    metrics = reward_metrics(plan, reward.total(scores), "reward")
    for name, found in scores.items():
        if name in reward.names:
            metrics |= reward_metrics(plan, found, f"reward/{name}")
        metrics |= {f"judge/{name}/{fact}": value for fact, value in found.facts.items()}
    return metrics


def advantage_sizes(plan: Plan, advantages: Tensor) -> dict[int, float]:
    """Mean |advantage| of the trained steps, by base-grid step; without those that failed.

    Those of a zero-variance group count: that is no signal, not a missing one.
    """
    trained = plan.trained & (plan.role == Role.ROLLOUT)[:, None] & ~advantages.isnan()
    return means_by_step(advantages[trained].abs(), plan.points[:, :-1][trained])


def rated_rollouts(plan: Plan) -> Tensor:
    """[rows] bool: the rollouts that are scored, without anchors and completions."""
    return plan.scored & (plan.role == Role.ROLLOUT)


def reward_metrics(plan: Plan, scores: Scores, prefix: str) -> Metrics:
    """Mean, spread within groups, failures and ties of a reward; None where nothing has one."""
    rated = rated_rollouts(plan)
    values, group = scores.values[rated], plan.group[rated]
    valid = ~values.isnan()
    groups = [values[(group == g) & valid] for g in group.unique()]
    spread = [g.std(correction=0).item() for g in groups if len(g)]
    return {
        f"{prefix}/mean": values[valid].mean().item() if valid.any() else None,
        f"{prefix}/std": _mean(spread),
        f"{prefix}/failed": int(scores.values[plan.scored].isnan().sum()),
        f"{prefix}/tied_groups": sum(is_tied(g) for g in groups if len(g) > 1),
        **{f"{prefix}/failed/{kind}": n for kind, n in failures(scores.statuses).items()},
    }


def evaluation_metrics(found: Evaluated) -> Metrics:
    """An evaluation as keys of `metrics.jsonl`."""
    overall = found.scores["overall"]
    by_skill = {f"eval/score/{k}": s.value for k, s in found.scores.items() if k != "overall"}
    alone = len(found.win_rates) == 1
    wins = {
        "eval/win_rate" if alone else f"eval/win_rate/{name}": values.nanmean().item()
        for name, values in found.win_rates.items()
    }
    return {
        "eval/score": overall.value,
        "eval/score_low": overall.low,
        "eval/score_high": overall.high,
        **by_skill,
        "eval/reward": found.reward,
        **wins,
        **{f"eval/{name}": value for name, value in found.monitor_means().items()},
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
