"""Objectives answer: which gradient follows?"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from entroflow.sampling.rollouts import LossWeighting, Transitions


class Objective(Protocol):
    """A pure loss on transitions, and what it needs to be computed.

    One with an attribute `loss_weighting` says how transitions of unequal groups share the loss,
    see `transitions_of`.
    """

    needs_old_mean: bool
    """Whether the means under the sampling policy must be kept."""

    needs_reference: bool
    """Whether the mean under the reference weights must be computed."""

    skips_zero_advantage: bool
    """Whether the loss of a transition with advantage 0 is exactly 0: no pass is spent on it."""

    minibatches: int | Literal["by_step"]
    """Parts into which the transitions are dealt at random, or one for each step they start at."""

    epochs: int

    def clip(self, dimensions: int) -> float:
        """The clip range per dimension for latents of D values."""
        ...

    def terms(
        self,
        transitions: Transitions,
        log_prob: Tensor,
        mean: Tensor,
        reference_mean: Tensor | None,
    ) -> dict[str, Tensor]:
        """Terms [n] per transition; `loss` is differentiated, the others are for the log.

        Args:
            transitions: n transitions.
            log_prob: [n] log-density per dimension under the live weights.
            mean, reference_mean: [n, *latent] under the live and the reference weights.
        """
        ...


def loss_weighting(objective: Objective) -> LossWeighting:
    """How transitions of unequal groups share the loss; those of an objective that says nothing,
    all alike.
    """
    chosen: LossWeighting = getattr(objective, "loss_weighting", "sample")
    return chosen
