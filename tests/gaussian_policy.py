"""A policy whose every distribution is known: the exact flow between noise and a Gaussian.

The data are N(mean + shift, variance), value by value, so a state at sigma t is Gaussian with mean
(1 - t)(mean + shift) and variance V = (1 - t)^2 variance + t^2, and the exact velocity
E[noise - data | x] is elementwise and affine in x. With variance 0 the data are a single point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entroflow.policies.attention import show
from entroflow.policies.base import Condition, WeightSets
from entroflow.policies.grid import shifted_grid


class GaussianPolicy:
    """The policy of the module's docstring; its one parameter is the learnable `shift`, at first 0.

    Everything is float64, whatever the states are stored in. Guidance changes nothing. Attention
    has no part in the velocity, but some is shown (unless `shows_attention` is false): every value
    looks at the velocity's values, and at a text token of zeros.

    Attributes:
        mean, variance: of the data at shift 0.
        offsets: what is added to the mean for some prompts.
        shift: [*latent_shape] parameter.
        grid_shift: of the sampling grid.
    """

    shows_attention = True

    def __init__(
        self,
        mean: float = 0.0,
        variance: float = 1.0,
        latent_shape: tuple[int, ...] = (2,),
        grid_shift: float = 1.0,
        offsets: dict[str, float] | None = None,
    ) -> None:
        self.latent_shape = latent_shape
        self.mean, self.variance, self.grid_shift = mean, variance, grid_shift
        self.offsets = offsets or {}
        self.shift = torch.nn.Parameter(torch.zeros(latent_shape, dtype=torch.float64))
        self.weights = WeightSets({"shift": self.shift})
        self.weights.keep("reference")

    def encode(self, prompts: list[str]) -> Condition:
        """The mean of the data at shift 0: [P], as [P, 1, ...]."""
        means = [self.mean + self.offsets.get(prompt, 0.0) for prompt in prompts]
        column = torch.tensor(means, dtype=torch.float64)
        return Condition({"mean": column.reshape(-1, *[1] * len(self.latent_shape))})

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition, guidance: float) -> Tensor:
        """kappa x - t (mean + shift) / V with kappa = (t - (1 - t) variance) / V."""
        t = sigma.double().reshape(-1, *[1] * len(self.latent_shape))
        V = (1 - t) ** 2 * self.variance + t**2
        kappa = (t - (1 - t) * self.variance) / V
        v = kappa * x.double() - t / V * (cond.tensors["mean"] + self.shift)
        if self.shows_attention:
            tokens = v.detach().reshape(len(x), 1, -1, 1)
            show(0, tokens, torch.nn.functional.pad(tokens, (0, 0, 1, 0)), slice(0, 1))
        return v

    def decode(self, latents: Tensor) -> Tensor:
        """The values of a latent as an image of one channel and one line: [B, 1, 1, D]."""
        return latents.reshape(len(latents), 1, 1, -1)

    def sigmas(self, steps: int) -> Tensor:
        """[steps + 1] shifted grid."""
        return shifted_grid(steps, self.grid_shift)

    def evaluations(self, guidance: float) -> int:
        """Always one."""
        return 1
