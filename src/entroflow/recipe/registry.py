"""What recipes can hold: their sections, the types of components in each, and what those must have.

A recipe of either kind has a `Layout`, by which it is read; this is the one for image generators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from entroflow.component import Component
from entroflow.recipe.kinds import Kind
from entroflow.settings import Attention, Monitors, Optimizer, Run, Sampling, Scoring

COMPONENTS: dict[str, dict[str, str]] = {
    "policy": {
        "shapes": "entroflow.policies.shapes.policy.ShapesPolicyConfig",
        "sd3": "entroflow.policies.diffusers.sd3.SD3Config",
        "flux": "entroflow.policies.diffusers.flux.FluxConfig",
    },
    "prompts": {
        "shapes": "entroflow.shapes.prompts.ShapesPrompts",
        "text": "entroflow.prompts.TextPrompts",
        "jsonl": "entroflow.prompts.JSONLPrompts",
        "dataset": "entroflow.prompts.DatasetPrompts",
    },
    "allocation": {
        "uniform": "entroflow.allocation.uniform.Uniform",
        "attention_shift": "entroflow.allocation.attention_shift.AttentionShift",
    },
    "exploration": {
        "every_step": "entroflow.exploration.every_step.EveryStep",
        "random_fraction": "entroflow.exploration.random_fraction.RandomFraction",
        "window": "entroflow.exploration.window.Window",
        "merged_steps": "entroflow.exploration.merged_steps.MergedSteps",
        "attention_peaks": "entroflow.exploration.attention_peaks.AttentionPeaks",
    },
    "kernel": {
        "flow_sde": "entroflow.sampling.kernels.FlowSDE",
        "dance_sde": "entroflow.sampling.kernels.DanceSDE",
        "cps": "entroflow.sampling.kernels.CPS",
        "variance_matched": "entroflow.sampling.kernels.VarianceMatched",
        "ode": "entroflow.sampling.kernels.ODE",
    },
    "reward": {
        "shapes": "entroflow.rewards.shapes.ShapesReward",
        "shapes_preference": "entroflow.rewards.preferences.models.ShapesPreference",
        "clip": "entroflow.rewards.clip.CLIPScore",
        "openai": "entroflow.rewards.served_score.ServedScore",
        "jpeg_size": "entroflow.rewards.jpeg_size.JPEGSize",
        "pairwise": "entroflow.rewards.pairwise.Pairwise",
        "mixture": "entroflow.rewards.mixture.Mixture",
    },
    "judge": {
        "openai": "entroflow.rewards.served_judge.ServedJudge",
        "shapes_preference": "entroflow.rewards.preferences.models.ShapesJudge",
    },
    "credit": {
        "terminal": "entroflow.credit.terminal.Terminal",
        "turning_points": "entroflow.credit.turning_points.TurningPoints",
        "shuffled": "entroflow.credit.shuffled.Shuffled",
    },
    "objective": {
        "clipped": "entroflow.objectives.clipped.Clipped",
        "guard": "entroflow.objectives.guard.Guard",
    },
    "evaluation": {
        "shapes": "entroflow.evaluation.shapes.ShapesEvaluation",
        "reward": "entroflow.evaluation.reward.RewardEvaluation",
    },
}
"""Section (or kind of part inside of one) -> type -> where it lives; imported when it is named."""

PROTOCOLS = {
    "policy": ("entroflow.policies.base.PolicyConfig",),
    "prompts": ("entroflow.prompts.PromptSource",),
    "allocation": ("entroflow.allocation.base.Allocation",),
    "exploration": ("entroflow.exploration.base.Exploration",),
    "kernel": ("entroflow.sampling.kernels.Kernel",),
    "reward": ("entroflow.rewards.base.Reward", "entroflow.rewards.base.GroupReward"),
    "judge": ("entroflow.rewards.pairwise.Judge",),
    "credit": ("entroflow.credit.base.Credit",),
    "objective": ("entroflow.objectives.base.Objective",),
    "evaluation": ("entroflow.evaluation.base.Evaluation",),
}
"""Section -> what its components must have: one of these."""

PLAIN: dict[str, type[Component]] = {
    "sampling": Sampling,
    "attention": Attention,
    "scoring": Scoring,
    "optimizer": Optimizer,
    "monitors": Monitors,
    "run": Run,
}
"""Section -> its one component."""
SECTIONS = (
    "policy", "prompts", "allocation", "sampling", "attention", "exploration", "kernel",
    "reward", "scoring", "credit", "objective", "optimizer", "evaluation", "monitors", "run",
)  # fmt: skip
LATER_SECTIONS = ("scoring", "monitors", "attention")
"""Sections that runs of older versions lack; their defaults are what those did."""
SHIPPED = Path(str(resources.files("entroflow") / "recipes"))
"""Folder of the shipped recipes and their prompts."""


@dataclass(frozen=True)
class Layout:
    """Which sections the recipes of one kind have, and what stands in each.

    Attributes:
        kind: what is trained by them.
        shipped: folder of those in the package, and of the files that they name.
        sections: by name, in their order: a component; or components by type, of which one is
            chosen, the first if the recipe does not say; or None, where all keys are those of
            another library and stay as they are.
    """

    kind: Kind
    shipped: Path
    sections: Mapping[str, type[Component] | Mapping[str, str] | None]

    @property
    def recipes(self) -> dict[str, Path]:
        """Name -> file of the recipes in the package."""
        return {path.stem: path for path in sorted(self.shipped.glob("*.yaml"))}

    def default_type(self, section: str) -> str | None:
        """The type that stands in a section where a recipe chooses none; None: there are none."""
        types = self.sections[section]
        return next(iter(types)) if isinstance(types, Mapping) else None


IMAGES = Layout(
    Kind.IMAGES, SHIPPED, {name: PLAIN.get(name) or COMPONENTS[name] for name in SECTIONS}
)
