"""Who gets the credit: rollouts step by step, with the image that each state would become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from entroflow.contents import read_object
from entroflow.pictures import read_picture
from entroflow.report import figures
from entroflow.report.examples import PNG, RECORD, SMALL, data_address, numbered
from entroflow.report.figures import GRAY, Metrics
from entroflow.report.panels import NOTHING, Drawing, Panel, by_step, drawn, lines
from entroflow.report.rendering import Section
from entroflow.runs.files import TrajectoriesFile
from entroflow.runs.folder import RunFolder

TURNING = (
    Panel("Turning points",
          "Per rollout: the steps that earned all that followed instead of their increment; those "
          "that balancing dropped earned it after all, so that as many are gains as losses.",
          {"credit/turning_points": "turning points", "credit/dropped": "dropped"}, lines),
    Panel("Plain and consistent disagree",
          "Share of the rollouts with turning points for which the two definitions find different "
          "ones. Consistent ones are those of the plain that the rest of the trajectory agrees "
          "with.", "credit/disagreement", lines),
)  # fmt: skip
STEPS = (
    Panel("Where trajectories turn", "Share of the rollouts that turned at a step.",
          "turning_points", by_step),
    Panel("Size of the increments", "How much a step changes the reward of its image, either way.",
          "increment", by_step),
)  # fmt: skip


def credit(folder: RunFolder, metrics: Metrics, last: int) -> list[Section]:
    """What is there up to iteration `last`; nothing where the credit looks at no steps."""
    names = numbered(folder.trajectories, last)
    if not names:
        return []
    # The latest first; in between there is more of the same.
    latest, *oldest = [
        _strips(folder.trajectories, name, figures.plan_of(metrics)["grid"])
        for name in dict.fromkeys([names[-1], names[0]])
    ]
    turning = any(entry.get(key) for entry in metrics for key in TURNING[0].names)
    lead = (
        "Each image is what the ODE makes of the state at that point, without further noise; the "
        "last is the rollout’s own. Below it is its reward; between two images stand the step with "
        "its sigma, and what it added."
    )
    which = "Of some prompts the rollouts that changed most."
    if turning:
        lead += (
            " ▲ and ▼ mark turning points, which earn all that followed instead, in bold; ◆ was "
        )
        lead += "one, but balancing dropped it."
        which = "The prompts with most turning points, and the rollouts that depended most on one."
    title = "Which steps turned the trajectories" if turning else "What each step added"
    blocks = [
        ("part", (f"At iteration {latest['iteration']}", which)), ("strips", latest),
        *(("older_strips", strips) for strips in oldest),
        ("pairs", drawn([*TURNING, *STEPS] if turning else STEPS[1:], metrics)),
    ]  # fmt: skip
    return [Section("credit", "Who gets the credit", title, lead, blocks)]


def _strips(folder: Path, name: str, grid: figures.Values) -> dict[str, Any]:
    """Some rollouts of an iteration, each with images, rewards and steps; a map of all."""
    record = read_object(folder / f"{name}{RECORD}", TrajectoriesFile)
    rows = record["trajectories"]
    sheet = read_picture(folder / f"{name}{PNG}", record.get("picture"))
    width, height = sheet.width // len(rows[0]["rewards"]), sheet.height // len(rows)
    strips = []
    for r, row in enumerate(rows):
        places = _places(row["rewards"])
        points = []
        for k, reward in enumerate(row["rewards"]):
            image = sheet.crop((k * width, r * height, (k + 1) * width, (r + 1) * height))
            words = "failed" if reward is None else f"{reward:.{places}f}".replace("-", "−")
            points.append((data_address(image), words))
        strips.append((row["caption"], points, _steps(row, grid)))
    large, turned = max(width, height) > SMALL, drawn([MAP], (record, grid))
    return {"iteration": int(name), "strips": strips, "large": large, "map": turned}


def _steps(row: Mapping[str, Any], grid: figures.Values) -> list[tuple[str, str, str, str]]:
    """Of every step its name, what it added, its kind, and all that followed if it turns.

    The kind is `rise` or `fall` for a turning point, `dropped` for one that balancing dropped.
    """
    rewards, steps = row["rewards"], []
    for k, step in enumerate(row["steps"]):
        before, after, end = rewards[k], rewards[k + 1], rewards[-1]
        added = "–" if before is None or after is None else _signed(after - before)
        worth = 0.0 if before is None or end is None else end - before
        turn = "rise" if worth > 0 else "fall"
        kind = turn if row["turns"][k] else "dropped" if row["dropped"][k] else ""
        steps.append((figures.step_label(step, grid), added, kind, _signed(worth) if kind else ""))
    return steps


def _map(source: tuple[Mapping[str, Any], figures.Values], panel: Panel) -> Drawing:
    """Rollouts of the batch side by side, prompt by prompt: where each turned."""
    record, grid = source
    every = record["map"]
    if not any(turn for turns in every["turns"] for turn in turns):
        return NOTHING
    order = sorted(range(len(every["prompt"])), key=lambda r: every["prompt"][r])
    steps = sorted({step for row in every["steps"] for step in row})
    at = [dict(zip(every["steps"][r], every["turns"][r], strict=True)) for r in order]
    prompt = [every["prompt"][r] for r in order]
    rows = [[turns.get(step) for turns in at] for step in steps]
    labels = [figures.step_label(step, grid) for step in steps]
    figure = figures.heat_map(range(len(order)), labels, rows, diverging=True)
    (trace,), layout = figure["data"], figure["layout"]
    words = {2: "a gain", 1: "a gain, dropped", -1: "a loss, dropped", -2: "a loss"}
    trace |= {
        "zmin": -2, "zmax": 2, "showscale": False, "xgap": 1 if len(order) <= 300 else 0,
        "customdata": [
            [f"{words.get(turns.get(step, 0), 'no turning point')}<br>{record['prompts'][p]}"
             for turns, p in zip(at, prompt, strict=True)]
            for step in steps
        ],
        "hovertemplate": "step %{y}: %{customdata}<extra></extra>",
    }  # fmt: skip
    edges = [i for i in range(1, len(prompt)) if prompt[i] != prompt[i - 1]]
    layout["shapes"] = [figures.rule(GRAY, x=i - 0.5) for i in edges]
    layout["xaxis"] |= {"title": {"text": "rollout, prompt by prompt"}, "showticklabels": False}
    layout["hovermode"] = "closest"
    return figure, ""


MAP = Panel(
    "Where the rollouts of the batch turned",
    "A column is a rollout, lines divide the prompts. Blue steps earned a gain, orange ones a "
    "loss; pale ones were turning points, too, but dropped by balancing.", "map", _map, wide=True,
)  # fmt: skip


def _places(rewards: Sequence[float | None]) -> int:
    """Decimals that show two digits of the largest increment."""
    pairs = ((a, b) for a, b in pairwise(rewards) if a is not None and b is not None)
    largest = max((abs(b - a) for a, b in pairs), default=0.0)
    return min(6, max(0, 1 - math.floor(math.log10(largest)))) if largest else 2


def _signed(change: float) -> str:
    """Two digits, few enough to stand between two images."""
    digits = f"{change:+.2g}" if abs(change) >= 1e-3 else f"{change:+.0e}".replace("e-0", "e-")
    return digits.replace("-", "−") if change else "0"
