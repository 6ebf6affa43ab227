"""What do methods gain for equal cost, and what do their ideas add?

    python benchmarks/methods.py [--runs runs/methods] [--at-once N]

Comparisons by `entroflow.comparison.runner`, each at 300k weighted evaluations with three seeds, and one at
equal updates: hours on two cores. Raw results go to docs/claims/methods.json, where none is made twice,
and tables to docs/methods.md. Interrupted, it goes on when called again.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from entroflow.cli.show import comparison_progress
from entroflow.comparison.jobs import Arm, Terms
from entroflow.comparison.results import RESULTS, stored_results
from entroflow.comparison.runner import compare
from entroflow.comparison.table import Row, best_by_validation, rows, smallest_difference
from entroflow.writing import write_text

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
SHARED = ("evaluation.steps=10", "run.evaluate_every=20", "optimizer.ema=0.9")
STRICT, GRADED = "reward.value=strict", "reward.value=graded"
"""Rewards. Turning points change nothing where a reward has two values (docs/credit.md)."""
EXPLORE = (
    "dance_grpo", "e_grpo", "flow_grpo", "flow_grpo_fast", "grpo_guard", "mix_grpo", "quickstart",
)  # fmt: skip
"""Recipes that differ in where randomness goes."""
CREDIT = ("flow_grpo", "tp_grpo", "tp_grpo_plain", "incremental")
"""Recipes that differ in who gets the credit."""
RATES = ("1e-4", "3e-4", "1e-3")
SEEDS = range(3)
BUDGET = {"budget": 300_000}
UPDATES = {"updates": 68}
"""As many as flow_grpo makes of the budget."""

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


def rates_of(recipe: str) -> list[Arm]:
    """A recipe with every learning rate."""
    return [Arm(recipe, (f"optimizer.learning_rate={rate}",)) for rate in RATES]


def chosen(recipe: str, results: Results) -> Arm | None:
    """A recipe with the best of the learning rates; None while one was not tried."""
    tried = [_of(arm, results, SEEDS[:1]) for arm in rates_of(recipe)]
    if not all(tried):
        return None
    return Arm.parse(name_of(best_by_validation([result for (result,) in tried])))


def tables(results: Results) -> dict[str, str]:
    """The tables of the page by their marks, of those comparisons that are complete."""
    strict, graded = made_with(results, STRICT, BUDGET), made_with(results, GRADED, BUDGET)
    found = {"rates": rates(EXPLORE, strict), "credit_rates": rates(CREDIT, graded)}
    explore = [chosen(recipe, strict) for recipe in EXPLORE]
    credit = [chosen(recipe, graded) for recipe in CREDIT]
    compared = {"methods": (explore, strict), "credit": (credit, graded)}
    if (own := chosen("e_grpo", strict)) is not None:
        compared |= {"starts": ([*starts(own)], strict), "merging": ([*merging(own)], strict)}
    for name, (arms, among) in compared.items():
        per_arm = [_of(arm, among, SEEDS) for arm in arms if arm is not None]
        if all(arms) and all(len(one) == len(SEEDS) for one in per_arm):
            found[name] = outcomes([result for one in per_arm for result in one])
    by_updates = made_with(results, GRADED, UPDATES)
    per_arm = [_of(arm, by_updates, SEEDS[:1]) for arm in credit if arm is not None]
    if all(credit) and all(per_arm):
        found["credit_updates"] = at_equal_updates([result for (result,) in per_arm])
    return {name: table for name, table in found.items() if table}


def made_with(results: Results, reward: str, end: Mapping[str, int]) -> Results:
    """Those trained on a reward that ended with a given budget or number of updates."""
    ((key, value),) = end.items()
    asked = {reward, f"run.{key}={value}"}
    return [result for result in results if asked <= {*result["overrides"]}]


def _of(arm: Arm, results: Results, seeds: Sequence[int]) -> Results:
    return [r for r in results if name_of(r) == arm.name and r["seed"] in seeds]


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


def at_equal_updates(results: Results) -> str:
    """A Markdown table of one seed: what as many updates cost and gain."""
    lines = [
        "| recipe | updates | weighted evaluations | rewards | strict score | gain [95%] |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: -_score(r)):
        spent, gain = result["ledger"], result["test"]["gain"]
        lines.append(
            f"| `{name_of(result)}` | {spent['ledger/optimizer_steps']} | "
            f"{spent['ledger/weighted_evaluations'] / 1000:.0f}k | "
            f"{spent['ledger/reward_calls'] / 1000:.0f}k | {_score(result):.3f} | "
            f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] |"
        )
    return "\n".join(lines)


def _score(result: Mapping[str, Any]) -> float:
    return float(result["test"]["models"]["tuned"]["scores"]["overall"]["value"])


def rates(recipes: Sequence[str], results: Results) -> str:
    """A Markdown table of the validation scores by which rates were chosen, from the first seed."""
    lines = ["| recipe | " + " | ".join(RATES) + " |", "|---|" + "---|" * len(RATES)]
    for recipe in recipes:
        tried = [_of(arm, results, SEEDS[:1]) for arm in rates_of(recipe)]
        if all(tried):
            scores = [result["curve"][-1]["eval/score"] for (result,) in tried]
            shown = [f"**{s:.3f}**" if s == max(scores) else f"{s:.3f}" for s in scores]
            lines.append(f"| `{recipe}` | " + " | ".join(shown) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with each table between its marks."""
    for name, table in tables.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        page = before + mark + table + "\n" + "".join(rest.partition("<!-- end -->")[1:])
    return page


def asked(description: str | None, runs: Path) -> argparse.Namespace:
    """What a benchmark of many runs is asked: `runs`, a folder that exists then, and `at_once`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=Path, default=runs)
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    return arguments


def measured(
    arguments: argparse.Namespace, claims: Path, arms: Sequence[Arm], **settings: Any
) -> Results:
    """The results of some arms; those in `claims` are not made again, new ones are added to it."""
    store = arguments.runs / RESULTS
    if claims.exists():
        write_text(store, claims.read_text(encoding="utf-8"))
    try:
        with comparison_progress() as progress:
            results, failed = compare(
                arms, out=arguments.runs, at_once=arguments.at_once, progress=progress, **settings
            )
    finally:
        if store.exists():
            write_text(claims, store.read_text(encoding="utf-8"))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed; their output is in {arguments.runs}.")
    return results


def main() -> None:
    """See the module."""
    arguments = asked(__doc__, ROOT / "runs" / "methods")

    def made(
        arms: Sequence[Arm],
        learning_rates: Sequence[str] = (),
        seeds: Sequence[int] = SEEDS,
        end: Mapping[str, float | str] = BUDGET,
        reward: str = STRICT,
    ) -> Results:
        return measured(
            arguments, CLAIMS, arms, seeds=seeds, terms=Terms(end, (reward, *SHARED)),
            learning_rates=learning_rates,
        )  # fmt: skip

    made([Arm(name) for name in EXPLORE], RATES)
    own = chosen("e_grpo", made_with(stored_results(arguments.runs), STRICT, BUDGET))
    assert own is not None
    made(starts(own))
    made(merging(own))
    credit = made([Arm(name) for name in CREDIT], RATES, reward=GRADED)
    best = list(dict.fromkeys(Arm.parse(name_of(result)) for result in credit))
    made(best, seeds=SEEDS[:1], end=UPDATES, reward=GRADED)
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, filled(page, tables(stored_results(arguments.runs))))


if __name__ == "__main__":
    main()
