"""Several optimizer steps per batch of rollouts, so that ratios leave 1 and clipping acts.

The whole path of the weights is worked out in numpy, from Gaussian densities at the weights of each
step, and compared with the path that an update takes by plain gradient descent. Which transitions a
step uses is noted by the objective; how they are dealt out has tests of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entroflow.credit.terminal import Terminal
from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.objectives import update as update_module
from entroflow.objectives.clipped import Clipped
from entroflow.objectives.transitions import Transitions
from entroflow.objectives.update import UpdateStatistics
from entroflow.sampling.plan import Plan
from experience import (
    KERNEL,
    OFFSETS,
    STEPS,
    Experience,
    advantages_in_numpy,
    branching_plan,
    every_step_plan,
    experience,
    log_prob_by_shift,
    log_prob_in_numpy,
    mean_by_shift,
    steps_of,
    total,
    total_with_failures,
    updated,
)
from gaussian_policy import GaussianPolicy

RATE, CLIP = 3.0, 0.05
SIZES = (12, 8)
"""Rollouts of the two prompts."""

reproducible = settings(deadline=None, derandomize=True, report_multiple_bugs=False)


# --- an update that is watched --------------------------------------------------------------------


class Watched:
    """The clipped objective; notes which transitions every optimizer step uses."""

    def __init__(self, **fields: object) -> None:
        self.inner = Clipped(**fields)
        self.used: list[list[tuple[int, int]]] = [[]]

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def terms(self, part: Transitions, *arguments: object) -> dict[str, Tensor]:
        # Those that are only compared with the reference have no gradient.
        if torch.is_grad_enabled():
            self.used[-1] += zip(part.row.tolist(), part.step.tolist(), strict=True)
        return self.inner.terms(part, *arguments)


class Descent(torch.optim.SGD):
    """Plain gradient descent; keeps the gradient of every step."""

    def __init__(self, policy: GaussianPolicy, rate: float, objective: Watched) -> None:
        super().__init__([policy.shift], lr=rate)
        self.policy, self.objective = policy, objective
        self.gradients: list[np.ndarray] = []

    def step(self, closure: None = None) -> None:
        self.gradients.append(self.policy.shift.grad.numpy().copy())
        self.objective.used.append([])
        super().step(closure)


@dataclass
class Path:
    """What an update did: transitions (numbers in the table) and gradient of every step."""

    used: list[np.ndarray]
    gradients: list[np.ndarray]
    statistics: UpdateStatistics
    ledger: Ledger


def two_dimensional_policy() -> GaussianPolicy:
    return GaussianPolicy(0.3, 0.5, latent_shape=(2,), grid_shift=3.0, offsets=OFFSETS)


def two_groups(policy: GaussianPolicy) -> Plan:
    return every_step_plan(policy, SIZES)


def seen_by_two_dimensional_policy(plan=two_groups, **options: object) -> Experience:
    policy = two_dimensional_policy()
    return experience(policy, plan(policy), credit=Terminal(advantage_clip=1.0), **options)


def walked(
    seen: Experience,
    rate: float = RATE,
    micro_batch: int = 64,
    max_grad_norm: float = math.inf,
    **fields: object,
) -> Path:
    """One update with the given fields of the objective."""
    objective, ledger = Watched(clip_range=CLIP, **fields), Ledger()
    optimizer = Descent(seen.policy, rate, objective)
    statistics = updated(
        seen, objective, micro_batch=micro_batch, optimizer=optimizer,
        max_grad_norm=max_grad_norm, ledger=ledger,
    )  # fmt: skip
    table = seen.transitions
    rows_and_steps = zip(table.row.tolist(), table.step.tolist(), strict=True)
    number = {key: n for n, key in enumerate(rows_and_steps)}
    *used, rest = objective.used
    assert not rest
    used = [np.array([number[key] for key in step], dtype=int) for step in used]
    return Path(used, optimizer.gradients, statistics, ledger)


# --- the same path by hand ------------------------------------------------------------------------


@dataclass
class ByHand:
    """Gradient of every step; ratio, loss and advantage of every use; the last shift."""

    gradients: list[np.ndarray]
    ratios: list[np.ndarray]
    losses: list[np.ndarray]
    advantages: list[np.ndarray]
    shift: np.ndarray


def by_hand(
    seen: Experience,
    used: list[np.ndarray],
    sharing: list[int] | None = None,
    kl: float = 0.0,
    bound: float = math.inf,
) -> ByHand:
    """Gradient descent on the clipped loss from shift 0, its cases written out (PPO, eq. 7).

    With rho = exp(log_prob - log_prob at shift 0), log_prob per dimension, the loss of a transition
    is -A rho, and constant where A > 0 and rho > 1 + c, or A < 0 and rho < 1 - c.

    Args:
        used: transitions of every step.
        sharing: transitions that share the weight of every step; those that are used unless given.
        kl: beta of the KL to shift 0, whose gradient is (dmean/dshift)^2 shift / (s^2 D).
        bound: on the norm of a step's gradient.
    """
    policy = two_dimensional_policy()
    start = steps_of(replace(seen, policy=policy))
    per_row = advantages_in_numpy(seen.scores.values, seen.rollouts.plan.group, clip=1.0)
    advantage = per_row[seen.transitions.row.numpy()]
    D = start["x"].shape[1]
    shift = np.zeros(D)
    found = ByHand([], [], [], [], shift)
    for step, these in enumerate(used):
        steps = {**start, "m": start["m"] + shift}
        log_ratio = log_prob_in_numpy(policy, **steps) - log_prob_in_numpy(policy, **start)
        A, rho = advantage[these], np.exp(log_ratio)[these]
        stopped = ((A > 0) & (rho > 1 + CLIP)) | ((A < 0) & (rho < 1 - CLIP))
        edge = np.where(A > 0, 1 + CLIP, 1 - CLIP)
        slope = (
            np.where(stopped, 0.0, -A * rho)[:, None] * log_prob_by_shift(policy, **steps)[these]
        )
        pull = mean_by_shift(policy, **start)[these] ** 2 / start["s"][these] ** 2 * shift / D
        share = 1 / (len(these) if sharing is None else sharing[step])
        # The update multiplies gradients by D.
        gradient = D * share * (slope + kl * pull).sum(axis=0)
        found.gradients.append(gradient)
        found.ratios.append(rho)
        found.advantages.append(A)
        divergence = (mean_by_shift(policy, **start)[these] * shift / start["s"][these]) ** 2 / 2
        found.losses.append(np.where(stopped, -A * edge, -A * rho) + kl * divergence.mean(axis=1))
        shift = shift - RATE * gradient * min(1.0, bound / np.linalg.norm(gradient))
    found.shift = shift
    return found


def cases(wanted: ByHand, steps: slice = slice(None)) -> dict[str, int]:
    """How many uses are outside the clip range, by side and sign of the advantage."""
    A, rho = np.concatenate(wanted.advantages[steps]), np.concatenate(wanted.ratios[steps])
    above, below = rho > 1 + CLIP, rho < 1 - CLIP
    return {
        "above, stopped": int((above & (A > 0)).sum()),
        "above, moving": int((above & (A < 0)).sum()),
        "below, stopped": int((below & (A < 0)).sum()),
        "below, moving": int((below & (A > 0)).sum()),
    }


# --- the path -------------------------------------------------------------------------------------


def check_path(minibatches: int = 2, epochs: int = 1, kinds: int = 4, **options: object) -> None:
    kl = options.pop("kl", 0.0)
    micro_batch = options.pop("micro_batch", 64)
    seen = seen_by_two_dimensional_policy(**options)
    path = walked(seen, minibatches=minibatches, epochs=epochs, kl=kl, micro_batch=micro_batch)
    assert len(path.gradients) == minibatches * epochs
    wanted = by_hand(seen, path.used, kl=kl)
    for found, by_cases in zip(path.gradients, wanted.gradients, strict=True):
        np.testing.assert_allclose(found, by_cases, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen.policy.shift.detach(), wanted.shift, rtol=1e-9)
    # Each case of clipping occurs after the first step, and none before.
    assert not any(cases(wanted, slice(0, 1)).values())
    assert sum(count > 0 for count in cases(wanted).values()) >= kinds, cases(wanted)
    assert path.statistics.diagnostics["ratio_max_deviation"] == 0
    for name, values in (("ratio", wanted.ratios), ("loss", wanted.losses)):
        mean = np.concatenate(values).mean()
        assert path.statistics.terms[name] == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("micro_batch", [1, 64])
@pytest.mark.parametrize("reward", [total, total_with_failures])
@pytest.mark.parametrize(("minibatches", "epochs"), [(2, 1), (1, 3), (3, 2)])
def test_gradients_after_the_weights_moved(minibatches, epochs, reward, micro_batch):
    """In later minibatches and epochs gradient = -(1/n) sum A rho dlog_prob over the transitions
    that clipping leaves; rho is against the policy that sampled (PPO 1707.06347, eq. 7).
    """
    check_path(minibatches, epochs, reward=reward, micro_batch=micro_batch)


def test_gradients_of_branches_after_the_weights_moved():
    """The same where a group's transitions start from one state; there are too few of them for
    every case of clipping.
    """
    check_path(2, 4, kinds=2, plan=branching_plan)


@pytest.mark.parametrize("plan", [two_groups, branching_plan])
def test_one_update_for_every_step(plan):
    """by_step: the transitions that start at one point of the grid, from noise to data, with the
    weights moving in between (the published order of E-GRPO).
    """
    seen = seen_by_two_dimensional_policy(plan)
    path = walked(seen, minibatches="by_step", epochs=2)
    step = seen.transitions.step.numpy()
    in_order = [np.flatnonzero(step == number) for number in np.unique(step)]
    assert len(in_order) > 1
    assert [sorted(used) for used in path.used] == [part.tolist() for part in in_order * 2]
    wanted = by_hand(seen, path.used)
    for found, by_cases in zip(path.gradients, wanted.gradients, strict=True):
        np.testing.assert_allclose(found, by_cases, rtol=1e-9, atol=1e-12)


def test_kl_pulls_back_after_the_weights_moved():
    """Its gradient, 0 in the first step, joins that of the clipped loss in the later ones."""
    check_path(3, 2, kl=0.5)


def test_transitions_that_are_skipped_keep_their_share_of_the_weight():
    """A tied group has advantages 0: no pass is spent on it, and the others weigh as before."""

    def only_first(images: Tensor, prompts: list[str], metadata: object) -> list[float]:
        own = total(images, prompts, metadata)
        return [
            value if prompt == "first" else 1.0 for value, prompt in zip(own, prompts, strict=True)
        ]

    seen = seen_by_two_dimensional_policy(reward=only_first)
    path = walked(seen, epochs=3)
    tied, everything = SIZES[1] * (STEPS - 1), sum(SIZES) * (STEPS - 1)
    assert path.statistics.skipped == 3 * tied
    assert [len(these) for these in path.used] == [everything - tied] * 3
    wanted = by_hand(seen, path.used, sharing=[everything] * 3)
    for found, by_cases in zip(path.gradients, wanted.gradients, strict=True):
        np.testing.assert_allclose(found, by_cases, rtol=1e-9, atol=1e-12)


def test_a_minibatch_of_tied_groups_takes_no_step():
    """No gradient, no step: an optimizer with memory would still move the weights."""

    def equal(images: Tensor, prompts: object, metadata: object) -> list[float]:
        return [1.0] * len(images)

    seen = seen_by_two_dimensional_policy(reward=equal)
    path = walked(seen, minibatches=2, epochs=2)
    assert path.gradients == []
    assert path.statistics.skipped == 2 * len(seen.transitions)
    assert path.statistics.terms == {}
    assert path.ledger.network_evaluations == path.ledger.optimizer_steps == 0
    assert torch.equal(seen.policy.shift, torch.zeros_like(seen.policy.shift))


def test_a_long_gradient_is_shortened_in_every_step():
    """Steps go no further than the bound, in the same direction; norms are noted before that."""
    seen = seen_by_two_dimensional_policy()
    bound = 0.06
    path = walked(seen, max_grad_norm=bound, minibatches=3, epochs=2)
    wanted = by_hand(seen, path.used, bound=bound)
    norms = [np.linalg.norm(gradient) for gradient in wanted.gradients]
    assert min(norms) < bound < max(norms), norms
    # torch adds 1e-6 to the norm that it divides by.
    assert path.statistics.gradient_norm == pytest.approx(norms, rel=1e-4)
    np.testing.assert_allclose(seen.policy.shift.detach(), wanted.shift, rtol=1e-4)


# --- the clip fraction ----------------------------------------------------------------------------


def check_clip_fraction(minibatches: int = 2, epochs: int = 2) -> None:
    seen = seen_by_two_dimensional_policy()
    path = walked(seen, minibatches=minibatches, epochs=epochs)
    wanted = by_hand(seen, path.used)
    outside = np.abs(np.concatenate(wanted.ratios) - 1) > CLIP
    assert outside.sum() == sum(cases(wanted).values()) > 0
    assert path.statistics.terms["clipped"] == pytest.approx(outside.mean(), rel=1e-12)
    step = seen.transitions.step.numpy()[np.concatenate(path.used)]
    for number in range(STEPS - 1):
        share = outside[step == number].mean()
        assert path.statistics.by_step["clipped"][number] == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(("minibatches", "epochs"), [(2, 1), (1, 2), (2, 2)])
def test_clip_fraction_is_the_share_of_ratios_outside_the_clip_range(minibatches, epochs):
    """Of all uses of a transition, in all steps, counted by hand; also for every sampling step."""
    check_clip_fraction(minibatches, epochs)


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (3, 1), (2, 3)])
def test_nothing_is_clipped_while_the_weights_stand_still(minibatches, epochs):
    """With a learning rate of 0 all ratios stay exactly 1."""
    path = walked(
        seen_by_two_dimensional_policy(), rate=0.0, minibatches=minibatches, epochs=epochs
    )
    assert path.statistics.terms["clipped"] == 0
    assert path.statistics.terms["ratio"] == 1


# --- who is visited when --------------------------------------------------------------------------


def check_visits(
    minibatches: int = 2, epochs: int = 2, plan=two_groups, micro_batch: int = 64
) -> None:
    seen = seen_by_two_dimensional_policy(plan)
    path = walked(seen, minibatches=minibatches, epochs=epochs, micro_batch=micro_batch)
    N = len(seen.transitions)
    assert len(path.used) == epochs * minibatches
    assert Counter(np.concatenate(path.used).tolist()) == dict.fromkeys(range(N), epochs)
    for epoch in range(epochs):
        part = path.used[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(np.concatenate(part).tolist()) == list(range(N))
    assert path.ledger.optimizer_steps == epochs * minibatches
    # One pass forward and backward for every distinct state, in every epoch.
    distinct = len(seen.transitions.state.unique())
    assert path.ledger.network_evaluations == epochs * distinct
    assert path.ledger.weighted_evaluations == 3 * epochs * distinct


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("plan", [two_groups, branching_plan])
@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 2), (2, 2), (2, 1), (1, 1), (2, 3)])
def test_every_epoch_visits_every_transition_once(minibatches, epochs, plan, micro_batch):
    """So two epochs visit each exactly twice, and a state costs one pass per epoch."""
    check_visits(minibatches, epochs, plan, micro_batch)


# --- the deal -------------------------------------------------------------------------------------

ROWS_AND_STATES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 14)), min_size=1, max_size=40
)


def deal(
    pairs: list[tuple[int, int]], count: int, seed: int = 0, iteration: int = 0, epoch: int = 0
) -> list[list[int]]:
    """Numbers of (row, state) transitions in each of `count` minibatches."""
    row, state = torch.tensor(pairs, dtype=torch.long).T
    ones = torch.ones(len(pairs), dtype=torch.float64)
    table = Transitions(
        states=torch.zeros(15, 2), state=state, next_state=state, sigma=ones, sigma_next=ones,
        std=ones, log_prob=ones, row=row, step=row, prompt=row, group=row, advantage=ones,
        weight=ones / len(pairs), idle=ones > 1, kernel=KERNEL, old_mean=None,
    )  # fmt: skip
    minibatches = update_module._minibatches(table, count, seed, iteration, epoch)
    assert len(minibatches) == count
    return [sorted(minibatch.tolist()) for minibatch in minibatches]


def states_and_partners(pairs: list[tuple[int, int]]) -> int:
    """At least how many minibatches can be filled: states, joined where their first row is one."""
    first_row = {}
    for row, state in pairs:
        first_row[state] = min(row, first_row.get(state, row))
    return len(set(first_row.values()))


@given(ROWS_AND_STATES, st.integers(1, 5), st.integers(0, 2**40), st.integers(0, 3))
@reproducible
def test_minibatches_part_the_transitions_and_keep_states_whole(pairs, count, seed, epoch):
    """Every transition is in one minibatch, beside all that start from its state."""
    count = min(count, states_and_partners(pairs))
    minibatches = deal(pairs, count, seed, epoch=epoch)
    assert sorted(n for minibatch in minibatches for n in minibatch) == list(range(len(pairs)))
    of_state = [{pairs[n][1] for n in minibatch} for minibatch in minibatches]
    assert sum(map(len, of_state)) == len({state for _, state in pairs})
    assert all(minibatches)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**40))
@reproducible
def test_rows_are_dealt_out_evenly_and_whole(rows, steps, count, seed):
    """Where no state is shared, minibatches are of whole rows, and differ by one row at most."""
    count = min(rows, count)
    pairs = [(row, row) for row in range(rows) for _ in range(steps)]
    minibatches = deal(pairs, count, seed)
    sizes = [len({pairs[n][0] for n in minibatch}) for minibatch in minibatches]
    assert sum(sizes) == rows
    assert max(sizes) - min(sizes) <= 1


@given(ROWS_AND_STATES, st.integers(1, 3))
@reproducible
def test_minibatches_that_would_stay_empty_are_refused(pairs, more):
    with pytest.raises(InputError, match=r"objective\.minibatches"):
        deal(pairs, states_and_partners(pairs) + more)


@given(
    ROWS_AND_STATES.flatmap(
        lambda pairs: st.tuples(st.just(pairs), st.permutations(range(len(pairs))))
    ),
    st.integers(1, 4),
    st.tuples(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 3)),
)
@reproducible
def test_the_deal_is_a_function_of_its_address(case, count, address):
    """The order of the table and all global random state leave it as it is."""
    pairs, order = case
    count = min(count, states_and_partners(pairs))
    minibatches = deal(pairs, count, *address)
    torch.manual_seed(address[1])
    np.random.seed(address[1])
    moved = deal([pairs[n] for n in order], count, *address)
    assert [sorted(order[n] for n in minibatch) for minibatch in moved] == minibatches


def check_every_address_deals_anew() -> None:
    pairs = [(row, row) for row in range(15)]
    addresses = [(s, i, e) for s in range(3) for i in range(3) for e in range(3)]
    deals = {str(deal(pairs, 2, *address)) for address in addresses}
    assert len(deals) == len(addresses)


def test_seed_iteration_and_epoch_deal_anew():
    """27 addresses, 27 different splits of 15 rows in two (of 6435)."""
    check_every_address_deals_anew()


def test_every_row_meets_every_place():
    """Over 600 epochs each of 6 rows is in each of 3 minibatches 200 times, within 5 sigma."""
    places = np.zeros((6, 3))
    for epoch in range(600):
        for place, minibatch in enumerate(deal([(row, row) for row in range(6)], 3, epoch=epoch)):
            places[minibatch, place] += 1
    assert np.abs(places - 200).max() < 5 * math.sqrt(600 * (1 / 3) * (2 / 3))


# --- mutations ------------------------------------------------------------------------------------


def with_the_opposite_advantage(monkeypatch) -> None:
    right = Clipped.terms

    def wrong(self: Clipped, transitions: Transitions, *arguments: object) -> dict[str, Tensor]:
        return right(self, replace(transitions, advantage=-transitions.advantage), *arguments)

    monkeypatch.setattr(Clipped, "terms", wrong)


def with_the_optimistic_bound(monkeypatch) -> None:
    right = Clipped.terms

    def wrong(self: Clipped, *arguments: object) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "maximum", torch.minimum)
            return right(self, *arguments)

    monkeypatch.setattr(Clipped, "terms", wrong)


def with_no_bound(monkeypatch) -> None:
    right = Clipped.terms

    def wrong(self: Clipped, *arguments: object) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "maximum", lambda plain, clipped: plain)
            return right(self, *arguments)

    monkeypatch.setattr(Clipped, "terms", wrong)


def with_the_density_of_now_as_the_old_one(monkeypatch) -> None:
    right = Clipped.terms

    def wrong(
        self: Clipped, part: Transitions, velocity: Tensor, others: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        density = part.density(part.mean(velocity)).detach()
        return right(self, replace(part, log_prob=density), velocity, others)

    monkeypatch.setattr(Clipped, "terms", wrong)


def with_the_first_minibatch_only(monkeypatch) -> None:
    right = update_module._minibatches

    def wrong(transitions: Transitions, count: int, *address: int) -> list[Tensor]:
        return right(transitions, count, *address)[:1] * count

    monkeypatch.setattr(update_module, "_minibatches", wrong)


def with_the_deal_of_the_first_epoch(monkeypatch) -> None:
    right = update_module._minibatches

    def wrong(
        transitions: Transitions, count: int, seed: int, iteration: int, epoch: int
    ) -> list[Tensor]:
        return right(transitions, count, seed, iteration, 0)

    monkeypatch.setattr(update_module, "_minibatches", wrong)


@pytest.mark.parametrize(
    ("check", "mutate"),
    [
        (check_path, with_the_opposite_advantage),
        (check_path, with_the_optimistic_bound),
        (check_path, with_no_bound),
        (check_path, with_the_density_of_now_as_the_old_one),
        (check_clip_fraction, with_the_opposite_advantage),
        (check_clip_fraction, with_the_optimistic_bound),
        (check_clip_fraction, with_the_density_of_now_as_the_old_one),
        (check_visits, with_the_first_minibatch_only),
        (check_every_address_deals_anew, with_the_deal_of_the_first_epoch),
    ],
)
def test_checks_reject_a_wrong_update(check, mutate, monkeypatch):
    """Each check of this file fails on code with one deliberate error."""
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
