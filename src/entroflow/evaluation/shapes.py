"""Evaluation on the shapes world: scores by skill, and what the reward can't see."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import Literal

import torch
from pydantic import Field
from scipy import stats

from entroflow.evaluation.base import Evaluated, HeldOutEvaluation, SkillScore
from entroflow.ledger import Ledger
from entroflow.policies.base import Policy
from entroflow.prompts import Prompt
from entroflow.rewards.base import Reward
from entroflow.rewards.base import score as score_rollouts
from entroflow.sampling.kernels import ODE
from entroflow.sampling.noise import Stream
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from entroflow.shapes import blind_spots, grammar
from entroflow.shapes.scoring import score

EXAMPLES_PER_SKILL = 4


class ShapesEvaluation(HeldOutEvaluation):
    """ODE samples of held-out prompts, the same prompts and noise every time."""

    type: Literal["shapes"] = "shapes"
    prompts_per_skill: int = Field(
        16, ge=1, description="most captions per skill; images are spread evenly over them"
    )

    def run(
        self,
        policy: Policy,
        *,
        seed: int,
        batch_size: int,
        reward: Reward | None = None,
        ledger: Ledger | None = None,
    ) -> Evaluated:
        """See `Evaluation.run`."""
        specs_by_skill = {
            skill: held_out(skill, self.split, self.prompts_per_skill) for skill in grammar.SKILLS
        }
        specs = [spec for chosen in specs_by_skill.values() for spec in chosen]
        sizes = torch.cat([_shares(self.images_per_skill, len(c)) for c in specs_by_skill.values()])
        prompts = [Prompt(grammar.text(spec)) for spec in specs]
        grid = policy.sigmas(self.steps)
        none = torch.zeros(len(prompts), dtype=torch.long)
        kernel = ODE()
        std = kernel.std(grid[:-1], grid[1:], grid)
        rollouts = Rollouts.empty(fresh_rows(prompts, sizes, none, grid, std), policy.latent_shape)
        finished = sample(
            policy, kernel, rollouts, policy.encode(rollouts.plan.texts),
            seed=seed, iteration=0, guidance=self.guidance, batch_size=batch_size,
            initial=Stream.EVALUATION, ledger=ledger,
        )  # fmt: skip
        rewards = torch.full((rollouts.plan.rows,), torch.nan)
        if reward is not None:
            rewards = score_rollouts(reward, rollouts, finished, ledger).values
        for _ in finished:
            pass
        images, prompt = rollouts.images, rollouts.plan.prompt
        assert images is not None
        verdict = score(images, [specs[p] for p in prompt.tolist()])
        skills = [specs[p].skill for p in prompt.tolist()]
        examples = _examples(skills)
        return Evaluated(
            scores=_by_skill(verdict.strict.double(), verdict.graded.double(), skills),
            reward=rewards.nanmean().item(),
            monitors={
                "diversity": blind_spots.diversity(images, prompt),
                "texture": blind_spots.background_texture(images).nanmean().item(),
                "contrast": blind_spots.contrast(images).nanmean().item(),
            },
            images=images[examples],
            captions=[prompts[p].text for p in prompt[examples].tolist()],
            passed=verdict.strict[examples].tolist(),
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


def _shares(total: int, parts: int) -> torch.Tensor:
    """`total` images over `parts` prompts, as even as can be."""
    return torch.tensor([total // parts + (i < total % parts) for i in range(parts)])


def _examples(skills: list[str]) -> list[int]:
    """Rows to show: of each skill a few, spread evenly."""
    shown = []
    for skill in grammar.SKILLS:
        rows = [row for row, name in enumerate(skills) if name == skill]
        stride = max(1, len(rows) // EXAMPLES_PER_SKILL)
        shown += rows[::stride][:EXAMPLES_PER_SKILL]
    return shown


def _by_skill(
    strict: torch.Tensor, graded: torch.Tensor, skills: list[str]
) -> dict[str, SkillScore]:
    """Scores by skill with Wilson intervals, and overall: the mean of the skills.

    The interval of the mean combines those of the skills (MOVER, Zou & Donner, 2008), so it does
    not collapse at 0 or 1. All intervals are over images and noise; the prompts are taken as given.
    """
    scores = {}
    for skill in grammar.SKILLS:
        rows = torch.tensor([name == skill for name in skills])
        n, right = int(rows.sum()), int(strict[rows].sum())
        interval = stats.binomtest(right, n).proportion_ci(method="wilson")
        mean = graded[rows].mean().item()
        scores[skill] = SkillScore(right / n, interval.low, interval.high, mean, n)
    parts = list(scores.values())
    mean = sum(s.strict for s in parts) / len(parts)
    scores["overall"] = SkillScore(
        strict=mean,
        low=mean - math.hypot(*(s.strict - s.low for s in parts)) / len(parts),
        high=mean + math.hypot(*(s.high - s.strict for s in parts)) / len(parts),
        graded=sum(s.graded for s in parts) / len(parts),
        images=sum(s.images for s in parts),
    )
    return scores
