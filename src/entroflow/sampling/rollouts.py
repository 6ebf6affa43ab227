"""Rollouts: what sampling a plan brings back, and the flat table of transitions made from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from entroflow.sampling.plan import FRESH, Plan, Role, join, padded

LossWeighting = Literal["sample", "prompt"]

ABSENT = -1
"""Index of a state that was not kept."""


@dataclass
class Rollouts:
    """The states, images and log-probabilities of a plan's rows.

    States are stored once in a pool and referred to by index: rows that start from the same state
    share it. Kept are the ends of trained steps and the states that children start from.

    Attributes:
        plan: the plan that was sampled.
        states: [M, *latent] pool of states.
        state_index: [B, S + 1] position in the pool of the state before each step, or `ABSENT`.
        velocities: [V, *latent] pool of the velocities at states that children start from.
        velocity_index: [B, S] position in that pool, or `ABSENT`.
        log_prob: [B, S] of stochastic steps, 0 elsewhere.
        means: [K, *latent] pool of the means of trained steps; empty unless they were asked for.
        mean_index: [B, S] position in that pool, or `ABSENT`.
        images: [number of scored rows, 3, H, W] in [0, 1].
        attention_entropy: [B, S] before each step, NaN where it was not measured.
        attention_shift: [P] how far it has moved from the reference's, if that was measured.
    """

    plan: Plan
    states: Tensor
    state_index: Tensor
    velocities: Tensor
    velocity_index: Tensor
    log_prob: Tensor
    means: Tensor
    mean_index: Tensor
    attention_entropy: Tensor
    images: Tensor | None = None
    attention_shift: Tensor | None = None

    @classmethod
    def empty(
        cls,
        plan: Plan,
        latent_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        keep_means: bool = False,
        keep_states: Tensor | None = None,
    ) -> Rollouts:
        """Room for everything the plan's rows will leave behind.

        Args:
            dtype: storage type of states.
            keep_means: also keep the means.
            keep_states: [B, S] bool, steps before which the state is kept whatever else.
        """
        trained = plan.trained
        before = trained if keep_states is None else trained | keep_states
        keep = torch.nn.functional.pad(before, (0, 1)) | torch.nn.functional.pad(trained, (1, 0))
        with_velocity = torch.zeros_like(trained)
        child = (plan.parent != FRESH).nonzero()[:, 0]
        parent, parent_step = plan.parent[child], plan.parent_step[child]
        keep[parent, parent_step] = True
        with_velocity[parent, parent_step] = True
        # A child's first state is its parent's: one place in the pool, not two.
        keep[child, 0] = False
        state_index = numbered(keep)
        velocity_index = numbered(with_velocity)
        states = torch.zeros(int(keep.sum()), *latent_shape, dtype=dtype)
        # Only states are stored coarsely; what is computed from them keeps the kernel's precision.
        exact = torch.promote_types(dtype, torch.float32)
        velocities = torch.zeros(int(with_velocity.sum()), *latent_shape, dtype=exact)
        for wave in plan.waves():
            born = wave[plan.parent[wave] != FRESH]
            state_index[born, 0] = state_index[plan.parent[born], plan.parent_step[born]]
        mean_index = numbered(trained & keep_means)
        means = torch.zeros(int((mean_index != ABSENT).sum()), *latent_shape, dtype=exact)
        log_prob = torch.zeros(plan.std.shape, dtype=exact)
        return cls(
            plan, states, state_index, velocities, velocity_index, log_prob, means, mean_index,
            attention_entropy=torch.full(plan.std.shape, torch.nan),
        )  # fmt: skip

    def image_of(self, rows: Tensor) -> Tensor:
        """Position of scored rows in `images`."""
        return (self.plan.scored.cumsum(0) - 1)[rows]

    def keep_images(self, rows: Tensor, images: Tensor) -> None:
        """Store the images of scored rows."""
        if self.images is None:
            self.images = torch.zeros(int(self.plan.scored.sum()), *images.shape[1:])
        self.images[self.image_of(rows)] = images.float().cpu()


def numbered(mask: Tensor) -> Tensor:
    """Running numbers 0, 1, ... where the mask holds, `ABSENT` elsewhere; same shape."""
    numbers = mask.flatten().cumsum(0).view(mask.shape) - 1
    return torch.where(mask, numbers, ABSENT)


def join_rollouts(rounds: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of several rounds over the same prompts as one."""
    if len(rounds) == 1:
        return rounds[0]
    plan = join([r.plan for r in rounds])
    S = plan.std.shape[1]

    def moved(indices: list[Tensor], pools: list[Tensor], width: int) -> Tensor:
        parts, offset = [], 0
        for index, pool in zip(indices, pools, strict=True):
            shifted = torch.where(index == ABSENT, ABSENT, index + offset)
            parts.append(padded(shifted, width, ABSENT))
            offset += len(pool)
        return torch.cat(parts)

    states, velocities = [r.states for r in rounds], [r.velocities for r in rounds]
    means = [r.means for r in rounds]
    images = [r.images for r in rounds if r.images is not None]
    return Rollouts(
        plan=plan,
        states=torch.cat(states),
        state_index=moved([r.state_index for r in rounds], states, S + 1),
        velocities=torch.cat(velocities),
        velocity_index=moved([r.velocity_index for r in rounds], velocities, S),
        log_prob=torch.cat([padded(r.log_prob, S, 0) for r in rounds]),
        means=torch.cat(means),
        mean_index=moved([r.mean_index for r in rounds], means, S),
        attention_entropy=torch.cat([padded(r.attention_entropy, S, torch.nan) for r in rounds]),
        images=torch.cat(images) if images else None,
        attention_shift=rounds[0].attention_shift,
    )


@dataclass(frozen=True)
class Transitions:
    """N stochastic transitions, whatever method made them: the only thing an update consumes.

    Attributes:
        states: [M, *latent] pool.
        state, next_state: [N] positions in the pool.
        sigma, sigma_next, std: [N].
        log_prob: [N] log-density per dimension under the policy that sampled.
        row, step, prompt, group: [N]; `step` is the base-grid index where the transition starts.
        advantage: [N].
        weight: [N]; non-negative, sums to 1.
        mean: [N, *latent] mean under the policy that sampled, or None.
    """

    states: Tensor
    state: Tensor
    next_state: Tensor
    sigma: Tensor
    sigma_next: Tensor
    std: Tensor
    log_prob: Tensor
    row: Tensor
    step: Tensor
    prompt: Tensor
    group: Tensor
    advantage: Tensor
    weight: Tensor
    mean: Tensor | None

    def __len__(self) -> int:
        return len(self.state)

    def take(self, index: Tensor) -> Transitions:
        """Some of the transitions; the pool stays whole."""
        per_transition = {
            name: value[index]
            for name, value in vars(self).items()
            if name != "states" and value is not None
        }
        return replace(self, **per_transition)


def transitions_of(
    rollouts: Rollouts, advantages: Tensor, loss_weighting: LossWeighting = "sample"
) -> Transitions:
    """The trained steps of all rollout rows as a flat table.

    Args:
        advantages: [B, S], NaN where the reward failed. Such transitions keep no weight.
        loss_weighting: how the others share it: sample, all alike; prompt, all prompts alike, and
            those of a prompt.
    """
    plan = rollouts.plan
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
        mean=rollouts.means[mean] if len(rollouts.means) else None,
    )


def _shares(valid: Tensor, part: Tensor) -> Tensor:
    """[N] weights that sum to 1: every part with a valid entry the same, and those within it."""
    inside = torch.zeros(int(part.max()) + 1 if len(part) else 0, dtype=torch.float64)
    inside.index_add_(0, part, valid.double())
    return valid / (inside[part] * (inside > 0).sum()).clamp(min=1)
