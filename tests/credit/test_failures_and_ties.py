"""What a failed reward, or one that is the same for all, must not do to a group."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from entroflow.credit.normalise import group_advantages

CONSTANTS = [0.1, 0.333, 0.7, 0.2871, 3.1, 22.4 / 26]


def one_group(values, **settings):
    return group_advantages(values, torch.zeros(len(values), dtype=torch.long), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", CONSTANTS)
def test_equal_rewards_give_exactly_nothing(value, dtype):
    for size in range(2, 49):
        rewards = torch.full((size,), value, dtype=dtype)
        assert (one_group(rewards, ddof=1, epsilon=1e-8) == 0).all()


def test_the_formula_as_it_is_usually_written_does_not():
    """In float32 the mean of eight equal numbers is another number: advantages of up to 0.9, all of
    the same sign, from nothing.
    """
    sizes = []
    for value in CONSTANTS:
        rewards = torch.full((8,), value)
        A = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        assert (A[0] == A).all()
        sizes.append(A.abs().max().item())
    assert 0.5 < max(sizes) < 1


@pytest.mark.parametrize(("size", "worst", "left"), [(24, -4.65, 0.137), (8, -2.47, 0.078)])
def test_a_failure_that_counts_as_0_poisons_its_group(size, worst, left):
    """Rewards around 0.7 +- 0.02 and one failure: as a 0 it takes all the contrast from the others;
    masked it takes nothing (T9).
    """
    rng = np.random.default_rng(0)
    failed, shrunk = [], []
    for _ in range(400):
        rewards = torch.from_numpy(rng.normal(0.7, 0.02, size))
        masked, zero = rewards.clone(), rewards.clone()
        masked[0], zero[0] = math.nan, 0.0
        settings = {"ddof": 1, "epsilon": 0.0, "clip": 100.0}
        A, poisoned = one_group(masked, **settings), one_group(zero, **settings)
        torch.testing.assert_close(A[1:], one_group(rewards[1:], **settings), atol=1e-12, rtol=0)
        assert A[0].isnan()
        failed.append(poisoned[0].item())
        shrunk.append((poisoned[1:].std() / A[1:].std()).item())
    assert np.mean(failed) == pytest.approx(worst, abs=0.06)
    assert np.mean(shrunk) == pytest.approx(left, abs=0.006)
