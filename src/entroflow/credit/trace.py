"""What a credit that looks into the trajectories saw: as metrics, and as images for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entroflow.sampling.plan import Plan
from entroflow.sampling.rollouts import Rollouts

SHOWN_PROMPTS, SHOWN_EACH = 3, 2
"""Prompts that are shown, and rollouts of each."""
SHOWN_SIDE = 256
"""Pixels; larger images are shown reduced to this, as a sheet holds one for every state."""


@dataclass(frozen=True)
class Trace:
    """R rollouts of n stochastic steps each, with the reward of every state between them.

    Attributes:
        row: [R, n + 1] rows of the plan whose images are those of y_0, ..., y_n; the last is the
            rollout's own.
        step: [R, n] base-grid index where each step begins.
        rewards: [R, n + 1] in float64, NaN where one failed.
        earned: [R, n] what each step earned before it was compared within its group; NaN where that
            is not known.
        plain, consistent: [R, n] bool, turning points by either definition.
        turns: [R, n] bool, those that earned all that followed.
        dropped: [R, n] bool, those that would have, but for balancing.
    """

    row: Tensor
    step: Tensor
    rewards: Tensor
    earned: Tensor
    plain: Tensor
    consistent: Tensor
    turns: Tensor
    dropped: Tensor

    @property
    def known(self) -> Tensor:
        """[R] bool, whether the trajectory counts at all: its first and last reward are there."""
        return ~(self.rewards[:, 0].isnan() | self.rewards[:, -1].isnan())


def trace_metrics(trace: Trace) -> dict[str, Any]:
    """Numbers of an iteration, as in `metrics.jsonl`; None where there is nothing to count.

    Returns:
        `credit/turning_points` and `credit/dropped`, per rollout; `credit/disagreement`, the share
        of rollouts with turning points of which the two definitions find different ones; and
        `by_step`: `turning_points`, the share of rollouts that turn there, and `increment`, the
        mean size of the increments.
    """
    known = trace.known
    found = (trace.plain | trace.consistent)[known].any(dim=1)
    differ = (trace.plain != trace.consistent)[known].any(dim=1)
    sizes = (trace.rewards[:, 1:] - trace.rewards[:, :-1]).abs()
    turning: dict[str, float | None] = {}
    increment: dict[str, float | None] = {}
    for step in trace.step.unique().tolist():
        there = (trace.step == step) & known[:, None]
        turning[str(step)] = _number(trace.turns[there].double().mean())
        increment[str(step)] = _number(sizes[there].nanmean())
    return {
        "credit/turning_points": _number(trace.turns[known].sum(dim=1).double().mean()),
        "credit/dropped": _number(trace.dropped[known].sum(dim=1).double().mean()),
        "credit/disagreement": _number(differ[found].double().mean()),
        "by_step": {"turning_points": turning, "increment": increment},
    }


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


@dataclass(frozen=True)
class Trajectories:
    """Some rollouts of an iteration to look at, and where all of them turned.

    Attributes:
        images: [r, n + 1, 3, H, W] bytes, no side above `SHOWN_SIDE`.
        known: ready for JSON. `trajectories`: r entries with `caption`, `steps`, `rewards`,
            `earned`, `turns` and `dropped`; `prompts`: captions of the batch; `map`: for every
            rollout its `prompt`, `steps` and `turns`: 2 for a turning point that earned all that
            followed, 1 for one that was dropped, negative where that was a loss, 0 elsewhere.
    """

    images: Tensor
    known: dict[str, Any]


def trajectories_of(rollouts: Rollouts, trace: Trace) -> Trajectories | None:
    """Rollouts that show the most: of the prompts with most turning points, those of most worth.

    None where there are no rollouts.
    """
    plan = rollouts.plan
    chosen = _telling(plan, trace)
    if rollouts.images is None or not len(chosen):
        return None
    images = _reduced(rollouts.images[rollouts.image_of(trace.row[chosen])])
    worth = trace.rewards[:, -1:] - trace.rewards[:, :-1]
    size = 2 * trace.turns.long() + trace.dropped.long()
    turns = torch.where(worth < 0, -size, size)
    own = trace.row[:, -1]
    return Trajectories(
        images=(images.clamp(0, 1) * 255).round().to(torch.uint8),
        known={
            "trajectories": [
                {
                    "caption": plan.texts[int(plan.prompt[own[r]])],
                    **{
                        name: getattr(trace, column)[r].tolist()
                        for name, column in (
                            ("steps", "step"), ("rewards", "rewards"), ("earned", "earned"),
                            ("turns", "turns"), ("dropped", "dropped"),
                        )
                    },
                }
                for r in chosen.tolist()
            ],
            "prompts": plan.texts,
            "map": {
                "prompt": plan.prompt[own].tolist(),
                "steps": trace.step.tolist(),
                "turns": turns.tolist(),
            },
        },
    )  # fmt: skip


def _reduced(images: Tensor) -> Tensor:
    """Images [r, n + 1, 3, H, W] with sides of `SHOWN_SIDE` at most, in the same proportions."""
    height, width = images.shape[-2:]
    factor = SHOWN_SIDE / max(height, width)
    if factor >= 1:
        return images
    size = [max(1, round(factor * side)) for side in (height, width)]
    small: Tensor = F.interpolate(images.flatten(0, 1).float(), size=size, mode="area")
    return small.view(*images.shape[:3], *size)


def _telling(plan: Plan, trace: Trace) -> Tensor:
    """[r] indices of rollouts to show, neighbours of the same prompt."""
    prompt = plan.prompt[trace.row[:, -1]]
    worth = (trace.rewards[:, -1:] - trace.rewards[:, :-1]).abs().nan_to_num(0.0)
    size = worth.where(trace.turns, 0.0).amax(dim=1)
    # Where nothing turned, or nothing was looked for, the largest change of all tells most.
    size = size + 1e-6 * worth.amax(dim=1)
    number = torch.zeros(len(plan.prompts)).index_add_(0, prompt, trace.turns.sum(1).float())
    most = torch.argsort(number, descending=True, stable=True)
    chosen = []
    for p in [p for p in most.tolist() if (prompt == p).any()][:SHOWN_PROMPTS]:
        mine = (prompt == p).nonzero()[:, 0]
        order = torch.argsort(size[mine], descending=True, stable=True)
        chosen.append(mine[order[:SHOWN_EACH]])
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long)
