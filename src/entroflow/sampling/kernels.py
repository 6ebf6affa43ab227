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
        """Standard deviation of a stochastic step; the arguments but `base_grid` broadcast.

        NaN where the kernel has no such step, and a plan must not ask for one.
        """
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
        return flow_sde_std(self.noise_level, sigma, sigma_next, base_grid)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """See the class; std = 0 gives the Euler step."""
        return score_corrected(x, v, sigma, sigma_next, std)


class DanceSDE(Component):
    """The SDE of DanceGRPO (2505.07818): constant diffusion eta, so std = eta sqrt(|dt|).

    The mean is that of Flow-SDE for this std: x + dt [v + eta^2 / (2 t) (x + (1 - t) v)].
    """

    type: Literal["dance_sde"] = "dance_sde"
    noise_level: float = Field(0.3, gt=0, description="eta, the diffusion, the same at every sigma")

    def std(self, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor) -> Tensor:
        """Broadcasts; see the class."""
        return self.noise_level * torch.sqrt(sigma - sigma_next)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """See the class; std = 0 gives the Euler step."""
        return score_corrected(x, v, sigma, sigma_next, std)


class CPS(Component):
    """Coefficient-preserving sampling (Flow-CPS, 2509.05952): std = t' sin(eta pi / 2).

    The mean is (1 - t') x0 + t' cos(eta pi / 2) x1 with the predictions x0 = x - t v of the data
    and x1 = x + (1 - t) v of the noise. For data at one point the marginals are exact at any noise
    level; in general they are not, however fine the grid.
    """

    type: Literal["cps"] = "cps"
    noise_level: float = Field(
        0.8, gt=0, le=1, description="eta; sin(eta pi / 2) of the noise is drawn anew"
    )
    floor: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="lowest sigma after a stochastic step: towards 0 the density becomes singular; "
        "0 where objective.weight is variance, which makes up for it",
    )

    def std(self, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor) -> Tensor:
        """Broadcasts; NaN between 0 and `floor`."""
        std = sigma_next * math.sin(self.noise_level * math.pi / 2) + 0 * sigma
        return std.masked_fill((sigma_next > 0) & (sigma_next < self.floor), math.nan)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """See the class; std = 0 gives the Euler step."""
        return coefficient_preserving(x, v, sigma, sigma_next, std)


class VarianceMatched(Component):
    """Flow-SDE's std, at most t', with the mean of CPS: the same entropy and no excess noise.

    A step of Flow-SDE adds noise beyond what sigma stands for, quadratically in its length, which
    shows in merged steps; here data at one point keep exact marginals at any length.
    """

    type: Literal["variance_matched"] = "variance_matched"
    noise_level: float = Field(0.7, gt=0, description="a of Flow-SDE")

    def std(self, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor) -> Tensor:
        """Broadcasts; see the class."""
        return torch.minimum(
            flow_sde_std(self.noise_level, sigma, sigma_next, base_grid), sigma_next
        )

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """See the class; std = 0 gives the Euler step."""
        return coefficient_preserving(x, v, sigma, sigma_next, std)


class ODE(Component):
    """No noise at all: Euler steps of the probability-flow ODE."""

    type: Literal["ode"] = "ode"

    def std(self, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros(torch.broadcast_shapes(sigma.shape, sigma_next.shape), dtype=sigma.dtype)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
        """x + (sigma_next - sigma) v."""
        return x + beside(sigma_next - sigma, x) * v


def flow_sde_std(
    noise_level: float, sigma: Tensor, sigma_next: Tensor, base_grid: Tensor
) -> Tensor:
    """a sqrt(t |dt| / (1 - t)); broadcasts, see `FlowSDE`."""
    room = torch.maximum(1 - sigma, 1 - base_grid[1])
    return noise_level * torch.sqrt(sigma * (sigma - sigma_next) / room)


def score_corrected(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Tensor:
    """x + dt v + std^2 / 2 score, with the score -(x + (1 - t) v) / t: one Euler-Maruyama step."""
    sigma, sigma_next, std = (beside(part, x) for part in (sigma, sigma_next, std))
    dt = sigma_next - sigma
    pull = torch.where(std > 0, std.square() / (2 * sigma), 0.0)
    return x + dt * v - pull * (x + (1 - sigma) * v)


def coefficient_preserving(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, std: Tensor
) -> Tensor:
    """(1 - t') x0 + sqrt(t'^2 - std^2) x1: what is drawn anew leaves the predicted noise.

    Written as the Euler step less the noise that is taken back, so that std = 0 gives it exactly.
    """
    sigma, sigma_next, std = (beside(part, x) for part in (sigma, sigma_next, std))
    kept = torch.sqrt(torch.clamp(sigma_next.square() - std.square(), min=0))
    # t' - sqrt(t'^2 - std^2), without the cancellation where std is small.
    taken = torch.where(std > 0, std.square() / (sigma_next + kept), 0.0)
    return x + (sigma_next - sigma) * v - taken * (x + (1 - sigma) * v)


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
