"""Who gets the credit: rollouts step by step, with the image that each state would become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from entroflow.contents import read_object
from entroflow.pictures import read_picture
from entroflow.report.curves import by_step, over_iterations
from entroflow.report.examples import KNOWN, PNG, SMALL, data_address, numbered
from entroflow.report.figures import BLUE, GRAY, ORANGE, PURPLE, Metrics, Panel, heat_map
from entroflow.runs.files import TrajectoriesFile
from entroflow.runs.folder import RunFolder

OVER_ITERATIONS = (
    (
        "credit/turning_points",
        "Turning points",
        BLUE,
        "Per rollout: the steps that earned all that followed instead of their increment.",
    ),
    (
        "credit/dropped",
        "Dropped by balancing",
        PURPLE,
        "Per rollout: turning points that earned their increment after all, so that as many are "
        "gains as losses.",
    ),
    (
        "credit/disagreement",
        "Plain and consistent disagree",
        ORANGE,
        "Share of the rollouts with turning points for which the two definitions find different "
        "ones. Consistent ones are those of the plain that the rest of the trajectory agrees with.",
    ),
)
BY_STEP = (
    (
        "turning_points",
        "Where trajectories turn",
        "Share of the rollouts for which the step was a turning point.",
        0.0,
    ),
    (
        "increment",
        "Size of the increments",
        "How much a step changes the reward of the image that would come of it, either way.",
        0.0,
    ),
)


@dataclass(frozen=True)
class Step:
    """A step of a strip: its place on the grid, what it added, and all that followed if it turns.

    `kind` is `rise` or `fall` for a turning point, `dropped` for one that balancing dropped.
    """

    name: str
    increment: str
    kind: str
    earned: str


@dataclass(frozen=True)
class Strip:
    """One rollout: [n + 1] images with their rewards, and the [n] steps between them."""

    caption: str
    points: Sequence[tuple[str, str]]
    steps: Sequence[Step]


@dataclass(frozen=True)
class Shown:
    """Some rollouts of one iteration, and a map of the turning points of all."""

    iteration: int
    strips: Sequence[Strip]
    large: bool
    map: Panel | None


@dataclass(frozen=True)
class Credit:
    """The section: the latest rollouts and the first ones, and what was counted.

    `turning` is whether turning points were looked for, and found.
    """

    turning: bool
    shown: Sequence[Shown]
    curves: Sequence[Panel]
    by_step: Sequence[Panel]


def credit(folder: RunFolder, metrics: Metrics, last: int) -> Credit | None:
    """What is there up to iteration `last`; None where the credit looks at no steps."""
    names = numbered(folder.trajectories, last)
    grid = (metrics[0].get("plan") or {}).get("grid", []) if metrics else []
    # The latest first; in between there is more of the same.
    wanted = list(dict.fromkeys([*names[-1:], *names[:1]]))
    shown = [_shown(folder.trajectories, name, grid) for name in wanted]
    if not shown:
        return None
    turning = any(line.get(key) for line in metrics for key, *_ in OVER_ITERATIONS[:2])
    return Credit(
        turning=turning,
        shown=shown,
        curves=over_iterations(metrics, OVER_ITERATIONS if turning else ()),
        by_step=by_step(metrics, BY_STEP if turning else BY_STEP[1:]),
    )


def _shown(folder: Path, name: str, grid: Sequence[float]) -> Shown:
    known = read_object(folder / f"{name}{KNOWN}", TrajectoriesFile)
    rows = known["trajectories"]
    sheet = read_picture(folder / f"{name}{PNG}", known.get("picture"))
    width, height = sheet.width // len(rows[0]["rewards"]), sheet.height // len(rows)
    strips = []
    for r, row in enumerate(rows):
        boxes = [
            (k * width, r * height, (k + 1) * width, (r + 1) * height)
            for k in range(len(row["rewards"]))
        ]
        places = _places(row["rewards"])
        points = [
            (
                data_address(sheet.crop(box)),
                "failed" if reward is None else f"{reward:.{places}f}".replace("-", "−"),
            )
            for box, reward in zip(boxes, row["rewards"], strict=True)
        ]
        strips.append(Strip(row["caption"], points, _steps(row, grid)))
    return Shown(int(name), strips, max(width, height) > SMALL, _map(known, grid))


def _steps(row: Mapping[str, Any], grid: Sequence[float]) -> list[Step]:
    rewards, found = row["rewards"], []
    for k, step in enumerate(row["steps"]):
        before, after, end = rewards[k], rewards[k + 1], rewards[-1]
        unknown = before is None or after is None
        worth = 0.0 if before is None or end is None else end - before
        kind, earned = "", ""
        if row["turns"][k]:
            kind, earned = ("rise" if worth > 0 else "fall"), _signed(worth)
        elif row["dropped"][k]:
            kind, earned = "dropped", _signed(worth)
        found.append(
            Step(
                name=_name(step, grid),
                increment="–" if unknown else _signed(after - before),
                kind=kind,
                earned=earned,
            )
        )
    return found


def _name(step: int, grid: Sequence[float]) -> str:
    return f"{step} · {grid[step]:.2f}" if step < len(grid) else str(step)


def _map(known: Mapping[str, Any], grid: Sequence[float]) -> Panel | None:
    """Rollouts of the batch side by side, prompt by prompt: where each turned."""
    everywhere = known["map"]
    if not any(turn for turns in everywhere["turns"] for turn in turns):
        return None
    order = sorted(range(len(everywhere["prompt"])), key=lambda r: everywhere["prompt"][r])
    steps = sorted({step for row in everywhere["steps"] for step in row})
    at = [dict(zip(everywhere["steps"][r], everywhere["turns"][r], strict=True)) for r in order]
    prompt = [everywhere["prompt"][r] for r in order]
    figure = heat_map(
        range(len(order)),
        [_name(step, grid) for step in steps],
        [[turns.get(step) for turns in at] for step in steps],
        diverging=True,
    )
    (trace,), layout = figure["data"], figure["layout"]
    words = {2: "a gain", 1: "a gain, dropped", -1: "a loss, dropped", -2: "a loss"}
    trace |= {
        "zmin": -2,
        "zmax": 2,
        "showscale": False,
        "xgap": 1 if len(order) <= 300 else 0,
        "customdata": [
            [f"{words.get(turns.get(step, 0), 'no turning point')}<br>{known['prompts'][p]}"
             for turns, p in zip(at, prompt, strict=True)]
            for step in steps
        ],
        "hovertemplate": "step %{y}: %{customdata}<extra></extra>",
    }  # fmt: skip
    edges = [i for i in range(1, len(prompt)) if prompt[i] != prompt[i - 1]]
    layout["shapes"] = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": i - 0.5, "x1": i - 0.5,
         "line": {"color": GRAY, "width": 1}}
        for i in edges
    ]  # fmt: skip
    layout["xaxis"] |= {"title": {"text": "rollout, prompt by prompt"}, "showticklabels": False}
    layout["hovermode"] = "closest"
    return Panel(
        "Where the rollouts of the batch turned",
        "A column is a rollout, lines divide the prompts. Blue steps earned a gain, orange ones a "
        "loss; pale ones were turning points, too, but dropped by balancing.",
        figure,
        wide=True,
    )


def _places(rewards: Sequence[float | None]) -> int:
    """Decimals that show two digits of the largest increment."""
    pairs = [(a, b) for a, b in pairwise(rewards) if a is not None and b is not None]
    largest = max((abs(b - a) for a, b in pairs), default=0.0)
    return min(6, max(0, 1 - math.floor(math.log10(largest)))) if largest else 2


def _signed(change: float) -> str:
    """Two digits, few enough to stand between two images."""
    digits = f"{change:+.2g}" if abs(change) >= 1e-3 else f"{change:+.0e}".replace("e-0", "e-")
    return digits.replace("-", "−") if change else "0"
