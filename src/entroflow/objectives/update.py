"""One update of the weights from a table of transitions, whatever made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entroflow.ledger import Ledger
from entroflow.objectives.base import Objective
from entroflow.policies.base import Condition, Policy
from entroflow.sampling.kernels import Kernel, kl_divergence, log_prob
from entroflow.sampling.noise import Stream, generator
from entroflow.sampling.rollouts import Transitions


@dataclass
class UpdateStatistics:
    """What happened in the updates of one iteration.

    Attributes:
        ratio_deviation: largest |ratio - 1| before the first optimizer step; 0 in exact arithmetic.
        kl: KL to the reference per dimension on the first micro-batch, before the first step.
        terms: means over all transitions that were used, by name.
        by_step: the same, by base-grid step.
        gradient_norm: before clipping, one per optimizer step.
        skipped: transitions of weight or advantage zero, on which no pass was spent.
    """

    ratio_deviation: float = 0.0
    kl: float = 0.0
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
    """Take `epochs x minibatches` optimizer steps.

    The gradient is that of the sum of weight x loss term over a minibatch, weights renormalised to
    sum to 1, times D: as if log-probabilities were not divided by D, so that Adam's epsilon and
    `max_grad_norm` mean the same at every resolution. Transitions that share a state share its
    forward pass and its minibatch.
    """
    statistics = UpdateStatistics()
    dimensions = transitions.states[0].numel()
    gathered: dict[str, list[Tensor]] = {}
    first = True
    for epoch in range(objective.epochs):
        for minibatch in _minibatches(transitions, objective.minibatches, seed, iteration, epoch):
            part = transitions.take(minibatch)
            share = part.weight / part.weight.sum().clamp(min=torch.finfo(torch.float64).tiny)
            used = part.weight > 0
            if not objective.needs_reference:
                used &= part.advantage != 0
            statistics.skipped += int((~used).sum())
            optimizer.zero_grad()
            for chunk in _same_state_chunks(part.state, used, micro_batch):
                passes = _forward(
                    policy, kernel, cond, part.take(chunk), guidance, ledger,
                    needs_reference=objective.needs_reference, monitor_reference=not gathered,
                )  # fmt: skip
                terms = objective.terms(
                    passes.transitions, passes.log_prob, passes.mean,
                    passes.reference_mean if objective.needs_reference else None,
                )  # fmt: skip
                if not gathered and passes.reference_mean is not None:
                    kl = kl_divergence(
                        passes.mean.detach(), passes.reference_mean, passes.transitions.std
                    )
                    statistics.kl = kl.mean().item()
                loss = (share[chunk].to(terms["loss"]) * terms["loss"]).sum()
                (dimensions * loss).backward()
                _gather(gathered, terms, minibatch[chunk], part.advantage[chunk])
                if first:
                    old = passes.transitions.log_prob.to(passes.log_prob)
                    ratio = torch.exp(passes.log_prob.detach() - old)
                    deviation = (ratio - 1).abs().max().item()
                    statistics.ratio_deviation = max(statistics.ratio_deviation, deviation)
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            if not norm.isfinite():
                raise FloatingPointError(
                    f"the gradient is not finite at iteration {iteration}; it was not applied. "
                    "Lower optimizer.learning_rate, or look at the rewards and the precision."
                )
            optimizer.step()
            ledger.optimizer_steps += 1
            statistics.gradient_norm.append(norm.item())
            first = False
    _summarise(statistics, gathered, transitions)
    return statistics


@dataclass(frozen=True)
class _Passes:
    """Transitions, and what the network says of them now."""

    transitions: Transitions
    log_prob: Tensor
    mean: Tensor
    reference_mean: Tensor | None


def _forward(
    policy: Policy,
    kernel: Kernel,
    cond: Condition,
    part: Transitions,
    guidance: float,
    ledger: Ledger,
    needs_reference: bool,
    monitor_reference: bool,
) -> _Passes:
    """One forward pass per distinct state, and one under the reference weights if wanted.

    A reference pass for monitoring alone is counted apart: it is no part of the method's cost.
    """
    distinct, first, inverse = _distinct(part.state)
    x, prompt = part.states[distinct], part.prompt[first]
    sigma = part.sigma[first].to(torch.promote_types(x.dtype, torch.float32))
    evaluations = len(distinct) * policy.evaluations(guidance)
    conditions = cond.take(prompt)

    def mean_of(velocity: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        states = x.to(exact)[inverse]
        v = velocity.to(exact)[inverse]
        return kernel.mean(states, v, part.sigma, part.sigma_next, part.std)

    reference_mean = None
    if needs_reference or monitor_reference:
        with torch.no_grad(), policy.weights("reference"):
            reference_mean = mean_of(policy.velocity(x, sigma, conditions, guidance))
        if needs_reference:
            ledger.forward(evaluations)
        else:
            ledger.monitor_evaluations += evaluations
    mean = mean_of(policy.velocity(x, sigma, conditions, guidance))
    ledger.forward_backward(evaluations)
    reached = part.states[part.next_state].to(mean)
    return _Passes(part, log_prob(reached, mean, part.std), mean, reference_mean)


def _minibatches(
    transitions: Transitions, count: int, seed: int, iteration: int, epoch: int
) -> list[Tensor]:
    """Random split of the transitions by row; rows that share a state stay together."""
    if count == 1:
        return [torch.arange(len(transitions))]
    lowest_row = torch.full((len(transitions.states),), torch.iinfo(torch.long).max)
    lowest_row.scatter_reduce_(0, transitions.state, transitions.row, "amin")
    unit = lowest_row[transitions.state]
    units = unit.unique()
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


def _gather(
    gathered: dict[str, list[Tensor]], terms: dict[str, Tensor], index: Tensor, advantage: Tensor
) -> None:
    gathered.setdefault("index", []).append(index)
    for name, values in {**terms, "advantage_size": advantage.abs()}.items():
        gathered.setdefault(name, []).append(values.detach())


def _summarise(
    statistics: UpdateStatistics, gathered: dict[str, list[Tensor]], transitions: Transitions
) -> None:
    if not gathered:
        return
    columns = {name: torch.cat(parts) for name, parts in gathered.items()}
    step = transitions.step[columns.pop("index")]
    for name, values in columns.items():
        values = values.double()
        statistics.terms[name] = values.mean().item()
        statistics.by_step[name] = {
            int(s): values[step == s].mean().item() for s in step.unique().tolist()
        }
