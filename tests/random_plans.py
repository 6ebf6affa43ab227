"""Random plans: trees of rows with grids, noise and roles of their own."""

from __future__ import annotations

import numpy as np
import torch

from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.sampling.plan import Plan, Role, fresh_rows, with_children

OFFSETS = {"first": 0.0, "second": 1.0, "third": -2.0}
PROMPTS = tuple(Prompt(text) for text in OFFSETS)


def random_std(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Standard deviations in [0.1, 0.9], half of them 0."""
    values = rng.uniform(0.1, 0.9, shape) * (rng.random(shape) < 0.5)
    return torch.from_numpy(values)


def random_fresh(rng: np.random.Generator, steps: int, prompts: int) -> Plan:
    """Up to three rows per prompt, at least one in all."""
    sizes = torch.from_numpy(rng.integers(0, 4, prompts))
    sizes[rng.integers(prompts)] += 1
    return fresh_rows(
        PROMPTS[:prompts],
        sizes,
        torch.from_numpy(rng.integers(0, 5, prompts)),
        shifted_grid(steps, shift=2.0),
        random_std(rng, prompts, steps),
        share_noise=bool(rng.random() < 0.3),
        role=Role.ANCHOR if rng.random() < 0.3 else Role.ROLLOUT,
        scored=bool(rng.random() < 0.7),
    )


def random_points(rng: np.random.Generator, start: int, steps: int, width: int) -> list[int]:
    """Some of the points from `start` to the end, padded to `width`."""
    between = np.arange(start + 1, steps)
    kept = between[rng.random(len(between)) < 0.6].tolist()
    points = [start, *kept, steps]
    return points + [steps] * (width - len(points))


def with_random_children(rng: np.random.Generator, plan: Plan, first_member: int) -> Plan:
    """Up to four children of random states, half of the time on grids of their own."""
    n, T = int(rng.integers(1, 5)), len(plan.base_grid) - 1
    parent = torch.from_numpy(rng.integers(plan.rows, size=n))
    parent_step = torch.from_numpy(rng.integers(plan.length[parent].numpy()))
    points = std = group = None
    if rng.random() < 0.5:
        starts = plan.points[parent, parent_step].tolist()
        rows = [random_points(rng, start, T, T + 1) for start in starts]
        points = torch.tensor(rows)
        steps = points[:, :-1] < T
        std = random_std(rng, n, T) * steps
        group = 10 + plan.prompt[parent]
    return with_children(
        plan,
        parent,
        parent_step,
        role=Role(int(rng.integers(3))),
        scored=bool(rng.random() < 0.7),
        group=group,
        member=torch.arange(first_member, first_member + n),
        points=points,
        std=std,
    )


def random_plan(rng: np.random.Generator, steps: int = 5, prompts: int = 3) -> Plan:
    """Fresh rows and up to three generations of children; no two rows share an address."""
    plan = random_fresh(rng, steps, prompts)
    for generation in range(int(rng.integers(4))):
        plan = with_random_children(rng, plan, first_member=100 * (generation + 1))
    return plan


def row_of(plan: Plan, row: int) -> dict[str, object]:
    """One row in plain numbers, without padding."""
    length = int(plan.length[row])
    columns = ("prompt", "group", "member", "role", "scored", "parent", "parent_step")
    return {
        **{name: getattr(plan, name)[row].item() for name in (*columns, "noise_member")},
        "points": plan.points[row, : length + 1].tolist(),
        "std": plan.std[row, :length].tolist(),
    }
