"""Prompts of the shapes world."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from entroflow.component import Component
from entroflow.noise import Stream, generator
from entroflow.prompts import Prompt
from entroflow.shapes import grammar


class ShapesPrompts(Component):
    """Prompts of the shapes world: a random skill, then a random caption of one split."""

    type: Literal["shapes"] = "shapes"
    per_iteration: int = Field(8, ge=1, description="prompts per iteration")
    split: grammar.Split = Field("train", description="captions to draw from")
    skills: tuple[str, ...] = Field(
        grammar.SKILLS, min_length=1, description="skills, dealt evenly over the prompts"
    )

    def model_post_init(self, _: Any) -> None:
        """Refuse unknown skills."""
        unknown = set(self.skills) - set(grammar.SKILLS)
        if unknown:
            raise ValueError(
                f"unknown skills {sorted(unknown)}; known: {', '.join(grammar.SKILLS)}"
            )

    def batch(self, seed: int, iteration: int) -> list[Prompt]:
        """Skills are dealt evenly in random order; captions are drawn with replacement."""
        rng = generator(seed, Stream.PROMPTS, iteration)
        dealt = [self.skills[i % len(self.skills)] for i in range(self.per_iteration)]
        skills = rng.permutation(len(self.skills))
        renamed = dict(zip(self.skills, (self.skills[i] for i in skills), strict=True))
        return [Prompt(grammar.text(grammar.draw(rng, self.split, (renamed[s],)))) for s in dealt]
