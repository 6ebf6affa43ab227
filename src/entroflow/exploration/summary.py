"""What a plan holds, in numbers that can be printed, written down and drawn."""

from __future__ import annotations

from typing import Any

import torch

from entroflow.sampling.kernels import entropy
from entroflow.sampling.plan import Plan, Role


def summary_of(plan: Plan) -> dict[str, Any]:
    """The stochastic steps of a plan, and the kinds of rows of its first prompt; ready for JSON.

    Returns:
        `grid`: the base grid [T + 1].
        `steps`: one entry for each different stochastic step of a rollout: `start` and `end` on the
        base grid, `sigma`, `sigma_next`, `std`, `entropy` per value in nats, and how many `rows`
        take it and how many are `trained` on it.
        `rows`: rows that are alike once: `role`, `points` on the base grid, `stochastic` and
        `trained` as numbers of their steps, and the `count` of such rows.
    """
    return {
        "grid": [round(sigma, 6) for sigma in plan.base_grid.tolist()],
        "steps": _steps(plan),
        "rows": _rows(plan),
    }


def _steps(plan: Plan) -> list[dict[str, Any]]:
    rollout = plan.role == Role.ROLLOUT
    row, column = ((plan.std > 0) & rollout[:, None]).nonzero(as_tuple=True)
    found: dict[tuple[int, int, float], list[bool]] = {}
    for start, end, std, trained in zip(
        plan.points[row, column].tolist(),
        plan.points[row, column + 1].tolist(),
        plan.std[row, column].tolist(),
        plan.trained[row, column].tolist(),
        strict=True,
    ):
        found.setdefault((start, end, std), []).append(trained)
    return [
        {
            "start": start,
            "end": end,
            "sigma": round(float(plan.base_grid[start]), 6),
            "sigma_next": round(float(plan.base_grid[end]), 6),
            "std": std,
            "entropy": float(entropy(torch.tensor(std, dtype=torch.float64))),
            "rows": len(trained),
            "trained": sum(trained),
        }
        for (start, end, std), trained in sorted(found.items())
    ]


def _rows(plan: Plan) -> list[dict[str, Any]]:
    kinds: dict[tuple[Any, ...], int] = {}
    for row in (plan.prompt == 0).nonzero()[:, 0].tolist():
        length = int(plan.length[row])
        kind = (
            int(plan.role[row]),
            tuple(plan.points[row, : length + 1].tolist()),
            tuple((plan.std[row] > 0).nonzero()[:, 0].tolist()),
            tuple(plan.trained[row].nonzero()[:, 0].tolist()),
        )
        kinds[kind] = kinds.get(kind, 0) + 1
    return [
        {
            "role": Role(role).name.lower(),
            "points": list(points),
            "stochastic": list(stochastic),
            "trained": list(trained),
            "count": count,
        }
        for (role, points, stochastic, trained), count in kinds.items()
    ]
