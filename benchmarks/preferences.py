"""Pref-GRPO against a learnt score: what do they gain, and who is hacked?

    python benchmarks/preferences.py [--runs runs/preferences] [--at-once N]

`pref_grpo` and `pointwise_preference` for equal updates, as they are and without KL, as published. The
learning rate without KL is the best of three by the first seed's verifiable score on validation
prompts; with it, it is the recipe's. Three seeds; some hours on two cores. Raw results go to
docs/claims/pref_grpo.json, where none is made twice, the table to docs/rewards.md and the picture to
docs/images/pref_grpo.png. Interrupted, it goes on when called again. Needs the extra `benchmarks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from entroflow.comparison.jobs import Arm, Terms
from entroflow.comparison.results import stored_results
from entroflow.comparison.table import best_by_validation, rows
from entroflow.evaluation.image_statistics import statistics as image_statistics
from entroflow.writing import write_text
from methods import RATES, SEEDS, asked, filled, measured, name_of, spread

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims" / "pref_grpo.json"
PAGE = ROOT / "docs" / "rewards.md"
PICTURE = ROOT / "docs" / "images" / "pref_grpo.png"
RECIPES = ("pref_grpo", "pointwise_preference")
NO_KL = "objective.kl=0"
BLIND_SPOTS = ("texture", "contrast")
"""Statistics of the shapes' evaluation alone."""
UPDATES = {"updates": 160}
LEARNT = {"pref_grpo": "eval/preference", "pointwise_preference": "eval/reward"}
"""Where the mean learnt score of held-out images is, by recipe."""
WINS = {"pref_grpo": "eval/win_rate", "pointwise_preference": "eval/judge"}
"""Where their win rate over the base is."""

Results = list[dict[str, Any]]


def recipe_of(result: Mapping[str, Any]) -> str:
    """The recipe of a result."""
    return str(result["arm"]["recipe"])


def farthest(point: Mapping[str, Any], known: set[str]) -> tuple[str, float]:
    """Of the known statistics that which has moved farthest at an evaluation, and how far."""
    drifts = {name: moved for name in known if (moved := point.get(f"drift/{name}")) is not None}
    name = max(drifts, key=lambda key: abs(drifts[key]))
    return name, drifts[name]


def statistics_of(results: Results) -> set[str]:
    """Those that all evaluations have and that are still measured: older ones had others."""
    points = [point for result in results for point in result["curve"]]
    drifts = ({k.removeprefix("drift/") for k in p if k.startswith("drift/")} for p in points)
    measured_now = {*image_statistics(torch.zeros(2, 3, 4, 4), torch.zeros(2)), *BLIND_SPOTS}
    return measured_now.intersection(*drifts)


def warned(result: Mapping[str, Any], known: set[str]) -> bool:
    """Whether the sentinel has warned of one of the known statistics, or of a reward."""
    return any(
        name in known or f"drift/{name}" not in point
        for point in result["curve"] for name in point.get("hacking") or ()
    )  # fmt: skip


def without_kl(result: Mapping[str, Any]) -> bool:
    """Whether it was made as published."""
    return NO_KL in result["arm"]["overrides"]


def compared(results: Results) -> Results:
    """Of every recipe its results without KL at the best rate, and as it is, where all are there."""
    found: Results = []
    for recipe in RECIPES:
        own = [result for result in results if recipe_of(result) == recipe]
        rates = [f"{recipe},{NO_KL},optimizer.learning_rate={rate}" for rate in RATES]
        first = [r for r in own if r["seed"] == SEEDS[0] and name_of(r) in rates]
        chosen = [recipe]
        if len(first) == len(RATES):
            chosen.insert(0, name_of(best_by_validation(first)))
        for name in chosen:
            same = [result for result in own if name_of(result) == name]
            found += same if len(same) == len(SEEDS) else []
    return found


def table(results: Results) -> str:
    """A Markdown table with a line for each recipe; means over seeds and their deviation."""
    lines = [
        "| recipe | strict score | gain over the base | learnt score | win rate over the base | "
        "texture | diversity | farthest drift | alarms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = statistics_of(results)
    for row in rows(results):
        of_row = [r for r in results if name_of(r) == row.name]
        ends = [r["curve"][-1] for r in of_row]
        recipe = recipe_of(of_row[0])
        names = sorted({farthest(end, known)[0] for end in ends})
        alarms = sum(warned(result, known) for result in of_row)
        lines.append(
            f"| `{row.name}` | {row.score:.3f} ± {row.spread:.3f} | {row.gain:+.3f} | "
            f"{spread([e[LEARNT[recipe]] - r['curve'][0][LEARNT[recipe]] for e, r in zip(ends, of_row, strict=True)], 2, '+')} | "
            f"{spread([end[WINS[recipe]] for end in ends], 2)} | "
            f"× {row.ratio('texture'):.2f} | × {row.ratio('diversity'):.2f} | "
            f"{spread([abs(farthest(end, known)[1]) for end in ends], 2)} ({', '.join(names)}) | "
            f"{alarms} of {len(of_row)} |"
        )
    return "\n".join(lines)


def draw(results: Results) -> None:
    """Over updates: the verifiable score, both proxies, and how far the images have moved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = statistics_of(results)
    panels = (
        ("strict score, held-out prompts", lambda recipe, point: point["eval/score"]),
        ("learnt score (log-odds)", lambda recipe, point: point[LEARNT[recipe]]),
        ("win rate over the base", lambda recipe, point: point[WINS[recipe]]),
        (
            "farthest drift (sd of the base's images)",
            lambda _, point: abs(farthest(point, known)[1]),
        ),
    )
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 6.4), dpi=110, sharex=True)
    colors = dict(zip(RECIPES, ("tab:blue", "tab:orange"), strict=True))
    for axes, (title, value) in zip(grid.flat, panels, strict=True):
        for result in results:
            recipe = recipe_of(result)
            name = f"{recipe}, no KL" if without_kl(result) else recipe
            axes.plot(
                [point["iteration"] for point in result["curve"]],
                [value(recipe, point) for point in result["curve"]],
                color=colors[recipe], linestyle="--" if without_kl(result) else "-",
                label=name if name not in axes.get_legend_handles_labels()[1] else None,
            )  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid[1]:
        axes.set_xlabel("updates")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


def main() -> None:
    """See the module."""
    arguments = asked(__doc__, ROOT / "runs" / "preferences")
    settings: Any = {"seeds": SEEDS, "terms": Terms(UPDATES)}
    published = [Arm(name, (NO_KL,)) for name in RECIPES]
    measured(arguments, CLAIMS, published, learning_rates=RATES, **settings)
    measured(arguments, CLAIMS, [Arm(name) for name in RECIPES], **settings)
    found = compared(stored_results(arguments.runs))
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, filled(page, {"preferences": table(found)}))
    draw(found)


if __name__ == "__main__":
    main()
