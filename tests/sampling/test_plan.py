"""Plans: rows from fresh noise, children of their states, rounds, and the order of sampling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.sampling.kernels import FlowSDE
from entroflow.sampling.plan import FRESH, Role, fresh_rows, join, shifted_left, with_children
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from gaussian_policy import GaussianPolicy
from random_plans import OFFSETS, PROMPTS, random_fresh, random_plan, row_of

reproducible = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
KERNEL = FlowSDE(noise_level=0.7)


def plain(plan):
    """Every row in plain numbers."""
    return [row_of(plan, row) for row in range(plan.rows)]


# --- fresh rows -----------------------------------------------------------------------------------


@reproducible
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    first=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    steps=st.integers(1, 5),
    share=st.booleans(),
    by_prompt=st.booleans(),
)
def test_fresh_rows_are_those_of_a_loop(sizes, first, steps, share, by_prompt):
    P = len(sizes)
    per_prompt = torch.arange(P * steps, dtype=torch.float64).reshape(P, steps) / 10
    std = per_prompt if by_prompt else per_prompt[0]
    plan = fresh_rows(
        PROMPTS[:P], torch.tensor(sizes), torch.tensor(first[:P]), shifted_grid(steps), std,
        share_noise=share, role=Role.ANCHOR, scored=False,
    )  # fmt: skip
    wanted = [
        {
            "prompt": p, "group": p, "member": first[p] + i, "role": Role.ANCHOR, "scored": False,
            "parent": FRESH, "parent_step": 0, "noise_member": FRESH if share else first[p] + i,
            "points": list(range(steps + 1)),
            "std": [(p * by_prompt * steps + s) / 10 for s in range(steps)],
        }
        for p in range(P)
        for i in range(sizes[p])
    ]  # fmt: skip
    assert plain(plan) == wanted
    assert plan.rows == sum(sizes)
    assert plan.length.tolist() == [steps] * sum(sizes)


def test_rows_do_not_share_memory():
    plan = fresh_rows(
        PROMPTS, torch.tensor([2, 1, 1]), torch.zeros(3, dtype=torch.long), shifted_grid(3),
        torch.full((3,), 0.5),
    )  # fmt: skip
    plan.std[0, 0], plan.points[0, 1], plan.group[0], plan.member[0] = 9, 9, 9, 9
    assert (plan.std[1:] == 0.5).all()
    assert plan.points[1:, 1].tolist() == [1, 1, 1]
    assert plan.prompt[0] == 0
    assert plan.noise_member[0] == 0


# --- children -------------------------------------------------------------------------------------


@reproducible
@given(seed=seeds)
def test_children_go_on_along_the_grid_of_their_parent(seed):
    """Same prompt, group, address and initial noise; the rest of the grid; no noise."""
    rng = np.random.default_rng(seed)
    plan = random_plan(rng)
    n = int(rng.integers(1, 5))
    parent = torch.from_numpy(rng.integers(plan.rows, size=n))
    step = torch.from_numpy(rng.integers(plan.length[parent].numpy()))
    grown = with_children(plan, parent, step, role=Role.COMPLETION)
    wanted = plain(plan)
    for p, s in zip(parent.tolist(), step.tolist(), strict=True):
        mother = wanted[p]
        left = mother["points"][s:]
        changed = {"parent": p, "parent_step": s, "points": left, "std": [0.0] * (len(left) - 1)}
        wanted.append({**mother, **changed, "role": Role.COMPLETION, "scored": True})
    assert plain(grown) == wanted


def test_children_take_what_they_are_given():
    plan = random_fresh(np.random.default_rng(0), steps=4, prompts=2)
    grown = with_children(
        plan, torch.tensor([0]), torch.tensor([1]), role=Role.ROLLOUT, scored=False,
        group=torch.tensor([7]), member=torch.tensor([5]), points=torch.tensor([[1, 3, 4]]),
        std=torch.tensor([[0.5, 0.0]], dtype=torch.float64),
    )  # fmt: skip
    child = row_of(grown, plan.rows)
    expected = {"group": 7, "member": 5, "points": [1, 3, 4], "std": [0.5, 0.0], "scored": False}
    assert expected.items() <= child.items()
    torch.testing.assert_close(
        grown.sigmas[-1], plan.base_grid[torch.tensor([1, 3, 4, 4, 4])], rtol=0, atol=0
    )


def test_a_child_on_a_wider_grid_widens_the_others():
    """The parents of a plan of merged steps have fewer points than their completions may have."""
    grid = shifted_grid(4)
    plan = fresh_rows(
        PROMPTS[:1], torch.tensor([1]), torch.tensor([0]), grid, torch.full((4,), 0.5)
    )
    narrow = replace(
        plan, points=torch.tensor([[0, 2, 4]]), std=torch.tensor([[0.5, 0.2]], dtype=plan.std.dtype)
    )
    grown = with_children(
        narrow, torch.tensor([0]), torch.tensor([0]), role=Role.COMPLETION,
        points=torch.arange(5)[None],
    )  # fmt: skip
    assert row_of(grown, 0) == row_of(narrow, 0)
    assert row_of(grown, 1)["points"] == [0, 1, 2, 3, 4]
    assert grown.length.tolist() == [2, 4]


def test_a_child_must_start_where_its_parent_is():
    plan = random_fresh(np.random.default_rng(0), steps=4, prompts=2)
    with pytest.raises(ValueError, match="start at the grid point of its parent"):
        with_children(
            plan, torch.tensor([0]), torch.tensor([1]), role=Role.COMPLETION,
            points=torch.tensor([[2, 3, 4]]),
        )  # fmt: skip


def test_a_child_can_not_start_at_the_end_of_its_parent():
    """Its row would never finish, its image stay empty and its reward count as failed."""
    plan = random_fresh(np.random.default_rng(0), steps=4, prompts=2)
    grown = with_children(
        plan, torch.tensor([0]), torch.tensor([2]), role=Role.COMPLETION,
        points=torch.tensor([[2, 4]]),
    )  # fmt: skip
    last = torch.tensor([grown.rows - 1])
    with pytest.raises(ValueError, match="end"):
        with_children(grown, last, torch.tensor([1]), role=Role.COMPLETION)


# --- rounds ---------------------------------------------------------------------------------------


@reproducible
@given(seed=seeds, rounds=st.integers(1, 3))
def test_joined_rounds_keep_every_row(seed, rounds):
    """Only the numbers of parents move, by the rows of the rounds before."""
    rng = np.random.default_rng(seed)
    plans = [random_plan(rng) for _ in range(rounds)]
    wanted, offset = [], 0
    for plan in plans:
        for row in plain(plan):
            moved = FRESH if row["parent"] == FRESH else row["parent"] + offset
            wanted.append({**row, "parent": moved})
        offset += plan.rows
    joined = join(plans)
    assert plain(joined) == wanted
    assert joined.network_evaluations() == sum(plan.network_evaluations() for plan in plans)
    assert joined.prompts == PROMPTS


def test_rounds_over_other_prompts_are_not_joined():
    plan = random_fresh(np.random.default_rng(0), steps=4, prompts=2)
    other = replace(plan, prompts=(PROMPTS[0], Prompt("other")))
    with pytest.raises(ValueError, match="same prompts"):
        join([plan, other])
    more = replace(plan, prompts=(PROMPTS[0], Prompt("second", {"tag": 1})))
    with pytest.raises(ValueError, match="same prompts"):
        join([plan, more])


# --- the order of sampling ------------------------------------------------------------------------


@reproducible
@given(seed=seeds)
def test_waves_part_the_rows_with_parents_first(seed):
    """A row is in the wave after its parent's, as early as can be."""
    plan = random_plan(np.random.default_rng(seed))
    waves = [wave.tolist() for wave in plan.waves()]
    assert sorted(row for wave in waves for row in wave) == list(range(plan.rows))
    assert all(wave == sorted(wave) for wave in waves)
    wave_of = {row: number for number, wave in enumerate(waves) for row in wave}
    for row, parent in enumerate(plan.parent.tolist()):
        assert wave_of[row] == (0 if parent == FRESH else wave_of[parent] + 1)


def test_no_rows_have_no_waves():
    none = torch.zeros(3, dtype=torch.long)
    plan = fresh_rows(PROMPTS, none, none, shifted_grid(3), torch.zeros(3))
    assert plan.rows == 0
    assert list(plan.waves()) == []
    assert plan.network_evaluations() == 0


@reproducible
@given(seed=seeds, batch_size=st.integers(1, 9), guided=st.booleans())
def test_evaluations_are_predicted(seed, batch_size, guided):
    """The plan's number, the ledger's and the number of states that the policy sees agree."""
    plan = random_plan(np.random.default_rng(seed))
    policy = GaussianPolicy(0.3, 0.5, offsets=OFFSETS)
    policy.evaluations = lambda guidance: 1 if guidance == 1 else 2
    seen, velocity = [], policy.velocity
    policy.velocity = lambda x, *rest: (seen.append(len(x)), velocity(x, *rest))[1]
    ledger = Ledger()
    rollouts = Rollouts.empty(plan, policy.latent_shape, torch.float64)
    guidance = 3.0 if guided else 1.0
    finished = sample(
        policy, KERNEL, rollouts, policy.encode(plan.texts), address=Address(0),
         guidance=guidance, batch_size=batch_size, ledger=ledger,
    )  # fmt: skip
    rows = sorted(row for part in finished for row in part.tolist())
    assert sum(seen) == plan.network_evaluations()
    assert ledger.network_evaluations == (2 if guided else 1) * plan.network_evaluations()
    assert rows == plan.scored.nonzero()[:, 0].tolist()
    assert ledger.decodes == len(rows)


# --- tables ---------------------------------------------------------------------------------------


@reproducible
@given(
    table=st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1)
    ),
    data=st.data(),
)
def test_shifted_left_drops_and_fills(table, data):
    width = len(table[0])
    by = data.draw(st.lists(st.integers(0, width), min_size=len(table), max_size=len(table)))
    moved = shifted_left(torch.tensor(table), torch.tensor(by), fill=-7)
    assert moved.tolist() == [row[n:] + [-7] * n for row, n in zip(table, by, strict=True)]
