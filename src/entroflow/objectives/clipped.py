"""The clipped policy-gradient objective of PPO and GRPO, with KL to the reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from entroflow.component import Component
from entroflow.sampling.kernels import kl_divergence
from entroflow.sampling.rollouts import LossWeighting, Transitions


class Surrogate(Component):
    """What the objectives with a clipped ratio have in common."""

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
    def needs_reference(self) -> bool:
        """Whether there is a KL term."""
        return self.kl > 0

    @property
    def skips_zero_advantage(self) -> bool:
        """Whether there is no KL term, which pulls whatever the advantage."""
        return self.kl == 0

    def clip(self, dimensions: int) -> float:
        """The clip range per dimension for latents of D values."""
        return self.clip_range or (self.clip_total or 0.0) / dimensions

    def terms(
        self,
        transitions: Transitions,
        log_prob: Tensor,
        mean: Tensor,
        reference_mean: Tensor | None,
    ) -> dict[str, Tensor]:
        """See `Objective.terms`."""
        clip = self.clip(mean[0].numel())
        advantage = transitions.advantage.to(log_prob)
        ratio = torch.exp(self._log_ratio(transitions, log_prob, mean))
        clipped = ratio.clamp(1 - clip, 1 + clip)
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped)
        surrogate = self._step_weight(transitions).to(surrogate) * surrogate
        terms = {"loss": surrogate, "ratio": ratio, "clipped": ((ratio - 1).abs() > clip).float()}
        if reference_mean is not None:
            kl = kl_divergence(mean, reference_mean, transitions.std)
            terms["kl"] = weighted = kl
            if self.kl_weight == "step_length":
                step_length = (transitions.sigma - transitions.sigma_next).to(kl)
                terms["weighted_kl"] = weighted = step_length * kl
            terms["loss"] = surrogate + self.kl * weighted
        return terms

    def _log_ratio(self, transitions: Transitions, log_prob: Tensor, mean: Tensor) -> Tensor:
        """[n] logarithm of what is clipped, as a function of the live weights."""
        raise NotImplementedError

    def _step_weight(self, transitions: Transitions) -> Tensor:
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

    @property
    def needs_old_mean(self) -> bool:
        """False: the ratio needs log-probabilities only."""
        return False

    def _log_ratio(self, transitions: Transitions, log_prob: Tensor, mean: Tensor) -> Tensor:
        return log_prob - transitions.log_prob.to(log_prob)

    def _step_weight(self, transitions: Transitions) -> Tensor:
        if self.weight == "variance":
            return 2 * transitions.std.square()
        return torch.ones_like(transitions.std)
