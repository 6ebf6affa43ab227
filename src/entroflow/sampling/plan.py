"""Plans: which trajectories are sampled, from where, with how much noise at which step.

Vocabulary:
    row         one trajectory; `B` rows make a plan
    point       index into the base grid; a row's own grid is a subset of it
    step        a move between two points of a row; stochastic if its std is positive
    role        rollout (trained on), anchor (others start from its states), completion (from a
                middle state to an image, to be scored)
    group       rows whose rewards are compared with each other
    member      number of a row within its group; (group, member) is the row's address for noise
    start       fresh noise, or the state of a parent row before one of its steps
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from entroflow.prompts import Prompt

FRESH = -1
"""Parent of a row that starts from fresh noise; noise member of a start shared by its group."""


class Role(IntEnum):
    """What a row is for."""

    ROLLOUT = 0
    ANCHOR = 1
    COMPLETION = 2


@dataclass(frozen=True)
class Plan:
    """B rows over P prompts; a struct of arrays.

    Attributes:
        prompts: the P prompts.
        base_grid: [T + 1] sigmas from 1 to 0.
        prompt, group, member: [B] integers.
        points: [B, S + 1] base-grid indices, increasing, padded with T.
        std: [B, S] standard deviation of every step; 0 is deterministic.
        trained: [B, S] bool, whether the update sees the step; only stochastic steps can be.
        role: [B] values of `Role`.
        scored: [B] bool, whether the row's image goes to the reward.
        parent: [B] row whose state this row starts from, or `FRESH`.
        parent_step: [B] the step of the parent before which that state stands.
        noise_member: [B] member in the address of the initial noise; `FRESH`: the group shares it.
    """

    prompts: tuple[Prompt, ...]
    base_grid: Tensor
    prompt: Tensor
    group: Tensor
    member: Tensor
    points: Tensor
    std: Tensor
    trained: Tensor
    role: Tensor
    scored: Tensor
    parent: Tensor
    parent_step: Tensor
    noise_member: Tensor

    @property
    def rows(self) -> int:
        """B."""
        return len(self.prompt)

    @property
    def texts(self) -> list[str]:
        """[P] the words of the prompts."""
        return [prompt.text for prompt in self.prompts]

    @property
    def sigmas(self) -> Tensor:
        """[B, S + 1] the grid of every row, padded with 0."""
        return self.base_grid[self.points]

    @property
    def length(self) -> Tensor:
        """[B] number of steps of every row."""
        return (self.points[:, :-1] < len(self.base_grid) - 1).sum(dim=1)

    def training(self, trained: Tensor) -> Plan:
        """The same plan; of its stochastic steps the update sees only those given: [B, S] bool."""
        return replace(self, trained=trained & (self.std > 0))

    def waves(self) -> Iterator[Tensor]:
        """Rows in an order in which parents come first, as sets that can be sampled together."""
        depth = torch.zeros(self.rows, dtype=torch.long)
        while True:
            deeper = torch.where(self.parent == FRESH, 0, depth[self.parent.clamp(min=0)] + 1)
            if torch.equal(deeper, depth):
                break
            depth = deeper
        for level in range(int(depth.max()) + 1 if self.rows else 0):
            yield (depth == level).nonzero()[:, 0]

    def network_evaluations(self) -> int:
        """Velocities the plan needs; the first of a row with a parent is known from the parent."""
        known = (self.parent != FRESH).sum()
        return int(self.length.sum() - known)

    def trained_states(self) -> int:
        """Different states that trained steps of rollouts start from: the passes of an update."""
        trained = self.trained & (self.role == Role.ROLLOUT)[:, None]
        row, step = trained.nonzero(as_tuple=True)
        while (inherited := (step == 0) & (self.parent[row] != FRESH)).any():
            row, step = (
                torch.where(inherited, self.parent[row], row),
                torch.where(inherited, self.parent_step[row], step),
            )
        return len({*zip(row.tolist(), step.tolist(), strict=True)})


def fresh_rows(
    prompts: Sequence[Prompt],
    sizes: Tensor,
    first_member: Tensor,
    base_grid: Tensor,
    std: Tensor,
    *,
    share_noise: bool = False,
    role: Role = Role.ROLLOUT,
    scored: bool = True,
) -> Plan:
    """Rows from fresh noise along the whole base grid; the group of a row is its prompt.

    Args:
        sizes: [P] rows per prompt.
        first_member: [P] number of the first row of each group (earlier rounds come before).
        std: [P, T] or [T] standard deviations.
        share_noise: one initial noise per group.
    """
    P, T = len(prompts), len(base_grid) - 1
    prompt = torch.repeat_interleave(torch.arange(P), sizes)
    within = torch.arange(len(prompt)) - (sizes.cumsum(0) - sizes)[prompt]
    member = within + first_member[prompt]
    B = len(prompt)
    std = std.expand(P, T)[prompt].clone()
    return Plan(
        prompts=tuple(prompts),
        base_grid=base_grid,
        prompt=prompt,
        group=prompt.clone(),
        member=member,
        points=torch.arange(T + 1).expand(B, -1).clone(),
        std=std,
        trained=std > 0,
        role=torch.full((B,), role),
        scored=torch.full((B,), scored),
        parent=torch.full((B,), FRESH),
        parent_step=torch.zeros(B, dtype=torch.long),
        noise_member=torch.full((B,), FRESH) if share_noise else member.clone(),
    )


def with_children(
    plan: Plan,
    parent: Tensor,
    parent_step: Tensor,
    *,
    role: Role,
    scored: bool = True,
    group: Tensor | None = None,
    member: Tensor | None = None,
    points: Tensor | None = None,
    std: Tensor | None = None,
) -> Plan:
    """The plan with rows added that start from states of its own rows.

    Args:
        parent, parent_step: [n] where each child starts.
        group, member: [n]; the parent's unless given.
        points: [n, S' + 1] the child's grid; the rest of the parent's grid unless given.
        std: [n, S']; deterministic unless given.
    """
    n, T = len(parent), len(plan.base_grid) - 1
    if points is None:
        points = shifted_left(plan.points[parent], parent_step, fill=T)
    if std is None:
        std = torch.zeros(n, points.shape[1] - 1, dtype=plan.std.dtype)
    children = replace(
        plan,
        prompt=plan.prompt[parent],
        group=plan.group[parent] if group is None else group,
        member=plan.member[parent] if member is None else member,
        points=points,
        std=std,
        trained=std > 0,
        role=torch.full((n,), role),
        scored=torch.full((n,), scored),
        parent=parent,
        parent_step=parent_step,
        noise_member=plan.noise_member[parent],
    )
    if (parent_step >= plan.length[parent]).any():
        raise ValueError("a child can't start at the end of its parent.")
    started = plan.points[parent, parent_step]
    if not torch.equal(points[:, 0], started):
        raise ValueError("a child must start at the grid point of its parent's state.")
    return _stacked([plan, children], parent_offsets=[0, 0])


def join(plans: Sequence[Plan]) -> Plan:
    """Several rounds over the same prompts as one plan."""
    if any(plan.prompts != plans[0].prompts for plan in plans):
        raise ValueError("rounds can be joined only over the same prompts.")
    offsets = [sum(plan.rows for plan in plans[:i]) for i in range(len(plans))]
    return _stacked(plans, offsets)


def _stacked(plans: Sequence[Plan], parent_offsets: Sequence[int]) -> Plan:
    T = len(plans[0].base_grid) - 1
    width = max(plan.points.shape[1] for plan in plans)
    columns: dict[str, list[Any]] = {
        f.name: [getattr(plan, f.name) for plan in plans]
        for f in fields(Plan)
        if f.name not in ("prompts", "base_grid")
    }
    columns["points"] = [padded(points, width, T) for points in columns["points"]]
    for name in ("std", "trained"):
        columns[name] = [padded(table, width - 1, 0) for table in columns[name]]
    columns["parent"] = [
        torch.where(parent == FRESH, FRESH, parent + offset)
        for parent, offset in zip(columns["parent"], parent_offsets, strict=True)
    ]
    stacked: dict[str, Any] = {name: torch.cat(parts) for name, parts in columns.items()}
    return replace(plans[0], **stacked)


def padded(table: Tensor, width: int, fill: float) -> Tensor:
    """The table [B, n] widened to [B, width] with `fill` on the right."""
    return torch.nn.functional.pad(table, (0, width - table.shape[1]), value=fill)


def shifted_left(table: Tensor, by: Tensor, fill: float) -> Tensor:
    """Row b of the table [B, n] without its first by[b] entries, filled up on the right."""
    source = torch.arange(table.shape[1]) + by[:, None]
    outside = source >= table.shape[1]
    moved = table.gather(1, source.clamp(max=table.shape[1] - 1))
    return moved.masked_fill(outside, fill)
