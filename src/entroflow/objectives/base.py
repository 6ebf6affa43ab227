"""Objectives answer: which gradient follows?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

from torch import Tensor

from entroflow.sampling.rollouts import Kept, Rollouts


@dataclass(frozen=True)
class Examples:
    """N states at which an update asks for the velocity, whatever made them.

    An objective derives its own record with the columns that its terms need.

    Attributes:
        states: [M, *latent] pool.
        state: [N] position in the pool. Examples of one state have the same sigma and prompt: one
            network pass serves them all, and they share a minibatch.
        sigma: [N].
        prompt: [N] index of the prompt.
        row: [N] examples of one row share a minibatch.
        step: [N] step of the base grid: of an update by steps, and of the diagnostics.
        weight: [N]; non-negative, sums to 1 over the whole update.
        idle: [N] bool, whose term is exactly zero whatever the velocity: no pass is spent on them.
    """

    states: Tensor
    state: Tensor
    sigma: Tensor
    prompt: Tensor
    row: Tensor
    step: Tensor
    weight: Tensor
    idle: Tensor

    def __len__(self) -> int:
        return len(self.state)

    def take(self, index: Tensor) -> Self:
        """Some of the examples; the pool stays whole."""
        columns = {
            name: value[index]
            for name, value in vars(self).items()
            if name != "states" and isinstance(value, Tensor)
        }
        return replace(self, **columns)


class Objective(Protocol):
    """Makes the examples of an update out of rollouts, and a loss of the velocities there.

    Derive from this class, and state only what differs from the defaults.
    """

    sampled_with: str = "live"
    """The weights that roll out: live, ema or reference."""

    needs: tuple[str, ...] = ()
    """Other weights whose velocity the terms take, as ("reference",)."""

    compares: tuple[str, ...] = ()
    """Other weights whose velocity is asked for at a few examples, for the diagnostics alone."""

    keeps: tuple[Kept, ...] = ()
    """What rollouts keep for the examples beside the states around trained steps."""

    needs_stochastic_steps: bool = False
    """Whether there is nothing to learn from where every step is deterministic."""

    minibatches: int | Literal["by_step"] = 1
    """Parts into which the rows are dealt at random, or one for each step that examples are of."""

    epochs: int = 1
    """Passes over the examples."""

    def examples(self, rollouts: Rollouts, advantages: Tensor) -> Examples:
        """The examples of an update.

        Args:
            rollouts: as sampled.
            advantages: [B, S] of every step; NaN where the reward failed.
        """
        ...

    def terms(
        self, part: Examples, velocity: Tensor, others: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Terms [n] per example; `loss` is differentiated, the others are for the log.

        Args:
            part: n examples.
            velocity: [n, *latent] at their states under the live weights.
            others: the same under those of `needs` (or of `compares`), by name.
        """
        ...

    def clip(self, dimensions: int) -> float | None:
        """The clip range per dimension for latents of D values, if anything is clipped."""
        return None

    def diagnostics(
        self, first: Mapping[str, Tensor], compared: Mapping[str, Tensor]
    ) -> dict[str, float | None]:
        """What the terms say before the first optimizer step, by name of the metric.

        Args:
            first: terms of the examples of the first optimizer step; none where none was taken.
            compared: terms of a few examples, where `compares` asks for them.
        """
        return {}

    def faults(
        self, diagnostics: Mapping[str, float | None], dimensions: int, at_reference: bool
    ) -> list[str]:
        """What the diagnostics show to be wrong, a sentence each.

        Args:
            dimensions: D values of a latent.
            at_reference: whether the trained weights were still those of the reference.
        """
        return []
