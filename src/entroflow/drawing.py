"""Draw prompts with the weights of a run, beside the base's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from entroflow import pictures
from entroflow.checkpoints import read_tensors
from entroflow.errors import InputError
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt
from entroflow.recipe import load_component
from entroflow.runs import RECIPE, RunFolder
from entroflow.sampling.kernels import ODE
from entroflow.sampling.noise import Stream
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from entroflow.shapes.grammar import parse
from entroflow.shapes.scenes import RESOLUTION
from entroflow.shapes.scoring import score

BATCH_SIZE = 64


def open_policy(run: Path | None, weights: str) -> tuple[Policy, list[str]]:
    """The policy of a run, and the names of its models: `base`, and `tuned` if there is a run.

    Under `weights("reference")` the policy is the base, under `weights("ema")` the weights asked
    for, of the best checkpoint if one is marked, else of the latest.

    Raises:
        InputError: no run folder, or no whole checkpoint in it.
    """
    if run is None:
        policy: Policy = load_component("quickstart", "policy").build()
        policy.weights.keep("reference")
        return policy, ["base"]
    folder = RunFolder.open(run)
    checkpoint = folder.best() or folder.latest()
    settings = load_component(folder.path / RECIPE, "policy")
    if not hasattr(settings, "build"):
        raise InputError(
            f"{run} was trained with a policy object from Python ({type(settings).__name__}); "
            "its weights can be used from Python only."
        )
    policy = settings.build()
    policy.weights.keep("reference")
    policy.weights.keep("ema", read_tensors(checkpoint / f"{weights}.safetensors"))
    return policy, ["base", "tuned"]


def draw(
    policy: Policy,
    names: Sequence[str],
    prompts: Sequence[str],
    *,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    out: Path,
) -> None:
    """Write a PNG: for every prompt a row per model, the same noise down a column.

    A green bar marks images that show exactly what their caption says, a red one those that don't;
    there is none where that can't be judged.

    Raises:
        InputError: a prompt is outside what the model knows.
    """
    grid = policy.sigmas(steps)
    kernel = ODE()
    plan = fresh_rows(
        [Prompt(text) for text in prompts],
        torch.full((len(prompts),), count),
        torch.zeros(len(prompts), dtype=torch.long),
        grid,
        kernel.std(grid[:-1], grid[1:], grid),
    )
    images: list[Tensor] = []
    captions: list[str] = []
    passed: list[bool | None] = []
    for name in names:
        rollouts = Rollouts.empty(plan, policy.latent_shape)
        with policy.weights("reference" if name == "base" else "ema"):
            for _ in sample(
                policy, kernel, rollouts, seed=seed, iteration=0, guidance=guidance,
                batch_size=BATCH_SIZE, initial=Stream.EVALUATION,
            ):  # fmt: skip
                pass
        assert rollouts.images is not None
        images.append(rollouts.images)
        captions += [f"{name}: {text}" for text in prompts for _ in range(count)]
        passed += _verdicts(rollouts.images, [prompts[p] for p in plan.prompt.tolist()])
    # [models, prompts, count] -> prompts first, so that the models stand below each other.
    order = torch.arange(len(names) * plan.rows).view(len(names), len(prompts), count)
    rows = order.transpose(0, 1).flatten()
    sheet = pictures.grid(
        torch.cat(images)[rows],
        columns=count,
        captions=[captions[row] for row in rows.tolist()],
        passed=[passed[row] for row in rows.tolist()],
    )
    pictures.save(sheet, out)


def _verdicts(images: Tensor, texts: Sequence[str]) -> list[bool | None]:
    """Whether each image is strictly right; None where the shapes world can't tell."""
    verdicts: list[bool | None] = [None] * len(texts)
    if images.shape[1:] != (3, RESOLUTION, RESOLUTION):
        return verdicts
    specs = {}
    for row, text in enumerate(texts):
        with suppress(InputError):
            specs[row] = parse(text)
    if specs:
        strict = score(images[list(specs)], list(specs.values())).strict
        for row, right in zip(specs, strict.tolist(), strict=True):
            verdicts[row] = right
    return verdicts
