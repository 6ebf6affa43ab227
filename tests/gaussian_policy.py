"""A policy whose every distribution is known: the exact flow between noise and a Gaussian.

The data are N(mean + shift, variance), value by value, so a state at sigma t is Gaussian with mean
(1 - t)(mean + shift) and variance V = (1 - t)^2 variance + t^2, and the exact velocity
E[noise - data | x] is elementwise and affine in x. With variance 0 the data are a single point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entroflow.policies.base import Condition, WeightSets
from entroflow.sampling.grid import shifted_grid


class GaussianPolicy:
    """The policy of the module's docstring; its one parameter is the learnable mean `shift`.

    Everything is float64, whatever the states are stored in. All prompts have the same data, and
    guidance changes nothing.

    Attributes:
        mean, variance: of the data at shift 0.
        shift: [*latent_shape] parameter.
        grid_shift: of the sampling grid.
    """

    def __init__(
        self,
        mean: float = 0.0,
        variance: float = 1.0,
        latent_shape: tuple[int, ...] = (2,),
        grid_shift: float = 1.0,
    ) -> None:
        self.latent_shape = latent_shape
        self.mean, self.variance, self.grid_shift = mean, variance, grid_shift
        self.shift = torch.nn.Parameter(torch.zeros(latent_shape, dtype=torch.float64))
        self.weights = WeightSets({"shift": self.shift})

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The mean of the data at shift 0, [P, *latent_shape]."""
        mean = torch.full((len(prompts), *self.latent_shape), self.mean, dtype=torch.float64)
        return Condition({"mean": mean})

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition, guidance: float) -> Tensor:
        """kappa x - t (mean + shift) / V with kappa = (t - (1 - t) variance) / V."""
        t = sigma.double().reshape(-1, *[1] * len(self.latent_shape))
        V = (1 - t) ** 2 * self.variance + t**2
        kappa = (t - (1 - t) * self.variance) / V
        return kappa * x.double() - t / V * (cond.tensors["mean"] + self.shift)

    def decode(self, latents: Tensor) -> Tensor:
        """The values of a latent as an image of one channel and one line: [B, 1, 1, D]."""
        return latents.reshape(len(latents), 1, 1, -1)

    def sigmas(self, steps: int) -> Tensor:
        """[steps + 1] shifted grid."""
        return shifted_grid(steps, self.grid_shift)

    def evaluations(self, guidance: float) -> int:
        """Always one."""
        return 1
