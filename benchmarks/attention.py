"""What does it cost to measure attention entropy?

    python benchmarks/attention.py [--repeats 15] [--out FILE]

Rollouts of `flow_grpo` on the embedded model, with and without it in turn: the ratio of their times,
with the settings as they are and with every layer. And the ratio for a single network call where every
row of the batch is measured, as a bound. One thread; nothing else may run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from entroflow.attention.probe import compared_states, probe_of, probed_velocity
from entroflow.exploration.base import Request
from entroflow.noise import Address
from entroflow.recipe.load import load_recipe
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from entroflow.settings import Attention
from entroflow.version import package_version

SETTINGS = {
    "default": Attention(),
    "every layer": Attention(layer_stride=1),
}


def ratios(
    plain: Callable[[], object], measured: Callable[[], object], repeats: int
) -> dict[str, float]:
    """Median, least and largest ratio of two times, taken in turn."""
    found = []
    for _ in range(repeats + 1):
        seconds = []
        for run in (plain, measured):
            start = perf_counter()
            run()
            seconds.append(perf_counter() - start)
        found.append(seconds[1] / seconds[0])
    warm = found[1:]
    return {"median": statistics.median(warm), "least": min(warm), "largest": max(warm)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    recipe = load_recipe("flow_grpo")
    policy = recipe.policy.build()
    prompts = recipe.prompts.batch(0, 0)
    grid, P = policy.sigmas(recipe.sampling.steps), len(prompts)
    sizes, none = torch.full((P,), 24), torch.zeros(P, dtype=torch.long)
    plan = recipe.exploration.plan(Request(prompts, sizes, none, grid, recipe.kernel, 0, 0))
    cond = policy.encode(plan.texts)

    def rollouts(settings: Attention | None) -> Callable[[], None]:
        def run() -> None:
            kept = None if settings is None else compared_states(plan, settings.states)
            into = Rollouts.empty(plan, policy.latent_shape, keep_states=kept)
            for _ in sample(
                policy, recipe.kernel, into, cond, address=Address(0),
                 batch_size=recipe.sampling.batch_size, probe=probe_of(settings),
            ):  # fmt: skip
                pass

        return run

    B = recipe.sampling.batch_size
    x, sigma = torch.randn(B, *policy.latent_shape), torch.full((B,), 0.5)
    rows, here = torch.ones(B, dtype=torch.bool), cond.take(torch.arange(B) % P)

    @torch.no_grad()
    def call(settings: Attention | None) -> None:
        for _ in range(8):
            if settings is None:
                policy.velocity(x, sigma, here, 1.0)
            else:
                probed_velocity(policy, x, sigma, here, 1.0, rows, settings)

    result = {
        name: {
            "rollouts": ratios(rollouts(None), rollouts(settings), arguments.repeats),
            "every row": ratios(
                lambda: call(None), lambda s=settings: call(s), arguments.repeats  # type: ignore[misc]
            ),
        }
        for name, settings in SETTINGS.items()
    }  # fmt: skip
    made = {"version": package_version(), "repeats": arguments.repeats, "threads": 1}
    text = json.dumps({**made, "ratios": result}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
