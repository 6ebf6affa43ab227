"""Steps that explore because attention is spread out there (A-7), alone and merged."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from entroflow.errors import InputError
from entroflow.exploration.attention_peaks import AttentionPeaks
from entroflow.exploration.base import Request
from entroflow.exploration.every_step import EveryStep
from entroflow.exploration.merged_steps import MergedSteps
from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.sampling.kernels import CPS, ODE, FlowSDE
from entroflow.sampling.plan import FRESH, Plan

KERNEL = FlowSDE(noise_level=0.7)
CURVE = [0.1, 0.6, 0.2, 0.3, 0.8, 0.75, 0.1, 0.9]
"""Highest at the last step, then at 4, 5 and 1; its hills are at 1, 4 and 7."""


def request(*, kernel=KERNEL, curve=CURVE, sizes=(3, 2), first=(0, 0), shift=1.0):
    return Request(
        [Prompt(f"prompt {n}") for n in range(len(sizes))], torch.tensor(sizes),
        torch.tensor(first), shifted_grid(len(curve), shift), kernel, 0, 0,
        torch.tensor(curve, dtype=torch.float64),
    )  # fmt: skip


def explored(exploration, **options):
    plan = exploration.plan(request(**options))
    steps = {tuple(row.nonzero()[:, 0].tolist()) for row in plan.std > 0}
    assert len(steps) == 1, "the same for all"
    return list(*steps)


def same(one, other):
    assert all(
        torch.equal(value, getattr(other, name))
        for name, value in vars(one).items() if isinstance(value, torch.Tensor)
    )  # fmt: skip


@pytest.mark.parametrize(("settings", "steps"), [
    ({"count": 2}, [4, 5]),
    ({"count": 3}, [1, 4, 5]),
    ({"count": 2, "select": "peaks"}, [1, 4]),
    ({"count": 3, "select": "peaks"}, [1, 4, 5]),
    ({"count": 3, "select": "peaks", "separation": 2}, [1, 4, 6]),
    ({"count": 2, "exclude": (4,)}, [1, 5]),
    ({"count": 2, "select": "peaks", "exclude": (4,)}, [1, 5]),
    ({"count": 20}, [0, 1, 2, 3, 4, 5, 6]),
    ({"count": 20, "exclude": (0, 3)}, [1, 2, 4, 5, 6]),
])  # fmt: skip
def test_noise_enters_where_the_curve_stands_out_and_never_at_the_last_step(settings, steps):
    assert explored(AttentionPeaks(**settings)) == steps


def test_the_std_is_the_kernels_and_such_steps_are_trained():
    plan = AttentionPeaks(count=2).plan(request(shift=3.0))
    grid = plan.base_grid
    std = KERNEL.std(grid[:-1], grid[1:], grid)
    assert torch.equal(plan.std[:, [4, 5]], std[[4, 5]].expand(5, -1))
    assert torch.equal(plan.trained, plan.std > 0)


def test_with_all_steps_chosen_it_is_every_step():
    for share_noise in (False, True):
        one = AttentionPeaks(count=7, share_noise=share_noise).plan(request())
        same(one, EveryStep(share_noise=share_noise).plan(request()))


def test_a_step_that_was_never_measured_comes_last():
    curve = [math.nan, 0.1, math.nan, 0.2, 0.0]
    assert explored(AttentionPeaks(count=2), curve=curve) == [1, 3]
    assert explored(AttentionPeaks(count=4), curve=curve) == [0, 1, 2, 3]


def test_a_group_shares_its_initial_noise_or_does_not():
    assert AttentionPeaks(share_noise=True).plan(request()).noise_member.tolist() == [FRESH] * 5
    later = AttentionPeaks().plan(request(first=(4, 0)))
    assert later.noise_member.tolist() == [4, 5, 6, 0, 1]


@pytest.mark.parametrize(("settings", "kernel", "said"), [
    ({"exclude": (8,)}, KERNEL, r"exclude names step 8, but the steps are 0 to 7"),
    ({"exclude": (-1,)}, KERNEL, r"exclude names step -1"),
    ({"exclude": tuple(range(7))}, KERNEL, r"exclude leaves no step to explore at"),
    ({}, CPS(floor=0.2), r"no stochastic step from sigma 0\.25 to 0\.125"),
])  # fmt: skip
def test_what_can_not_be_planned_is_refused(settings, kernel, said):
    """Of the kernel even where the peaks of the moment are far from what it lacks."""
    curve = [0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1]
    with pytest.raises(InputError, match=said):
        AttentionPeaks(**settings).plan(request(kernel=kernel, curve=curve))
    excluded = AttentionPeaks(exclude=(6,))
    assert explored(excluded, kernel=CPS(floor=0.2), curve=curve) == [0, 1, 2, 3]


# --- merged steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_branches_leave_where_the_curve_stands_out(shift):
    """The plan of the same starts written out."""
    chosen = MergedSteps(starts="attention_peaks", count=2, merge=1)
    assert chosen.needs_attention
    listed = MergedSteps(starts=(4, 5), merge=1)
    assert not listed.needs_attention
    same(chosen.plan(request(shift=shift)), listed.plan(request(shift=shift)))


def test_they_are_merged_by_entropy():
    settings = {"merge": "entropy", "tau": 1.5, "out_of_reach": "highest"}
    chosen = MergedSteps(starts="attention_peaks", count=2, select="peaks", **settings)
    given = request(shift=3.0)
    assert chosen.steps(given) == MergedSteps(starts=(1, 4), **settings).steps(given)


@pytest.mark.parametrize(
    "given", [{"count": 2}, {"select": "peaks"}, {"separation": 2}, {"exclude": (0,)}]
)
def test_keys_that_choose_nothing_are_refused(given):
    (key,) = given
    with pytest.raises(ValidationError, match=f"{key} chooses among starts by attention"):
        MergedSteps(**given)
    MergedSteps(starts="attention_peaks", **given)
    MergedSteps(**{key: MergedSteps.model_fields[key].default})


def test_a_start_that_may_come_later_must_be_possible_now():
    merged = MergedSteps(starts="attention_peaks", count=1, merge=3)
    with pytest.raises(InputError, match="merge is 3 at step 5"):
        merged.plan(request())
    merged = MergedSteps(starts="attention_peaks", count=1, merge=3, exclude=(5, 6))
    assert merged.steps(request()) == [(4, 7)]
    listed = MergedSteps(starts="attention_peaks", merge=(1, 2, 3, 4))
    with pytest.raises(InputError, match="merge is a list"):
        listed.plan(request())


def test_a_prompt_without_rollouts_in_a_round_has_no_anchor_in_it():
    """And the branches of the others are those of a round where it has some."""
    exploration = MergedSteps(starts=(1, 3), merge=1)

    def branches(plan: Plan, prompt):
        mine = (plan.prompt == prompt) & (plan.parent != FRESH)
        parents = plan.parent[mine]
        assert (plan.prompt[parents] == prompt).all()
        assert (plan.parent[parents] == FRESH).all()
        return [getattr(plan, name)[mine].tolist()
                for name in ("group", "member", "points", "std", "parent_step")]  # fmt: skip

    less = exploration.plan(request(sizes=(0, 2, 0, 1), first=(3, 3, 3, 3)))
    more = exploration.plan(request(sizes=(1, 2, 1, 1), first=(3, 3, 3, 3)))
    anchors = less.prompt[less.parent == FRESH]
    assert anchors.tolist() == [1, 3]
    assert less.group[less.parent == FRESH].tolist() == [9, 27]
    for prompt in (1, 3):
        assert branches(less, prompt) == branches(more, prompt)


def test_a_deterministic_kernel_leaves_nothing_to_explore():
    assert not (AttentionPeaks().plan(request(kernel=ODE())).std > 0).any()
