"""GRPO mechanics: ratio, KL, loss, clipping and advantages along the real path of a training step.

Experience is sampled, scored, credited and turned into transitions by the library itself, with the
elementwise float64 policy, so bits can be compared. What comes out is compared with densities and
gradients worked out in numpy. t and t' are sigma before and after a step.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entroflow import noise
from entroflow.credit import normalise, terminal
from entroflow.credit.terminal import Terminal
from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.objectives import transitions, update
from entroflow.objectives.clipped import Clipped
from entroflow.objectives.transitions import Transitions
from entroflow.sampling import kernels, solver
from entroflow.sampling.kernels import FlowSDE
from entroflow.sampling.rollouts import Rollouts, join_rollouts
from experience import (
    KERNEL,
    STEPS,
    Experience,
    advantages_in_numpy,
    branching_plan,
    different_prompts_policy,
    every_step_plan,
    experience,
    log_prob_by_shift,
    log_prob_in_numpy,
    mean_by_shift,
    mean_in_numpy,
    steps_of,
    total,
    total_with_failures,
    updated,
)
from gaussian_policy import GaussianPolicy

reproducible = settings(deadline=None, derandomize=True, report_multiple_bugs=False)


# --- ratio ----------------------------------------------------------------------------------------


def check_ratio_is_one(
    dtype: torch.dtype = torch.float64, plan=every_step_plan, batch_size=64, micro_batch=64
) -> None:
    policy = different_prompts_policy()
    seen = experience(policy, plan(policy), dtype=dtype, batch_size=batch_size)
    statistics = updated(seen, Clipped(clip_range=1e-4), micro_batch=micro_batch)
    assert statistics.skipped == 0
    assert statistics.terms["ratio"] == 1
    assert statistics.diagnostics["ratio_max_deviation"] == 0


def check_log_prob_is_the_density_of_the_stored_states(dtype: torch.dtype, rtol: float) -> None:
    seen = experience(dtype=dtype)
    density = log_prob_in_numpy(seen.policy, **steps_of(seen))
    recorded = seen.transitions.log_prob.double().numpy()
    np.testing.assert_allclose(recorded, density, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", [every_step_plan, branching_plan])
def test_ratio_before_the_first_step_is_exactly_one(plan, dtype):
    """On policy rho = 1 bit for bit, however states are stored (PPO 1707.06347, Flow-GRPO)."""
    check_ratio_is_one(dtype, plan)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_ratio_is_one_whatever_the_batches(batch_size, micro_batch):
    """With an elementwise policy rho = 1 does not depend on how rows are batched."""
    check_ratio_is_one(batch_size=batch_size, micro_batch=micro_batch)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_recorded_log_prob_is_the_density_of_the_stored_next_state(dtype, rtol):
    """log_prob = mean over D of log N(x'; mean, s^2) at the x' that was stored (Flow-GRPO)."""
    check_log_prob_is_the_density_of_the_stored_states(dtype, rtol)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_recorded_mean_is_that_of_the_step(dtype, rtol):
    """The mean kept is x + dt [v + d / 2t (x + (1 - t) v)], unrounded (Flow-GRPO, eq. 12)."""
    seen = experience(dtype=dtype)
    wanted = mean_in_numpy(seen.policy, **steps_of(seen))
    kept = seen.transitions.old_mean.flatten(1)
    np.testing.assert_allclose(kept.double(), wanted, rtol=rtol, atol=rtol)


def test_joined_rounds_keep_every_bit():
    """Two rounds joined have the means, states and log-probabilities of each, in its precision."""
    first, second = (experience().rollouts for _ in range(2))
    joined = join_rollouts([first, second])
    for name in ("means", "log_prob", "states"):
        parts = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(getattr(joined, name), parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_policy_sees_sigma_unrounded(dtype):
    """A coarse storage type of states must not round the sigma that the velocity is taken at."""
    policy = different_prompts_policy()
    seen_sigmas, velocity = [], policy.velocity

    def recorded(x: Tensor, sigma: Tensor, *arguments: object) -> Tensor:
        seen_sigmas.extend(sigma.tolist())
        return velocity(x, sigma, *arguments)

    policy.velocity = recorded
    updated(experience(policy, dtype=dtype), Clipped(clip_range=1e-4))
    wanted = policy.sigmas(STEPS)[:-1].tolist()
    assert sorted(set(seen_sigmas), reverse=True) == pytest.approx(wanted, rel=1e-6)


def test_a_known_velocity_is_not_computed_again():
    """Branches take the velocity at their first state from the anchor that passed through it."""
    policy, ledger = different_prompts_policy(), Ledger()
    plan = branching_plan(policy)
    collected = Rollouts.empty(plan, policy.latent_shape, torch.float64)
    cond = policy.encode(collected.plan.texts)
    for _ in solver.sample(policy, KERNEL, collected, cond, address=Address(0), ledger=ledger):
        pass
    anchors, from_step_1, from_step_2 = 2 * 5, 4 * (4 - 1), 4 * (3 - 1)
    assert ledger.network_evaluations == anchors + from_step_1 + from_step_2
    assert plan.network_evaluations() == ledger.network_evaluations


def with_density_before_rounding(monkeypatch) -> None:
    """Make the solver take log-probabilities of the next state before that is rounded."""
    drawn = []

    def remembered(*arguments: object) -> Tensor:
        drawn.append(noise.gaussian(*arguments))
        return drawn[-1]

    def of_unrounded(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return kernels.log_prob(mean + kernels.beside(std, mean) * drawn[-1].to(mean), mean, std)

    monkeypatch.setattr(solver, "gaussian", remembered)
    monkeypatch.setattr(solver, "log_prob", of_unrounded)


def with_next_states_of_the_following_transition(monkeypatch) -> None:
    right = transitions.transitions_of

    def shifted(*arguments: object) -> Transitions:
        table = right(*arguments)
        return replace(table, next_state=table.next_state.roll(-1))

    monkeypatch.setattr(transitions, "transitions_of", shifted)


@pytest.mark.parametrize(
    "mutate", [with_density_before_rounding, with_next_states_of_the_following_transition]
)
@pytest.mark.parametrize(
    "check",
    [check_ratio_is_one, partial(check_log_prob_is_the_density_of_the_stored_states, rtol=1e-4)],
)
def test_ratio_checks_reject_wrong_bookkeeping(check, mutate, monkeypatch):
    """Negative control: log_prob of the unrounded state, or of another transition's state."""
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(torch.bfloat16)


# --- KL -------------------------------------------------------------------------------------------


def kl_only(policy: GaussianPolicy | None = None) -> Experience:
    """Experience whose advantages are all 0, so that only the KL has a gradient."""
    return experience(policy, reward=lambda images, prompts, metadata: [1.0] * len(images))


def test_kl_to_an_equal_reference_is_exactly_zero():
    """With reference = live weights, KL = 0 and its gradient is 0, and no weight moves."""
    policy = different_prompts_policy()
    with torch.no_grad():
        policy.shift.copy_(torch.linspace(-1, 1, 6).reshape(3, 2))
    policy.weights.keep("reference")
    before = policy.shift.detach().clone()
    statistics = updated(kl_only(policy), Clipped(clip_range=1e-4, kl=3.0), learning_rate=1.0)
    assert statistics.terms["kl"] == 0
    assert statistics.gradient_norm == [0.0]
    assert torch.equal(policy.shift, before)


def away_from_reference() -> tuple[Experience, np.ndarray]:
    """Experience of a policy whose shift differs from the reference, and the difference [D]."""
    policy = different_prompts_policy()
    difference = torch.linspace(-0.5, 1.0, 6, dtype=torch.float64)
    with torch.no_grad():
        policy.shift.copy_(difference.reshape(3, 2))
    return kl_only(policy), difference.numpy()


def check_kl_by_step() -> None:
    seen, difference = away_from_reference()
    by_step = updated(seen, Clipped(clip_range=1e-4, kl=1.0)).by_step["kl"]
    grid, a = seen.rollouts.plan.base_grid.numpy(), KERNEL.noise_level
    assert by_step.keys() == set(range(STEPS - 1))
    for step in range(1, STEPS - 1):
        t, length = grid[step], grid[step] - grid[step + 1]
        velocity_difference = difference * t / ((1 - t) ** 2 * seen.policy.variance + t**2)
        factor = length * (1 - t) / (2 * t) * (1 / a + a / 2) ** 2
        wanted = np.mean(velocity_difference**2) * factor
        assert by_step[step] == pytest.approx(wanted, rel=1e-10)


def test_kl_of_a_step_follows_from_the_difference_of_velocities():
    """KL = mean dv^2 |dt| (1 - t) / (2 t) (1/a + a/2)^2 per dimension for t < 1 (Flow-GRPO)."""
    check_kl_by_step()


@pytest.mark.parametrize("weighting", ["uniform", "step_length"])
def test_gradient_of_the_kl(weighting):
    """d KL / dshift = (dmean/dshift)^2 difference / (s^2 D), times |dt| as in Flow-GRPO's code."""
    seen, difference = away_from_reference()
    steps, beta, rate = steps_of(seen), 0.3, 1e-3
    before = seen.policy.shift.detach().flatten().numpy().copy()
    updated(seen, Clipped(clip_range=1e-4, kl=beta, kl_weight=weighting), learning_rate=rate)
    weight = steps["t"] - steps["t_next"] if weighting == "step_length" else 1.0
    curvature = np.mean(weight * mean_by_shift(seen.policy, **steps) ** 2 / steps["s"] ** 2)
    # The update multiplies gradients by D.
    wanted = before - rate * beta * curvature * difference
    np.testing.assert_allclose(seen.policy.shift.detach().flatten(), wanted, rtol=1e-10)


def test_kl_weighted_by_step_length_is_the_true_kl_times_the_step_length():
    """The KL term that Flow-GRPO's code adds, over the true one, is |dt|."""
    seen, _ = away_from_reference()
    true, coded = (
        updated(seen, Clipped(clip_range=1e-4, kl=1.0, kl_weight=weighting)).by_step
        for weighting in ("uniform", "step_length")
    )
    grid = seen.rollouts.plan.base_grid.tolist()
    for step in range(STEPS - 1):
        length = grid[step] - grid[step + 1]
        assert coded["loss"][step] == pytest.approx(length * true["loss"][step], rel=1e-12)
        # Both are written down.
        assert coded["kl"][step] == pytest.approx(true["kl"][step], rel=1e-12)
        assert coded["weighted_kl"][step] == pytest.approx(length * true["kl"][step], rel=1e-12)
    assert "weighted_kl" not in true


def test_the_kl_before_the_first_step_does_not_depend_on_the_objective(monkeypatch):
    """From the passes of the loss, or from passes of its own: the mean of the closed form."""
    seen, difference = away_from_reference()
    monkeypatch.setattr(update, "COMPARED", len(seen.transitions))
    steps = steps_of(seen)
    move = mean_by_shift(seen.policy, **steps) / steps["s"]
    wanted = np.mean(move**2) * np.mean(difference**2) / 2
    assert wanted > 0
    for beta in (0.0, 0.3):
        found = updated(seen, Clipped(clip_range=1e-4, kl=beta)).diagnostics["kl"]
        assert found == pytest.approx(wanted, rel=1e-10)


# --- loss and gradient at ratio 1 -----------------------------------------------------------------


def check_on_policy_gradient(reward=total, plan=every_step_plan, micro_batch=64) -> None:
    policy, rate = different_prompts_policy(), 1e-3
    credit = Terminal(advantage_clip=1.0)
    seen = experience(policy, plan(policy), reward=reward, credit=credit)
    per_row = advantages_in_numpy(seen.scores.values, seen.rollouts.plan.group, clip=1.0)
    advantage = per_row[seen.transitions.row.numpy()]
    valid = ~np.isnan(advantage)
    D = seen.policy.shift.numel()
    by_shift = log_prob_by_shift(policy, **steps_of(seen))
    gradient = -(np.where(valid, advantage, 0)[:, None] * by_shift).sum(axis=0)
    statistics = updated(seen, Clipped(clip_range=1e-4), rate, micro_batch)
    wanted = -rate * D * gradient / valid.sum()
    np.testing.assert_allclose(seen.policy.shift.detach().flatten(), wanted, rtol=1e-9)
    norm = D * np.linalg.norm(gradient) / valid.sum()
    assert statistics.gradient_norm == pytest.approx([norm], rel=1e-9)


class GivenDensity(Transitions):
    """Transitions of two values whose log-density stands in the place of the velocity."""

    def mean(self, velocity):
        return velocity[:, None].expand(-1, 2)

    def density(self, mean):
        return mean[:, 0]


def surrogate(advantage: Tensor, log_ratio: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The clipped loss [n] of transitions of two values each, and its gradient by log rho."""
    n = len(advantage)
    zeros, ones = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    numbers = torch.arange(n)
    table = GivenDensity(
        kernel=FlowSDE(), states=torch.zeros(2 * n, 2), state=numbers, next_state=numbers + n,
        sigma=ones, sigma_next=zeros, std=ones, log_prob=zeros - 1.25,
        row=numbers, step=numbers, prompt=numbers, group=numbers,
        advantage=advantage, weight=ones / n, idle=torch.zeros(n, dtype=torch.bool),
        old_mean=None,
    )  # fmt: skip
    log_prob = (log_ratio - 1.25).requires_grad_()
    loss = Clipped(clip_range=clip).terms(table, log_prob, {})["loss"]
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    return loss.detach(), gradient


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
@pytest.mark.parametrize("plan", [every_step_plan, branching_plan])
@pytest.mark.parametrize("reward", [total, total_with_failures])
def test_gradient_at_ratio_one_is_the_policy_gradient(reward, plan, micro_batch):
    """Gradient = -(1/N) sum A dlog_prob over the N transitions whose reward did not fail (GRPO)."""
    check_on_policy_gradient(reward, plan, micro_batch)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30))
@reproducible
def test_loss_at_ratio_one_is_minus_the_mean_advantage(advantages):
    """At rho = 1 the loss is -A and its gradient by log rho is -A (PPO 1707.06347)."""
    advantage = torch.tensor(advantages, dtype=torch.float64)
    loss, gradient = surrogate(advantage, torch.zeros_like(advantage), clip=0.1)
    torch.testing.assert_close(loss.mean(), -advantage.mean(), rtol=0, atol=0)
    torch.testing.assert_close(gradient, -advantage, rtol=0, atol=0)


@pytest.mark.parametrize("clip", [0.5, 5.0])
def test_loss_of_an_iteration_is_minus_the_mean_clamped_advantage(clip):
    """-mean clamp(A, -c, c), which is 0 for whole groups unless the clamp acts (Flow-GRPO)."""
    seen = experience(credit=Terminal(advantage_clip=clip))
    loss = updated(seen, Clipped(clip_range=1e-4)).terms["loss"]
    per_row = advantages_in_numpy(seen.scores.values, seen.rollouts.plan.group, clip=clip)
    assert loss == pytest.approx(-per_row[seen.transitions.row.numpy()].mean(), abs=1e-12)
    if clip == 5.0:
        assert loss == pytest.approx(0.0, abs=1e-12)


def test_transitions_of_failed_rewards_have_no_weight():
    """A failed reward has weight 0 for its steps; the other weights are equal and sum to 1."""
    seen = experience(reward=total_with_failures)
    failed = seen.scores.values.isnan()[seen.transitions.row]
    weight = seen.transitions.weight
    assert failed.any()
    assert torch.equal(weight > 0, ~failed)
    torch.testing.assert_close(weight[~failed], torch.full_like(weight[~failed], weight.max()))
    assert weight.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert updated(seen, Clipped(clip_range=1e-4)).skipped == int(failed.sum())


# --- clipping -------------------------------------------------------------------------------------


def check_clipping() -> None:
    A, clip = 1.5, 0.2
    for advantage, ratio, moves in (
        (A, 1.3, False),
        (A, 1.1, True),
        (A, 0.9, True),
        (A, 0.7, True),
        (-A, 1.3, True),
        (-A, 1.1, True),
        (-A, 0.9, True),
        (-A, 0.7, False),
    ):
        log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64)
        loss, gradient = surrogate(torch.tensor([advantage]).double(), log_ratio, clip)
        nearest = min(max(ratio, 1 - clip), 1 + clip)
        assert gradient.item() == pytest.approx(-advantage * ratio if moves else 0.0, rel=1e-12)
        assert loss.item() == pytest.approx(-advantage * (ratio if moves else nearest), rel=1e-12)


def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_too_far():
    """A > 0: no gradient iff rho > 1 + c; A < 0: none iff rho < 1 - c (PPO 1707.06347, eq. 7)."""
    check_clipping()


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-1, 1)), min_size=1, max_size=20),
    st.floats(0.01, 0.5),
)
@reproducible
def test_clipped_loss_is_the_pessimistic_one(pairs, clip):
    """Loss = -min(A rho, A clip(rho, 1 - c, 1 + c)), entry by entry (PPO 1707.06347, eq. 7)."""
    advantage, log_ratio = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    loss, _ = surrogate(advantage, log_ratio, clip)
    ratio = np.exp(log_ratio.numpy())
    wanted = -np.minimum(
        advantage.numpy() * ratio, advantage.numpy() * np.clip(ratio, 1 - clip, 1 + clip)
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimensions", [1, 3072, 65536])
def test_total_clip_range_bounds_the_true_log_ratio(dimensions):
    """`clip_total` C bounds the true log-ratio, so each of D dimensions has C / D."""
    assert Clipped(clip_total=0.3).clip(dimensions) == pytest.approx(0.3 / dimensions, rel=1e-15)
    assert Clipped(clip_range=1e-4).clip(dimensions) == 1e-4


# --- advantages -----------------------------------------------------------------------------------

REWARD = st.one_of(st.integers(-40, 40).map(lambda n: n / 8), st.just(math.nan))
"""Eighths, which sum without rounding, and failures."""

GROUPED = st.lists(st.tuples(REWARD, st.integers(0, 3)), min_size=1, max_size=24)
DDOF = st.sampled_from([0, 1])


def group_advantages(pairs: list[tuple[float, int]], **options: object) -> np.ndarray:
    """Advantages of (reward, group) pairs."""
    rewards = torch.tensor([r for r, _ in pairs], dtype=torch.float64)
    group = torch.tensor([g for _, g in pairs], dtype=torch.long)
    return normalise.group_advantages(rewards, group, **options).numpy()


def check_advantages() -> None:
    @given(GROUPED, st.sampled_from(["group", "global", "none"]), DDOF, st.sampled_from([1.0, 5.0]))
    @reproducible
    def agrees_with_the_loop(pairs, scale, ddof, clip):
        options = {"scale": scale, "ddof": ddof, "epsilon": 1e-4, "clip": clip}
        rewards, group = zip(*pairs, strict=True)
        wanted = advantages_in_numpy(rewards, group, **options)
        np.testing.assert_allclose(group_advantages(pairs, **options), wanted, rtol=0, atol=1e-10)

    agrees_with_the_loop()


def test_advantages_agree_with_a_loop_over_groups():
    """A = clamp((R - mean) / (std + eps)) with failed rewards left out (GRPO 2402.03300)."""
    check_advantages()


@given(GROUPED, st.sampled_from(["group", "global", "none"]), DDOF)
@reproducible
def test_advantages_of_a_group_sum_to_zero(pairs, scale, ddof):
    """Unless clamped, the advantages of every group sum to 0 (GRPO 2402.03300)."""
    advantages = group_advantages(pairs, scale=scale, ddof=ddof, clip=1e9)
    groups = np.array([g for _, g in pairs])
    for g in np.unique(groups):
        assert np.nansum(advantages[groups == g]) == pytest.approx(0.0, abs=1e-9)


@given(GROUPED, st.integers(-800, 800).map(lambda n: n / 8), DDOF)
@reproducible
def test_advantages_ignore_a_constant_added_to_all_rewards(pairs, constant, ddof):
    """R -> R + c changes nothing (GRPO 2402.03300)."""
    moved = [(r + constant, g) for r, g in pairs]
    np.testing.assert_allclose(
        group_advantages(moved, ddof=ddof), group_advantages(pairs, ddof=ddof), rtol=0, atol=1e-9
    )


@given(GROUPED, st.floats(0.01, 100), DDOF)
@reproducible
def test_advantages_ignore_the_scale_of_rewards(pairs, factor, ddof):
    """R -> a R changes nothing for a > 0 once eps = 0 (GRPO 2402.03300)."""
    options = {"ddof": ddof, "epsilon": 0.0}
    scaled = [(factor * r, g) for r, g in pairs]
    np.testing.assert_allclose(
        group_advantages(scaled, **options), group_advantages(pairs, **options), rtol=0, atol=1e-9
    )


@given(GROUPED.flatmap(lambda pairs: st.tuples(st.just(pairs), st.permutations(range(len(pairs))))))
@reproducible
def test_advantages_follow_a_permutation_of_rewards(case):
    """Advantages move with their rewards, and the names of groups do not matter."""
    pairs, order = case
    shuffled = [(pairs[i][0], 7 - pairs[i][1]) for i in order]
    np.testing.assert_allclose(
        group_advantages(shuffled), group_advantages(pairs)[order], rtol=0, atol=1e-10
    )


@given(GROUPED, DDOF)
@reproducible
def test_failed_rewards_leave_the_others_alone(pairs, ddof):
    """A NaN reward has a NaN advantage, and the others have what they would have without it."""
    advantages = group_advantages(pairs, ddof=ddof)
    failed = np.array([math.isnan(r) for r, _ in pairs])
    assert np.array_equal(np.isnan(advantages), failed)
    others = [pair for pair, gone in zip(pairs, failed, strict=True) if not gone]
    np.testing.assert_allclose(
        advantages[~failed], group_advantages(others, ddof=ddof), rtol=0, atol=1e-12
    )


@given(
    st.floats(-1e6, 1e6),
    st.integers(1, 30),
    st.sampled_from(["group", "global", "none"]),
    DDOF,
    st.sampled_from([0.0, 1e-4]),
    st.booleans(),
)
@reproducible
def test_equal_rewards_have_advantages_of_exactly_zero(value, size, scale, ddof, epsilon, failure):
    """A tied group, or a group of one, gets 0 and no NaN, whatever rounding does to its mean."""
    pairs = [(value, 0)] * size + [(1.0, 1), (2.0, 1)] + [(math.nan, 0)] * failure
    advantages = group_advantages(pairs, scale=scale, ddof=ddof, epsilon=epsilon)
    assert np.array_equal(advantages[:size], np.zeros(size))
    assert (advantages[size : size + 2] != 0).all()


def test_rewards_equal_up_to_rounding_are_tied():
    """A spread of 1e-9 of the mean, or of 1, is a tie; ten times that is not."""
    for level in (0.0, 1.0, 1e6):
        unit = 1e-9 * max(1.0, level)
        tied, apart = [(level, 0), (level + 0.5 * unit, 0)], [(level, 0), (level + 10 * unit, 0)]
        assert np.array_equal(group_advantages(tied, epsilon=0.0), np.zeros(2))
        assert (group_advantages(apart, epsilon=0.0) != 0).all()


@pytest.mark.parametrize(("ddof", "size"), [(0, 1.0), (1, math.sqrt(0.5))])
def test_advantages_of_a_pair(ddof, size):
    """Two rewards have advantages +-1 with ddof = 0 and +-0.7071 with ddof = 1, eps aside."""
    advantages = group_advantages([(3.0, 0), (5.0, 0)], ddof=ddof, epsilon=0.0)
    np.testing.assert_allclose(advantages, [-size, size], rtol=1e-12)


def check_direction_of_the_policy_gradient(group_size: int = 12, ddof: int = 0) -> None:
    n, weights = 20000, np.array([0.6, -1.2, 0.3])
    groups = torch.arange(n).repeat_interleave(group_size)
    eps = np.random.default_rng(0).standard_normal((n * group_size, 3))
    rewards = torch.from_numpy(eps @ weights)
    advantages = normalise.group_advantages(rewards, groups, ddof=ddof, epsilon=0.0, clip=1e9)
    per_group = (advantages.numpy()[:, None] * eps).reshape(n, group_size, 3).mean(axis=1)
    G = group_size
    c4 = math.sqrt(2 / (G - 1)) * scipy.special.gamma(G / 2) / scipy.special.gamma((G - 1) / 2)
    kappa = c4 * ((G - 1) / G if ddof == 1 else math.sqrt((G - 1) / G))
    standard_error = per_group.std(axis=0, ddof=1) / math.sqrt(n)
    wanted = kappa * weights / np.linalg.norm(weights)
    assert (np.abs(per_group.mean(axis=0) - wanted) < 4 * standard_error).all()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("group_size", [2, 4, 12])
def test_expected_policy_gradient_points_along_a_linear_reward(group_size, ddof):
    """R = w.eps: E[mean A eps] = kappa w / |w| within 4 standard errors (derived).

    kappa = sqrt((G - 1) / G) c4(G) with ddof = 0 and (G - 1) / G c4(G) with ddof = 1.
    """
    check_direction_of_the_policy_gradient(group_size, ddof)


def check_scale_is_local(scale: str, local: bool) -> None:
    """Whether rewards ten times as large for prompt 0 leave the advantages of prompt 1 alone."""
    seen = experience(credit=Terminal(scale=scale))
    larger = torch.where(seen.rollouts.plan.group == 0, 10.0, 1.0) * seen.scores.values
    credit = Terminal(scale=scale)
    before = credit.advantages(seen.rollouts, seen.scores)
    after = credit.advantages(seen.rollouts, replace(seen.scores, values=larger))
    elsewhere = seen.rollouts.plan.group == 1
    assert torch.equal(before[elsewhere], after[elsewhere]) == local


@pytest.mark.parametrize(("scale", "local"), [("group", True), ("none", True), ("global", False)])
def test_only_the_global_scale_couples_prompts(scale, local):
    """Scaling one prompt's rewards moves other prompts' advantages only if the std is global."""
    check_scale_is_local(scale, local)


def test_every_step_of_a_row_has_the_advantage_of_its_image():
    """Terminal credit: all transitions of a row carry its normalised final reward (Flow-GRPO)."""
    seen = experience(credit=Terminal(ddof=1, epsilon=1e-3))
    group = seen.rollouts.plan.group
    per_row = advantages_in_numpy(seen.scores.values, group, ddof=1, epsilon=1e-3)
    wanted = per_row[seen.transitions.row.numpy()]
    np.testing.assert_allclose(seen.transitions.advantage, wanted, rtol=0, atol=1e-12)
    assert np.bincount(seen.transitions.row).tolist() == [STEPS - 1] * 10


# --- mutations ------------------------------------------------------------------------------------


def with_the_other_ddof(monkeypatch) -> None:
    right = normalise.group_advantages

    def wrong(*arguments: object, ddof: int = 0, **options: object) -> Tensor:
        return right(*arguments, ddof=1 - ddof, **options)

    monkeypatch.setattr(normalise, "group_advantages", wrong)
    monkeypatch.setattr(terminal, "group_advantages", wrong)


def with_the_groups_of_the_next_row(monkeypatch) -> None:
    right = normalise.group_advantages

    def wrong(rewards: Tensor, group: Tensor, **options: object) -> Tensor:
        return right(rewards, group.roll(1), **options)

    monkeypatch.setattr(normalise, "group_advantages", wrong)
    monkeypatch.setattr(terminal, "group_advantages", wrong)


def with_the_opposite_advantage(monkeypatch) -> None:
    right = Clipped.terms

    def wrong(self: Clipped, transitions: Transitions, *arguments: object) -> dict[str, Tensor]:
        return right(self, replace(transitions, advantage=-transitions.advantage), *arguments)

    monkeypatch.setattr(Clipped, "terms", wrong)


def with_the_optimistic_bound(monkeypatch) -> None:
    monkeypatch.setattr(torch, "maximum", torch.minimum)


def with_twice_the_kl(monkeypatch) -> None:
    right = Clipped.terms

    def wrong(self: Clipped, *arguments: object) -> dict[str, Tensor]:
        terms = right(self, *arguments)
        return {**terms, "kl": 2 * terms["kl"]}

    monkeypatch.setattr(Clipped, "terms", wrong)


@pytest.mark.parametrize(
    ("check", "mutate"),
    [
        (check_kl_by_step, with_twice_the_kl),
        (check_on_policy_gradient, with_the_opposite_advantage),
        (check_on_policy_gradient, with_the_other_ddof),
        (check_on_policy_gradient, with_next_states_of_the_following_transition),
        (check_clipping, with_the_optimistic_bound),
        (check_clipping, with_the_opposite_advantage),
        (check_advantages, with_the_other_ddof),
        (check_advantages, with_the_groups_of_the_next_row),
        (check_direction_of_the_policy_gradient, with_the_other_ddof),
        (partial(check_scale_is_local, "group", True), with_the_groups_of_the_next_row),
    ],
)
def test_checks_reject_a_wrong_mechanism(check, mutate, monkeypatch):
    """Each check of this file fails on code with one deliberate error."""
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
