"""Scoring a stream of finished rows: whatever a reward object returns, failures stay failures."""

import math

import pytest
import torch

from entroflow.errors import InputError
from entroflow.prompts import Prompt
from entroflow.rewards.base import FunctionReward, Scores, Status, score
from entroflow.sampling.grid import shifted_grid
from entroflow.sampling.kernels import ODE
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from gaussian_policy import GaussianPolicy

ROWS = 5


class Fixed:
    """Returns what it is told to, batch after batch."""

    def __init__(self, values, statuses):
        self.values, self.statuses = list(values), list(statuses)

    def score(self, images, prompts):
        n = len(images)
        values, statuses = self.values[:n], tuple(self.statuses[:n])
        self.values, self.statuses = self.values[n:], self.statuses[n:]
        return Scores(torch.tensor(values, dtype=torch.float64), statuses)


def scored(reward, batch_size=2):
    policy, grid = GaussianPolicy(mean=0.3, variance=0.5), shifted_grid(2, 1.0)
    sizes, none = torch.tensor([ROWS]), torch.tensor([0])
    plan = fresh_rows([Prompt("a ring")], sizes, none, grid, torch.zeros(2))
    rollouts = Rollouts.empty(plan, policy.latent_shape)
    cond = policy.encode(rollouts.plan.texts)
    finished = sample(policy, ODE(), rollouts, cond, seed=0, iteration=0, batch_size=batch_size)
    return score(reward, rollouts, finished)


def test_values_land_on_their_rows():
    found = scored(Fixed([1, 2, 3, 4, 5], [Status.OK] * ROWS))
    assert found.values.tolist() == [1, 2, 3, 4, 5]
    assert found.statuses == (Status.OK,) * ROWS


def test_a_value_beside_a_failure_is_never_used():
    """An object may report a failure and still fill in a 0."""
    statuses = [Status.OK, Status.ERROR, Status.UNPARSED, Status.OK, Status.OK]
    found = scored(Fixed([1, 0, 0, 4, 5], statuses))
    assert found.values.isnan().tolist() == [False, True, True, False, False]
    assert list(found.statuses) == statuses


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_a_failure_of_its_image_alone(bad):
    found = scored(Fixed([1, bad, 3, 4, 5], [Status.OK] * ROWS))
    assert found.values.isnan().tolist() == [False, True, False, False, False]
    assert found.statuses[1] == Status.UNPARSED


@pytest.mark.parametrize(("values", "statuses"), [(1, 2), (3, 2), (2, 1), (2, 3)])
def test_the_wrong_number_of_values_or_statuses_is_refused(values, statuses):
    """One value must not spread over a batch."""

    class Wrong:
        def score(self, images, prompts):
            return Scores(torch.ones(values), (Status.OK,) * statuses)

    with pytest.raises(InputError, match="Wrong must return one value and one status per image"):
        scored(Wrong())


def test_the_warning_of_a_failed_function_names_the_kind_of_error(caplog):
    def reward(images, prompts, metadata):
        return [entry["level"] for entry in metadata]

    found = scored(FunctionReward(reward), batch_size=ROWS)
    assert found.values.isnan().all()
    assert "KeyError: 'level'" in caplog.text
