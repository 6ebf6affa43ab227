"""Evaluation on the shapes world: scores by skill, and what the reward can't see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import ClassVar, Literal

import torch
from pydantic import Field
from scipy import stats

from entroflow.evaluation.base import Evaluated, HeldOutEvaluation, Measure, Score
from entroflow.evaluation.image_statistics import NAMES, statistics
from entroflow.evaluation.images import draw, shares
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt
from entroflow.rewards.combined import Rewards
from entroflow.shapes import blind_spots, grammar
from entroflow.shapes.scoring import score

EXAMPLES_PER_SKILL = 4


class ShapesEvaluation(HeldOutEvaluation):
    """ODE samples of held-out prompts, the same prompts and noise every time."""

    measure: ClassVar[Measure] = Measure(
        "strict score",
        "A strictly right image shows everything its caption asks for and nothing else; the score "
        "is the share of such images.",
        share=True,
    )
    monitor_names: ClassVar[tuple[str, ...]] = (*NAMES, "texture", "contrast")

    type: Literal["shapes"] = "shapes"
    prompts_per_skill: int = Field(
        16, ge=1, description="most captions per skill; images are spread evenly over them"
    )

    def held_out(self) -> Mapping[grammar.Split, Sequence[Prompt]]:
        """See `HeldOutEvaluation.held_out`."""
        splits: tuple[grammar.Split, ...] = ("validation", "test")
        return {
            split: [
                Prompt(grammar.text(spec))
                for skill in grammar.SKILLS
                for spec in held_out(skill, split, self.prompts_per_skill)
            ]
            for split in splits
        }

    def run(
        self,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        reward: Rewards | None = None,
        ledger: Ledger | None = None,
    ) -> Evaluated:
        """See `Evaluation.run`."""
        specs_by_skill = {
            skill: held_out(skill, self.split, self.prompts_per_skill) for skill in grammar.SKILLS
        }
        specs = [spec for chosen in specs_by_skill.values() for spec in chosen]
        drawn = draw(
            policy,
            [Prompt(grammar.text(spec)) for spec in specs],
            torch.cat([shares(self.images, len(c)) for c in specs_by_skill.values()]),
            steps=self.steps, guidance=self.guidance, seed=seed, batch_size=batch_size,
            reward=reward, ledger=ledger,
        )  # fmt: skip
        images, shown = drawn.images, [specs[p] for p in drawn.prompt.tolist()]
        strict = score(images, shown).strict
        skills = [spec.skill for spec in shown]
        examples = _examples(skills)
        return Evaluated(
            scores=_by_skill(strict.double(), skills),
            reward=drawn.rewards.nanmean().item(),
            monitors={
                **statistics(images, drawn.prompt),
                "texture": blind_spots.background_texture(images),
                "contrast": blind_spots.contrast(images),
            },
            images=images[examples],
            captions=[grammar.text(shown[row]) for row in examples],
            passed=strict[examples].tolist(),
            drawn=drawn,
            by_image=strict.double(),
        )


def held_out(skill: str, split: grammar.Split, most: int) -> list[grammar.Spec]:
    """Up to `most` captions of one skill, its forms in turn, spread evenly over each form."""
    forms = []
    skill_forms = [form for form in grammar.split_forms(split)[skill] if form]
    for form in skill_forms:
        stride = max(1, len(form) * len(skill_forms) // most)
        forms.append(form[::stride])
    dealt = [spec for turn in zip_longest(*forms) for spec in turn if spec is not None]
    return dealt[:most]


def _examples(skills: list[str]) -> list[int]:
    """Rows to show: of each skill a few, spread evenly."""
    shown = []
    for skill in grammar.SKILLS:
        rows = [row for row, name in enumerate(skills) if name == skill]
        stride = max(1, len(rows) // EXAMPLES_PER_SKILL)
        shown += rows[::stride][:EXAMPLES_PER_SKILL]
    return shown


def _by_skill(strict: torch.Tensor, skills: list[str]) -> dict[str, Score]:
    """Scores by skill with Wilson intervals, and overall: the mean of the skills.

    The interval of the mean combines those of the skills (MOVER, Zou & Donner, 2008), so it does
    not collapse at 0 or 1. All intervals are over images and noise; the prompts are taken as given.
    """
    scores = {}
    for skill in grammar.SKILLS:
        rows = torch.tensor([name == skill for name in skills])
        n, right = int(rows.sum()), int(strict[rows].sum())
        interval = stats.binomtest(right, n).proportion_ci(method="wilson")
        scores[skill] = Score(right / n, interval.low, interval.high, n)
    parts = list(scores.values())
    mean = sum(s.value for s in parts) / len(parts)
    scores["overall"] = Score(
        value=mean,
        low=mean - math.hypot(*(s.value - s.low for s in parts)) / len(parts),
        high=mean + math.hypot(*(s.high - s.value for s in parts)) / len(parts),
        images=sum(s.images for s in parts),
    )
    return scores
