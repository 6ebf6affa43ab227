"""GRPO-Guard: a ratio that is centred and has the same scale at every sigma."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from entroflow.objectives.clipped import Surrogate
from entroflow.objectives.transitions import Transitions
from entroflow.sampling.kernels import kl_divergence
from entroflow.sampling.rollouts import Kept


class Guard(Surrogate):
    """The clipped objective with log rho = (log-ratio + b) std, over the length of the step.

    The plain log-ratio of densities is below 0 on average, by b = mean (mu - mu_old)^2 / (2 std^2),
    so its clip range favours one side; and its spread grows as std falls, so one clip range can't
    suit all steps. With b added and std multiplied (2510.22319), log rho is the mean over the
    latent of (mu - mu_old) eps, with eps the noise that was drawn; b is that of the transition.

    `clip_range` c bounds log rho, in units of the latent; `clip_total` is c D. At rho = 1 the
    gradient is that of the clipped objective with the weight std / |sigma' - sigma| per step.
    """

    type: Literal["guard"] = "guard"

    keeps: ClassVar[tuple[Kept, ...]] = ("means",)

    def _log_ratio(self, part: Transitions, density: Tensor, mean: Tensor) -> Tensor:
        assert part.old_mean is not None
        shift = kl_divergence(mean, part.old_mean.to(mean), part.std)
        centred = density - part.log_prob.to(density) + shift
        return centred * part.std.to(centred)

    def _step_weight(self, part: Transitions) -> Tensor:
        return 1 / (part.sigma - part.sigma_next)
