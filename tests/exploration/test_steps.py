"""Which steps are stochastic and which are trained: every step, a random part, a window."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from entroflow.errors import InputError
from entroflow.exploration.base import Request
from entroflow.exploration.every_step import EveryStep
from entroflow.exploration.random_fraction import RandomFraction
from entroflow.exploration.window import Window
from entroflow.prompts import Prompt
from entroflow.sampling.grid import shifted_grid
from entroflow.sampling.kernels import CPS, FlowSDE
from entroflow.sampling.plan import FRESH
from entroflow.trainer import Trainer
from tiny_run import ROLLOUTS, PixelPolicy, brightness, recipe

KERNEL = FlowSDE(noise_level=0.7)


def planned(exploration, *, steps=16, sizes=(3, 2), first=None, seed=0, iteration=0, kernel=KERNEL):
    grid = shifted_grid(steps, 3.0)
    prompts = [Prompt(f"prompt {n}") for n in range(len(sizes))]
    first_member = torch.tensor(first or [0] * len(sizes))
    request = Request(prompts, torch.tensor(sizes), first_member, grid, kernel, seed, iteration)
    return exploration.plan(request)


def starts(exploration, **options):
    """The first stochastic step of every row, and how many there are."""
    stochastic = planned(exploration, **options).std > 0
    first = stochastic.int().argmax(dim=1)
    expected = torch.arange(stochastic.shape[1])
    count = stochastic.sum(dim=1)
    inside = (expected >= first[:, None]) & (expected < (first + count)[:, None])
    assert torch.equal(stochastic, inside)
    assert set(count.tolist()) == {exploration.size}
    return first.tolist()


def test_no_window_of_a_run_may_reach_a_step_that_the_kernel_refuses():
    """It shows before the first iteration, though the first window is far from it."""
    moving = Window(size=4, move="progressive")
    with pytest.raises(InputError, match=r"no stochastic step from sigma 0\.\d+ to 0\.0"):
        planned(moving, steps=50, kernel=CPS(floor=0.1))
    planned(moving, steps=50, kernel=CPS(floor=0))
    planned(Window(size=4), steps=50, kernel=CPS(floor=0.1))
    planned(Window(size=4, move="random", last_start=5), steps=50, kernel=CPS(floor=0.1))


# --- every step -----------------------------------------------------------------------------------


def test_every_step_but_the_last_has_the_std_of_the_kernel():
    plan = planned(EveryStep())
    grid = plan.base_grid
    wanted = KERNEL.std(grid[:-2], grid[1:-1], grid)
    assert torch.equal(plan.std, torch.cat([wanted, torch.zeros(1)]).expand(5, -1))
    assert torch.equal(plan.trained, plan.std > 0)


@pytest.mark.parametrize("exploration", [EveryStep, RandomFraction, Window])
def test_a_group_shares_its_initial_noise_or_does_not(exploration):
    shared = planned(exploration(share_noise=True)).noise_member
    assert shared.tolist() == [FRESH] * 5
    assert planned(exploration(share_noise=False)).noise_member.tolist() == [0, 1, 2, 0, 1]


# --- a random part --------------------------------------------------------------------------------


def test_a_random_part_of_the_steps_is_trained_and_all_are_stochastic():
    """DanceGRPO: 9 of the 15 steps before the last at 16 steps and a fraction of 0.6."""
    plan = planned(RandomFraction(), sizes=(4, 4))
    assert torch.equal(plan.std, planned(EveryStep(), sizes=(4, 4)).std)
    assert plan.trained.sum(dim=1).tolist() == [9] * 8
    assert not plan.trained[:, -1].any()
    assert len({tuple(row) for row in plan.trained.tolist()}) == 8


def test_every_step_is_chosen_equally_often():
    """Over 1,200 rows each of 7 steps is among 4 chosen in 4/7 of them, within 5 sigma."""
    chosen = planned(RandomFraction(fraction=0.6), steps=8, sizes=(600, 600)).trained.sum(dim=0)
    share = 4 / 7
    bound = 5 * math.sqrt(1200 * share * (1 - share))
    assert (chosen[:-1] - 1200 * share).abs().max() < bound


def test_what_is_trained_depends_on_the_address_alone():
    """A round that begins at member 2 goes on where one of 4 members would."""
    whole = planned(RandomFraction(), sizes=(4, 0)).trained
    later = planned(RandomFraction(), sizes=(2, 3), first=(2, 0)).trained
    assert torch.equal(whole[2:], later[:2])
    for other in ({"seed": 1}, {"iteration": 1}):
        assert not torch.equal(whole, planned(RandomFraction(), sizes=(4, 0), **other).trained)


def test_a_part_of_less_than_one_step_is_refused():
    with pytest.raises(InputError, match=r"fraction is 0.05 of 15 steps: less than one"):
        planned(RandomFraction(fraction=0.05))


def test_only_the_trained_steps_are_transitions_and_cost_a_pass():
    """Sampling asks for all steps, the update for 2 of 3 stochastic ones of every row."""
    settings = recipe(
        exploration={"type": "random_fraction", "fraction": 0.67},
        objective={"kl": 0.0, "minibatches": 1},
    )
    trainer = Trainer(settings, PixelPolicy())
    metrics = trainer.step()
    assert metrics["policy/transitions"] == 2 * ROLLOUTS
    assert metrics["ledger/network_evaluations"] == (4 + 2) * ROLLOUTS
    assert metrics["policy/ratio_max_deviation"] == 0
    assert set(metrics["by_step"]["ratio"]) == {"0", "1", "2"}
    assert settings.reward.function is brightness


# --- a window -------------------------------------------------------------------------------------


def test_a_fixed_window_stands_still():
    window = Window(size=4, start=2)
    assert {tuple(starts(window, iteration=n)) for n in (0, 30, 500)} == {(2,) * 5}


@pytest.mark.parametrize("stride", [1, 3])
def test_a_progressive_window_slides_and_comes_back(stride):
    """`stride` further every 5 iterations; after the last start from the first again (MixGRPO)."""
    window = Window(size=4, start=1, last_start=9, move="progressive", every=5, stride=stride)
    at, stayed = 1, 0
    for iteration in range(150):
        assert starts(window, iteration=iteration) == [at] * 5
        stayed += 1
        if stayed == 5:
            at, stayed = at + stride, 0
            if at > 9:
                at = 1


def test_a_progressive_window_reaches_all_steps_but_the_last():
    window = Window(size=4, move="progressive", every=1)
    seen = [starts(window, iteration=n, sizes=(1,))[0] for n in range(12)]
    assert seen == list(range(12))
    assert starts(window, iteration=12, sizes=(1,)) == [0]


def test_a_decaying_window_passes_late_starts_sooner():
    """At start l it stays for `every` exp(-rate max(0, l - from)) iterations (MixGRPO)."""
    window = Window(
        size=2, start=0, last_start=5, move="decay", every=20, decay_rate=0.5, decay_from=2
    )
    stays = [20, 20, 20, 12, 7, 4]
    assert stays == [round(20 * math.exp(-0.5 * max(0, at - 2))) for at in range(6)]
    wanted = [at for at, stay in enumerate(stays) for _ in range(stay)]
    found = [starts(window, iteration=n, sizes=(1,))[0] for n in range(2 * len(wanted))]
    assert found == wanted * 2


def test_a_random_window_is_drawn_for_all_groups_every_so_many_iterations():
    window = Window(size=3, start=2, last_start=7, move="random", every=4)
    drawn = [starts(window, iteration=n) for n in range(400)]
    assert all(len(set(rows)) == 1 for rows in drawn)
    places = [rows[0] for rows in drawn]
    assert all(len(set(places[n : n + 4])) == 1 for n in range(0, 400, 4))
    assert set(places) == set(range(2, 8))
    assert places != [starts(window, iteration=n, seed=1)[0] for n in range(400)]


def test_a_window_per_group_is_shared_by_its_members_in_every_round():
    """Uniform over the starts: each of 6 in a sixth of 1,200 draws, within 5 sigma."""
    window = Window(size=3, last_start=5, move="random_per_group")
    seen = Counter()
    for iteration in range(300):
        rows = starts(window, iteration=iteration, sizes=(2, 2, 2, 2))
        again = starts(window, iteration=iteration, sizes=(1, 1, 1, 1), first=(2, 2, 2, 2))
        assert rows[::2] == rows[1::2] == again
        seen.update(rows[::2])
    counts = np.array([seen[at] for at in range(6)])
    assert counts.sum() == 1200
    assert np.abs(counts - 200).max() < 5 * math.sqrt(1200 * (1 / 6) * (5 / 6))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": 16}, r"start \+ exploration.size is 16, but must stay below sampling.steps"),
        ({"size": 4, "start": 12}, r"start \+ exploration.size is 16"),
        ({"size": 4, "last_start": 12}, r"last_start \+ exploration.size is 16"),
        ({"size": 4, "start": 5, "last_start": 4}, "last_start is 4, before .*start"),
    ],
)
def test_a_window_that_reaches_the_last_step_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        planned(Window(**settings))
