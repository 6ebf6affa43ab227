"""What does `quickstart` achieve? Three seeds, and a control with the rewards shuffled in groups.

    python benchmarks/quickstart.py [SECTION.KEY=VALUE]... [--seeds 0 1 2] [--runs runs/claims]

Runs `entroflow train` once per seed, one after the other, and writes docs/claims/quickstart.json
(raw results) and docs/images/quickstart.png. With changes to the recipe there is neither control nor
picture. A run whose recipe hash, base weights and seed are stored is not repeated. Needs the extra
`benchmarks` for the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

from entroflow.comparison.results import curve_of
from entroflow.policies.shapes.policy import WEIGHTS
from entroflow.recipe.load import load_recipe
from entroflow.runs.folder import EVALUATION, RunFolder

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims" / "quickstart.json"
PICTURE = ROOT / "docs" / "images" / "quickstart.png"
CONTROL = "credit.type=shuffled"
SHOWN = 8
"""Test prompts in the picture."""


def train(overrides: list[str], folder: Path) -> None:
    """One run from the command line, gone on with if it was interrupted."""
    goes_on = (folder / "checkpoints").is_dir()
    start = (
        ["--resume", str(folder)] if goes_on else ["quickstart", "--run", str(folder), *overrides]
    )
    subprocess.run([sys.executable, "-m", "entroflow.cli.main", "train", *start], check=True)


def result_of(folder: Path, key: dict) -> dict:
    """What a finished run left behind, without pictures."""
    run = RunFolder.open(folder)
    metrics = run.metrics()
    evaluation = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
    return {
        **key,
        "commit": metrics[0]["version"],
        "training_seconds": metrics[-1]["seconds"],
        "ledger": {k: v for k, v in metrics[-1].items() if k.startswith("ledger/")},
        "curve": curve_of(metrics),
        "test": evaluation,
    }


def draw(results: list[dict], runs: Path) -> None:
    """The curves of all runs, and test prompts before and after the first one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 4.4), dpi=110)
    curves, pictures = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    axes = curves.subplots()
    for result in results:
        minutes = [point["seconds"] / 60 for point in result["curve"]]
        strict = [point["eval/score"] for point in result["curve"]]
        color = "0.6" if result["control"] else "tab:blue"
        label = "rewards shuffled" if result["control"] else "quickstart, one line a seed"
        seen = axes.get_legend_handles_labels()[1]
        axes.plot(minutes, strict, color=color, label=None if label in seen else label)
    axes.set(xlabel="minutes of training on two CPU cores", ylabel="strict score, held-out prompts")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    curves.subplots_adjust(left=0.14, right=0.97, bottom=0.15, top=0.95)
    first = runs / name_of(next(r for r in results if not r["control"]))
    known = json.loads((first / "examples" / "test_base.json").read_text(encoding="utf-8"))[
        "captions"
    ]
    chosen = np.linspace(0, len(known) - 1, SHOWN).round().astype(int)
    # A thin row between the two pairs of rows leaves room for captions of two lines.
    cells = pictures.subplots(5, SHOWN // 2, height_ratios=(1, 1, 0.3, 1, 1))
    for axes in cells[2]:
        axes.set_axis_off()
    for row, model in enumerate(("base", "tuned")):
        strip = np.asarray(Image.open(first / "examples" / f"test_{model}.png"))
        side = strip.shape[0]
        for place, index in enumerate(chosen):
            half, column = divmod(place, SHOWN // 2)
            axes = cells[3 * half + row, column]
            axes.imshow(strip[:, index * side : (index + 1) * side], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(textwrap.fill(known[index], 20), fontsize=8)
            if column == 0:
                axes.set_ylabel({"base": "before", "tuned": "after"}[model], fontsize=9)
    pictures.subplots_adjust(left=0.05, right=0.99, bottom=0.02, top=0.9, hspace=0.08, wspace=0.1)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE)


def name_of(result: dict) -> str:
    """Folder of a run."""
    return f"{'control' if result['control'] else 'seed'}-{result['seed']}-{result['recipe_hash']}-{result['base']}"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    stored = json.loads(CLAIMS.read_text(encoding="utf-8")) if CLAIMS.exists() else []
    weights = hashlib.blake2b(WEIGHTS.read_bytes(), digest_size=6).hexdigest()
    results = []
    planned = [(seed, False) for seed in arguments.seeds]
    if not arguments.overrides:
        planned.append((arguments.seeds[0], True))
    for seed, control in planned:
        overrides = [*arguments.overrides, f"run.seed={seed}", *([CONTROL] if control else [])]
        recipe = load_recipe("quickstart", overrides)
        key = {"recipe_hash": recipe.hash, "base": weights, "seed": seed, "control": control}
        found = [r for r in stored if key.items() <= r.items()]
        if not found:
            folder = arguments.runs / name_of(key)
            if not (folder / EVALUATION).exists():
                train(overrides, folder)
            found = [{"overrides": overrides, **result_of(folder, key)}]
            stored += found
            CLAIMS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        results += found
        gain, models = found[0]["test"]["gain"], found[0]["test"]["models"]
        base, tuned = models["base"], models["tuned"]
        texture, diversity = (
            (base["monitors"][name], tuned["monitors"][name]) for name in ("texture", "diversity")
        )
        print(
            f"seed {seed}{' control' if control else ''}: test strict "
            f"{base['scores']['overall']['value']:.3f} -> {tuned['scores']['overall']['value']:.3f}, "
            f"gain {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] in "
            f"{found[0]['training_seconds']:.0f} s of training; texture {texture[1] / texture[0]:.2f} x, "
            f"diversity {diversity[0]:.3f} -> {diversity[1]:.3f} (measured at {found[0]['commit']})",
            flush=True,
        )
    if arguments.overrides:
        return
    missing = [r for r in results if not (arguments.runs / name_of(r)).is_dir()]
    if missing:
        print(f"picture not drawn: {arguments.runs} no longer holds {name_of(missing[0])}")
    else:
        draw(results, arguments.runs)


if __name__ == "__main__":
    main()
