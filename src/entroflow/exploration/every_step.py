"""Flow-GRPO: every step explores but the last."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from entroflow.component import Component
from entroflow.exploration.base import Request
from entroflow.sampling.plan import Plan, fresh_rows


class EveryStep(Component):
    """All steps are stochastic except the last, whose noise would stay visible (2505.05470)."""

    type: Literal["every_step"] = "every_step"
    share_noise: bool = Field(False, description="whether a group starts from one initial noise")

    def plan(self, request: Request) -> Plan:
        """One row per rollout."""
        return fresh_rows(
            request.prompts, request.sizes, request.first_member, request.base_grid,
            request.std_but_last(), share_noise=self.share_noise,
        )  # fmt: skip
