"""E-GRPO: entropies, merge lengths, the plan they make, and what is sampled and trained from it.

A step from sigma_i to sigma_(i + l) has variance V = a^2 sigma_i (sigma_i - sigma_(i + l)) /
(1 - sigma_i) and entropy h = ln(2 pi e V) / 2 per value; the threshold is on e^h (2601.00423).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from entroflow.credit import terminal
from entroflow.credit.terminal import Terminal
from entroflow.errors import InputError
from entroflow.exploration.base import Request
from entroflow.exploration.merged_steps import MergedSteps
from entroflow.exploration.step_entropy import merge_length, scaled_entropy
from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.objectives.clipped import Clipped
from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores, Status
from entroflow.sampling import solver
from entroflow.sampling.kernels import CPS, ODE, DanceSDE, FlowSDE, VarianceMatched
from entroflow.sampling.plan import FRESH, Role
from entroflow.sampling.rollouts import Rollouts
from experience import experience, updated
from gaussian_policy import GaussianPolicy

A, T = 0.7, 16
KERNEL = FlowSDE(noise_level=A)
GRID = shifted_grid(T, 3.0)
LENGTHS = {
    0.0: [1, 1, 1, 1, 1, 1, 1, 1],
    1.8: [1, 1, 1, 2, 2, 2, 2, 3],
    2.0: [1, 1, 1, 2, 2, 2, 3, 3],
    2.2: [1, 1, 2, 2, 2, 3, 3, 3],
    2.6: [1, 1, 2, 3, 3, 4, 4, 4],
}
"""Merge lengths at 16 steps and shift 3, by tau."""


def std(i, end, grid=GRID, kernel=KERNEL):
    return kernel.std(grid[i : i + 1], grid[end : end + 1], grid)


def merge_lengths(kernel, grid, starts, *threshold):
    return [merge_length(kernel, grid, start, *threshold) for start in starts]


def perplexity(i, end):
    return math.sqrt(2 * math.pi * math.e) * std(i, end).item()


def request(policy, sizes=(3, 2), kernel=KERNEL, first=(0, 0), steps=T):
    prompts = [Prompt(text) for text in ("first", "second")][: len(sizes)]
    return Request(
        prompts, torch.tensor(sizes), torch.tensor(first[: len(sizes)]), policy.sigmas(steps),
        kernel, 0, 0,
    )  # fmt: skip


def two_prompts():
    return GaussianPolicy(0.3, 0.5, latent_shape=(3, 2), grid_shift=3.0, offsets={"second": 1.0})


def sampled(policy, plan, kernel=KERNEL, batch_size=64):
    ledger = Ledger()
    rollouts = Rollouts.empty(plan, policy.latent_shape, torch.float64)
    cond = policy.encode(plan.texts)
    for _ in solver.sample(
        policy, kernel, rollouts, cond, address=Address(0), batch_size=batch_size, ledger=ledger
    ):
        pass
    return rollouts, ledger


# --- entropy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 16, 25])
@pytest.mark.parametrize("shift", [1, 3])
def test_variance_of_a_merged_step_in_the_terms_of_the_paper(steps, shift):
    """With m = T - i: V / a^2 = s^2 T m l / ((T - m) (T + (s - 1) m) (T + (s - 1) (m - l)))."""
    grid = shifted_grid(steps, shift)
    for m in range(1, steps):
        for length in range(1, m + 1):
            i, S = steps - m, shift - 1
            wanted = shift**2 * steps * m * length
            wanted /= (steps - m) * (steps + S * m) * (steps + S * (m - length))
            assert std(i, i + length, grid).item() ** 2 / A**2 == pytest.approx(wanted, rel=1e-11)


def test_entropy_grows_with_the_length_and_falls_towards_the_data():
    for i in range(T - 1):
        found = [scaled_entropy(std(i, end), "nats").item() for end in range(i + 1, T + 1)]
        assert (np.diff(found) > 0).all()
    single = [scaled_entropy(std(i, i + 1), "nats").item() for i in range(1, T)]
    assert (np.diff(single) < 0).all()


def test_entropy_moves_with_the_logarithm_of_the_noise_level():
    for factor in (0.5, 2.0):
        scaled = FlowSDE(noise_level=factor * A)
        for i in (0, 3, 9):
            shift = scaled_entropy(std(i, i + 2, kernel=scaled), "nats")
            shift = (shift - scaled_entropy(std(i, i + 2), "nats")).item()
            assert shift == pytest.approx(math.log(factor), abs=1e-12)


def test_scales_of_the_entropy():
    """e^h, e^(2h), 2h and h with h = ln(2 pi e V) / 2; e^h at 16 steps as known."""
    found = scaled_entropy(KERNEL.std(GRID[:-1], GRID[1:], GRID))
    known = [
        2.893, 2.989, 2.137, 1.763, 1.542, 1.392, 1.281, 1.193, 1.120, 1.056, 0.997, 0.937, 0.872,
        0.795, 0.692, 0.528,
    ]  # fmt: skip
    np.testing.assert_allclose(found, known, atol=6e-4)
    s = std(3, 4)
    V = s.item() ** 2
    h = 0.5 * math.log(2 * math.pi * math.e * V)
    for scale, wanted in {
        "perplexity": math.exp(h), "squared_perplexity": 2 * math.pi * math.e * V,
        "twice_nats": 2 * h, "nats": h,
    }.items():  # fmt: skip
        assert scaled_entropy(s, scale).item() == pytest.approx(wanted, rel=1e-12)


# --- merge lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", LENGTHS)
def test_merge_lengths_are_the_known_ones(tau):
    assert merge_lengths(KERNEL, GRID, range(8), tau) == LENGTHS[tau]


def test_merge_lengths_on_other_grids_and_scales():
    fine = merge_lengths(KERNEL, shifted_grid(25, 3.0), range(12), 2.2)
    assert fine == [1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5]
    squared = merge_lengths(KERNEL, GRID, range(8), 1.8, "squared_perplexity")
    assert squared == [1, 1, 1, 1, 1, 1, 2, 2]
    twice = merge_lengths(KERNEL, GRID, range(8), 2.6, "twice_nats")
    assert twice == [2, 2, 3, 4, 5, 6, 6, 7]


def check_least_lengths() -> None:
    for tau in (0.0, 1.0, 1.8, 2.2, 2.6):
        for i, length in enumerate(merge_lengths(KERNEL, GRID, range(8), tau)):
            assert perplexity(i, i + length) >= tau
            assert length == 1 or perplexity(i, i + length - 1) < tau
            assert (length == 1) == (perplexity(i, i + 1) >= tau)


def test_a_merge_length_is_the_least_that_reaches_tau():
    check_least_lengths()


def test_merge_lengths_grow_with_tau():
    lists = [merge_lengths(KERNEL, GRID, range(8), tau) for tau in np.linspace(0, 2.8, 29)]
    assert (np.diff(lists, axis=0) >= 0).all()


def test_a_tau_out_of_reach_is_refused():
    """Step 14 can't be merged: the last step stays deterministic."""
    assert perplexity(14, 15) < 0.8
    with pytest.raises(InputError, match=r"tau is 0.8, but from sigma 0.3 \(step 14\) .* 0.69"):
        merge_lengths(KERNEL, GRID, [0, 14], 0.8)


def merged_and_in_parts(i, length):
    """Variance of a merged step, and the sum of those that it replaces."""
    parts = sum(std(k, k + 1).item() ** 2 for k in range(i, i + length))
    return std(i, i + length).item() ** 2, parts


@pytest.mark.parametrize(
    ("i", "length", "merged", "single"),
    [(2, 2, 0.561, 0.449), (5, 3, 0.383, 0.293), (7, 3, 0.286, 0.222)],
)
def test_variances_of_merged_steps_are_the_known_ones(i, length, merged, single):
    assert merged_and_in_parts(i, length) == pytest.approx((merged, single), abs=6e-4)


def test_a_merged_step_has_more_variance_than_its_parts():
    """Its diffusion is that of its noisiest end: merging does not preserve the total."""
    for i in range(T - 1):
        for length in range(1, T - i):
            merged, parts = merged_and_in_parts(i, length)
            if length == 1:
                assert merged == pytest.approx(parts, rel=1e-12)
            else:
                assert merged > parts * (1 + 1e-6)


def test_where_tau_is_out_of_reach_the_highest_entropy_may_do():
    """With Flow-SDE that is the longest merged step, with a bounded std it need not be."""
    policy = two_prompts()
    late = MergedSteps(starts="second_half", out_of_reach="highest").steps(request(policy))
    assert late == [(8, 12), (9, 13), (10, 14), *((i, 15) for i in range(11, 15))]
    for i, end in late:
        assert perplexity(i, end) >= 2.2 or end == T - 1
    bounded = VarianceMatched(noise_level=A)
    stds = [std(0, end, kernel=bounded).item() for end in range(1, T)]
    best = merge_length(bounded, GRID, 0, 99.0, highest=True)
    assert stds[best - 1] == max(stds) > stds[-1]


def test_merging_may_not_cost_a_kernel_entropy():
    """The std of variance_matched is at most the next sigma, which falls with the length."""
    bounded = VarianceMatched(noise_level=A)
    stds = [std(0, end, kernel=bounded).item() for end in range(1, T)]
    most = 1 + int(np.argmax(stds))
    asked = request(two_prompts(), kernel=bounded)
    assert MergedSteps(starts=(0,), merge=most).steps(asked) == [(0, most)]
    with pytest.raises(InputError, match="where one less has as much entropy"):
        MergedSteps(starts=(0,), merge=most + 1).steps(asked)


# --- one step -------------------------------------------------------------------------------------


def test_merged_deterministic_steps_are_the_longer_euler_step():
    x, v = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    t, end, zero = GRID[5].expand(3), GRID[9].expand(3), torch.zeros(3).double()
    merged = KERNEL.mean(x, v, t, end, zero)
    assert torch.equal(merged, x + (GRID[9] - GRID[5]) * v)
    step = x
    for k in range(5, 9):
        step = KERNEL.mean(step, v, GRID[k].expand(3), GRID[k + 1].expand(3), zero)
    torch.testing.assert_close(merged, step, rtol=0, atol=1e-12)


def test_branches_that_merge_nothing_take_the_plain_step_to_the_bit():
    """From the anchor's state by Flow-SDE to the next point, with noise of their address."""
    policy = two_prompts()
    plan = MergedSteps(starts=(4,), merge=1).plan(request(policy))
    rollouts, _ = sampled(policy, plan)
    (row,) = (plan.role == Role.ROLLOUT).nonzero()[:1, 0]
    grid, cond = policy.sigmas(T), policy.encode(plan.texts)
    x = rollouts.states[rollouts.state_index[row, 0]][None]
    t, t_next = grid[4:5], grid[5:6]
    with torch.no_grad():
        v = policy.velocity(x, t, cond.take(plan.prompt[row : row + 1]), 1.0)
    s = KERNEL.std(t, t_next, grid)
    address = (plan.group[row : row + 1], plan.member[row : row + 1], torch.tensor([4]))
    noise = solver.gaussian(policy.latent_shape, Address(0), solver.Stream.STEP, *address).double()
    wanted = KERNEL.mean(x, v, t, t_next, s) + s[:, None, None] * noise
    assert torch.equal(rollouts.states[rollouts.state_index[row, 1]], wanted[0])


# --- the plan -------------------------------------------------------------------------------------


def test_the_plan_has_an_anchor_per_prompt_and_a_group_per_prompt_and_start():
    policy = two_prompts()
    plan = MergedSteps().plan(request(policy, sizes=(3, 2)))
    anchors, branches = (plan.role == role for role in (Role.ANCHOR, Role.ROLLOUT))
    assert plan.prompt[anchors].tolist() == [0, 1]
    assert (plan.std[anchors] == 0).all()
    assert not plan.scored[anchors].any()
    assert plan.noise_member.tolist() == [FRESH] * plan.rows
    assert branches.sum() == 8 * (3 + 2)
    grid = policy.sigmas(T)
    by_group = {}
    for row in branches.nonzero()[:, 0].tolist():
        start = int(plan.parent_step[row])
        length = LENGTHS[2.2][start]
        end = start + length
        points = [start, *range(end, T + 1)]
        assert plan.points[row, : len(points)].tolist() == points
        assert int(plan.length[row]) == len(points) - 1
        wanted = KERNEL.std(grid[start], grid[end], grid)
        assert plan.std[row].tolist() == [wanted.item()] + [0.0] * (plan.std.shape[1] - 1)
        assert plan.prompt[plan.parent[row]] == plan.prompt[row]
        assert plan.role[plan.parent[row]] == Role.ANCHOR
        by_group.setdefault(int(plan.group[row]), []).append((int(plan.prompt[row]), start))
    assert all(len(set(members)) == 1 for members in by_group.values())
    sizes = Counter({members[0]: len(members) for members in by_group.values()})
    assert sizes == {(p, start): (3, 2)[p] for p in (0, 1) for start in range(8)}
    assert not set(by_group) & set(plan.group[anchors].tolist())
    addresses = list(zip(plan.group.tolist(), plan.member.tolist(), strict=True))
    assert len(set(addresses)) == plan.rows


def test_a_second_round_goes_on_with_other_members_of_the_same_groups():
    policy = two_prompts()
    first = MergedSteps().plan(request(policy, sizes=(3, 2)))
    later = MergedSteps().plan(request(policy, sizes=(1, 2), first=(3, 2)))
    assert set(later.group.tolist()) == set(first.group.tolist())
    found = {
        (g, m)
        for g, m, role in zip(
            later.group.tolist(), later.member.tolist(), later.role.tolist(), strict=True
        )
        if role == Role.ROLLOUT
    }
    per_prompt = {0: [3], 1: [2, 3]}
    assert found == {
        (p * (T + 1) + 1 + start, m) for p in (0, 1) for start in range(8) for m in per_prompt[p]
    }


@pytest.mark.parametrize(
    ("starts", "wanted"),
    [
        ("first_quarter", range(4)), ("first_half", range(8)), ("second_half", range(8, 15)),
        ("all", range(15)), ((0, 2, 9), (0, 2, 9)),
    ],
)  # fmt: skip
def test_starts(starts, wanted):
    steps = MergedSteps(starts=starts, merge=1).steps(request(two_prompts()))
    assert steps == [(start, start + 1) for start in wanted]


def test_merged_steps_overlap_or_follow_each_other():
    policy = two_prompts()
    overlapping = MergedSteps(tau=2.6).steps(request(policy))
    assert overlapping == [(i, i + length) for i, length in enumerate(LENGTHS[2.6])]
    apart = MergedSteps(tau=2.6, overlap=False).steps(request(policy))
    assert apart == [(0, 1), (1, 2), (2, 4), (4, 7), (7, 11)]
    # What is swallowed need not be possible: nothing of length 5 could start at 11.
    fives = MergedSteps(starts="all", merge=5, overlap=False).steps(request(policy))
    assert fives == [(0, 5), (5, 10), (10, 15)]


def test_fixed_merge_lengths():
    policy = two_prompts()
    four = MergedSteps(merge=4).steps(request(policy))
    assert four == [(i, i + 4) for i in range(8)]
    # The launch script of the authors: starts 0 1 2 4 with lengths 1 1 2 3.
    listed = MergedSteps(starts=(0, 1, 2, 4), merge=(1, 1, 2, 3)).steps(request(policy))
    assert listed == [(0, 1), (1, 2), (2, 4), (4, 7)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"starts": (3, 1)}, "rising numbers from 0 to 14"), ({"starts": (0, 15)}, "from 0 to 14"),
        ({"starts": ()}, "rising numbers"), ({"merge": 0}, "at least 1, not 0"),
        ({"merge": (1, 2)}, "has 2 numbers for 8 starts"),
        ({"merge": 9}, "merge is 9 at step 7, but must end before the last"),
        ({"starts": "second_half"}, "tau is 2.2, but from sigma"), ({"tau": 9.0}, "tau is 9"),
    ],
)  # fmt: skip
def test_what_can_not_be_merged_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        MergedSteps(**settings).plan(request(two_prompts()))


@pytest.mark.parametrize(("steps", "starts"), [(3, "first_quarter"), (2, "second_half")])
def test_a_part_without_steps_is_refused(steps, starts):
    with pytest.raises(InputError, match=f"starts is {starts}, of which {steps} steps have none"):
        MergedSteps(starts=starts, merge=1).plan(request(two_prompts(), steps=steps))


@pytest.mark.parametrize("kernel", [CPS(), DanceSDE(), ODE()])
@pytest.mark.parametrize("merge", ["entropy", 2])
def test_kernels_that_gain_nothing_by_merging_are_refused(kernel, merge):
    """The entropy of CPS falls with the length of a step, that of Dance-SDE rises to the data."""
    with pytest.raises(InputError, match="which only the kernels flow_sde and variance_matched do"):
        MergedSteps(merge=merge).plan(request(two_prompts(), kernel=kernel))
    assert MergedSteps(merge=1).steps(request(two_prompts(), kernel=kernel))


# --- sampling -------------------------------------------------------------------------------------


def check_sigmas_and_cost() -> None:
    """T for the anchor, T - i - l for a branch: 16 + 12 * 83 = 1012 per prompt at the default."""
    policy, seen = two_prompts(), Counter()
    right = policy.velocity

    def watched(x, sigma, cond, guidance):
        seen.update(np.round(sigma.numpy(), 9).tolist())
        return right(x, sigma, cond, guidance)

    policy.velocity = watched
    plan = MergedSteps().plan(request(policy, sizes=(12,)))
    _, ledger = sampled(policy, plan)
    assert plan.network_evaluations() == ledger.network_evaluations == 1012
    grid = np.round(policy.sigmas(T).numpy(), 9)
    wanted = Counter(grid[:-1].tolist())
    for start, length in enumerate(LENGTHS[2.2]):
        for sigma in grid[start + length : -1].tolist():
            wanted[sigma] += 12
    assert seen == wanted


def test_branches_ask_the_network_at_their_own_sigmas_and_cost_what_they_must():
    check_sigmas_and_cost()


def test_a_branch_without_noise_ends_as_its_anchor():
    """Where nothing is merged; then all rewards of a group are equal and so is nothing learnt."""
    policy = two_prompts()
    plan = MergedSteps(merge=1).plan(request(policy))
    still = replace(plan, std=torch.zeros_like(plan.std), scored=torch.ones_like(plan.scored))
    rollouts, _ = sampled(policy, still)
    rewards = rollouts.images[rollouts.image_of(torch.arange(plan.rows))].double().flatten(1).sum(1)
    values = torch.where(plan.role == Role.ROLLOUT, rewards, torch.nan)
    scores = Scores(values, (Status.OK,) * plan.rows)
    assert (Terminal().advantages(rollouts, scores) == 0).all()
    for row in range(plan.rows):
        anchor = row if plan.parent[row] == FRESH else int(plan.parent[row])
        images = rollouts.images[rollouts.image_of(torch.tensor([row, anchor]))]
        assert torch.equal(images[0], images[1])


def final_moments(kernel, i, length, m=0.5, q=0.3, tail_from=None):
    """Mean and variance of what a branch ends in, by the affine recursion in float64 arithmetic."""
    grid = GRID.tolist()

    def kappa(t):
        return (t - (1 - t) * q) / ((1 - t) ** 2 * q + t**2)

    mean, variance = 0.0, 1.0
    for k in range(i):
        step = 1 + (grid[k + 1] - grid[k]) * kappa(grid[k])
        mean, variance = (
            (1 - grid[k + 1]) * m + step * (mean - (1 - grid[k]) * m),
            step**2 * variance,
        )
    t, t_next = grid[i], grid[i + length]
    V, s = (1 - t) ** 2 * q + t**2, std(i, i + length, kernel=kernel).item()
    if isinstance(kernel, VarianceMatched):
        slope = ((1 - t_next) * (1 - t) * q + math.sqrt(t_next**2 - s**2) * t) / V
    else:
        slope = 1 + (t_next - t) * kappa(t) - s**2 / (2 * V)
    mean = (1 - t_next) * m + slope * (mean - (1 - t) * m)
    variance = slope**2 * variance + s**2
    for k in range(tail_from or i + length, T):
        # The velocity at the sigma the network is told, at a state that may stand elsewhere.
        dt, told = grid[k + 1] - grid[k], kappa(grid[k])
        mean = mean + dt * (told * (mean - (1 - grid[k]) * m) - m)
        variance = (1 + dt * told) ** 2 * variance
    return mean, variance


def test_the_recursion_knows_the_index_error_of_the_published_code():
    """Going on from i + 1 instead of i + l: mean .531 and variance .192 for .500 and .249."""
    assert final_moments(KERNEL, 7, 3) == pytest.approx((0.5, 0.249), abs=2e-3)
    assert final_moments(KERNEL, 7, 3, tail_from=8) == pytest.approx((0.531, 0.192), abs=2e-3)


@pytest.mark.parametrize("kernel", [KERNEL, VarianceMatched(noise_level=A)])
def test_images_have_the_mean_and_variance_of_the_recursion(kernel):
    """Over the 20,000 independent values of one latent, within four standard errors."""
    policy = GaussianPolicy(0.5, 0.3, latent_shape=(20_000,), grid_shift=3.0)
    plan = MergedSteps(starts=(2, 7), merge=(2, 3)).plan(request(policy, (1,), kernel))
    rollouts, _ = sampled(policy, plan, kernel)
    for row, (i, length) in zip((1, 2), ((2, 2), (7, 3)), strict=True):
        mean, variance = final_moments(kernel, i, length)
        values = rollouts.images[rollouts.image_of(torch.tensor([row]))].double()
        n = values.numel()
        assert values.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
        assert values.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


# --- training -------------------------------------------------------------------------------------


def seen_by_branches(**options):
    policy = two_prompts()
    plan = MergedSteps(starts=(0, 1, 2), merge=(1, 1, 2)).plan(request(policy, (4, 3), steps=5))
    return experience(policy, plan, **options)


def test_a_group_shares_its_state_and_its_pass():
    seen, ledger = seen_by_branches(), Ledger()
    table = seen.transitions
    assert len(table) == 3 * (4 + 3)
    for group in table.group.unique():
        assert len(table.state[table.group == group].unique()) == 1
    assert len(table.state.unique()) == 2 * 3
    updated(seen, Clipped(clip_range=1e-4), ledger=ledger)
    assert ledger.weighted_evaluations == 3 * 2 * 3


def check_groups() -> None:
    seen = seen_by_branches()
    plan, values = seen.rollouts.plan, seen.scores.values.clone()
    branches = plan.role == Role.ROLLOUT
    credit = Terminal(ddof=1, epsilon=1e-8)

    def advantages():
        return credit.advantages(seen.rollouts, Scores(values, seen.scores.statuses))[:, 0]

    before = advantages()
    for prompt in (0, 1):
        for start in (0, 1, 2):
            mine = branches & (plan.prompt == prompt) & (plan.parent_step == start)
            R = values[mine].numpy()
            wanted = (R - R.mean()) / (R.std(ddof=1) + 1e-8)
            np.testing.assert_allclose(before[mine], wanted, rtol=1e-9)
    first = branches & (plan.prompt == 0) & (plan.parent_step == 1)
    values[first] = values[first].flip(0) * 3 + 1
    after = advantages()
    assert torch.equal(before[~first], after[~first])
    assert not torch.equal(before[first], after[first])


def test_rewards_of_one_start_say_nothing_about_another():
    """Advantages are those inside (prompt, start), by numpy, whatever other starts are paid."""
    check_groups()


def test_the_shared_pass_gives_the_gradient_of_separate_ones():
    shared, separate = seen_by_branches(), seen_by_branches()
    table = separate.transitions
    copies = torch.cat([table.states, table.states[table.state]])
    own = len(table.states) + torch.arange(len(table))
    separate.transitions = replace(table, states=copies, state=own)
    assert len(separate.transitions.state.unique()) == len(table)
    for seen in (shared, separate):
        updated(seen, Clipped(clip_range=1e-4), learning_rate=1.0)
    found, wanted = shared.policy.shift.detach(), separate.policy.shift.detach()
    assert wanted.abs().min() > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# --- mutations ------------------------------------------------------------------------------------


def with_one_step_too_many(monkeypatch):
    right = MergedSteps._length
    monkeypatch.setattr(MergedSteps, "_length", lambda *given: right(*given) + 1)


def with_the_tail_of_the_published_code(monkeypatch):
    """The skipped points stay in the grid of a branch: the tail goes on from i + 1."""
    right = MergedSteps.plan

    def wrong(self, given):
        plan = right(self, given)
        for row in (plan.role == Role.ROLLOUT).nonzero()[:, 0].tolist():
            start = int(plan.points[row, 0])
            points = torch.arange(start, start + plan.points.shape[1]).clamp(max=T)
            plan.points[row] = points
        return plan

    monkeypatch.setattr(MergedSteps, "plan", wrong)


@pytest.mark.parametrize("mutate", [with_one_step_too_many, with_the_tail_of_the_published_code])
def test_checks_reject_wrong_merging(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_sigmas_and_cost()


def test_checks_reject_advantages_of_a_whole_prompt(monkeypatch):
    right = terminal.group_advantages

    def wrong(values, group, **settings):
        return right(values, group // 6, **settings)

    monkeypatch.setattr(terminal, "group_advantages", wrong)
    with pytest.raises(AssertionError):
        check_groups()


def test_checks_reject_lengths_that_stop_too_soon(monkeypatch):
    right = globals()["merge_length"]
    monkeypatch.setitem(globals(), "merge_length", lambda *given: max(1, right(*given) - 1))
    with pytest.raises(AssertionError):
        check_least_lengths()
