"""One iteration of the library up to the update, and its densities and gradients in numpy.

Experience is sampled, scored, credited and turned into transitions by the library itself, with the
elementwise float64 policy, so bits can be compared. t and t' are sigma before and after a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from entroflow.credit.terminal import Terminal
from entroflow.exploration.base import Request
from entroflow.exploration.every_step import EveryStep
from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.objectives import transitions
from entroflow.objectives.base import Objective
from entroflow.objectives.transitions import Transitions
from entroflow.objectives.update import UpdateStatistics, update
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.scoring import score
from entroflow.sampling import solver
from entroflow.sampling.kernels import FlowSDE
from entroflow.sampling.plan import Plan, Role, fresh_rows, with_children
from entroflow.sampling.rollouts import Rollouts
from gaussian_policy import GaussianPolicy

KERNEL = FlowSDE(noise_level=0.7)
PROMPTS = [Prompt("first"), Prompt("second")]
OFFSETS = {"second": 1.0}
STEPS = 5


def different_prompts_policy() -> GaussianPolicy:
    """Each prompt has its own mean, so that a mix-up of prompts shows."""
    return GaussianPolicy(0.3, 0.5, latent_shape=(3, 2), grid_shift=3.0, offsets=OFFSETS)


def every_step_plan(policy: GaussianPolicy, sizes: tuple[int, int] = (6, 4)) -> Plan:
    """All steps but the last are stochastic."""
    request = Request(
        PROMPTS, torch.tensor(sizes), torch.tensor([0, 0]), policy.sigmas(STEPS), KERNEL, 0, 0
    )
    return EveryStep().plan(request)


def branching_plan(policy: GaussianPolicy) -> Plan:
    """Two deterministic anchors, and four branches from one state of each, in mixed order."""
    grid = policy.sigmas(STEPS)
    one, none = torch.ones(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    still = torch.zeros(STEPS, dtype=torch.float64)
    anchors = fresh_rows(PROMPTS, one, none, grid, still, role=Role.ANCHOR, scored=False)
    parent = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0])
    parent_step = torch.tensor([2, 1])[parent]
    std = torch.zeros(8, STEPS, dtype=torch.float64)
    std[:, 0] = KERNEL.std(grid[parent_step], grid[parent_step + 1], grid)
    return with_children(
        anchors, parent, parent_step, role=Role.ROLLOUT,
        member=torch.arange(1, 9), std=std,
    )  # fmt: skip


def total(images: Tensor, prompts: object, metadata: object) -> list[float]:
    """A linear reward: the sum of the latent."""
    return images.double().flatten(1).sum(dim=1).tolist()


def total_with_failures(images: Tensor, prompts: object, metadata: object) -> list[float]:
    """The same, but the second image of every call fails."""
    values = total(images, prompts, metadata)
    return [math.nan if i == 1 else value for i, value in enumerate(values)]


@dataclass
class Experience:
    """One iteration up to the update."""

    policy: GaussianPolicy
    rollouts: Rollouts
    scores: Scores
    transitions: Transitions

    def examples(self, objective: Objective) -> Transitions:
        """Those of an objective: without KL, transitions of advantage 0 are idle."""
        idle = (self.transitions.advantage == 0) & (not objective.needs)
        return replace(self.transitions, idle=idle)


def experience(
    policy: GaussianPolicy | None = None,
    plan: Plan | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    reward=total,
    credit: Terminal | None = None,
    batch_size: int = 64,
) -> Experience:
    """Sample, score, credit."""
    policy = policy or different_prompts_policy()
    plan = plan or every_step_plan(policy)
    collected = Rollouts.empty(plan, policy.latent_shape, dtype, keeps=("means",))
    cond = policy.encode(collected.plan.texts)
    finished = solver.sample(
        policy, KERNEL, collected, cond, address=Address(0), batch_size=batch_size
    )
    scores = score(as_rewards(reward).parts, collected, finished)["reward"]
    advantages = (credit or Terminal()).advantages(collected, scores)
    table = transitions.transitions_of(collected, advantages)
    return Experience(policy, collected, scores, table)


def updated(
    seen: Experience,
    objective: Objective,
    learning_rate: float = 0.0,
    micro_batch: int = 64,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    max_grad_norm: float = math.inf,
    ledger: Ledger | None = None,
) -> UpdateStatistics:
    """One update, by plain gradient descent without gradient clipping unless told otherwise.

    Where no advantage is zero an objective without KL leaves nothing out; else its own examples do.
    """
    policy, cond = seen.policy, seen.policy.encode([prompt.text for prompt in PROMPTS])
    return update(
        policy, cond, seen.examples(objective), objective,
        optimizer or torch.optim.SGD([policy.shift], lr=learning_rate), [policy.shift],
        seed=0, iteration=0, guidance=1.0, micro_batch=micro_batch, max_grad_norm=max_grad_norm,
        ledger=ledger or Ledger(),
    )  # fmt: skip


# --- the same in numpy ----------------------------------------------------------------------------


def steps_of(seen: Experience) -> dict[str, np.ndarray]:
    """Of all transitions: states and the mean of the prompt's data [N, D], sigmas and s [N, 1]."""
    table = seen.transitions
    D = table.states[0].numel()
    offsets = np.array([OFFSETS.get(prompt.text, 0.0) for prompt in PROMPTS])
    shift = seen.policy.shift.detach().flatten().numpy()
    return {
        "m": seen.policy.mean + offsets[table.prompt.numpy()][:, None] + shift,
        "x": table.states[table.state].double().reshape(-1, D).numpy(),
        "x_next": table.states[table.next_state].double().reshape(-1, D).numpy(),
        "t": table.sigma[:, None].numpy(),
        "t_next": table.sigma_next[:, None].numpy(),
        "s": table.std[:, None].numpy(),
    }


def velocity_in_numpy(policy: GaussianPolicy, m, x, t) -> np.ndarray:
    """E[noise - data | x] for N(m, q) data, by the rule for joint Gaussians."""
    q = policy.variance
    gain = (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2)
    return -m + gain * (x - (1 - t) * m)


def mean_in_numpy(policy: GaussianPolicy, m, x, t, t_next, s, **_) -> np.ndarray:
    """Flow-SDE: x + dt [v + d / (2 t) (x + (1 - t) v)] with d = s^2 / |dt|."""
    v, dt = velocity_in_numpy(policy, m, x, t), t_next - t
    return x + dt * (v + s**2 / (t - t_next) / (2 * t) * (x + (1 - t) * v))


def log_prob_in_numpy(policy: GaussianPolicy, **steps) -> np.ndarray:
    """[N] Gaussian log-density of the next state, divided by D."""
    mean = mean_in_numpy(policy, **steps)
    return scipy.stats.norm.logpdf(steps["x_next"], mean, steps["s"]).mean(axis=1)


def mean_by_shift(policy: GaussianPolicy, t, t_next, s, **_) -> np.ndarray:
    """dmean / dshift [N, 1]: dmean/dv = dt (1 + d (1 - t) / 2t) times dv/dshift = -t / V."""
    dt, V = t_next - t, (1 - t) ** 2 * policy.variance + t**2
    return dt * (1 + s**2 / (t - t_next) * (1 - t) / (2 * t)) * -t / V


def log_prob_by_shift(policy: GaussianPolicy, **steps) -> np.ndarray:
    """d log_prob / dshift [N, D] with log_prob the mean over D of the Gaussian log-density."""
    residual = steps["x_next"] - mean_in_numpy(policy, **steps)
    D = residual.shape[1]
    return residual / steps["s"] ** 2 * mean_by_shift(policy, **steps) / D


def advantages_in_numpy(
    rewards, group, scale="group", ddof=0, epsilon=1e-4, clip=5.0
) -> np.ndarray:
    """Group advantages by a loop over groups."""
    rewards, group = np.asarray(rewards, dtype=float), np.asarray(group)
    out = np.full(len(rewards), np.nan)
    everything = rewards[~np.isnan(rewards)]
    for g in np.unique(group):
        mine = (group == g) & ~np.isnan(rewards)
        values = rewards[mine]
        if len(values) == 0:
            continue
        if values.max() - values.min() <= 1e-9 * max(1, abs(values.mean())):
            out[mine] = 0
            continue
        spread = {
            "group": lambda values=values: values.std(ddof=ddof) + epsilon,
            "global": lambda: everything.std(ddof=ddof) + epsilon,
            "none": lambda: 1.0,
        }[scale]()
        out[mine] = np.clip((values - values.mean()) / spread, -clip, clip)
    return out
