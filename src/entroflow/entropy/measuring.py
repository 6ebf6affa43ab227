"""What a run measures of attention, what it remembers of it, and what it says about it."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from entroflow.entropy.curve import EntropyCurve
from entroflow.entropy.probe import (
    attention_shift,
    entropy_by_step,
    probe_of,
    probed_velocity,
)
from entroflow.ledger import Ledger
from entroflow.plain_sections import Attention
from entroflow.policies.base import Condition, Policy
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores
from entroflow.sampling.kernels import ODE
from entroflow.sampling.noise import Stream
from entroflow.sampling.plan import Plan, Role, fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample


class AttentionMeter:
    """Measures where a part of the recipe needs it, or the section `attention` asks for it.

    Attributes:
        curve: Entropy(t), over the iterations so far.
    """

    def __init__(self, settings: Attention, allocation: object, exploration: object) -> None:
        self.settings = settings
        self._of_allocation = bool(getattr(allocation, "needs_attention", False))
        self._of_exploration = bool(getattr(exploration, "needs_attention", False))
        self.curve = EntropyCurve(settings.curve_ema)

    def in_round(self, number: int) -> Attention | None:
        """What is measured in a round, from 0: nothing after the first."""
        on = self.settings.measure or self._of_allocation or self._of_exploration
        return self.settings if on and number == 0 else None

    def try_out(
        self, policy: Policy, prompts: list[Prompt], sigma: Tensor, guidance: float
    ) -> None:
        """Measure one state, if any is to be.

        Not counted: a run that is resumed asks again, and spends the same.

        Raises:
            InputError: the policy shows no attention, or it can't be looked at.
        """
        settings = self.in_round(0)
        if settings is None:
            return
        cond = policy.encode([prompts[0].text])
        x = torch.zeros(1, *policy.latent_shape)
        with torch.no_grad():
            probed_velocity(policy, x, sigma, cond, guidance, torch.ones(1).bool(), settings)

    def entropy_for_plans(
        self,
        policy: Policy,
        prompts: list[Prompt],
        base_grid: Tensor,
        *,
        seed: int,
        guidance: float,
        batch_size: int,
        ledger: Ledger,
    ) -> Tensor | None:
        """[T] what an exploration plans by, if it does; at first by the ODE of the reference."""
        if not self._of_exploration:
            return None
        if self.curve.values is None:
            P, T = len(prompts), len(base_grid) - 1
            plan = fresh_rows(
                prompts, torch.ones(P, dtype=torch.long), torch.zeros(P, dtype=torch.long),
                base_grid, torch.zeros(T, dtype=base_grid.dtype), scored=False,
            )  # fmt: skip
            rollouts = Rollouts.empty(plan, policy.latent_shape)
            cond = policy.encode(plan.texts)
            with ledger.timed("attention"), policy.weights("reference"):
                for _ in sample(
                    policy, ODE(), rollouts, cond, seed=seed, iteration=0, guidance=guidance,
                    batch_size=batch_size, initial=Stream.PROBE, probe=probe_of(self.settings),
                    ledger=ledger,
                ):  # fmt: skip
                    pass
            self.curve.follow(entropy_by_step(rollouts))
        return self.curve.values

    def shift(
        self,
        policy: Policy,
        rollouts: Rollouts,
        cond: Condition,
        *,
        guidance: float,
        batch_size: int,
        ledger: Ledger,
    ) -> Tensor:
        """[P] how far attention has moved; see `attention_shift`.

        Passes of the reference that serve the report alone are counted apart.
        """
        counted = ledger if self._of_allocation else Ledger()
        with ledger.timed("attention"):
            found = attention_shift(
                policy, rollouts, cond, self.settings,
                guidance=guidance, batch_size=batch_size, ledger=counted,
            )  # fmt: skip
        if counted is not ledger:
            ledger.check_evaluations += counted.network_evaluations
        return found

    def passes(self, prompts: int, steps: int) -> int:
        """States at which an iteration evaluates the reference to allocate."""
        return prompts * min(self.settings.states, steps) if self._of_allocation else 0


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
    plan, shift = rollouts.plan, rollouts.attention_shift
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
