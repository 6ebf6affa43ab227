"""The one solver: every row moves along its own grid from its own state.

A plain rollout, a branch with a merged step, an anchor, a completion from a middle state and an
evaluation run are the same call with other grids. Rows at different sigmas share a network batch,
finished rows leave it, and a velocity that is known is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from entroflow.ledger import Ledger
from entroflow.noise import Address, Stream, gaussian
from entroflow.policies.base import Condition, Policy
from entroflow.sampling.kernels import Kernel, log_prob
from entroflow.sampling.plan import FRESH, probed_rows
from entroflow.sampling.rollouts import ABSENT, Rollouts


class Probe(Protocol):
    """A measurement of the network while it computes velocities, which it does not change."""

    def __call__(
        self,
        policy: Policy,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        guidance: float,
        rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The velocity [B, ...], and [B] a number for those of the rows [B] bool, NaN elsewhere."""
        ...


@dataclass(frozen=True)
class Moves:
    """One step of some rows, as `integrate` reports it.

    Attributes:
        row, step: [n] which rows, and which of their steps.
        velocity, mean, state: [n, *latent] before, mean of and after the step.
        log_prob: [n] of the step; 0 where it is deterministic.
        finished: [n] bool, whether this was the row's last step.
        attention_entropy: [n] before the step, NaN where it was not measured.
    """

    row: Tensor
    step: Tensor
    velocity: Tensor
    mean: Tensor
    state: Tensor
    log_prob: Tensor
    finished: Tensor
    attention_entropy: Tensor


def integrate(
    policy: Policy,
    kernel: Kernel,
    x: Tensor,
    cond: Condition,
    prompt: Tensor,
    sigmas: Tensor,
    std: Tensor,
    *,
    noise: Callable[[Tensor, Tensor], Tensor] | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
    velocity: Tensor | None = None,
    probe: Probe | None = None,
    probed: Tensor | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Moves]:
    """Move every row from its first to its last sigma; yields after every network batch.

    Args:
        x: [B, *latent] states; not modified. States keep this dtype: a next state is rounded to it
            before its log-probability is taken.
        cond: encoded prompts, first axis P.
        prompt: [B] index into `cond`.
        sigmas: [B, S + 1] grids, padded at the end with their last value.
        std: [B, S] standard deviations, 0 = deterministic.
        noise: (rows [n], steps [n]) -> standard normal [n, *latent], for stochastic steps only;
            None where there are none.
        guidance: guidance scale handed to the policy.
        batch_size: most rows in one network call.
        velocity: [B, *latent] known velocity at the first state; NaN rows are not known.
        probe: measures attention entropy, if anything does.
        probed: [B] bool, of which rows.
        ledger: counts the network evaluations.
    """
    x = x.clone()
    length = (sigmas[:, :-1] > sigmas[:, 1:]).sum(dim=1)
    position = torch.zeros(len(x), dtype=torch.long)

    def advance(row: Tensor, v: Tensor, entropy: Tensor) -> Moves:
        step = position[row]
        sigma, sigma_next, spread = sigmas[row, step], sigmas[row, step + 1], std[row, step]
        # Kernel arithmetic is float32 at least, whatever states and velocities are stored in.
        exact = torch.promote_types(x.dtype, torch.float32)
        mean = kernel.mean(x[row].to(exact), v.to(exact), sigma, sigma_next, spread)
        state = mean.to(x.dtype, copy=True)
        density = torch.zeros(len(row), dtype=exact)
        random = (spread > 0).nonzero()[:, 0]
        if len(random):
            assert noise is not None
            drawn = noise(row[random], step[random]).to(mean)
            scale = spread[random].to(mean).reshape(-1, *[1] * (x.dim() - 1))
            state[random] = (mean[random] + scale * drawn).to(x.dtype)
            density[random] = log_prob(state[random].to(exact), mean[random], spread[random])
        x[row] = state
        position[row] += 1
        return Moves(row, step, v, mean, state, density, position[row] == length[row], entropy)

    if velocity is not None:
        known = ~velocity.flatten(1).isnan().any(dim=1)
        for row in known.nonzero()[:, 0].split(batch_size):
            yield advance(row, velocity[row], torch.full((len(row),), torch.nan))
    while len(waiting := (position < length).nonzero()[:, 0]):
        row = waiting[:batch_size]
        sigma = sigmas[row, position[row]].to(torch.promote_types(x.dtype, torch.float32))
        given = x[row], sigma, cond.take(prompt[row]), guidance
        if probe is None or probed is None:
            v, entropy = policy.velocity(*given), torch.full((len(row),), torch.nan)
        else:
            v, entropy = probe(policy, *given, probed[row])
        if ledger is not None:
            ledger.forward(len(row) * policy.evaluations(guidance))
        yield advance(row, v, entropy)


@torch.no_grad()
def sample(
    policy: Policy,
    kernel: Kernel,
    rollouts: Rollouts,
    cond: Condition,
    *,
    address: Address,
    guidance: float = 1.0,
    batch_size: int = 64,
    initial: Stream = Stream.INITIAL,
    probe: Probe | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Tensor]:
    """Sample the plan of `rollouts` and fill them; yields row numbers as their images are done.

    Args:
        policy: run with the weights that are active.
        rollouts: as made by `Rollouts.empty`.
        cond: the encoded prompts of its plan.
        address: of all noise.
        guidance: guidance scale.
        batch_size: most rows in one network call.
        initial: stream of the initial noise.
        probe: measures attention entropy, if anything does, of the rows of `probed_rows`.
        ledger: counts network evaluations and decodes.
    """
    plan, sigmas, latent_shape = rollouts.plan, rollouts.plan.sigmas, policy.latent_shape
    rollouts.kernel, rollouts.address = kernel, address
    probed = probed_rows(plan)
    for wave in plan.waves():

        def step_noise(row: Tensor, step: Tensor, wave: Tensor = wave) -> Tensor:
            rows = wave[row]
            return gaussian(
                latent_shape, address, Stream.STEP,
                plan.group[rows], plan.member[rows], plan.points[rows, step],
            )  # fmt: skip

        x, velocity = _starts(rollouts, wave, latent_shape, address, initial)
        moves = integrate(
            policy, kernel, x, cond, plan.prompt[wave], sigmas[wave], plan.std[wave],
            noise=step_noise, guidance=guidance, batch_size=batch_size,
            velocity=velocity, probe=probe, probed=probed[wave], ledger=ledger,
        )  # fmt: skip
        for move in moves:
            _remember(rollouts, wave, move)
            done = move.finished & plan.scored[wave[move.row]]
            if done.any():
                rows = wave[move.row[done]]
                if ledger is not None:
                    ledger.decodes += len(rows)
                rollouts.keep_images(rows, policy.decode(move.state[done]))
                yield rows


def _starts(
    rollouts: Rollouts,
    wave: Tensor,
    latent_shape: tuple[int, ...],
    address: Address,
    initial: Stream,
) -> tuple[Tensor, Tensor | None]:
    """First states of the rows of a wave, and their velocities where a parent knows them."""
    plan, pool = rollouts.plan, rollouts.states
    parent = plan.parent[wave]
    x = torch.empty(len(wave), *latent_shape, dtype=pool.dtype)
    fresh = parent == FRESH
    rows = wave[fresh]
    steps = torch.zeros(len(rows), dtype=torch.long)
    x[fresh] = gaussian(
        latent_shape, address, initial, plan.group[rows], plan.noise_member[rows], steps
    ).to(x.dtype)
    kept = rollouts.state_index[rows, 0] != ABSENT
    pool[rollouts.state_index[rows[kept], 0]] = x[fresh][kept]
    if fresh.all():
        return x, None
    born, step = parent[~fresh], plan.parent_step[wave][~fresh]
    x[~fresh] = pool[rollouts.state_index[born, step]]
    velocity = torch.full_like(x, torch.nan, dtype=rollouts.velocities.dtype)
    velocity[~fresh] = rollouts.velocities[rollouts.velocity_index[born, step]]
    return x, velocity


def _remember(rollouts: Rollouts, wave: Tensor, move: Moves) -> None:
    row = wave[move.row]
    after = rollouts.state_index[row, move.step + 1]
    kept = after != ABSENT
    rollouts.states[after[kept]] = move.state[kept]
    before = rollouts.velocity_index[row, move.step]
    wanted = before != ABSENT
    rollouts.velocities[before[wanted]] = move.velocity[wanted].to(rollouts.velocities.dtype)
    rollouts.log_prob[row, move.step] = move.log_prob.to(rollouts.log_prob.dtype)
    rollouts.attention_entropy[row, move.step] = move.attention_entropy
    place = rollouts.mean_index[row, move.step]
    kept = place != ABSENT
    rollouts.means[place[kept]] = move.mean[kept].to(rollouts.means.dtype)
