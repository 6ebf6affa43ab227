"""TP-GRPO (2602.06422): increments, turning points, balancing, completions and what they cost.

R_k is the reward of the ODE completion of the state before stochastic step k, and R_n that of the
rollout itself. The definitions are written out below step by step, for one trajectory at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entroflow.credit.terminal import Terminal
from entroflow.credit.turning_points import (
    TurningPoints,
    aggregated,
    balanced,
    increments,
    turning_points,
)
from entroflow.errors import InputError
from entroflow.exploration.base import Request
from entroflow.exploration.every_step import EveryStep
from entroflow.exploration.merged_steps import MergedSteps
from entroflow.exploration.window import Window
from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.prompts import Prompt
from entroflow.recipe.load import load_recipe
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.scoring import score
from entroflow.sampling.kernels import ODE, FlowSDE
from entroflow.sampling.plan import Role, fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from gaussian_policy import GaussianPolicy

PROMPTS = [Prompt("first"), Prompt("second")]


# --- the definitions, one trajectory at a time ----------------------------------------------------


def sign(x):
    return (x > 0) - (x < 0)


def turns_by_definition(R, constraint):
    """Steps k that turn, by definitions 4.1 (plain) and 5.1 (consistent)."""
    n, found = len(R) - 1, set()
    d = [R[k + 1] - R[k] for k in range(n)]
    whole = sign(R[n] - R[0])
    for k in range(n):
        with_whole = sign(d[k]) * whole > 0
        rest = sign(d[k]) * sign(R[n] - R[k + 1]) > 0
        if k == 0:
            turns = rest if constraint == "consistent" else with_whole
        else:
            turns = with_whole and sign(d[k - 1]) * whole < 0
            if constraint == "consistent":
                turns = turns and rest
        if turns:
            found.add(k)
    return found


def earned_by_definition(R, turns):
    n = len(R) - 1
    return [R[n] - R[k] if k in turns else R[k + 1] - R[k] for k in range(n)]


def table(R):
    return torch.tensor([R], dtype=torch.float64)


def traced(credit, R, prompt):
    """Trajectories of which nothing is known but rewards [R, n + 1] and prompts."""
    row = torch.zeros(R.shape, dtype=torch.long)
    return credit.traced(row, row[:, 1:], R, prompt)


def earned_by(credit, R, prompt):
    return traced(credit, R, prompt).earned


def found(R, constraint, **options):
    turns = turning_points(table(R), constraint, **options)[0]
    return set(turns.nonzero()[:, 0].tolist())


# Rewards as judges give them: often equal, so that signs of 0 occur.
rewards = st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=11)


@settings(max_examples=300, deadline=None)
@given(rewards, st.sampled_from(["plain", "consistent"]))
def test_turning_points_are_those_of_the_definitions(R, constraint):
    turns = found(R, constraint)
    assert turns == turns_by_definition(R, constraint)
    credit = TurningPoints(constraint=constraint, balance="off")
    earned = earned_by(credit, table(R), torch.zeros(1, dtype=torch.long))
    assert earned[0].tolist() == earned_by_definition(R, turns)


@pytest.mark.parametrize(
    ("R", "plain", "plain_earned", "consistent", "consistent_earned"),
    [
        ([0, -1, 2, 1, 3], {1, 3}, [-1, 4, -1, 2], {1}, [-1, 4, -1, 2]),
        ([0, 10, 8, 9, 1], {0, 2}, [1, -2, -7, -8], set(), [10, -2, 1, -8]),
        ([0, 1, 2, 3], {0}, [3, 1, 1], {0}, [3, 1, 1]),
        ([0, -1, -2, -3], {0}, [-3, -1, -1], {0}, [-3, -1, -1]),
        ([0, 0, 1, 1], set(), [0, 1, 0], set(), [0, 1, 0]),
        ([0, 1], {0}, [1], set(), [1]),
        ([2, 1, 3, 2, 2], set(), [-1, 2, -1, 0], set(), [-1, 2, -1, 0]),
        # Step 2 turns, and what follows undoes it: R_n - R_2 = 0 is what it earns, not d_2 = 2.
        ([0, 2, 1, 3, 1], {0, 2}, [1, -1, 0, -2], set(), [2, -1, 2, -2]),
    ],
)
def test_worked_examples(R, plain, plain_earned, consistent, consistent_earned):
    """The reference's seven, and a plain turning point that is worth nothing."""
    none = torch.zeros(1, dtype=torch.long)
    for constraint, turns, earned in (
        ("plain", plain, plain_earned), ("consistent", consistent, consistent_earned)
    ):  # fmt: skip
        assert found(R, constraint) == turns
        credit = TurningPoints(constraint=constraint, balance="off")
        assert earned_by(credit, table(R), none)[0].tolist() == earned


@settings(max_examples=300, deadline=None)
@given(rewards)
def test_increments_add_up_and_consistent_turns_agree(R):
    """sum d = R_n - R_0, and the lemma of appendix C."""
    d, agg = increments(table(R))[0].tolist(), aggregated(table(R))[0].tolist()
    n = len(d)
    assert sum(d) == R[-1] - R[0] == agg[0]
    assert agg == [sum(d[k:]) for k in range(n)]
    assert agg[-1] == d[-1]
    consistent, plain = found(R, "consistent"), found(R, "plain")
    assert consistent <= plain
    assert n - 1 not in consistent
    for k in consistent:
        assert sign(agg[k]) == sign(d[k]) == sign(R[-1] - R[0])
        assert abs(agg[k]) > abs(d[k])


@settings(max_examples=200, deadline=None)
@given(rewards, st.sampled_from(["plain", "consistent"]), st.floats(0.1, 9), st.floats(-9, 9))
def test_scale_and_offset_of_the_reward_change_no_turning_point(R, constraint, a, b):
    """R -> a R + b scales what is earned; R -> -R flips it."""
    none = torch.zeros(1, dtype=torch.long)
    credit = TurningPoints(constraint=constraint, balance="off")
    before = earned_by(credit, table(R), none)
    # Where rounding makes a sign of an exact tie, the claim does not hold.
    exact = [round(a * 8) / 8 * x + round(b * 8) / 8 for x in R]
    assert found(exact, constraint) == found(R, constraint)
    torch.testing.assert_close(earned_by(credit, table(exact), none), round(a * 8) / 8 * before)
    turned = [-x for x in R]
    assert found(turned, constraint) == found(R, constraint)
    assert torch.equal(earned_by(credit, table(turned), none), -before)


def test_the_first_step_may_be_left_out():
    assert found([0, 1, 2, 3], "consistent", first_step=False) == set()
    assert found([0, -1, 2, 1, 3], "plain", first_step=False) == {1, 3}


def test_small_differences_have_no_sign_in_the_dead_band():
    """Judges are noisy: a fall of 0.1 before the rise makes no turn where 0.2 is noise."""
    R = [0.0, -0.1, 2.0, 3.0]
    assert found(R, "consistent") == {1}
    assert found(R, "consistent", dead_band=0.2) == set()
    # The first step still has no sign, so it turns neither.
    assert found([0.0, 0.1, 2.0], "plain", dead_band=0.2) == set()
    assert found([0.0, 0.3, 2.0], "plain", dead_band=0.2) == {0}


# --- failures -------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(rewards, st.data(), st.sampled_from(["plain", "consistent"]))
def test_a_reward_that_failed_takes_its_increments_and_the_turns_that_use_them(R, data, constraint):
    """All else is as it was; without R_0 or R_n nothing of the trajectory is known."""
    k = data.draw(st.integers(0, len(R) - 1))
    n = len(R) - 1
    broken = [math.nan if i == k else x for i, x in enumerate(R)]
    credit = TurningPoints(constraint=constraint, balance="off")
    none = torch.zeros(1, dtype=torch.long)
    earned = earned_by(credit, table(broken), none)[0].tolist()
    if k in (0, n):
        assert all(map(math.isnan, earned))
        return
    assert {j for j in range(n) if math.isnan(earned[j])} == {k - 1, k}
    before = turns_by_definition(R, constraint)
    # A turn at step j uses d_(j - 1), d_j and, if consistent, R_(j + 1).
    void = {k - 1, k, k + 1}
    assert found(broken, constraint) == before - void
    whole = earned_by_definition(R, before - void)
    assert [x for j, x in enumerate(earned) if j not in (k - 1, k)] == [
        x for j, x in enumerate(whole) if j not in (k - 1, k)
    ]


# --- balancing ------------------------------------------------------------------------------------


def test_the_largest_of_the_more_frequent_side_stay():
    worth = torch.tensor([[5.0, 3.0, 1.0, -2.0]])
    turns = torch.ones(1, 4, dtype=torch.bool)
    assert balanced(turns, worth).tolist() == [[True, False, False, True]]
    one_sided = torch.tensor([[5.0, 3.0, 1.0, 2.0]])
    assert balanced(turns, one_sided).all()


def balanced_by_sorting(turns, worth):
    """Indices kept, from lists."""
    up = sorted((i for i, t in enumerate(turns) if t and worth[i] > 0), key=lambda i: -worth[i])
    down = sorted((i for i, t in enumerate(turns) if t and worth[i] < 0), key=lambda i: worth[i])
    m = min(len(up), len(down))
    even = [i for i, t in enumerate(turns) if t and worth[i] == 0]
    return sorted(up + down + even if m == 0 else up[:m] + down[:m] + even)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-5, 5)), min_size=6, max_size=24))
def test_balancing_is_that_of_sorted_lists_and_done_once(pairs):
    pairs = pairs[: len(pairs) // 3 * 3]
    turns = torch.tensor([t for t, _ in pairs]).reshape(-1, 3)
    worth = torch.tensor([float(w) for _, w in pairs]).reshape(-1, 3)
    kept = balanced(turns, worth)
    wanted = balanced_by_sorting(turns.flatten().tolist(), worth.flatten().tolist())
    assert kept.flatten().nonzero()[:, 0].tolist() == wanted
    assert torch.equal(balanced(kept, worth), kept)
    assert not (kept & ~turns).any()


def test_what_is_dropped_earns_its_increment_again():
    """Three rising turns and one falling; scopes: the batch, each prompt, or none."""
    R = torch.tensor([[0, -1, 2, 5], [0, -1, 1, 2], [0, -1, 3, 4], [0, 1, -3, -4]]).double()
    prompt = torch.tensor([0, 0, 1, 1])
    turns = {
        scope: traced(TurningPoints(balance=scope), R, prompt).turns
        for scope in ("batch", "prompt", "off")
    }
    assert turns["off"][:, 1].tolist() == [True] * 4
    assert turns["batch"][:, 1].tolist() == [True, False, False, True]
    assert turns["prompt"][:, 1].tolist() == [True, True, True, True]
    earned = earned_by(TurningPoints(balance="batch"), R, prompt)
    assert earned[:, 1].tolist() == [6, 2, 4, -5]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-0.5, 2.0]), min_size=2, max_size=11),
    st.sampled_from(["plain", "consistent"]),
)
def test_of_a_reward_with_two_values_nothing_turns(R, constraint):
    """What follows a turning point is its increment, so all three choices are one."""
    prompt = torch.zeros(1, dtype=torch.long)
    turning = traced(TurningPoints(constraint=constraint, balance="off"), table(R), prompt)
    assert torch.equal(turning.earned, increments(table(R)))
    later = turning.turns[:, 1:]
    assert not (constraint == "consistent" and later.any())


def test_increments_alone_are_the_third_choice():
    R = torch.tensor([[0, -1, 2, 1, 3.0]], dtype=torch.float64)
    earned = earned_by(TurningPoints(aggregate=False), R, torch.zeros(1, dtype=torch.long))
    assert torch.equal(earned, increments(R))


# --- completions ----------------------------------------------------------------------------------


class Still:
    """Steps that are stochastic by name: the ODE, with a noise that changes no bit."""

    def std(self, sigma, sigma_next, base_grid):
        return torch.full_like(sigma, 1e-40)

    def mean(self, x, velocity, sigma, sigma_next, std):
        return ODE().mean(x, velocity, sigma, sigma_next, std)


def plan_of(exploration, policy, steps, sizes=(3, 2), kernel=None, seed=0):
    request = Request(
        PROMPTS, torch.tensor(sizes), torch.zeros(len(sizes), dtype=torch.long),
        policy.sigmas(steps), kernel or FlowSDE(noise_level=0.7), seed, 0,
    )  # fmt: skip
    return exploration.plan(request)


def nonlinear(images, prompts, metadata):
    """No completion has the reward of another by chance."""
    return (3 * images.double().flatten(1)).sin().sum(dim=1).tolist()


def run(plan, policy, kernel=None, credit=None, reward=nonlinear, ledger=None):
    """Rollouts, scores and rewards R_k of a plan with its completions, in float64."""
    credit = credit or TurningPoints()
    whole = credit.complete(plan)
    collected = Rollouts.empty(whole, policy.latent_shape, torch.float64)
    cond = policy.encode(whole.texts)
    with torch.no_grad():
        finished = sample(
            policy, kernel or FlowSDE(noise_level=0.7), collected, cond, address=Address(0),
             batch_size=7, ledger=ledger,
        )  # fmt: skip
        scores = score(as_rewards(reward).parts, collected, finished, ledger)["reward"]
    return collected, scores, credit.trace(whole, scores).rewards


def gaussian():
    return GaussianPolicy(0.3, 0.5, latent_shape=(3, 2), offsets={"second": 1.0})


def test_without_noise_all_completions_are_the_image_itself():
    """R_0 = ... = R_n to the bit, so nothing turns and nothing is earned (T2)."""
    policy, kernel = gaussian(), Still()
    plan = plan_of(EveryStep(), policy, 6, kernel=kernel)
    collected, scores, R = run(plan, policy, kernel)
    assert R.shape == (5, 6)
    assert (R[:, :1] == R).all()
    assert not turning_points(R, "plain").any()
    advantages = TurningPoints().advantages(collected, scores)
    assert (advantages == 0).all()
    assert len(set(R[:, 0].tolist())) == 5


def test_completions_follow_the_ode_from_the_states_of_the_rollout():
    """To the bit: from y_0 a rollout without noise from the same latents; from y_k by hand (T3)."""
    policy = gaussian()
    plan = plan_of(EveryStep(), policy, 6)
    collected, _, _ = run(plan, policy)
    whole = collected.plan
    grid = policy.sigmas(6)
    cond = policy.encode(whole.texts)
    for child in (whole.role == Role.COMPLETION).nonzero()[:, 0].tolist():
        parent, k = int(whole.parent[child]), int(whole.parent_step[child])
        x = collected.states[collected.state_index[parent, k]][None]
        for i in range(k, 6):
            v = policy.velocity(x, grid[i : i + 1], cond.take(whole.prompt[child : child + 1]), 1.0)
            x = x + (grid[i + 1] - grid[i]) * v.detach()
        image = collected.images[collected.image_of(torch.tensor([child]))]
        assert torch.equal(image, policy.decode(x).float())
    none = torch.zeros(2, dtype=torch.long)
    still = fresh_rows(PROMPTS, torch.tensor([3, 2]), none, grid, torch.zeros(6))
    alone = Rollouts.empty(still, policy.latent_shape, torch.float64)
    with torch.no_grad():
        for _ in sample(
            policy,
            ODE(),
            alone,
            cond,
            address=Address(0),
        ):
            pass
    first = (whole.role == Role.COMPLETION) & (whole.parent_step == 0)
    images = collected.images[collected.image_of(first.nonzero()[:, 0])]
    assert torch.equal(images, alone.images)


@pytest.mark.parametrize(
    ("steps", "exploration", "evaluations"),
    [
        (10, EveryStep(), 55),
        (6, EveryStep(), 21),
        # T + n (T - s) - n (n + 1) / 2 with T = 8, s = 2, n = 3.
        (8, Window(start=2, size=3), 8 + 3 * 6 - 6),
    ],
)
def test_what_it_costs(steps, exploration, evaluations):
    """Known velocities are shared: 55 and 21 evaluations, n + 1 rewards and decodes (T8)."""
    policy, ledger = gaussian(), Ledger()
    plan = plan_of(exploration, policy, steps)
    collected, _, R = run(plan, policy, ledger=ledger)
    n = R.shape[1] - 1
    assert ledger.network_evaluations == 5 * evaluations
    assert collected.plan.network_evaluations() == 5 * evaluations
    assert ledger.reward_calls == ledger.decodes == 5 * (n + 1)
    # States before and after every trained step: y_0 ... y_n, once each.
    assert len(collected.states) == 5 * (n + 1)


def test_in_a_later_window_the_first_completion_is_the_ode_from_the_noise():
    """Before the window all is deterministic, so R_0 is that of the pure ODE (T11)."""
    policy = gaussian()
    late, _, R = run(plan_of(Window(start=2, size=3), policy, 8), policy)
    _, _, whole = run(plan_of(EveryStep(), policy, 8), policy)
    assert torch.equal(R[:, 0], whole[:, 0])
    assert not torch.equal(R[:, 1], whole[:, 1])
    assert R.shape == (5, 4)
    assert (late.plan.role == Role.COMPLETION).sum() == 5 * 3


def test_completions_of_one_index_and_prompt_are_a_group():
    """For rewards that compare images; rollouts keep their groups."""
    policy = gaussian()
    plan = plan_of(EveryStep(), policy, 4)
    whole = TurningPoints().complete(plan)
    assert torch.equal(whole.group[: plan.rows], plan.group)
    children = (whole.role == Role.COMPLETION).nonzero()[:, 0]
    of = {}
    for child in children.tolist():
        of.setdefault(int(whole.group[child]), set()).add(
            (int(whole.prompt[child]), int(whole.parent_step[child]))
        )
    assert all(len(kinds) == 1 for kinds in of.values())
    assert len(of) == 2 * 3
    assert not set(of) & set(plan.group.tolist())
    assert whole.scored.all()
    assert not whole.trained[children].any()


@pytest.mark.parametrize(
    ("exploration", "kernel", "reason"),
    [
        (MergedSteps(merge=1), FlowSDE(), "gives them 1: choose another exploration"),
        (Window(size=1), FlowSDE(), "gives them 1: choose another exploration, or a wider one"),
        (EveryStep(), ODE(), "gives them 0: choose another kernel than ode"),
    ],
)
def test_fewer_than_two_stochastic_steps_are_refused_with_the_reason(exploration, kernel, reason):
    policy = GaussianPolicy(0.3, 0.5, grid_shift=3.0)
    with pytest.raises(InputError, match=reason):
        TurningPoints().complete(plan_of(exploration, policy, 8, kernel=kernel))


# --- advantages -----------------------------------------------------------------------------------


def advantages_by_hand(R, group, prompt, credit):
    """Per step the group's mean and standard deviation (of n), in numpy; NaN left out."""
    earned = earned_by(credit, R, prompt).numpy()
    out = np.full(earned.shape, np.nan)
    for k in range(earned.shape[1]):
        for g in np.unique(group):
            mine = (group == g) & ~np.isnan(earned[:, k])
            values = earned[mine, k]
            if len(values):
                out[mine, k] = (values - values.mean()) / (values.std() + credit.epsilon)
    return np.clip(out, -5, 5)


@pytest.mark.parametrize("failing", [False, True])
def test_every_step_is_compared_with_the_same_step_of_its_group(failing):
    """T9; the untrained last step has none."""
    policy = gaussian()
    plan = plan_of(EveryStep(), policy, 6, sizes=(6, 5))
    calls = iter(range(10_000))

    def reward(images, prompts, metadata):
        values = nonlinear(images, prompts, metadata)
        return [math.nan if failing and next(calls) % 11 == 3 else value for value in values]

    credit = TurningPoints()
    collected, scores, R = run(plan, policy, credit=credit, reward=reward)
    assert bool(R.isnan().any()) == failing
    found_ = credit.advantages(collected, scores)
    rows = torch.arange(plan.rows)
    wanted = advantages_by_hand(R, plan.group.numpy(), plan.prompt[rows], credit)
    np.testing.assert_allclose(found_[: plan.rows, :5].numpy(), wanted, atol=1e-12)
    assert (found_[: plan.rows, 5] == 0).all()
    if not failing:
        sums = torch.zeros(2, 5, dtype=torch.float64).index_add_(0, plan.group, found_[:11, :5])
        torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-9, rtol=0)


def test_with_the_final_reward_for_every_step_it_is_flow_grpo(monkeypatch):
    """T10: the same advantages as terminal credit, to the bit."""
    policy = gaussian()
    plan = plan_of(EveryStep(), policy, 6, sizes=(6, 5))
    credit = TurningPoints()
    collected, scores, _ = run(plan, policy, credit=credit)
    own = TurningPoints.traced

    def final(self, row, step, R, prompt):
        return replace(own(self, row, step, R, prompt), earned=R[:, -1:].expand(step.shape))

    monkeypatch.setattr(TurningPoints, "traced", final)
    found_ = credit.advantages(collected, scores)[: plan.rows, :5]
    terminal = Terminal().advantages(collected, scores)[: plan.rows, :5]
    assert torch.equal(found_, terminal)


def test_increments_single_out_the_step_that_carries_the_variance():
    """A reward that the second step decides: it alone earns; terminal credit pays all steps."""
    policy = gaussian()
    plan = plan_of(EveryStep(), policy, 4, sizes=(64, 0))
    credit = TurningPoints(aggregate=False)
    whole = credit.complete(plan)
    rng = np.random.default_rng(0)
    step_two = rng.standard_normal(64)
    R = np.zeros((64, 4))
    R[:, 2:] = step_two[:, None]
    values = torch.zeros(whole.rows, dtype=torch.float64)
    values[:64] = torch.from_numpy(R[:, -1])
    for child in range(64, whole.rows):
        parent, k = int(whole.parent[child]), int(whole.parent_step[child])
        values[child] = R[parent, k]
    scores = Scores(values, (Status.OK,) * whole.rows)
    collected = Rollouts.empty(whole, policy.latent_shape)
    A = credit.advantages(collected, scores)[:64]
    assert A[:, 1].abs().mean() > 0.7
    assert (A[:, [0, 2]] == 0).all()
    assert (Terminal().advantages(collected, scores)[:64, 0].abs() > 0).all()


def test_a_recipe_chooses_it():
    recipe = load_recipe("flow_grpo", ["credit.type=turning_points", "credit.constraint=plain"])
    assert recipe.credit == TurningPoints(constraint="plain")
