"""DanceGRPO: every step explores but the last, and every rollout trains a random part of them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.exploration.base import Request
from entroflow.noise import Stream, generator
from entroflow.sampling.plan import Plan, fresh_rows


class RandomFraction(Component):
    """All steps but the last are stochastic; each row trains on its own choice of them.

    DanceGRPO (2505.07818) does so for 60% of the steps, rounded down, from one initial noise per
    prompt. Its last step is a jump to the predicted data, as here, without noise.
    """

    type: Literal["random_fraction"] = "random_fraction"
    fraction: float = Field(0.6, gt=0, le=1, description="share of the stochastic steps trained on")
    share_noise: bool = Field(True, description="whether a group starts from one initial noise")

    def plan(self, request: Request) -> Plan:
        """One row per rollout.

        Raises:
            InputError: the fraction is less than one step.
        """
        std = request.std_but_last()
        stochastic = len(std) - 1
        count = int(self.fraction * stochastic)
        if count < 1:
            raise InputError(
                f"exploration.fraction is {self.fraction:g} of {stochastic} steps: less than one."
            )
        plan = fresh_rows(
            request.prompts, request.sizes, request.first_member, request.base_grid, std,
            share_noise=self.share_noise,
        )  # fmt: skip
        trained = torch.zeros_like(plan.trained)
        for row, (group, member) in enumerate(
            zip(plan.group.tolist(), plan.member.tolist(), strict=True)
        ):
            source = generator(request.seed, Stream.WINDOW, request.iteration, group, member)
            trained[row, torch.from_numpy(source.permutation(stochastic)[:count])] = True
        return plan.training(trained)
