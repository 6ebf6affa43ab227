"""The spread of rewards that the shift of attention is compared with."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores, Status
from entroflow.sampling.plan import Plan, Role, fresh_rows, join, with_children
from entroflow.training.attention_metrics import reward_spread

GRID = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)


def rounds(*sizes: tuple[int, ...]) -> Plan:
    """Plans of rounds over prompts, joined."""
    plans, spent = [], torch.zeros(len(sizes[0]), dtype=torch.long)
    prompts = [Prompt(f"prompt {n}") for n in range(len(sizes[0]))]
    for of_round in sizes:
        now = torch.tensor(of_round)
        plans.append(fresh_rows(prompts, now, spent, GRID, torch.ones(2, dtype=torch.float64)))
        spent = spent + now
    return join(plans)


def spread(plan: Plan, values: list[float], relative: bool = False) -> list[float]:
    return reward_spread(
        plan,
        Scores(torch.tensor(values, dtype=torch.float64), (Status.OK,) * len(values)),
        relative=relative,
    ).tolist()


def test_of_groups_of_two_sizes_as_many_count_as_the_smaller_has():
    plan = rounds((2, 2), (0, 3))
    assert spread(plan, [1.0, 3.0, 5.0, 9.0, 100.0, 200.0, 300.0]) == [1.0, 2.0]


def test_chance_alone_spreads_large_groups_no_more_than_small_ones():
    """Of equal rewards in groups of 4 and 16, the deviation of n would differ by a tenth."""
    source = torch.Generator().manual_seed(0)
    plan = rounds((4,) * 400, (0, 12) * 200)
    values = torch.randn(plan.rows, generator=source).tolist()
    found = spread(plan, values)
    small, large = found[::2], found[1::2]
    error = statistics.stdev(found) / math.sqrt(len(small))
    assert abs(statistics.mean(small) - statistics.mean(large)) < 3 * math.sqrt(2) * error
    # All members would be seen to differ: (1 - 1/4, 1 - 1/16) under the root, and more.
    of_all = [
        statistics.pstdev(v for v, p in zip(values, plan.prompt.tolist(), strict=True) if p == n)
        for n in range(400)
    ]
    assert statistics.mean(of_all[1::2]) - statistics.mean(of_all[::2]) > 6 * error


def test_win_rates_depend_on_the_size_of_the_group():
    """Nothing is said where groups differ in it, and all count where they don't."""
    values = [0.0, 1.0, 0.25, 0.75]
    assert spread(rounds((2, 2)), values, relative=True) == [0.5, 0.25]
    assert all(map(math.isnan, spread(rounds((2, 2), (1, 0)), [*values, 0.5], relative=True)))


def test_failures_completions_and_prompts_without_any_are_left_out():
    plan = rounds((3, 3, 0))
    plan = with_children(
        plan, torch.tensor([0]), torch.tensor([1]), role=Role.COMPLETION,
        group=torch.tensor([-1]),
    )  # fmt: skip
    found = spread(plan, [1.0, math.nan, 5.0, *[math.nan] * 3, 99.0])
    assert found[0] == 2.0
    assert all(map(math.isnan, found[1:]))


def test_several_groups_of_a_prompt_are_averaged():
    plan = rounds((4,))
    plan.group[2:] = 1
    plan.member[2:] -= 2
    assert spread(plan, [0.0, 2.0, 0.0, 6.0]) == [pytest.approx(2.0)]
