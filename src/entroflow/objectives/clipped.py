"""The clipped policy-gradient objective of PPO and GRPO, with KL to the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from entroflow.component import Component
from entroflow.objectives.transitions import LossWeighting, Transitions, transitions_of
from entroflow.sampling.kernels import kl_divergence
from entroflow.sampling.rollouts import Kept, Rollouts


class Surrogate(Component):
    """What the objectives with a clipped ratio have in common."""

    sampled_with: ClassVar[str] = "live"
    keeps: ClassVar[tuple[Kept, ...]] = ()
    needs_stochastic_steps: ClassVar[bool] = True

    clip_range: float | None = Field(None, gt=0, description="clip range per dimension")
    clip_total: float | None = Field(
        None,
        gt=0,
        description="clip range times D: of the true log-ratio, or what the objective makes of it; "
        "6.6 if neither is given, which is 1e-4 per dimension for latents of 65,536 values",
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL to the reference, per dimension")
    kl_weight: Literal["uniform", "step_length"] = Field(
        "uniform",
        description="step_length: KL times |sigma' - sigma|, as Flow-GRPO's published code does",
    )
    minibatches: Annotated[int, Field(ge=1)] | Literal["by_step"] = Field(
        1,
        description="optimizer steps per pass over the rollouts, on random parts of the rows; "
        "by_step: one for each step of the base grid where transitions start, in their order",
    )
    epochs: int = Field(1, ge=1, description="passes over the rollouts")
    loss_weighting: LossWeighting = Field(
        "sample",
        description="of groups of unequal size: every transition counts the same, or every prompt",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_clip_range(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = [fields.get(name) is not None for name in ("clip_range", "clip_total")]
        if all(given):
            raise ValueError("give clip_range or clip_total, not both")
        return fields if any(given) else {**fields, "clip_total": 6.6}

    @property
    def needs(self) -> tuple[str, ...]:
        """The reference, where there is a KL term."""
        return ("reference",) if self.kl else ()

    @property
    def compares(self) -> tuple[str, ...]:
        """The reference, where there is no KL term: the KL is measured all the same."""
        return () if self.kl else ("reference",)

    def clip(self, dimensions: int) -> float:
        """The clip range per dimension for latents of D values."""
        return self.clip_range or (self.clip_total or 0.0) / dimensions

    def examples(self, rollouts: Rollouts, advantages: Tensor) -> Transitions:
        """The trained transitions; without a KL term, those of advantage 0 are idle."""
        table = transitions_of(rollouts, advantages, self.loss_weighting)
        return table if self.kl else replace(table, idle=table.advantage == 0)

    def terms(
        self, part: Transitions, velocity: Tensor, others: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """See `Objective.terms`."""
        mean = part.mean(velocity)
        density = part.density(mean)
        clip = self.clip(mean[0].numel())
        advantage = part.advantage.to(density)
        ratio = torch.exp(self._log_ratio(part, density, mean))
        clipped = ratio.clamp(1 - clip, 1 + clip)
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
        surrogate = self._step_weight(part).to(surrogate) * surrogate
        terms = {"loss": surrogate, "ratio": ratio, "clipped": ((ratio - 1).abs() > clip).float()}
        if "reference" in others:
            kl = kl_divergence(mean, part.mean(others["reference"]), part.std)
            terms["kl"] = weighted = kl
            if self.kl_weight == "step_length":
                step_length = (part.sigma - part.sigma_next).to(kl)
                terms["weighted_kl"] = weighted = step_length * kl
            terms["loss"] = surrogate + self.kl * weighted
        return terms

    def diagnostics(
        self, first: Mapping[str, Tensor], compared: Mapping[str, Tensor]
    ) -> dict[str, float | None]:
        """How far the ratio is from 1, and the KL to the reference, before the first step.

        Returns:
            `ratio_max_deviation`: the largest |ratio - 1|, 0 in exact arithmetic; None where no
            step was taken. `kl`: the mean per dimension.
        """
        ratio, kl = first.get("ratio"), {**compared, **first}.get("kl")
        return {
            "ratio_max_deviation": None if ratio is None else (ratio - 1).abs().max().item(),
            "kl": None if kl is None else kl.mean().item(),
        }

    def faults(
        self, diagnostics: Mapping[str, float | None], dimensions: int, at_reference: bool
    ) -> list[str]:
        """A ratio or a KL that is not what it must be while the weights are those that sampled."""
        limit = 0.1 * self.clip(dimensions)
        deviation, kl = diagnostics["ratio_max_deviation"], diagnostics["kl"]
        faults = []
        if deviation is not None and deviation > limit:
            faults.append(
                f"before the first step the policy ratio is off by {deviation:.1e}, more than a "
                f"tenth of the clip range ({limit:.1e}). Rollout and training must agree in dtype, "
                "guidance, grid, batch shape and grad mode"
            )
        if at_reference and (kl or 0.0) > limit:
            faults.append(
                f"the KL to the reference is {kl:.1e} before the first step, when it must be 0: "
                "the weights that sampled are the reference's, so the policy computes otherwise "
                "under weights('reference')"
            )
        return faults

    def _log_ratio(self, part: Transitions, density: Tensor, mean: Tensor) -> Tensor:
        """[n] logarithm of what is clipped, as a function of the live weights."""
        raise NotImplementedError

    def _step_weight(self, part: Transitions) -> Tensor:
        """[n] factor of the surrogate; the ratio, its clip range and the KL are without it."""
        raise NotImplementedError


class Clipped(Surrogate):
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)) + beta KL, per transition.

    rho is the ratio of densities per dimension: the true ratio to the power 1/D. Give either
    `clip_range` c per dimension, or `clip_total`, the bound on the true log-ratio, c D.
    """

    type: Literal["clipped"] = "clipped"
    weight: Literal["uniform", "variance"] = Field(
        "uniform",
        description="of the clipped term of a step; variance: 2 std^2, the factor by which the "
        "published density of CPS differs from the true one",
    )

    def _log_ratio(self, part: Transitions, density: Tensor, mean: Tensor) -> Tensor:
        return density - part.log_prob.to(density)

    def _step_weight(self, part: Transitions) -> Tensor:
        if self.weight == "variance":
            return 2 * part.std.square()
        return torch.ones_like(part.std)
