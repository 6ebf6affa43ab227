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
from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.recipe.load import load_recipe
from entroflow.sampling.kernels import CPS, FlowSDE
from entroflow.sampling.plan import FRESH
from entroflow.training.trainer import Trainer
from tiny_run import ROLLOUTS, PixelPolicy, brightness, only, recipe

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
    assert only(settings).function is brightness


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
    """At start l it stays for `every` exp(-rate max(0, l - from)) iterations, as a rule no integer.

    MixGRPO counts the iterations at a start and leaves it as soon as the count has reached that
    number: after the smallest integer that is no less than it. With the settings of its code, 25
    iterations, a rate of 0.1 and 13, those are 25 up to start 13, and then of

        25 exp(-0.1 j), j = 1, ..., 7:  22.62  20.47  18.52  16.76  15.16  13.72  12.41

    the next integers. At starts 15, 18 and 20 the nearest one would be another.
    """
    stays = [25] * 14 + [23, 21, 19, 17, 16, 14, 13]
    wanted = [at for at, stay in enumerate(stays) for _ in range(stay)]
    window = Window(size=4, start=0, move="decay")
    places = [starts(window, iteration=n, steps=25, sizes=(1,))[0] for n in range(len(wanted) + 30)]
    assert places == wanted + wanted[:30]


def test_a_window_that_decays_fast_stays_for_one_iteration():
    """20 exp(-5 j) is 20, 0.13, 0.0009, ...; from the first start on, with a stride of 2."""
    window = Window(size=2, start=1, last_start=7, stride=2, move="decay", every=20,
                    decay_rate=5.0, decay_from=1)  # fmt: skip
    places = [starts(window, iteration=n, sizes=(1,))[0] for n in range(46)]
    assert places == ([1] * 20 + [3, 5, 7]) * 2


def test_a_random_window_is_sampled_for_all_groups_in_every_iteration():
    """Whatever `every` is, uniform and independent, as in MixGRPO's code.

    Of 1,200 iterations each of 6 starts has a sixth, and a sixth has the start of the one before,
    within 5 standard deviations.
    """
    window = Window(size=3, start=2, last_start=7, move="random", every=25)
    rows = [starts(window, iteration=n) for n in range(1201)]
    assert all(len(set(places)) == 1 for places in rows)
    places = np.array([first for first, *_ in rows])
    reach = 5 * math.sqrt(1200 * (1 / 6) * (5 / 6))
    counts = np.bincount(places[1:], minlength=8)
    assert counts[:2].sum() == 0
    assert np.abs(counts[2:] - 200).max() < reach
    assert abs(np.sum(places[1:] == places[:-1]) - 200) < reach
    assert list(places) != [starts(window, iteration=n, seed=1)[0] for n in range(1201)]


def test_the_windows_of_mix_grpo_are_those_of_its_code_for_500_iterations():
    """Then, as the notes say, they stay whole, where the code's become shorter.

    In the code, of 25 steps, iteration n has those from l = (n // 25) mod 24 up to l + 4, but
    below 23.
    """
    exploration = load_recipe("mix_grpo").exploration

    def steps(iteration):
        std = planned(exploration, steps=25, sizes=(1,), iteration=iteration).std
        return std[0].nonzero()[:, 0].tolist()

    def published(iteration):
        first = iteration // 25 % 24
        return [*range(first, min(first + 4, 23))]

    edges = {25 * at + offset for at in range(20) for offset in (0, 12, 24)}
    assert {n: steps(n) for n in edges} == {n: published(n) for n in edges}
    assert (published(500), steps(500)) == ([20, 21, 22], [20, 21, 22, 23])
    assert (steps(524), steps(525)) == ([20, 21, 22, 23], [0, 1, 2, 3])
    assert (published(575), published(600)) == ([], [0, 1, 2, 3])


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
