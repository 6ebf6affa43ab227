"""Draw prompts with the weights of a run, beside the base's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from entroflow import pictures
from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.evaluation.images import draw as sample_images
from entroflow.prompts import Prompt
from entroflow.runs.open import Opened
from entroflow.shapes.grammar import parse
from entroflow.shapes.scenes import RESOLUTION
from entroflow.shapes.scoring import score


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
    listed = [Prompt(text) for text in prompts]
    images: list[Tensor] = []
    captions: list[str] = []
    passed: list[bool | None] = []
    for name in models:
        with policy.weights("reference" if name == "base" else "ema"):
            drawn = sample_images(
                policy, listed, torch.full((len(listed),), count), steps=steps, guidance=guidance,
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
