"""Is a reward fit to be trained on? A few images tell most of what goes wrong later."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from entroflow.checks.findings import DoubtfulError, Finding, NotPossibleError, finding_of
from entroflow.credit.normalise import is_tied
from entroflow.errors import InputError
from entroflow.evaluation.images import draw
from entroflow.noise import Address, Stream, gaussian, generator
from entroflow.prompts import Prompt
from entroflow.recipe.load import Recipe
from entroflow.rewards.base import failures
from entroflow.rewards.parts import Part
from entroflow.rewards.scoring import score_against, score_images

ENOUGH = 8
"""Images that are enough to be suspicious where all of a prompt earn the same."""
SAME = 1e-6
"""Relative difference up to which two scores count as the same."""


def examine_reward(
    part: Part, groups: Sequence[Tensor], prompts: Sequence[Prompt]
) -> Iterator[Finding]:
    """Check a reward on images; findings as they come.

    Args:
        groups: images [n, 3, H, W] in [0, 1] of each prompt, two or more.
        prompts: one for each.
    """
    subject = _Subject(part, groups, prompts)
    for check in (
        subject.values, subject.repeated, subject.batches, subject.noise, subject.spread,
        subject.cost,
    ):  # fmt: skip
        yield finding_of(check.__name__, check)


def examine_recipe(recipe: Recipe, prompts: int, images: int) -> Iterator[Finding]:
    """Check the rewards and monitors of a recipe on images of its untrained model.

    Args:
        prompts: of the first iteration, so many at most.
        images: of each.
    """
    groups, chosen = untrained(recipe, prompts, images)
    parts = all_rewards(recipe)
    for name, part in parts.items():
        for found in examine_reward(part, groups, chosen):
            said = f"{name}: {found.said}" if len(parts) > 1 else found.said
            yield replace(found, said=said)


def all_rewards(recipe: Recipe) -> dict[str, Part]:
    """The rewards that a recipe trains on, and its monitors, by name."""
    monitors = {f"monitor {name}": each for name, each in recipe.monitors.rewards.items()}
    return {**recipe.reward.parts, **monitors}


@torch.no_grad()
def untrained(recipe: Recipe, prompts: int, images: int) -> tuple[list[Tensor], list[Prompt]]:
    """Images of a recipe's untrained model: a group for each prompt, and the prompts.

    Args:
        prompts: of the first iteration, so many at most.
        images: of each.
    """
    chosen = recipe.prompts.batch(recipe.run.seed, 0)[:prompts]
    drawn = draw(
        recipe.policy.build(), chosen, torch.full((len(chosen),), images),
        steps=recipe.sampling.steps, guidance=recipe.sampling.guidance,
        seed=recipe.run.seed, batch_size=recipe.sampling.batch_size,
    )  # fmt: skip
    return [drawn.images[drawn.prompt == p] for p in range(len(chosen))], chosen


@dataclass
class _Subject:
    """The reward under examination, and what it said at first."""

    part: Part
    groups: Sequence[Tensor]
    prompts: Sequence[Prompt]
    seconds: float = 0.0
    first: list[Tensor] = field(default_factory=list)

    def values(self) -> str:
        """Every image has a finite one."""
        start = perf_counter()
        found = [
            score_images(self.part, images, prompt)
            for images, prompt in zip(self.groups, self.prompts, strict=True)
        ]
        self.seconds = perf_counter() - start
        failed = failures(s for scores in found for s in scores.statuses)
        number = sum(len(images) for images in self.groups)
        if failed:
            kinds = ", ".join(f"{times} {kind}" for kind, times in failed.items())
            raise InputError(f"{sum(failed.values())} of {number} images have none ({kinds}).")
        self.first = [scores.values for scores in found]
        return f"{number} images of {len(self.prompts)} prompts have one"

    def repeated(self) -> str:
        """The same images earn the same again."""
        self._needs_values()
        apart = max(
            _apart(score_images(self.part, images, prompt).values, before)
            for images, prompt, before in self._each()
        )
        if apart > SAME:
            raise DoubtfulError(
                f"the same images differ by {apart:.2g} when they are scored again: advantages "
                "will follow that noise (a judge with a temperature, dropout?)"
            )
        return "the same images earn the same again"

    def batches(self) -> str:
        """An image earns the same whatever is beside it; of a group, wherever it stands."""
        self._needs_values()
        apart = max(self._moved(*each) for each in self._each())
        if apart > SAME:
            said = (
                "in another order the images of a group earn other rewards"
                if self.part.compares
                else "alone an image earns another reward than in a batch"
            )
            raise DoubtfulError(f"{said}, by up to {apart:.2g}")
        if self.part.compares:
            return "the order of a group does not count"
        return "batches do not count"

    def noise(self) -> str:
        """Images earn more than noise."""
        self._needs_values()
        margins = torch.cat([self._over_noise(*each) for each in self._each()])
        if margins.isnan().any():
            raise DoubtfulError("noise has no reward, so it can't be told from images")
        better = (margins > 0).double().mean().item()
        if better < 0.75:
            raise DoubtfulError(f"only {better:.0%} of the images earn more than noise")
        return f"{better:.0%} of the images earn more than noise"

    def spread(self) -> str:
        """Images of a prompt differ, or there is nothing to learn."""
        self._needs_values()
        whole = torch.cat(self.first)
        tied = sum(is_tied(values) for values in self.first)
        said = f"from {whole.min():.4g} to {whole.max():.4g}"
        if tied == len(self.first) and len(whole) >= ENOUGH:
            raise DoubtfulError(f"{said}; images of a prompt all earn the same: nothing to learn")
        within = torch.stack([values.std(correction=0) for values in self.first]).mean()
        return f"{said}, with a standard deviation of {within:.3g} among images of a prompt" + (
            f"; {tied} of {len(self.first)} prompts are tied" if tied else ""
        )

    def cost(self) -> str:
        """What an image takes."""
        self._needs_values()
        number = sum(len(images) for images in self.groups)
        return f"{1000 * self.seconds / number:.3g} ms for each image"

    def _needs_values(self) -> None:
        if not self.first:
            raise NotPossibleError("needs values")

    def _each(self) -> Iterator[tuple[Tensor, Prompt, Tensor]]:
        return zip(self.groups, self.prompts, self.first, strict=True)

    def _moved(self, images: Tensor, prompt: Prompt, before: Tensor) -> float:
        if self.part.compares:
            turned = score_images(self.part, images.flip(0), prompt).values.flip(0)
            return _apart(turned, before)
        alone = [score_images(self.part, image[None], prompt).values for image in images]
        return _apart(torch.cat(alone), before)

    def _over_noise(self, images: Tensor, prompt: Prompt, before: Tensor) -> Tensor:
        numbers = torch.arange(len(images))
        zeros = torch.zeros_like(numbers)
        drawn = gaussian(images.shape[1:], Address(0), Stream.EVALUATION, zeros, numbers, zeros)
        noise = (0.5 + 0.3 * drawn).clamp(0, 1).to(images)
        if self.part.compares:
            source, asked = generator(0, Stream.JUDGE), [prompt] * len(images)
            return score_against(self.part, images, noise, asked, source).values - 0.5
        return before - score_images(self.part, noise, prompt).values


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the size of the values; infinite where one is missing."""
    difference = (one - other).abs().max().item() / max(1.0, other.abs().max().item())
    return math.inf if math.isnan(difference) else difference
