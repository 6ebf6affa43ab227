"""The solver against a loop over rows: grids, noise, trees of rows, batches and storage types."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from entroflow.ledger import Ledger
from entroflow.noise import Address, Stream, gaussian
from entroflow.policies.grid import shifted_grid
from entroflow.policies.shapes.policy import ShapesPolicy
from entroflow.prompts import Prompt
from entroflow.sampling import solver
from entroflow.sampling.kernels import FlowSDE
from entroflow.sampling.plan import FRESH, fresh_rows, with_children
from entroflow.sampling.rollouts import ABSENT, Rollouts
from entroflow.sampling.solver import integrate, sample
from gaussian_policy import GaussianPolicy
from random_network import random_weights
from random_plans import OFFSETS, PROMPTS, random_plan, random_std

KERNEL = FlowSDE(noise_level=0.7)
SHAPE = (3, 2)
reproducible = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)


def gaussian_policy():
    return GaussianPolicy(0.3, 0.5, latent_shape=SHAPE, grid_shift=2.0, offsets=OFFSETS)


def watched(policy):
    """Keep what every call of the policy was given, as (x, sigma)."""
    calls, velocity = [], policy.velocity

    def recorded(x, sigma, cond, guidance):
        calls.append((x.clone(), sigma.clone()))
        return velocity(x, sigma, cond, guidance)

    policy.velocity = recorded
    return calls


def problem(rng, rows=6, steps=5, dtype=torch.float64):
    """Random states, grids of 1 to `steps` steps that end anywhere, stds, prompts and noise."""
    lengths = rng.integers(1, steps + 1, rows)
    sigmas = np.zeros((rows, steps + 1))
    for row, length in enumerate(lengths):
        grid = np.sort(rng.uniform(0.02, 1.0, length + 1))[::-1]
        if rng.random() < 0.5:
            grid[-1] = 0
        sigmas[row] = np.concatenate([grid, np.full(steps - length, grid[-1])])
    real = torch.arange(steps) < torch.from_numpy(lengths)[:, None]
    return SimpleNamespace(
        x=torch.from_numpy(rng.standard_normal((rows, *SHAPE))).to(dtype),
        prompt=torch.from_numpy(rng.integers(len(PROMPTS), size=rows)),
        sigmas=torch.from_numpy(sigmas),
        std=random_std(rng, rows, steps) * real,
        length=lengths.tolist(),
        noise=torch.from_numpy(rng.standard_normal((rows, steps, *SHAPE))),
    )


def integrated(policy, given, **options):
    """Everything `integrate` reports, by (row, step)."""
    cond = policy.encode([prompt.text for prompt in PROMPTS])
    before = given.x.clone()
    found = {}
    for moves in integrate(
        policy, KERNEL, given.x, cond, given.prompt, given.sigmas, given.std,
        noise=lambda row, step: given.noise[row, step], **options,
    ):  # fmt: skip
        for i, key in enumerate(zip(moves.row.tolist(), moves.step.tolist(), strict=True)):
            assert key not in found
            found[key] = SimpleNamespace(
                **{name: getattr(moves, name)[i] for name in ("velocity", "mean", "state")},
                log_prob=moves.log_prob[i].item(),
                finished=bool(moves.finished[i]),
            )
    assert torch.equal(given.x, before)
    return found


def loop_over_rows(policy, given, velocity=None):
    """The same, one row and one step at a time."""
    cond = policy.encode([prompt.text for prompt in PROMPTS])
    found = {}
    for row, length in enumerate(given.length):
        x = given.x[row : row + 1]
        for step in range(length):
            sigma, sigma_next = (
                given.sigmas[row, step : step + 1],
                given.sigmas[row, step + 1 :][:1],
            )
            std = given.std[row, step : step + 1]
            if velocity is not None and step == 0 and not velocity[row].isnan().any():
                v = velocity[row : row + 1]
            else:
                v = policy.velocity(x, sigma, cond.take(given.prompt[row : row + 1]), 1.0)
            mean = KERNEL.mean(x, v, sigma, sigma_next, std)
            x, density = mean, 0.0
            if std > 0:
                x = mean + std * given.noise[row, step]
                density = stats.norm.logpdf(x.numpy(), mean.numpy(), std.item()).mean()
            found[row, step] = SimpleNamespace(
                velocity=v[0], mean=mean[0], state=x[0], log_prob=density,
                finished=step == length - 1,
            )  # fmt: skip
    return found


def assert_bit_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for key, move in wanted.items():
        for name in ("velocity", "mean", "state"):
            assert torch.equal(getattr(found[key], name), getattr(move, name)), (key, name)
        assert found[key].log_prob == pytest.approx(move.log_prob, abs=1e-12)
        assert found[key].finished == move.finished


# --- integrate ------------------------------------------------------------------------------------


@reproducible
@given(seed=seeds, rows=st.integers(1, 7), batch_size=st.integers(1, 8))
@torch.no_grad()
def test_every_row_moves_as_it_would_alone(seed, rows, batch_size):
    """Bit for bit, whatever the lengths and grids of the rows beside it."""
    given = problem(np.random.default_rng(seed), rows)
    policy = gaussian_policy()
    found = integrated(policy, given, batch_size=batch_size)
    assert_bit_equal(found, loop_over_rows(policy, given))


@reproducible
@given(seed=seeds, batch_size=st.integers(1, 8))
@torch.no_grad()
def test_a_known_velocity_is_used_and_not_computed(seed, batch_size):
    """Here it is not the policy's, so that its use shows; NaN rows are not known."""
    rng = np.random.default_rng(seed)
    given, policy, ledger = problem(rng), gaussian_policy(), Ledger()
    known = torch.from_numpy(rng.random(len(given.x)) < 0.5)
    velocity = torch.from_numpy(rng.standard_normal(given.x.shape))
    velocity[~known] = torch.nan
    wanted = loop_over_rows(policy, given, velocity)
    calls = watched(policy)
    found = integrated(policy, given, batch_size=batch_size, velocity=velocity, ledger=ledger)
    assert_bit_equal(found, wanted)
    computed = sum(given.length) - int(known.sum())
    assert sum(len(x) for x, _ in calls) == computed
    assert ledger.network_evaluations == ledger.weighted_evaluations == computed


@reproducible
@given(seed=seeds, batch_size=st.integers(1, 8))
@torch.no_grad()
def test_batches_are_full_as_long_as_enough_rows_wait(seed, batch_size):
    """Finished rows leave, others take their place; no row is sent twice in one batch."""
    given, policy = problem(np.random.default_rng(seed)), gaussian_policy()
    calls = watched(policy)
    left, sizes = list(given.length), []
    cond = policy.encode([prompt.text for prompt in PROMPTS])
    for moves in integrate(
        policy, KERNEL, given.x, cond, given.prompt, given.sigmas, given.std,
        noise=lambda row, step: given.noise[row, step], batch_size=batch_size,
    ):  # fmt: skip
        unfinished = sum(steps > 0 for steps in left)
        sizes.append(min(batch_size, unfinished))
        rows = moves.row.tolist()
        assert len(set(rows)) == len(rows)
        for row, step, finished in zip(
            rows, moves.step.tolist(), moves.finished.tolist(), strict=True
        ):
            assert step == given.length[row] - left[row]
            left[row] -= 1
            assert finished == (left[row] == 0)
        _, sigma = calls[-1]
        assert torch.equal(sigma, given.sigmas[moves.row, moves.step])
    assert not any(left)
    assert [len(x) for x, _ in calls] == sizes


def test_rows_at_different_sigmas_share_a_call():
    """Two rows of three and one steps, in batches of two: two calls of 2 and 1, then 1."""
    policy = gaussian_policy()
    calls = watched(policy)
    given = SimpleNamespace(
        x=torch.ones(2, *SHAPE, dtype=torch.float64), prompt=torch.tensor([0, 1]),
        sigmas=torch.tensor([[1, 0.7, 0.3, 0], [0.5, 0, 0, 0]], dtype=torch.float64),
        std=torch.zeros(2, 3, dtype=torch.float64), noise=torch.zeros(2, 3, *SHAPE),
    )  # fmt: skip
    with torch.no_grad():
        integrated(policy, given, batch_size=2)
    assert [sigma.tolist() for _, sigma in calls] == [[1.0, 0.5], [0.7], [0.3]]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float32, 24)])
@torch.no_grad()
def test_states_at_rest_are_rounded_before_their_density(dtype, bits):
    """Round, then the log-probability of the rounded state, then go on from it."""
    given = problem(np.random.default_rng(0), rows=40, dtype=dtype)
    policy = gaussian_policy()
    calls = watched(policy)
    found = integrated(policy, given, batch_size=64)
    unrounded = []
    for (row, step), move in found.items():
        std = given.std[row, step].item()
        assert move.state.dtype == dtype
        assert move.mean.dtype == torch.float32
        drawn = move.mean.double() + std * given.noise[row, step].float()
        torch.testing.assert_close(move.state.double(), drawn, rtol=2.0**-bits, atol=1e-5)
        if std > 0:
            state, mean = move.state.double().numpy(), move.mean.double().numpy()
            density = stats.norm.logpdf(state, mean, std).mean()
            assert move.log_prob == pytest.approx(density, abs=2e-6)
            unrounded.append(abs(stats.norm.logpdf(drawn.numpy(), mean, std).mean() - density))
        else:
            assert torch.equal(move.state, move.mean.to(dtype))
            assert move.log_prob == 0
    if dtype == torch.bfloat16:
        assert max(unrounded) > 1e-3
    assert all(x.dtype == dtype for x, _ in calls)
    given_to_policy = torch.cat([x for x, _ in calls])
    order = [key for batch in range(len(calls)) for key in sorted(found) if key[1] == batch]
    for x, (row, step) in zip(given_to_policy, order, strict=True):
        assert torch.equal(x, found[row, step - 1].state if step else given.x[row])


# --- sample ---------------------------------------------------------------------------------------


def sampled(policy, plan, *, dtype=torch.float64, kernel=KERNEL, **options):
    rollouts = Rollouts.empty(plan, policy.latent_shape, dtype)
    cond = policy.encode(rollouts.plan.texts)
    for _ in sample(policy, kernel, rollouts, cond, **{"address": Address(3, 2), **options}):
        pass
    return rollouts


def trajectory(policy, plan, row):
    """States, log-probabilities and image of one row, from its ancestors down, by a plain loop."""
    cond = policy.encode([plan.prompts[plan.prompt[row]].text])
    group, member = plan.group[row], plan.member[row]

    def noise_at(stream, group, member, step):
        place = (torch.tensor([int(n)]) for n in (group, member, step))
        return gaussian(SHAPE, Address(3, 2), stream, *place).double()

    parent, step = int(plan.parent[row]), int(plan.parent_step[row])
    if parent == FRESH:
        x = noise_at(Stream.INITIAL, group, plan.noise_member[row], 0)
    else:
        x = trajectory(policy, plan, parent)[0][step]
    states, densities = [x], []
    for s in range(int(plan.length[row])):
        sigma, sigma_next = (plan.base_grid[plan.points[row, s + i]][None] for i in (0, 1))
        std = plan.std[row, s][None]
        x = KERNEL.mean(x, policy.velocity(x, sigma, cond, 1.0), sigma, sigma_next, std)
        density = 0.0
        if std > 0:
            mean = x
            x = mean + std * noise_at(Stream.STEP, group, member, plan.points[row, s])
            density = stats.norm.logpdf(x.numpy(), mean.numpy(), std.item()).mean()
        states.append(x)
        densities.append(density)
    return states, densities


@reproducible
@given(seed=seeds, batch_size=st.integers(1, 9))
@torch.no_grad()
def test_a_tree_of_rows_is_sampled_as_every_row_from_its_ancestors(seed, batch_size):
    """Bit for bit: what is kept of states, what is decoded; and no state but these is kept."""
    plan = random_plan(np.random.default_rng(seed), steps=4)
    policy = gaussian_policy()
    rollouts = sampled(policy, plan, batch_size=batch_size)
    starts = set(zip(plan.parent.tolist(), plan.parent_step.tolist(), strict=True))
    for row in range(plan.rows):
        states, densities = trajectory(policy, plan, row)
        stochastic = (plan.std[row] > 0).tolist()
        for s, state in enumerate(states):
            index = int(rollouts.state_index[row, s])
            is_child_start = s == 0 and plan.parent[row] != FRESH
            used = stochastic[s : s + 1] == [True] or (s > 0 and stochastic[s - 1])
            assert (index != ABSENT) == (used or (row, s) in starts or is_child_start)
            if index != ABSENT:
                assert torch.equal(rollouts.states[index], state[0])
        length = len(densities)
        assert rollouts.log_prob[row, :length].tolist() == pytest.approx(densities, abs=1e-12)
        assert (rollouts.log_prob[row, length:] == 0).all()
        if plan.scored[row]:
            image = rollouts.images[rollouts.image_of(torch.tensor([row]))]
            assert torch.equal(image.double(), policy.decode(states[-1]).float().double())


def window_plan(prompts, steps=4, rows=6, shift=1.0):
    """`rows` rows per prompt, two stochastic steps."""
    grid = shifted_grid(steps, shift)
    std = KERNEL.std(grid[:-1], grid[1:], grid)
    std[2:] = 0
    sizes = torch.full((len(prompts),), rows)
    return fresh_rows(prompts, sizes, torch.zeros_like(sizes), grid, std)


@pytest.mark.parametrize(
    "change",
    [{"address": Address(4, 2)}, {"address": Address(3, 3)}, {"initial": Stream.EVALUATION}],
    ids=str,
)
def test_another_seed_iteration_or_stream_is_other_noise(change):
    plan, policy = window_plan(PROMPTS), gaussian_policy()
    first = sampled(policy, plan)
    assert torch.equal(sampled(policy, plan).states, first.states)
    other = sampled(policy, plan, **change)
    starts = first.state_index[:, 0]
    assert not (first.states[starts] == other.states[starts]).any()


def test_a_group_can_share_its_initial_noise():
    """All rows of a group start from one state, groups from others; they part at noisy steps."""
    grid = shifted_grid(3)
    plan = fresh_rows(
        PROMPTS, torch.tensor([3, 2, 2]), torch.tensor([0, 4, 0]), grid,
        torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), share_noise=True,
    )  # fmt: skip
    rollouts = sampled(gaussian_policy(), plan)
    starts, ends = (rollouts.states[rollouts.state_index[:, s]].flatten(1) for s in (0, 2))
    assert len(starts.unique(dim=0)) == 3
    assert len(ends.unique(dim=0)) == plan.rows
    for group in range(3):
        assert len(starts[plan.group == group].unique(dim=0)) == 1


def test_rows_come_as_they_finish_and_gradients_stay_off():
    """Images are there when their row numbers come, and whoever takes them may use gradients."""
    plan = with_children(
        window_plan(PROMPTS[:1], rows=3), torch.tensor([1, 2]), torch.tensor([2, 3]), role=2
    )
    policy = gaussian_policy()
    rollouts = Rollouts.empty(plan, SHAPE, torch.float64)
    seen = []
    with torch.enable_grad():
        cond = policy.encode(rollouts.plan.texts)
        for rows in sample(policy, KERNEL, rollouts, cond, address=Address(0), batch_size=2):
            seen.append(rows.tolist())
            assert torch.is_grad_enabled()
            assert rollouts.images[rollouts.image_of(rows)].abs().sum() > 0
    # Rows 0 and 1 share a batch, 2 is left alone; the children come after all of them.
    assert seen == [[0, 1], [2], [4], [3]]
    assert not rollouts.states.requires_grad
    assert not rollouts.images.requires_grad


# --- through the network --------------------------------------------------------------------------


def test_the_network_agrees_with_itself_in_half_the_batch_size(monkeypatch):
    """Noise is bit-equal on any layout; latents agree to 1e-4 in float32."""
    policy = ShapesPolicy(random_weights(), precision="fp32")
    drawn = []

    def recorded(shape, address, stream, groups, rows, steps):
        noise = gaussian(shape, address, stream, groups, rows, steps)
        places = zip(groups.tolist(), rows.tolist(), steps.tolist(), strict=True)
        drawn[-1].update({(stream, *place): n for place, n in zip(places, noise, strict=True)})
        return noise

    monkeypatch.setattr(solver, "gaussian", recorded)
    prompts = [Prompt("a red circle left of a blue square"), Prompt("three rings")]
    plan = window_plan(prompts, rows=3)
    found = []
    for batch_size in (6, 3):
        drawn.append({})
        found.append(sampled(policy, plan, dtype=torch.float32, batch_size=batch_size))
    whole, half = found
    assert drawn[0].keys() == drawn[1].keys()
    assert len(drawn[0]) == 3 * plan.rows
    assert all(torch.equal(drawn[0][place], drawn[1][place]) for place in drawn[0])
    torch.testing.assert_close(half.states, whole.states, rtol=0, atol=1e-4)
    torch.testing.assert_close(half.images, whole.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(half.log_prob, whole.log_prob, rtol=0, atol=1e-4)
    assert whole.images.std() > 0.05
