"""Flow-GRPO: every step explores but the last."""

from __future__ import annotations

from typing import Literal

from entroflow.component import Component
from entroflow.exploration.base import Request
from entroflow.sampling.plan import Plan, fresh_rows


class EveryStep(Component):
    """All steps are stochastic except the last, whose noise would stay visible (2505.05470)."""

    type: Literal["every_step"] = "every_step"

    def plan(self, request: Request) -> Plan:
        """One row per rollout, each from its own noise."""
        std = request.std()
        std[-1] = 0
        return fresh_rows(
            request.prompts, request.sizes, request.first_member, request.base_grid, std
        )
