"""Exploration answers: which steps are random, from which states, over which sigma interval?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from entroflow.errors import InputError
from entroflow.prompts import Prompt
from entroflow.sampling.kernels import Kernel
from entroflow.sampling.plan import Plan


def refuse_undefined(std: Tensor, sigma: Tensor, sigma_next: Tensor) -> None:
    """Refuse steps for which a kernel has no standard deviation; all of the same shape.

    Raises:
        InputError: one is NaN.
    """
    refused = std.isnan()
    if refused.any():
        raise InputError(
            f"the kernel has no stochastic step from sigma {sigma[refused][0]:.3g} to "
            f"{sigma_next[refused][0]:.3g}; keep the exploration away from it, or see what the "
            "kernel's keys allow (cps: floor)."
        )


@dataclass(frozen=True)
class Request:
    """What an exploration is asked to plan.

    Attributes:
        prompts: the P prompts.
        sizes: [P] rollouts per prompt in this round.
        first_member: [P] rollouts per prompt in earlier rounds.
        base_grid: [T + 1] sigmas.
        kernel: gives the standard deviations.
        seed, iteration: part of the address of random choices.
        attention_entropy: [T] of the steps of the base grid, NaN where it is not known; for parts
            that say `needs_attention`.
    """

    prompts: Sequence[Prompt]
    sizes: Tensor
    first_member: Tensor
    base_grid: Tensor
    kernel: Kernel
    seed: int
    iteration: int
    attention_entropy: Tensor | None = None

    def std(self) -> Tensor:
        """[T] standard deviation that the kernel gives each step of the base grid."""
        return self.kernel.std(self.base_grid[:-1], self.base_grid[1:], self.base_grid)

    def std_but_last(self) -> Tensor:
        """[T] the same, but 0 for the last step, whose noise would stay visible."""
        std = self.std()
        std[-1] = 0
        return std


class Exploration(Protocol):
    """Makes the plan of one round.

    One with a true attribute `needs_attention` is told the attention entropy of every step.
    """

    def plan(self, request: Request) -> Plan:
        """The rows to sample."""
        ...
