"""Images of held-out prompts, sampled without step noise: the same noise every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entroflow.evaluation.base import Drawn
from entroflow.ledger import Ledger
from entroflow.noise import Address, Stream
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt
from entroflow.rewards.base import AnyReward, GroupReward, Scores
from entroflow.rewards.mixture import rewards_of, total
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
    reward: AnyReward | None = None,
    ledger: Ledger | None = None,
) -> Drawn:
    """Follow the ODE from fresh noise, under the weights that are active.

    Args:
        sizes: [P] images of each prompt.
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
    if reward is not None:
        rewards = _values(reward, score(one_by_one(reward), rollouts, finished, ledger), plan.rows)
    for _ in finished:
        pass
    assert rollouts.images is not None
    return Drawn(prompts, rollouts.images, plan.prompt, rewards)


def shares(total: int, parts: int) -> Tensor:
    """`total` images over `parts` prompts, as even as can be."""
    return torch.tensor([total // parts + (i < total % parts) for i in range(parts)])


def one_by_one(reward: AnyReward) -> dict[str, AnyReward]:
    """The rewards that judge an image by itself; of others see `evaluation.watching`."""
    parts = rewards_of(reward)
    return {name: part for name, part in parts.items() if not isinstance(part, GroupReward)}


def _values(reward: AnyReward, scores: Mapping[str, Scores], rows: int) -> Tensor:
    """[rows] what is trained on, of the rewards that could be scored; NaN where there is none."""
    if not scores:
        return torch.full((rows,), torch.nan, dtype=torch.float64)
    return total(reward, scores).values
