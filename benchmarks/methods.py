"""What do the shipped recipes gain for equal cost, and what do E-GRPO's two ideas add?

    python benchmarks/methods.py [--runs runs/methods] [--at-once N]

Three comparisons by `entroflow.compare`, each at 300k weighted evaluations with three seeds: hours on
two cores. Raw results go to docs/claims/methods.json, where none is made twice, and tables to
docs/methods.md. Interrupted, it goes on when called again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from entroflow.checkpoints import write_text
from entroflow.compare import RESULTS, Arm, compare, stored_results
from entroflow.compared import Row, best_by_validation, rows, smallest_difference
from entroflow.recipe import shipped_recipes
from entroflow.show import comparison_progress

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
SHARED = (
    "reward.value=strict",
    "evaluation.steps=10",
    "run.evaluate_every=20",
    "optimizer.ema=0.9",
)
RATES = ("1e-4", "3e-4", "1e-3")
SEEDS = range(3)
END = {"budget": 300_000}

Results = list[dict[str, Any]]


def starts(own: Arm) -> list[Arm]:
    """E-GRPO by where its rollouts branch off; from late steps tau can't be reached."""
    parts = {"first_quarter": "refuse", "second_half": "highest", "all": "highest"}
    changed = [
        Arm(own.recipe, (*own.overrides, f"exploration.starts={part}",
                         f"exploration.out_of_reach={late}"))
        for part, late in parts.items()
    ]  # fmt: skip
    return [own, *changed]


def merging(own: Arm) -> list[Arm]:
    """E-GRPO by how many steps are merged; by entropy is the recipe itself."""
    fixed = [Arm(own.recipe, (*own.overrides, f"exploration.merge={n}")) for n in (1, 2, 4)]
    return [own, *fixed]


def name_of(result: dict[str, Any]) -> str:
    """The arm of a result, as it is typed."""
    return Arm(result["arm"]["recipe"], tuple(result["arm"]["overrides"])).name


def tables(results: Results) -> dict[str, str]:
    """The tables of the page by their marks, of those comparisons that are complete."""
    found = {}
    rates_tried = {
        recipe: [Arm(recipe, (f"optimizer.learning_rate={rate}",)) for rate in RATES]
        for recipe in shipped_recipes("shapes")
    }
    first = [result for result in results if result["seed"] == SEEDS[0]]
    if all(_of(arm, first) for arms in rates_tried.values() for arm in arms):
        found["rates"] = rates(first)
        chosen = {
            recipe: Arm.parse(
                name_of(best_by_validation([r for arm in arms for r in _of(arm, first)]))
            )
            for recipe, arms in rates_tried.items()
        }
        own = chosen["e_grpo"]
        compared = {"methods": [*chosen.values()], "starts": starts(own), "merging": merging(own)}
        for name, arms in compared.items():
            if all(len(_of(arm, results)) == len(SEEDS) for arm in arms):
                found[name] = outcomes([r for arm in arms for r in _of(arm, results)])
    return found


def _of(arm: Arm, results: Results) -> Results:
    return [result for result in results if name_of(result) == arm.name]


def outcomes(results: Results) -> str:
    """A Markdown table with a line for each arm, the best first, and what it could have shown."""
    table = rows(results)
    lines = [
        "| recipe | iterations | strict score | gain over the base [95%] | texture | diversity |",
        "|---|---|---|---|---|---|",
        *(_line(row, [r for r in results if name_of(r) == row.name]) for row in table),
        "",
        f"Differences below {smallest_difference(table):.3f} would likely not have shown.",
    ]
    return "\n".join(lines)


def _line(row: Row, results: Results) -> str:
    gains = [float(result["test"]["gain"]["value"]) for result in results]
    reach = scipy.stats.t.ppf(0.975, len(gains) - 1) * scipy.stats.sem(gains)
    done = sorted({result["iterations"] for result in results})
    return (
        f"| `{row.name}` | {done[0] if len(done) == 1 else f'{done[0]}–{done[-1]}'} | "
        f"{row.score:.3f} ± {row.spread:.3f} | "
        f"{row.gain:+.3f} [{row.gain - reach:+.3f}, {row.gain + reach:+.3f}] | "
        f"× {row.ratio('texture'):.2f} | × {row.ratio('diversity'):.2f} |"
    )


def rates(first: Results) -> str:
    """A Markdown table of the validation scores by which rates were chosen, from the first seed."""
    lines = ["| recipe | " + " | ".join(RATES) + " |", "|---|" + "---|" * len(RATES)]
    for recipe in shipped_recipes("shapes"):
        arms = [Arm(recipe, (f"optimizer.learning_rate={rate}",)) for rate in RATES]
        scores = [_of(arm, first)[0]["curve"][-1]["eval/score"] for arm in arms]
        shown = [f"**{s:.3f}**" if s == max(scores) else f"{s:.3f}" for s in scores]
        lines.append(f"| `{recipe}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with each table between its marks."""
    for name, table in tables.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        page = before + mark + table + "\n" + "".join(rest.partition("<!-- end -->")[1:])
    return page


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    store = arguments.runs / RESULTS
    if CLAIMS.exists():
        write_text(store, CLAIMS.read_text(encoding="utf-8"))

    def made(arms: Sequence[Arm], learning_rates: Sequence[str] = ()) -> Results:
        try:
            with comparison_progress() as progress:
                results, failed = compare(
                    arms, SEEDS, END, arguments.runs, shared=SHARED,
                    learning_rates=learning_rates, at_once=arguments.at_once, progress=progress,
                )  # fmt: skip
        finally:
            if store.exists():
                write_text(CLAIMS, store.read_text(encoding="utf-8"))
        if failed:
            raise SystemExit(f"{len(failed)} runs failed; their output is in {arguments.runs}.")
        return results

    methods = made([Arm(name) for name in shipped_recipes("shapes")], RATES)
    own = next(Arm.parse(name) for name in map(name_of, methods) if name.startswith("e_grpo,"))
    made(starts(own))
    made(merging(own))
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, filled(page, tables(stored_results(arguments.runs))))


if __name__ == "__main__":
    main()
