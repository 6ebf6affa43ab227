"""Rollouts: what sampling a plan brings back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entroflow.noise import Address
from entroflow.sampling.kernels import Kernel
from entroflow.sampling.plan import FRESH, Plan, Role, join, padded

Kept = Literal["means", "latents"]
"""What rollouts may keep beside states: means of trained steps, final latents of rollouts."""

ABSENT = -1
"""Index of a state that was not kept."""


@dataclass
class Rollouts:
    """The states, images and log-probabilities of a plan's rows.

    States are stored once in a pool and referred to by index: rows that start from the same state
    share it. Kept are the ends of trained steps and the states that children start from.

    Attributes:
        plan: the plan that was sampled.
        kernel, address: what it was sampled with; None before.
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
    kernel: Kernel | None = None
    address: Address | None = None
    images: Tensor | None = None
    attention_shift: Tensor | None = None

    @classmethod
    def empty(
        cls,
        plan: Plan,
        latent_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        keeps: Sequence[Kept] = (),
        keep_states: Tensor | None = None,
    ) -> Rollouts:
        """Room for everything the plan's rows will leave behind.

        Args:
            dtype: storage type of states.
            keeps: what else is kept.
            keep_states: [B, S] bool, steps before which the state is kept whatever else.
        """
        trained = plan.trained
        before = trained if keep_states is None else trained | keep_states
        keep = torch.nn.functional.pad(before, (0, 1)) | torch.nn.functional.pad(trained, (1, 0))
        if "latents" in keeps:
            rollout = (plan.role == Role.ROLLOUT).nonzero()[:, 0]
            keep[rollout, plan.length[rollout]] = True
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
        mean_index = numbered(trained & ("means" in keeps))
        means = torch.zeros(int((mean_index != ABSENT).sum()), *latent_shape, dtype=exact)
        log_prob = torch.zeros(plan.std.shape, dtype=exact)
        return cls(
            plan, states, state_index, velocities, velocity_index, log_prob, means, mean_index,
            attention_entropy=torch.full(plan.std.shape, torch.nan),
        )  # fmt: skip

    def latents_of(self, rows: Tensor) -> Tensor:
        """[n, *latent] the final latents of rollouts, where they were kept."""
        return self.states[self.state_index[rows, self.plan.length[rows]]]

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
        kernel=rounds[0].kernel,
        address=rounds[0].address,
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
