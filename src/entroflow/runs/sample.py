"""Draw prompts with the weights of a run, beside the base's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entroflow import pictures
from entroflow.checkpoints import check_reference, read_run_state, read_tensors
from entroflow.contents import read_text
from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.evaluation.images import draw as sample_images
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt
from entroflow.recipe.kinds import RECIPE, Kind
from entroflow.recipe.load import load_component, warn_of_another_recipe
from entroflow.recipe.text import parse_yaml
from entroflow.runs.folder import RunFolder
from entroflow.runs.inputs import Inputs
from entroflow.shapes.grammar import parse
from entroflow.shapes.scenes import RESOLUTION
from entroflow.shapes.scoring import score


@dataclass(frozen=True)
class Opened:
    """The policy of a run.

    Attributes:
        policy: under `weights("reference")` the base, under `weights("ema")` the tuned weights.
        models: `base`, and `tuned` if there is a run.
        recipe: what it was made by, a shipped name or a file.
        iteration: of the checkpoint that the tuned weights come from.
        inputs: what that was trained with; none where it is not written down.
        trust: see `load_recipe`.
    """

    policy: Policy
    models: tuple[str, ...]
    recipe: str | Path
    iteration: int | None = None
    inputs: Inputs = field(default_factory=dict)
    trust: bool = False

    def part(self, section: str) -> Any:
        """A part of what it was made by; see `load_component`."""
        return load_component(self.recipe, section, trust=self.trust)


def open_policy(run: Path | None, weights: str = "ema", *, trust: bool = False) -> Opened:
    """The policy of a run, or the embedded base model.

    Args:
        weights: `ema` or `live`, of the best checkpoint if one is marked, else of the latest.
        trust: see `load_recipe`.

    Raises:
        InputError: no run folder, no whole checkpoint in it, or other base weights than it had.
    """
    policy: Policy
    if run is None:
        policy = load_component("quickstart", "policy").build()
        policy.weights.keep_reference()
        return Opened(policy, ("base",), "quickstart")
    folder = RunFolder.open(run, Kind.IMAGES)
    checkpoint = folder.best() or folder.latest()
    recipe = folder.path / RECIPE
    policy = load_component(recipe, "policy", trust=trust).build()
    policy.weights.keep_reference()
    state = read_run_state(checkpoint)
    warn_of_another_recipe(state, parse_yaml(read_text(recipe), RECIPE), checkpoint)
    check_reference(state, policy.weights.digest("reference"), checkpoint)
    policy.weights.keep("ema", read_tensors(checkpoint / f"{weights}.safetensors"))
    return Opened(
        policy, ("base", "tuned"), recipe, state["iteration"], state.get("inputs") or {}, trust
    )


def draw(
    opened: Opened,
    prompts: Sequence[str],
    *,
    count: int,
    steps: int | None,
    guidance: float | None,
    seed: int,
    out: Path,
) -> None:
    """Write a PNG: for every prompt a row per model, the same noise down a column.

    A green bar marks images that show exactly what their caption says, a red one those that don't;
    there is none where that can't be judged.

    Args:
        steps, guidance: None: as in the evaluation of the run, if it says.

    Raises:
        InputError: a prompt is outside what the model knows, or `out` is a folder.
    """
    if out.is_dir():
        raise InputError(f"{out} is a folder; name the PNG to write.")
    if guidance is not None and not math.isfinite(guidance):
        raise InputError(f"guidance must be a finite number, not {guidance}.")
    policy, models = opened.policy, opened.models
    evaluation = opened.part("evaluation")
    usual = evaluation if isinstance(evaluation, HeldOutEvaluation) else HeldOutEvaluation()
    steps = usual.steps if steps is None else steps
    guidance = usual.guidance if guidance is None else guidance
    asked = [Prompt(text) for text in prompts]
    images: list[Tensor] = []
    captions: list[str] = []
    passed: list[bool | None] = []
    for name in models:
        with policy.weights("reference" if name == "base" else "ema"):
            drawn = sample_images(
                policy, asked, torch.full((len(asked),), count), steps=steps, guidance=guidance,
                seed=seed, batch_size=opened.part("sampling").batch_size,
            )  # fmt: skip
        images.append(drawn.images)
        captions += [f"{name}: {text}" for text in prompts for _ in range(count)]
        passed += _verdicts(drawn.images, [prompts[p] for p in drawn.prompt.tolist()])
    # [models, prompts, count] -> prompts first, so that the models stand below each other.
    order = torch.arange(len(models) * len(prompts) * count).view(len(models), len(prompts), count)
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
