"""How long does the strict score of an image take?

    python benchmarks/scoring.py [--batch 192] [--repeats 20] [--out FILE]

Prints milliseconds per image of the reward, in batches, for three kinds of images: rendered scenes
of their captions, samples of the base model, and noise. The time is the median over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from entroflow.noise import Address
from entroflow.policies.shapes.policy import ShapesPolicyConfig
from entroflow.prompts import Prompt
from entroflow.rewards.shapes import ShapesReward
from entroflow.sampling.kernels import ODE
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from entroflow.shapes.grammar import SKILLS, Spec, draw, text
from entroflow.shapes.scenes import lay_out, render

STEPS = 10


def samples(specs: list[Spec]) -> Tensor:
    """One image of the base model for each caption, by the ODE."""
    policy = ShapesPolicyConfig().build()
    ones, zeros = (
        torch.ones(len(specs), dtype=torch.long),
        torch.zeros(len(specs), dtype=torch.long),
    )
    prompts = [Prompt(text(spec)) for spec in specs]
    plan = fresh_rows(prompts, ones, zeros, policy.sigmas(STEPS), torch.zeros(STEPS))
    rollouts = Rollouts.empty(plan, policy.latent_shape)
    cond = policy.encode(rollouts.plan.texts)
    for _ in sample(
        policy,
        ODE(),
        rollouts,
        cond,
        address=Address(0),
    ):
        pass
    assert rollouts.images is not None
    return rollouts.images


def milliseconds(images: Tensor, specs: list[Spec], repeats: int) -> list[float]:
    """Per image, of every repeat; the captions are read before, as in a training run."""
    reward, prompts = ShapesReward(value="strict"), [Prompt(text(spec)) for spec in specs]
    reward.score(images, prompts)
    times = []
    for _ in range(repeats):
        start = perf_counter()
        reward.score(images, prompts)
        times.append(1000 * (perf_counter() - start) / len(images))
    return times


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    specs = [draw(rng, "train", [SKILLS[i % len(SKILLS)]]) for i in range(arguments.batch)]
    kinds = {
        "scenes": render(lay_out(specs, rng)),
        "samples": samples(specs),
        "noise": torch.from_numpy(rng.random((len(specs), 3, 32, 32), dtype=np.float32)),
    }
    times = {name: milliseconds(images, specs, arguments.repeats) for name, images in kinds.items()}
    result = {
        "milliseconds_per_image": {
            name: round(statistics.median(of_kind), 4) for name, of_kind in times.items()
        },
        "fastest": {name: round(min(of_kind), 4) for name, of_kind in times.items()},
        "slowest": {name: round(max(of_kind), 4) for name, of_kind in times.items()},
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
