"""Transition kernels: the Gaussian from which the next state is drawn.

A kernel is two pure functions. `std` is fixed when the plan is made; `mean` is evaluated at every
step. A standard deviation of 0 makes any kernel the Euler step x + (sigma' - sigma) v.
Log-density, KL and entropy follow from (mean, std) and stand here once for all kernels; each is
divided by D, the number of values per latent.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Kernel(Protocol):
    """A transition kernel."""

    def std(self, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor) -> Tensor:
        """Standard deviation of a stochastic step; the arguments but `base_grid` broadcast."""
        ...

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """Mean of the next state [B, *latent]; `sigma`, `sigma_next` and `std` are [B]."""
        ...


class FlowSDE(Component):
    """The marginal-preserving SDE of Flow-GRPO (2505.05470, eq. 12), one Euler-Maruyama step.

    With diffusion a sqrt(t / (1 - t)): std^2 = a^2 t |dt| / (1 - t), and the mean is
    x + dt [v + std^2 / (2 t |dt|) (x + (1 - t) v)]. At t = 1 the denominator 1 - t is replaced by
    that of the base grid's second point, so the first step has std = a on every grid.
    """

    type: Literal["flow_sde"] = "flow_sde"
    noise_level: float = Field(0.7, gt=0, description="a, the scale of the injected noise")

    def std(self, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor) -> Tensor:
        """Broadcasts; see the class."""
        room = torch.maximum(1 - sigma, 1 - base_grid[1])
        return self.noise_level * torch.sqrt(sigma * (sigma - sigma_next) / room)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """See the class; std = 0 gives the Euler step."""
        sigma, sigma_next, std = (beside(part, x) for part in (sigma, sigma_next, std))
        dt = sigma_next - sigma
        pull = torch.where(std > 0, std.square() / (2 * sigma), 0.0)
        return x + dt * v - pull * (x + (1 - sigma) * v)


class ODE(Component):
    """No noise at all: Euler steps of the probability-flow ODE."""

    type: Literal["ode"] = "ode"

    def std(self, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros(torch.broadcast_shapes(sigma.shape, sigma_next.shape), dtype=sigma.dtype)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """x + (sigma_next - sigma) v."""
        return x + beside(sigma_next - sigma, x) * v


def beside(per_row: Tensor, x: Tensor) -> Tensor:
    """Shape [B] as [B, 1, ...] with the dtype and device of x, so that it multiplies latents."""
    return per_row.to(x).reshape(-1, *[1] * (x.dim() - 1))


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density of `x_next` divided by D: [B]. `std` [B] must be positive."""
    scaled = (x_next - mean) / beside(std, mean)
    return -0.5 * scaled.square().flatten(1).mean(dim=1) - std.to(mean).log() - LOG_SQRT_2PI


def kl_divergence(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """KL between two Gaussians of equal std, divided by D: [B]."""
    difference = (mean - other_mean) / beside(std, mean)
    return 0.5 * difference.square().flatten(1).mean(dim=1)


def entropy(std: Tensor) -> Tensor:
    """Differential entropy of the step divided by D, in nats; same shape as `std`."""
    return std.log() + LOG_SQRT_2PI + 0.5
