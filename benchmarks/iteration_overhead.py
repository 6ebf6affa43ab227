"""How much does an iteration cost beyond the bare network passes that it needs?

    python benchmarks/iteration_overhead.py [--repeats 5] [--out FILE] [SECTION.KEY=VALUE]...

Prints the time of an iteration (without scoring, evaluation and checkpoints) divided by the time
of the same number of forward, and forward and backward, passes of the bare network at its best
batch size. Both are measured in turn in this process; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter

import torch

from entroflow.policies.shapes.policy import ShapesPolicy
from entroflow.policies.shapes.tokenizer import tokenize
from entroflow.recipe.load import load_recipe
from entroflow.training.trainer import Trainer

BATCH_SIZES = (32, 48, 64, 96, 128, 192)


def forward_seconds(policy: ShapesPolicy, batch: int) -> float:
    """Seconds per image of a forward pass."""
    x, sigma, cond = inputs(policy, batch)
    with torch.no_grad():
        start = perf_counter()
        policy.velocity(x, sigma, cond, 1.0)
        return (perf_counter() - start) / batch


def forward_backward_seconds(policy: ShapesPolicy, batch: int) -> float:
    """Seconds per image of a forward and backward pass."""
    x, sigma, cond = inputs(policy, batch)
    start = perf_counter()
    policy.velocity(x, sigma, cond, 1.0).square().mean().backward()
    return (perf_counter() - start) / batch


def inputs(policy: ShapesPolicy, batch: int):
    """A random network batch."""
    words = tokenize(["a red circle left of a blue square"])
    cond = type(policy.encode(["a ring"]))({"words": words.expand(batch, -1)})
    return torch.randn(batch, *policy.latent_shape), torch.rand(batch), cond


def best(measure, policy: ShapesPolicy) -> int:
    """The batch size with the lowest median time per image."""
    return min(
        BATCH_SIZES,
        key=lambda batch: statistics.median(measure(policy, batch) for _ in range(5)),
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()

    trainer = Trainer(load_recipe("quickstart", arguments.overrides))
    policy = trainer.policy
    trainer.step()
    forward_batch, backward_batch = (
        best(forward_seconds, policy),
        best(forward_backward_seconds, policy),
    )
    ratios, scoring, iterations, bare = [], [], [], []
    for _ in range(arguments.repeats):
        before = trainer.ledger.counts(), dict(trainer.ledger.seconds)
        start = perf_counter()
        trainer.step()
        whole = perf_counter() - start
        spent = {stage: trainer.ledger.seconds[stage] - before[1][stage] for stage in before[1]}
        backward = (
            trainer.ledger.weighted_evaluations - before[0]["weighted_evaluations"]
            - trainer.ledger.network_evaluations + before[0]["network_evaluations"]
        ) // 2  # fmt: skip
        forward = trainer.ledger.network_evaluations - before[0]["network_evaluations"] - backward
        # As many passes as the iteration took, so that both see the same machine.
        f = [forward_seconds(policy, forward_batch) for _ in range(-(-forward // forward_batch))]
        b = [
            forward_backward_seconds(policy, backward_batch)
            for _ in range(-(-backward // backward_batch))
        ]
        policy.network.zero_grad()
        iterations.append(whole - spent["score"])
        bare.append(forward * statistics.mean(f) + backward * statistics.mean(b))
        scoring.append(spent["score"])
        ratios.append(iterations[-1] / bare[-1])
    result = {
        "ratio": statistics.median(iterations) / statistics.median(bare),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "iteration_seconds": statistics.median(iterations),
        "bare_seconds": statistics.median(bare),
        "scoring_seconds": statistics.median(scoring),
        "forward_passes": forward,
        "forward_backward_passes": backward,
        "best_batch": {"forward": forward_batch, "forward_backward": backward_batch},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
