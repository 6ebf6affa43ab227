"""Does control of entropy keep a language model trying? Clip_B, Clip_V and TRL's bonus on Countdown.

    python benchmarks/entropy.py [--runs runs/entropy] [--at-once N]

`entroflow llm train` without control, with Clip_B and Clip_V at their published thresholds and at ones
that leave out one to four percent of the tokens, and with TRL's entropy bonus, whose coefficient is the
best of three by the first seed's Avg@16 on validation puzzles; equal updates, three seeds. A good hour on
two cores. Raw results go to docs/claims/entropy.json, where none is made twice, a table to
docs/language-models.md and a picture to docs/images/entropy.png. Interrupted, it goes on when called
again. Needs the extras `llm` and `benchmarks`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from entroflow.comparison.table import detectable
from entroflow.contents import read_object
from entroflow.llm.recipe import load
from entroflow.report.llm_page import change_correlation
from entroflow.runs.folder import RunFolder
from entroflow.version import package_version
from entroflow.writing import to_json, write_text
from methods import filled, spread

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims" / "entropy.json"
PAGE = ROOT / "docs" / "language-models.md"
PICTURE = ROOT / "docs" / "images" / "entropy.png"
SEEDS = range(3)
COEFFICIENTS = ("0.003", "0.01", "0.03")
"""Of TRL's bonus."""
ARMS = {
    "none": (),
    "Clip_B": ("clip.type=b", "clip.denominator=shrink"),
    "Clip_V": ("clip.type=v", "clip.denominator=shrink"),
    "Clip_B, μ 2": ("clip.type=b", "clip.denominator=shrink", "clip.mu=2"),
    "Clip_V, μ 4, no cap": ("clip.type=v", "clip.denominator=shrink", "clip.mu=4", "clip.most=1"),
    "Clip_B, μ 1": ("clip.type=b", "clip.denominator=shrink", "clip.mu=1"),
    "Clip_V, μ 2, no cap": ("clip.type=v", "clip.denominator=shrink", "clip.mu=2", "clip.most=1"),
}
KEPT = (
    "iteration", "seconds", "token_entropy", "reward", "entropy_clip/share", "discriminator/centred",
    "entropy_change/predicted", "entropy_change/measured",
)  # fmt: skip
"""What of a line of the metrics goes into the results, besides evaluations."""

Results = list[dict[str, Any]]


def bonus(coefficient: str) -> tuple[str, ...]:
    """The overrides of TRL's entropy bonus."""
    return (f"trainer.entropy_coef={coefficient}",)


def stored() -> Results:
    """What was measured so far."""
    return read_object(CLAIMS)["results"] if CLAIMS.exists() else []


def made(jobs: Sequence[tuple[str, tuple[str, ...], int]], runs: Path, at_once: int) -> None:
    """Make those results that are not there; a job is an arm, its overrides and a seed."""
    there = {(result["recipe_hash"], result["seed"]) for result in stored()}
    wanted = [job for job in jobs if (load("countdown", job[1]).hash, job[2]) not in there]

    def one(job: tuple[str, tuple[str, ...], int]) -> dict[str, Any]:
        arm, overrides, seed = job
        name = load("countdown", overrides).hash
        folder = runs / f"{name}-seed{seed}"
        if not (folder / "evaluation.json").exists():
            command = [sys.executable, "-m", "entroflow.cli.main", "llm", "train"]
            if folder.exists() and RunFolder(folder).all_checkpoints():
                command += ["--resume", str(folder)]
            else:
                shutil.rmtree(folder, ignore_errors=True)
                command += ["countdown", *overrides, f"run.seed={seed}", "--run", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return result_of(RunFolder.open(folder), arm, overrides, seed)

    runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        for result in pool.map(one, wanted):
            write_text(CLAIMS, to_json({"results": [*stored(), result]}, indent=1) + "\n")
            gain = result["evaluation"]["tuned"]["avg@16"][0]
            print(f"{result['arm']}  seed {result['seed']}  Avg@16 {gain:.3f}", flush=True)


def result_of(folder: RunFolder, arm: str, overrides: Sequence[str], seed: int) -> dict[str, Any]:
    """What is kept of a run."""
    lines = folder.metrics()
    updates, correlation = change_correlation(lines)
    evaluation = read_object(folder.path / "evaluation.json")
    del evaluation["answers"]
    curve = [
        {key: value for key, value in line.items() if key in KEPT or key.startswith("eval/")}
        for line in lines
    ]
    return {
        "arm": arm, "overrides": list(overrides), "seed": seed,
        "recipe_hash": load("countdown", overrides).hash, "version": package_version(),
        "change_correlation": correlation, "updates": updates, "evaluation": evaluation,
        "curve": curve,
    }  # fmt: skip


def best_bonus(results: Results) -> str:
    """The coefficient with the best last Avg@16 on validation puzzles, of the first seed."""
    tried = {
        result["arm"]: result["curve"][-1]["eval/avg@16"]
        for result in results
        if result["seed"] == SEEDS[0] and result["arm"].startswith("bonus ")
    }
    return max(tried, key=tried.__getitem__).removeprefix("bonus ")


def compared(results: Results) -> Results:
    """Arm by arm, of the bonus with the best coefficient."""
    arms = (*ARMS, f"bonus {best_bonus(results)}")
    return [result for arm in arms for result in results if result["arm"] == arm]


def by_arm(results: Results) -> dict[str, Results]:
    """The results of each arm, in their order."""
    return {
        arm: [result for result in results if result["arm"] == arm]
        for arm in dict.fromkeys(result["arm"] for result in results)
    }


def table(results: Results) -> str:
    """A Markdown table with a line for each arm, and what it could have shown."""
    lines = [
        "| control | entropy at the end | Avg@16 | Pass@4 | Pass@16 | left out | mean S − S̄ | "
        "predicted and measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    arms = by_arm(results)
    measures = ("avg@16", "pass@4", "pass@16")

    def base(of: Callable[[Mapping[str, Any]], float]) -> str:
        return f"{statistics.mean(of(result) for result in results):.3f}"

    # The first update's answers are the base's.
    cells = [base(lambda result: updates_of(result)[0]["token_entropy"])]
    cells += [base(lambda result, m=m: result["evaluation"]["base"][m][0]) for m in measures]
    lines.append(f"| *base* | {' | '.join(cells)} | | | |")
    tuned = {
        measure: [[r["evaluation"]["tuned"][measure][0] for r in own] for own in arms.values()]
        for measure in measures
    }
    for row, (arm, own) in enumerate(arms.items()):
        updates = [updates_of(result) for result in own]
        ends = [statistics.mean(u["token_entropy"] for u in of_run[-10:]) for of_run in updates]
        shares = [u.get("entropy_clip/share", 0.0) for of_run in updates for u in of_run]
        centred = [
            statistics.mean(u["discriminator/centred"] for u in of_run) for of_run in updates
        ]
        cells = [spread(ends), *(spread(tuned[measure][row]) for measure in measures)]
        cells += [f"{statistics.mean(shares):.2%}", spread(centred, 5, "+")]
        cells += [spread([result["change_correlation"] for result in own], 2, "+")]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    least = [
        f"{detectable([(len(values), statistics.stdev(values)) for values in tuned[measure]]):.3f} "
        f"in {measure.capitalize()}"
        for measure in measures
    ]
    lines += ["", f"Differences below {', '.join(least)} would likely not have shown."]
    return "\n".join(lines)


def updates_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of its updates."""
    return [line for line in result["curve"] if "token_entropy" in line]


def draw(results: Results) -> None:
    """Entropy, Avg@16 and Pass@16 over updates, of every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("token_entropy", "entropy (nats)"),
        ("eval/avg@16", "Avg@16"),
        ("eval/pass@16", "Pass@16"),
    )
    figure, grid = pyplot.subplots(1, 3, figsize=(12, 3.8), dpi=110)
    # A hue for each clip, the darker the more it leaves out.
    colors = (
        "black", "#9ecae1", "#fdae6b", "#4292c6", "#e6550d", "#08519c", "#a63603", "tab:green",
    )  # fmt: skip
    for axes, (key, title) in zip(grid, panels, strict=True):
        for (arm, own), color in zip(by_arm(results).items(), colors, strict=True):
            for number, result in enumerate(own):
                points = [(line["iteration"], line[key]) for line in result["curve"] if key in line]
                axes.plot(*zip(*points, strict=True), color=color, alpha=0.8, linewidth=1.3,
                          label=None if number else arm)  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3)
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=8, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(PICTURE)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "entropy")
    parser.add_argument("--at-once", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(f"bonus {c}", bonus(c), SEEDS[0]) for c in COEFFICIENTS]
    jobs += [(arm, overrides, seed) for seed in SEEDS for arm, overrides in ARMS.items()]
    made(jobs, arguments.runs, arguments.at_once)
    chosen = best_bonus(stored())
    made(
        [(f"bonus {chosen}", bonus(chosen), seed) for seed in SEEDS],
        arguments.runs,
        arguments.at_once,
    )
    results = compared(stored())
    page = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, filled(page, {"entropy": table(results)}))
    draw(results)


if __name__ == "__main__":
    main()
