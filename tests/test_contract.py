"""The contract between the stages: a method that no shipped part knows passes through them all.

Two prompts, two allocation rounds; an anchor per prompt, branches with a merged step from two of
its states, groups of 8 and 16, a completion from a middle state, and one failed reward, on a
Gaussian policy whose densities are written out again here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from entroflow.credit.normalise import group_advantages
from entroflow.errors import InputError
from entroflow.objectives.transitions import transitions_of
from entroflow.recipe.load import build_recipe
from entroflow.rewards.base import Scores, Status
from entroflow.sampling.plan import Role, fresh_rows, with_children
from entroflow.training.trainer import Trainer
from gaussian_policy import GaussianPolicy

STEPS = 6
STARTS = {1: 3, 2: 4}
"""Base-grid index where a branch starts -> where its merged stochastic step ends."""
ROUNDS = ([8, 20], [8, 12])
"""Branches per prompt in each round: 16 and 32 in all, so groups of 8 and 16 per start."""
FAILED = 5


class TwoRounds:
    rounds = len(ROUNDS)

    def sizes(self, prompts, rounds):
        return torch.tensor(ROUNDS[len(rounds)]) if len(rounds) < len(ROUNDS) else None


class Branches:
    """Half of a prompt's rollouts branch off at each start; the group is (prompt, start)."""

    def plan(self, request):
        P, T = len(request.prompts), len(request.base_grid) - 1
        anchors = fresh_rows(
            request.prompts, torch.ones(P, dtype=torch.long), torch.zeros(P, dtype=torch.long),
            request.base_grid, torch.zeros(T, dtype=torch.float64),
            share_noise=True, role=Role.ANCHOR, scored=False,
        )  # fmt: skip
        parent, start, member = [], [], []
        for p in range(P):
            half = int(request.sizes[p]) // 2
            first = int(request.first_member[p]) // 2
            for s in STARTS:
                parent += [p] * half
                start += [s] * half
                member += list(range(first, first + half))
        parent, start = torch.tensor(parent), torch.tensor(start)
        points = torch.full((len(parent), T), T)
        std = torch.zeros(len(parent), T - 1, dtype=torch.float64)
        grid = request.base_grid
        for row, s in enumerate(start.tolist()):
            own = [s, *range(STARTS[s], T + 1)]
            points[row, : len(own)] = torch.tensor(own)
            std[row, 0] = request.kernel.std(grid[s], grid[STARTS[s]], grid)
        return with_children(
            anchors, parent, start, role=Role.ROLLOUT, group=100 + 10 * parent + start,
            member=torch.tensor(member), points=points, std=std,
        )  # fmt: skip


class BranchCredit:
    """Terminal credit by (prompt, start); the first branch also asks for a completion."""

    def complete(self, plan):
        first = (plan.role == Role.ROLLOUT).nonzero()[:1, 0]
        return with_children(plan, first, torch.ones(1, dtype=torch.long), role=Role.COMPLETION)

    def advantages(self, rollouts, scores):
        plan = rollouts.plan
        rollout = plan.role == Role.ROLLOUT
        per_row = torch.zeros(plan.rows, dtype=torch.float64)
        per_row[rollout] = group_advantages(scores.values[rollout], plan.group[rollout])
        return per_row[:, None].expand(plan.std.shape)


class SumReward:
    """The sum of a latent's values; the image whose number is `FAILED` can't be scored."""

    def __init__(self):
        self.seen = 0

    def score(self, images, prompts):
        values = images.flatten(1).sum(dim=1).double()
        numbers = range(self.seen, self.seen + len(images))
        self.seen += len(images)
        statuses = tuple(Status.ERROR if n == FAILED else Status.OK for n in numbers)
        bad = torch.tensor([status is Status.ERROR for status in statuses])
        return Scores(values.masked_fill(bad, torch.nan), statuses)


@pytest.fixture
def run():
    recipe = build_recipe(
        {
            "prompts": {"type": "shapes", "per_iteration": 2},
            "sampling": {"steps": STEPS, "state_dtype": "float64", "batch_size": 7},
            "objective": {"type": "clipped", "clip_range": 0.2},
            "optimizer": {"learning_rate": 0.01, "micro_batch": 3},
        }
    )
    recipe = replace(recipe, allocation=TwoRounds(), exploration=Branches(), credit=BranchCredit())
    policy = GaussianPolicy(mean=0.3, variance=0.5)
    trainer = Trainer(recipe, policy, SumReward())
    prompts = recipe.prompts.batch(0, 0)
    rollouts, found = trainer._roll_out(prompts, trainer._encode(prompts))
    scores = found["reward"]
    transitions = transitions_of(rollouts, recipe.credit.advantages(rollouts, scores))
    return trainer, policy, prompts, rollouts, scores, transitions


def test_plan_has_the_groups_and_roles_that_were_asked_for(run):
    _, _, _, rollouts, _, _ = run
    plan = rollouts.plan
    counts = {role: int((plan.role == role).sum()) for role in Role}
    assert counts == {Role.ANCHOR: 4, Role.ROLLOUT: 48, Role.COMPLETION: 2}
    groups = plan.group[plan.role == Role.ROLLOUT].tolist()
    assert {g: groups.count(g) for g in set(groups)} == {101: 8, 102: 8, 111: 16, 112: 16}
    addresses = {
        (g, m)
        for g, m, role in zip(
            plan.group.tolist(), plan.member.tolist(), plan.role.tolist(), strict=True
        )
        if role == Role.ROLLOUT
    }
    assert len(addresses) == 48


def test_network_is_evaluated_once_per_state(run):
    trainer, _, _, _, _, _ = run
    anchors = 4 * STEPS
    tails = sum((STEPS - end) * 24 for end in STARTS.values())
    completions = 2 * (STEPS - STARTS[1] - 1)
    assert trainer.ledger.network_evaluations == anchors + tails + completions


def test_branches_share_their_state_bitwise(run):
    _, _, _, rollouts, _, transitions = run
    for group in transitions.group.unique():
        for first_round in (True, False):
            half = transitions.row < 31 if first_round else transitions.row >= 31
            mine = (transitions.group == group) & half
            assert len(transitions.state[mine].unique()) == 1
    assert len(rollouts.states) < len(transitions) * 2


def test_completion_of_a_deterministic_tail_is_the_branch_itself(run):
    _, _, _, rollouts, _, _ = run
    plan = rollouts.plan
    for row in (plan.role == Role.COMPLETION).nonzero()[:, 0].tolist():
        parent = int(plan.parent[row])
        images = rollouts.images[rollouts.image_of(torch.tensor([row, parent]))]
        assert torch.equal(images[0], images[1])


def test_batch_size_changes_no_bit(run):
    trainer, policy, prompts, rollouts, _, _ = run
    settings = trainer.recipe.sampling
    for batch_size in (1, 1000):
        recipe = replace(
            trainer.recipe, sampling=settings.model_copy(update={"batch_size": batch_size})
        )
        again = Trainer(recipe, policy, SumReward())
        other, _ = again._roll_out(prompts, again._encode(prompts))
        assert torch.equal(other.states, rollouts.states)
        assert torch.equal(other.log_prob, rollouts.log_prob)


def test_log_probabilities_are_the_gaussian_density(run):
    _, policy, _, rollouts, _, t = run
    grid = rollouts.plan.base_grid
    for i in range(len(t)):
        start = int(t.step[i])
        sigma, sigma_next = float(grid[start]), float(grid[STARTS[start]])
        x, y = t.states[t.state[i]], t.states[t.next_state[i]]
        mean, std = _flow_sde(policy.shift.detach(), x, sigma, sigma_next, 1 - float(grid[1]))
        density = torch.distributions.Normal(mean, std).log_prob(y).mean()
        assert t.log_prob[i].item() == pytest.approx(density.item(), abs=1e-12)


def test_failed_reward_is_masked_and_weights_sum_to_one(run):
    _, _, _, rollouts, scores, t = run
    plan = rollouts.plan
    failed = [r for r in range(plan.rows) if scores.statuses[r] is Status.ERROR]
    assert len(failed) == 1
    assert plan.role[failed[0]] == Role.ROLLOUT
    assert t.weight[t.row == failed[0]].tolist() == [0.0]
    assert t.weight.sum().item() == pytest.approx(1, abs=1e-12)
    assert len(t.weight[t.weight > 0].unique()) == 1
    group = plan.group[failed[0]]
    others = [
        r
        for r in range(plan.rows)
        if plan.group[r] == group and plan.role[r] == Role.ROLLOUT and r not in failed
    ]
    values = scores.values[others]
    expected = (values - values.mean()) / (values.std(correction=0) + 1e-4)
    found = torch.stack([t.advantage[t.row == r][0] for r in others])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_update_follows_the_policy_gradient_with_one_pass_per_state(run):
    trainer, policy, prompts, rollouts, _, t = run
    grid = rollouts.plan.base_grid
    shift = policy.shift.detach().clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(t)):
        start = int(t.step[i])
        sigma, sigma_next = float(grid[start]), float(grid[STARTS[start]])
        x, y = t.states[t.state[i]], t.states[t.next_state[i]]
        mean, std = _flow_sde(shift, x, sigma, sigma_next, 1 - float(grid[1]))
        density = torch.distributions.Normal(mean, std).log_prob(y).sum()
        loss = loss - t.weight[i] * t.advantage[i] * density
    (expected,) = torch.autograd.grad(loss, shift)

    gradients = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (gradients.append(policy.shift.grad.clone()), step())
    before = trainer.ledger.network_evaluations
    statistics = trainer._update(t, trainer._encode(prompts), share_done=0.0)
    norm = statistics.gradient_norm[0]
    limit = trainer.recipe.optimizer.max_grad_norm
    clipped = expected * min(1.0, limit / (norm + 1e-6))
    torch.testing.assert_close(gradients[0], clipped, rtol=1e-10, atol=1e-12)
    assert norm == pytest.approx(expected.norm().item(), rel=1e-10)
    assert statistics.diagnostics["ratio_max_deviation"] == 0.0
    assert statistics.diagnostics["kl"] == 0.0
    states = len(t.state.unique())
    assert states == 8
    assert trainer.ledger.network_evaluations - before == states
    # The KL is measured on a sample that meets every state, under both weights.
    assert trainer.ledger.check_evaluations == 2 * states
    assert not torch.equal(policy.shift.detach(), torch.zeros(2, dtype=torch.float64))


def test_a_whole_step_counts_the_rewards_of_rollouts_alone(run):
    """Completions are images too, but of another kind."""
    trainer, _, _, rollouts, scores, _ = run
    metrics = Trainer(trainer.recipe, GaussianPolicy(mean=0.3, variance=0.5), SumReward()).step()
    values = scores.values[rollouts.plan.role == Role.ROLLOUT]
    assert metrics["reward/mean"] == pytest.approx(values.nanmean().item(), rel=1e-12)
    assert metrics["reward/failed"] == 1
    assert metrics["policy/ratio_max_deviation"] == 0.0


def test_scores_of_completions_alone_are_no_rewards(run):
    """With nothing but those, every advantage would be masked: the run stops and says so."""
    trainer, _, _, rollouts, scores, _ = run
    rollout = rollouts.plan.role == Role.ROLLOUT
    trainer._advantages(rollouts, {"reward": scores})
    scores = replace(scores, values=scores.values.masked_fill(rollout, torch.nan))
    assert scores.values.isfinite().any()
    with pytest.raises(InputError, match="every reward of iteration 1 failed"):
        trainer._advantages(rollouts, {"reward": scores})


def _flow_sde(shift, x, sigma, sigma_next, room, a=0.7, mean=0.3, variance=0.5):
    """Mean and std of one Flow-SDE step on the Gaussian flow, from the equations of the paper."""
    target = mean + shift
    V = (1 - sigma) ** 2 * variance + sigma**2
    v = (sigma - (1 - sigma) * variance) / V * (x - (1 - sigma) * target) - target
    diffusion = a * math.sqrt(sigma / max(1 - sigma, room))
    dt = sigma_next - sigma
    drift = v + diffusion**2 / (2 * sigma) * (x + (1 - sigma) * v)
    return x + drift * dt, torch.as_tensor(diffusion * math.sqrt(-dt), dtype=torch.float64)
