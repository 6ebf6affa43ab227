"""The flat table of transitions, against a plain loop over rows and steps."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entroflow.noise import Address
from entroflow.objectives.transitions import transitions_of
from entroflow.sampling.kernels import FlowSDE
from entroflow.sampling.plan import Role
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from gaussian_policy import GaussianPolicy
from random_plans import OFFSETS, random_plan

KERNEL = FlowSDE(noise_level=0.7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_the_table_holds_every_trained_step_of_the_rollouts_with_its_own_advantage(seed):
    """Also on grids that skip points, where the step of the base grid is not the column, and where
    not every stochastic step is trained.
    """
    rng = np.random.default_rng(seed)
    plan, policy = random_plan(rng), GaussianPolicy(0.3, 0.5, offsets=OFFSETS)
    if rng.random() < 0.5:
        plan = plan.training(torch.from_numpy(rng.random(plan.std.shape) < 0.6))
    rollouts = Rollouts.empty(plan, policy.latent_shape, torch.float64, keeps=("means",))
    cond = policy.encode(plan.texts)
    for _ in sample(policy, KERNEL, rollouts, cond, address=Address(0), batch_size=3):
        pass
    advantages = torch.from_numpy(rng.normal(size=plan.std.shape))
    advantages[torch.from_numpy(rng.random(plan.std.shape) < 0.2)] = math.nan
    table = transitions_of(rollouts, advantages)
    wanted = [
        (row, column)
        for row in range(plan.rows)
        for column in range(int(plan.length[row]))
        if plan.role[row] == Role.ROLLOUT and plan.trained[row, column]
    ]
    assert len(table) == len(wanted)
    assert not (plan.trained & (plan.std == 0)).any()
    assert plan.trained_states() == len(table.state.unique())
    valid = sum(not math.isnan(advantages[place]) for place in wanted)
    for i, (row, column) in enumerate(wanted):
        points = plan.points[row].tolist()
        assert (table.row[i], table.step[i]) == (row, points[column])
        assert table.prompt[i] == plan.prompt[row]
        assert table.group[i] == plan.group[row]
        assert table.sigma[i] == plan.base_grid[points[column]]
        assert table.sigma_next[i] == plan.base_grid[points[column + 1]]
        assert table.std[i] == plan.std[row, column]
        assert table.log_prob[i] == rollouts.log_prob[row, column]
        # The density of the step from one state of the table to the other.
        mean = table.old_mean[i]
        density = torch.distributions.Normal(mean, table.std[i])
        reached = table.states[table.next_state[i]]
        torch.testing.assert_close(density.log_prob(reached).mean(), table.log_prob[i])
        failed = math.isnan(advantages[row, column])
        assert table.advantage[i] == (0 if failed else advantages[row, column])
        assert table.weight[i] == (0 if failed else 1 / valid)
    if valid:
        assert math.isclose(table.weight.sum(), 1, rel_tol=1e-12)
