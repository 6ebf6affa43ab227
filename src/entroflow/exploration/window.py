"""A window of stochastic steps; the other steps follow the ODE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.exploration.base import Request
from entroflow.sampling.plan import Plan, fresh_rows


class Window(Component):
    """Steps `start`, ..., `start + size - 1` are stochastic.

    Fewer random steps mean fewer transitions to train on and a closer tie between noise and reward.
    """

    type: Literal["window"] = "window"
    start: int = Field(0, ge=0, description="first stochastic step")
    size: int = Field(3, ge=1, description="number of stochastic steps")

    def plan(self, request: Request) -> Plan:
        """One row per rollout, each from its own noise.

        Raises:
            InputError: the window reaches the last step.
        """
        std = request.std()
        if self.start + self.size >= len(std):
            raise InputError(
                f"exploration.start + exploration.size is {self.start + self.size}, but must stay "
                f"below sampling.steps ({len(std)}): noise of the last step would stay visible."
            )
        outside = [i for i in range(len(std)) if not self.start <= i < self.start + self.size]
        std[outside] = 0
        return fresh_rows(
            request.prompts, request.sizes, request.first_member, request.base_grid, std
        )
