"""Stochastic transitions: the examples of objectives with a ratio of densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entroflow.objectives.base import Examples
from entroflow.sampling.kernels import Kernel, log_prob
from entroflow.sampling.plan import Role
from entroflow.sampling.rollouts import Rollouts

LossWeighting = Literal["sample", "prompt"]


@dataclass(frozen=True)
class Transitions(Examples):
    """N stochastic transitions; `step` is the base-grid index where one starts.

    Attributes:
        kernel: the kernel that they were sampled with.
        next_state: [N] position in the pool of the state that was reached.
        sigma_next, std: [N].
        log_prob: [N] log-density per dimension under the policy that sampled.
        group: [N].
        advantage: [N].
        old_mean: [N, *latent] mean under the policy that sampled, or None.
    """

    kernel: Kernel
    next_state: Tensor
    sigma_next: Tensor
    std: Tensor
    log_prob: Tensor
    group: Tensor
    advantage: Tensor
    old_mean: Tensor | None

    def mean(self, velocity: Tensor) -> Tensor:
        """[N, *latent] mean of the next state, of the velocities [N, *latent] before it."""
        x = self.states[self.state].to(velocity)
        return self.kernel.mean(x, velocity, self.sigma, self.sigma_next, self.std)

    def density(self, mean: Tensor) -> Tensor:
        """[N] log-density per dimension of the state that was reached."""
        return log_prob(self.states[self.next_state].to(mean), mean, self.std)


def transitions_of(
    rollouts: Rollouts, advantages: Tensor, loss_weighting: LossWeighting = "sample"
) -> Transitions:
    """The trained steps of all rollout rows as a flat table; none of them is idle.

    Args:
        advantages: [B, S], NaN where the reward failed. Such transitions keep no weight.
        loss_weighting: how the others share it: sample, all alike; prompt, all prompts alike, and
            those of a prompt.
    """
    plan, kernel = rollouts.plan, rollouts.kernel
    assert kernel is not None
    trained = plan.trained & (plan.role == Role.ROLLOUT)[:, None]
    row, column = trained.nonzero(as_tuple=True)
    advantage = advantages[row, column]
    valid = ~advantage.isnan()
    weight = _shares(
        valid, plan.prompt[row] if loss_weighting == "prompt" else torch.zeros_like(row)
    )
    sigmas = plan.sigmas
    mean = rollouts.mean_index[row, column]
    return Transitions(
        kernel=kernel,
        states=rollouts.states,
        state=rollouts.state_index[row, column],
        next_state=rollouts.state_index[row, column + 1],
        sigma=sigmas[row, column],
        sigma_next=sigmas[row, column + 1],
        std=plan.std[row, column],
        log_prob=rollouts.log_prob[row, column],
        row=row,
        step=plan.points[row, column],
        prompt=plan.prompt[row],
        group=plan.group[row],
        advantage=advantage.nan_to_num(0.0),
        weight=weight,
        idle=torch.zeros_like(valid),
        old_mean=rollouts.means[mean] if len(rollouts.means) else None,
    )


def _shares(valid: Tensor, part: Tensor) -> Tensor:
    """[N] weights that sum to 1: every part with a valid entry the same, and those within it."""
    inside = torch.zeros(int(part.max()) + 1 if len(part) else 0, dtype=torch.float64)
    inside.index_add_(0, part, valid.double())
    return valid / (inside[part] * (inside > 0).sum()).clamp(min=1)
