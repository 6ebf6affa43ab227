"""One update of the weights from a table of transitions, whatever made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.noise import Stream, generator
from entroflow.objectives.base import Objective
from entroflow.policies.base import Condition, Policy
from entroflow.sampling.kernels import Kernel, kl_divergence, log_prob
from entroflow.sampling.rollouts import Transitions

KL_SAMPLE = 32
"""Transitions on which the KL to the reference is measured."""


@dataclass
class UpdateStatistics:
    """What happened in the updates of one iteration; None or absent where nothing was measured.

    Attributes:
        kl: KL to the reference per dimension before the first optimizer step: mean over its
            transitions if the objective needs the reference, else over a sample of all.
        ratio_deviation: largest |ratio - 1| before the first optimizer step, of the term `ratio`
            that the objective clips if it has one; 0 in exact arithmetic.
        terms: means over all transitions that were used, by name.
        by_step: the same, by base-grid step; and `advantage_size`, the mean |advantage| of all
            transitions whose reward did not fail.
        gradient_norm: before clipping, one per optimizer step.
        skipped: transitions of weight or advantage zero, on which no pass was spent.
    """

    kl: float | None = None
    ratio_deviation: float | None = None
    terms: dict[str, float] = field(default_factory=dict)
    by_step: dict[str, dict[int, float]] = field(default_factory=dict)
    gradient_norm: list[float] = field(default_factory=list)
    skipped: int = 0


def update(
    policy: Policy,
    kernel: Kernel,
    cond: Condition,
    transitions: Transitions,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    *,
    seed: int,
    iteration: int,
    guidance: float,
    micro_batch: int,
    max_grad_norm: float,
    ledger: Ledger,
) -> UpdateStatistics:
    """Take `epochs x minibatches` optimizer steps; none for a minibatch that teaches nothing.

    The gradient is that of the sum of weight x loss term over a minibatch, weights renormalised to
    sum to 1, times D: as if log-probabilities were not divided by D, so that Adam's epsilon and
    `max_grad_norm` mean the same at every resolution. Transitions that share a state share its
    forward pass and its minibatch.

    Raises:
        InputError: fewer rows than minibatches, or a gradient that is not finite.
    """
    forward = _Forward(policy, kernel, cond, guidance)
    statistics = UpdateStatistics()
    if not objective.needs_reference:
        statistics.kl = _kl_to_reference(forward, transitions, micro_batch, ledger)
    dimensions = transitions.states[0].numel()
    gathered: dict[str, list[Tensor]] = {}
    first, first_kl = True, []
    for epoch in range(objective.epochs):
        for minibatch in _minibatches(transitions, objective.minibatches, seed, iteration, epoch):
            part = transitions.take(minibatch)
            share = part.weight / part.weight.sum().clamp(min=torch.finfo(torch.float64).tiny)
            used = part.weight > 0
            if objective.skips_zero_advantage:
                used &= part.advantage != 0
            statistics.skipped += int((~used).sum())
            if not used.any():
                continue
            optimizer.zero_grad()
            for chunk in _same_state_chunks(part.state, used, micro_batch):
                these = part.take(chunk)
                evaluations = forward.evaluations(these)
                reference_mean = None
                if objective.needs_reference:
                    reference_mean = forward.reference(these)
                    ledger.forward(evaluations)
                mean = forward(these)
                ledger.forward_backward(evaluations)
                reached = these.states[these.next_state].to(mean)
                density = log_prob(reached, mean, these.std)
                terms = objective.terms(these, density, mean, reference_mean)
                loss = (share[chunk].to(terms["loss"]) * terms["loss"]).sum()
                (dimensions * loss).backward()
                _gather(gathered, terms, minibatch[chunk])
                if first and reference_mean is not None:
                    first_kl.append(kl_divergence(mean.detach(), reference_mean, these.std))
                if first:
                    plain = torch.exp(density.detach() - these.log_prob.to(density))
                    ratio = terms.get("ratio", plain).detach()
                    deviation = (ratio - 1).abs().max().item()
                    statistics.ratio_deviation = max(statistics.ratio_deviation or 0.0, deviation)
            if first and first_kl:
                statistics.kl = torch.cat(first_kl).mean().item()
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            if not norm.isfinite():
                raise InputError(
                    f"the gradient of iteration {iteration + 1} is not finite and was not applied; "
                    "lower optimizer.learning_rate, or look at the rewards and the precision."
                )
            optimizer.step()
            ledger.optimizer_steps += 1
            statistics.gradient_norm.append(norm.item())
            first = False
    _summarise(statistics, gathered, transitions)
    return statistics


@dataclass(frozen=True)
class _Forward:
    """Means of transitions [n, *latent] under the active weights, one pass per distinct state."""

    policy: Policy
    kernel: Kernel
    cond: Condition
    guidance: float

    def __call__(self, part: Transitions) -> Tensor:
        distinct, first, inverse = _distinct(part.state)
        x = part.states[distinct]
        exact = torch.promote_types(x.dtype, torch.float32)
        sigma, conditions = part.sigma[first].to(exact), self.cond.take(part.prompt[first])
        velocity = self.policy.velocity(x, sigma, conditions, self.guidance)
        states, velocities = x.to(exact)[inverse], velocity.to(exact)[inverse]
        return self.kernel.mean(states, velocities, part.sigma, part.sigma_next, part.std)

    def reference(self, part: Transitions) -> Tensor:
        """The same under the reference weights, without gradient."""
        with torch.no_grad(), self.policy.weights("reference"):
            return self(part)

    def evaluations(self, part: Transitions) -> int:
        """Network evaluations of one call."""
        return len(part.state.unique()) * self.policy.evaluations(self.guidance)


@torch.no_grad()
def _kl_to_reference(
    forward: _Forward, transitions: Transitions, micro_batch: int, ledger: Ledger
) -> float:
    """Mean over transitions spread evenly over the table.

    The passes serve a run-time check alone and are counted apart: no part of the method's cost.
    """
    n = min(KL_SAMPLE, len(transitions))
    sample = transitions.take(torch.linspace(0, len(transitions) - 1, n).long())
    kl = []
    everything = torch.ones(n, dtype=torch.bool)
    for chunk in _same_state_chunks(sample.state, everything, micro_batch):
        part = sample.take(chunk)
        kl.append(kl_divergence(forward(part), forward.reference(part), part.std))
        ledger.check_evaluations += 2 * forward.evaluations(part)
    return torch.cat(kl).mean().item()


def _minibatches(
    transitions: Transitions,
    count: int | Literal["by_step"],
    seed: int,
    iteration: int,
    epoch: int,
) -> list[Tensor]:
    """Random split of the transitions by row, where rows that share a state stay together; or one
    part for each base-grid step where transitions start.
    """
    if count == "by_step":
        steps = transitions.step.unique()
        return [(transitions.step == step).nonzero()[:, 0] for step in steps]
    if count == 1:
        return [torch.arange(len(transitions))]
    lowest_row = torch.full((len(transitions.states),), torch.iinfo(torch.long).max)
    lowest_row.scatter_reduce_(0, transitions.state, transitions.row, "amin")
    unit = lowest_row[transitions.state]
    units = unit.unique()
    if len(units) < count:
        raise InputError(
            f"objective.minibatches is {count}, but the transitions fall into only {len(units)} "
            "parts that share no state; take fewer, or more rollouts."
        )
    order = generator(seed, Stream.MINIBATCH, iteration, step=epoch).permutation(len(units))
    place = torch.empty(len(units), dtype=torch.long)
    place[torch.from_numpy(order)] = torch.arange(len(units)) * count // len(units)
    minibatch = place[torch.searchsorted(units, unit)]
    return [(minibatch == number).nonzero()[:, 0] for number in range(count)]


def _same_state_chunks(state: Tensor, used: Tensor, micro_batch: int) -> list[Tensor]:
    """Indices of the used transitions in chunks of at most `micro_batch` distinct states."""
    index = used.nonzero()[:, 0]
    distinct, _, inverse = _distinct(state[index])
    order = torch.argsort(inverse, stable=True)
    chunk_of = inverse[order] // micro_batch
    chunks = (len(distinct) + micro_batch - 1) // micro_batch
    return [index[order[chunk_of == number]] for number in range(chunks)]


def _distinct(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct values in order of appearance, where each appears first, and the inverse map."""
    values, inverse = state.unique(return_inverse=True)
    first = torch.full((len(values),), len(state), dtype=torch.long)
    first.scatter_reduce_(0, inverse, torch.arange(len(state)), "amin")
    order = torch.argsort(first)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return values[order], first[order], rank[inverse]


def _gather(gathered: dict[str, list[Tensor]], terms: dict[str, Tensor], index: Tensor) -> None:
    gathered.setdefault("index", []).append(index)
    for name, values in terms.items():
        gathered.setdefault(name, []).append(values.detach())


def _summarise(
    statistics: UpdateStatistics, gathered: dict[str, list[Tensor]], transitions: Transitions
) -> None:
    # Also those that were skipped: a tied group is no signal, not a missing one.
    rated = transitions.weight > 0
    statistics.by_step["advantage_size"] = _by_step(
        transitions.advantage[rated].abs(), transitions.step[rated]
    )
    if not gathered:
        return
    columns = {name: torch.cat(parts) for name, parts in gathered.items()}
    step = transitions.step[columns.pop("index")]
    for name, values in columns.items():
        statistics.terms[name] = values.double().mean().item()
        statistics.by_step[name] = _by_step(values, step)


def _by_step(values: Tensor, step: Tensor) -> dict[int, float]:
    """Means by base-grid step."""
    return {int(s): values[step == s].double().mean().item() for s in step.unique().tolist()}
