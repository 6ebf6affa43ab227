"""AEGPO and its two levels against their host, at equal cost.

    python benchmarks/aegpo.py [--runs runs/aegpo] [--at-once N]

`aegpo`, `aegpo_global`, `aegpo_local`, and `flow_grpo` with four steps that attention did not choose,
each at 300k weighted evaluations with its best of three learning rates and three seeds; their host
`flow_grpo` with the rate that `methods.py` chose. Hours on two cores. Raw results go to
docs/claims/aegpo.json, where none is made twice, and a table to docs/attention.md. Interrupted, it
goes on when called again.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from typing import Any

import scipy.stats

from entroflow.comparison.jobs import Arm, Terms
from entroflow.comparison.results import stored_results
from entroflow.comparison.table import best_by_validation, rows, smallest_difference
from entroflow.writing import write_text
from methods import (
    BUDGET,
    RATES,
    ROOT,
    SEEDS,
    STRICT,
    Results,
    asked,
    chosen,
    filled,
    made_with,
    measured,
    name_of,
)
from methods import (
    CLAIMS as METHODS,
)

CLAIMS = ROOT / "docs" / "claims" / "aegpo.json"
PAGE = ROOT / "docs" / "attention.md"
SHARED = (STRICT, "evaluation.steps=10", "run.evaluate_every=5", "optimizer.ema=0.9")
MEASURE = ("attention.measure=true", "attention.layer_stride=1")
"""For the host and the control, which this changes by no bit and costs nothing that is counted."""
ARMS = (
    Arm("aegpo"),
    Arm("aegpo_local"),
    Arm("aegpo_global"),
    Arm("flow_grpo", ("exploration.type=window", "exploration.size=4", *MEASURE)),
)
FIXED = 0.65
"""A score on validation prompts that all are timed to."""


def host() -> Arm:
    """The host with the learning rate that was chosen for it."""
    results = json.loads(METHODS.read_text(encoding="utf-8"))["results"]
    own = chosen("flow_grpo", made_with(results, STRICT, BUDGET))
    assert own is not None
    return Arm(own.recipe, (*own.overrides, *MEASURE))


def base_of(result: Mapping[str, Any]) -> tuple[str, ...]:
    """What an arm is without its learning rate."""
    overrides = [o for o in result["arm"]["overrides"] if not o.startswith("optimizer")]
    return (result["arm"]["recipe"], *overrides)


def best(results: Results) -> Results:
    """Of every arm the results of its best rate, of those arms that have all seeds."""
    found: Results = []
    for arm in dict.fromkeys(base_of(result) for result in results):
        own = [result for result in results if base_of(result) == arm]
        rate = name_of(best_by_validation([r for r in own if r["seed"] == SEEDS[0]]))
        same = [result for result in own if name_of(result) == rate]
        found += same if len(same) == len(SEEDS) else []
    return found


def reached(result: Mapping[str, Any]) -> float:
    """Weighted evaluations, in thousands, until the fixed score; between evaluations by a line."""
    before = result["curve"][0]
    for point in result["curve"]:
        if point["eval/score"] >= FIXED:
            rise = point["eval/score"] - before["eval/score"]
            share = (FIXED - before["eval/score"]) / rise if rise else 1.0
            spent = [p["ledger/weighted_evaluations"] for p in (before, point)]
            return (spent[0] + share * (spent[1] - spent[0])) / 1000
        before = point
    return math.nan


def correlation(results: Results) -> str:
    """Mean over iterations and seeds, and its 95% interval over seeds."""
    of_seeds = [
        statistics.fmean(v for v in r["attention"]["rank_correlation"] if v is not None)
        for r in results
    ]
    reach = scipy.stats.t.ppf(0.975, len(of_seeds) - 1) * scipy.stats.sem(of_seeds)
    mean = statistics.fmean(of_seeds)
    return f"{mean:+.2f} [{mean - reach:+.2f}, {mean + reach:+.2f}]"


def table(results: Results) -> str:
    """A Markdown table with a line for each arm, the best first."""
    lines = [
        f"| recipe | iterations | strict score | gain | evaluations to {FIXED} | texture | "
        "diversity | shift and spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    table = rows(results)
    for row in table:
        own = [result for result in results if name_of(result) == row.name]
        done = sorted(reached(result) for result in own)
        name = row.name
        for measure in MEASURE:
            name = name.replace(f",{measure}", "")
        times = ", ".join("never" if math.isnan(t) else f"{t:.0f}k" for t in done)
        lines.append(
            f"| `{name}` | {row.iterations:.0f} | {row.score:.3f} ± {row.spread:.3f} | "
            f"{row.gain:+.3f} | {times} | × {row.ratio('texture'):.2f} | "
            f"× {row.ratio('diversity'):.2f} | {correlation(own)} |"
        )
    least = smallest_difference(table)
    return "\n".join([*lines, "", f"Differences below {least:.3f} would likely not have shown."])


def main() -> None:
    """See the module."""
    arguments = asked(__doc__, ROOT / "runs" / "aegpo")
    shared: Any = {"seeds": SEEDS, "terms": Terms(BUDGET, SHARED)}
    measured(arguments, CLAIMS, ARMS, learning_rates=RATES, **shared)
    measured(arguments, CLAIMS, [host()], **shared)
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, filled(page, {"aegpo": table(best(stored_results(arguments.runs)))}))


if __name__ == "__main__":
    main()
