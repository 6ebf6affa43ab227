"""One update of the weights from examples, whatever made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.noise import Stream, generator
from entroflow.objectives.base import Examples, Objective
from entroflow.policies.base import Condition, Policy

COMPARED = 32
"""Examples at which weights are compared for the diagnostics alone."""


@dataclass
class UpdateStatistics:
    """What happened in the updates of one iteration.

    Attributes:
        diagnostics: what the objective says of the time before the first optimizer step.
        terms: means over all examples that were used, by name; none where none was.
        by_step: the same, by base-grid step.
        gradient_norm: before clipping, one per optimizer step.
        skipped: examples that are idle or have no weight, on which no pass was spent.
    """

    diagnostics: dict[str, float | None] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    by_step: dict[str, dict[int, float]] = field(default_factory=dict)
    gradient_norm: list[float] = field(default_factory=list)
    skipped: int = 0


def update(
    policy: Policy,
    cond: Condition,
    examples: Examples,
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
    `max_grad_norm` mean the same at every resolution. Examples that share a state share its
    forward pass and its minibatch.

    Raises:
        InputError: fewer rows than minibatches, or a gradient that is not finite.
    """
    velocities = _Velocities(policy, cond, guidance)
    statistics = UpdateStatistics()
    compared = _compared(velocities, examples, objective, micro_batch, ledger)
    dimensions = examples.states[0].numel()
    gathered, first = _Gathered(), _Gathered()
    for epoch in range(objective.epochs):
        for minibatch in _minibatches(examples, objective.minibatches, seed, iteration, epoch):
            part = examples.take(minibatch)
            share = part.weight / part.weight.sum().clamp(min=torch.finfo(torch.float64).tiny)
            used = (part.weight > 0) & ~part.idle
            statistics.skipped += int((~used).sum())
            if not used.any():
                continue
            optimizer.zero_grad()
            for chunk in _same_state_chunks(part.state, used, micro_batch):
                these = part.take(chunk)
                evaluations = velocities.evaluations(these)
                others = {}
                for name in objective.needs:
                    others[name] = velocities.of(name, these)
                    ledger.forward(evaluations)
                live = velocities(these)
                ledger.forward_backward(evaluations)
                terms = objective.terms(these, live, others)
                loss = (share[chunk].to(terms["loss"]) * terms["loss"]).sum()
                (dimensions * loss).backward()
                gathered.add(terms, minibatch[chunk])
                if not statistics.gradient_norm:
                    first.add(terms, minibatch[chunk])
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            if not norm.isfinite():
                raise InputError(
                    f"the gradient of iteration {iteration + 1} is not finite and was not applied; "
                    "lower optimizer.learning_rate, or look at the rewards and the precision."
                )
            optimizer.step()
            ledger.optimizer_steps += 1
            statistics.gradient_norm.append(norm.item())
    statistics.diagnostics = objective.diagnostics(first.terms(), compared)
    for name, values in gathered.terms().items():
        statistics.terms[name] = values.double().mean().item()
        statistics.by_step[name] = means_by_step(values, examples.step[gathered.index()])
    return statistics


@dataclass(frozen=True)
class _Velocities:
    """Velocities of examples [n, *latent], one pass per distinct state."""

    policy: Policy
    cond: Condition
    guidance: float

    def __call__(self, part: Examples) -> Tensor:
        """Under the active weights, in float32 at least."""
        distinct, first, inverse = _distinct(part.state)
        x = part.states[distinct]
        exact = torch.promote_types(x.dtype, torch.float32)
        sigma, conditions = part.sigma[first].to(exact), self.cond.take(part.prompt[first])
        velocity = self.policy.velocity(x, sigma, conditions, self.guidance)
        return velocity.to(exact)[inverse]

    def of(self, weights: str, part: Examples) -> Tensor:
        """Under named weights, without gradient."""
        with torch.no_grad(), self.policy.weights(weights):
            return self(part)

    def evaluations(self, part: Examples) -> int:
        """Network evaluations of one call."""
        return len(part.state.unique()) * self.policy.evaluations(self.guidance)


@torch.no_grad()
def _compared(
    velocities: _Velocities,
    examples: Examples,
    objective: Objective,
    micro_batch: int,
    ledger: Ledger,
) -> dict[str, Tensor]:
    """Terms of examples spread evenly over all, with the weights that the objective compares.

    The passes serve a run-time check alone and are counted apart: no part of the method's cost.
    """
    compared = _Gathered()
    if not objective.compares:
        return {}
    n = min(COMPARED, len(examples))
    sample = examples.take(torch.linspace(0, len(examples) - 1, n).long())
    everything = torch.ones(n, dtype=torch.bool)
    for chunk in _same_state_chunks(sample.state, everything, micro_batch):
        part = sample.take(chunk)
        live = velocities(part)
        others = {name: velocities.of(name, part) for name in objective.compares}
        compared.add(objective.terms(part, live, others), chunk)
        ledger.check_evaluations += (1 + len(others)) * velocities.evaluations(part)
    return compared.terms()


def _minibatches(
    examples: Examples,
    count: int | Literal["by_step"],
    seed: int,
    iteration: int,
    epoch: int,
) -> list[Tensor]:
    """Random split of the examples by row, where rows that share a state stay together; or one
    part for each base-grid step.
    """
    if count == "by_step":
        steps = examples.step.unique()
        return [(examples.step == step).nonzero()[:, 0] for step in steps]
    if count == 1:
        return [torch.arange(len(examples))]
    lowest_row = torch.full((len(examples.states),), torch.iinfo(torch.long).max)
    lowest_row.scatter_reduce_(0, examples.state, examples.row, "amin")
    unit = lowest_row[examples.state]
    units = unit.unique()
    if len(units) < count:
        raise InputError(
            f"objective.minibatches is {count}, but the examples fall into only {len(units)} "
            "parts that share no state; take fewer, or more rollouts."
        )
    order = generator(seed, Stream.MINIBATCH, iteration, step=epoch).permutation(len(units))
    place = torch.empty(len(units), dtype=torch.long)
    place[torch.from_numpy(order)] = torch.arange(len(units)) * count // len(units)
    minibatch = place[torch.searchsorted(units, unit)]
    return [(minibatch == number).nonzero()[:, 0] for number in range(count)]


def _same_state_chunks(state: Tensor, used: Tensor, micro_batch: int) -> list[Tensor]:
    """Indices of the used examples in chunks of at most `micro_batch` distinct states."""
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


class _Gathered:
    """Terms of examples, part by part."""

    def __init__(self) -> None:
        self._index: list[Tensor] = []
        self._terms: dict[str, list[Tensor]] = {}

    def add(self, terms: Mapping[str, Tensor], index: Tensor) -> None:
        """Keep the terms [n] of the examples at index [n]."""
        self._index.append(index)
        for name, values in terms.items():
            self._terms.setdefault(name, []).append(values.detach())

    def terms(self) -> dict[str, Tensor]:
        """By name, [number of examples]."""
        return {name: torch.cat(parts) for name, parts in self._terms.items()}

    def index(self) -> Tensor:
        """[number of examples] which they are."""
        return torch.cat(self._index)


def means_by_step(values: Tensor, step: Tensor) -> dict[int, float]:
    """Means of values [n] by their base-grid step [n]."""
    return {int(s): values[step == s].double().mean().item() for s in step.unique().tolist()}
