"""Do the completions of TP-GRPO take more time than their network evaluations?

    python benchmarks/completions.py [--repeats 5] [--out FILE] [SECTION.KEY=VALUE]...

Iterations of `flow_grpo` and `tp_grpo`, which have the same groups and stochastic steps, in turn.
Prints the ratio of their times, without scoring and decoding, over that of their weighted
evaluations: 1 where sharing and batching lose nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from entroflow.recipe.load import load_recipe
from entroflow.training.trainer import Trainer

RECIPES = ("flow_grpo", "tp_grpo")


class Timed:
    """A trainer that says what an iteration took."""

    def __init__(self, recipe: str, overrides: list[str]) -> None:
        self.trainer = Trainer(load_recipe(recipe, overrides))
        self.decoding = 0.0
        self._decode = self.trainer.policy.decode
        self.trainer.policy.decode = self._timed_decode  # type: ignore[method-assign]
        self.found: list[dict[str, Any]] = []

    def _timed_decode(self, latents: torch.Tensor) -> torch.Tensor:
        start = perf_counter()
        images = self._decode(latents)
        self.decoding += perf_counter() - start
        return images

    def step(self) -> None:
        """One iteration, written down."""
        ledger = self.trainer.ledger
        before, stages, self.decoding = ledger.counts(), dict(ledger.seconds), 0.0
        start = perf_counter()
        self.trainer.step()
        whole = perf_counter() - start
        counts = {name: count - before[name] for name, count in ledger.counts().items()}
        stage = {name: s - stages.get(name, 0.0) for name, s in ledger.seconds.items()}
        self.found.append(
            {
                "seconds": whole - stage["score"] - self.decoding,
                "sampling": stage["rollout"] - stage["score"] - self.decoding,
                "update": stage["update"],
                "scoring": stage["score"],
                "decoding": self.decoding,
                **{name: counts[name] for name in
                   ("network_evaluations", "weighted_evaluations", "reward_calls", "decodes")},
            }
        )  # fmt: skip

    def median(self, name: str) -> float:
        """Over the iterations."""
        return statistics.median(iteration[name] for iteration in self.found)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()

    timed = {name: Timed(name, arguments.overrides) for name in RECIPES}
    for one in timed.values():
        one.step()
        one.found.clear()
    for _ in range(arguments.repeats):
        for one in timed.values():
            one.step()
    plain, turning = (timed[name] for name in RECIPES)

    def ratio(name: str) -> float:
        return turning.median(name) / plain.median(name)

    result = {
        "time_ratio": ratio("seconds"),
        "weighted_evaluations_ratio": ratio("weighted_evaluations"),
        "time_over_evaluations": ratio("seconds") / ratio("weighted_evaluations"),
        "threads": torch.get_num_threads(),
        "medians": {
            name: {key: round(one.median(key), 4) for key in one.found[0]}
            for name, one in timed.items()
        },
        "seconds": {
            name: [round(i["seconds"], 3) for i in one.found] for name, one in timed.items()
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
