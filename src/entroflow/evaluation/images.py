"""Images of held-out prompts, sampled without step noise: the same noise every time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entroflow.evaluation.base import Drawn
from entroflow.ledger import Ledger
from entroflow.noise import Address, Stream
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt
from entroflow.rewards.combined import Rewards
from entroflow.rewards.scoring import score
from entroflow.sampling.kernels import ODE
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample


def draw(
    policy: Policy,
    prompts: Sequence[Prompt],
    sizes: Tensor,
    *,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int,
    reward: Rewards | None = None,
    ledger: Ledger | None = None,
) -> Drawn:
    """Follow the ODE from fresh noise, under the weights that are active.

    Args:
        sizes: [P] images of each prompt.
        reward: of which the parts that compare are left out; see `evaluation.watching`.
    """
    grid, kernel = policy.sigmas(steps), ODE()
    std = kernel.std(grid[:-1], grid[1:], grid)
    none = torch.zeros(len(prompts), dtype=torch.long)
    plan = fresh_rows(prompts, sizes, none, grid, std)
    rollouts = Rollouts.empty(plan, policy.latent_shape)
    finished = sample(
        policy, kernel, rollouts, policy.encode(plan.texts),
        address=Address(seed), guidance=guidance, batch_size=batch_size,
        initial=Stream.EVALUATION, ledger=ledger,
    )  # fmt: skip
    rewards = torch.full((plan.rows,), torch.nan, dtype=torch.float64)
    if reward is not None and reward.pointwise:
        rewards = reward.total(score(reward.pointwise, rollouts, finished, ledger)).values
    for _ in finished:
        pass
    assert rollouts.images is not None
    return Drawn(prompts, rollouts.images, plan.prompt, rewards)


def shares(total: int, parts: int) -> Tensor:
    """`total` images over `parts` prompts, as even as can be."""
    return torch.tensor([total // parts + (i < total % parts) for i in range(parts)])
