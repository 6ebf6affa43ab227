"""AEGPO's local level: the steps explore at which attention is most spread out."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.exploration.base import Request, refuse_undefined
from entroflow.exploration.peaks import highest, prominent
from entroflow.sampling.plan import Plan, fresh_rows


class PeakChoice(Component):
    """Chooses steps by the curve of attention entropy over the grid."""

    count: int = Field(4, ge=1, description="how many steps are chosen")
    select: Literal["topk", "peaks"] = Field(
        "topk",
        description="topk: where the curve is highest; peaks: its most prominent local maxima, and "
        "the highest others where they are too few",
    )
    separation: int = Field(
        1,
        ge=1,
        description="of select: peaks; least distance between two steps, where enough are left",
    )
    exclude: tuple[int, ...] = Field(
        (), description="steps that are never chosen; the last of the grid never is"
    )

    def eligible(self, request: Request) -> Tensor:
        """[T] bool: the steps that may be chosen.

        Raises:
            InputError: `exclude` names no step, or leaves none.
        """
        T = len(request.base_grid) - 1
        wrong = [step for step in self.exclude if not 0 <= step < T]
        if wrong:
            raise InputError(
                f"exploration.exclude names step {wrong[0]}, but the steps are 0 to {T - 1}."
            )
        eligible = torch.arange(T) < T - 1
        eligible[list(self.exclude)] = False
        if not eligible.any():
            raise InputError("exploration.exclude leaves no step to explore at.")
        return eligible

    def chosen(self, request: Request) -> Tensor:
        """Rising step numbers.

        Raises:
            InputError: see `eligible`.
        """
        eligible, curve = self.eligible(request), request.attention_entropy
        assert curve is not None
        curve = curve.nan_to_num(-torch.inf)
        if self.select == "topk":
            return highest(curve, eligible, self.count)
        return prominent(curve, eligible, self.count, self.separation)


class AttentionPeaks(PeakChoice):
    """Stochastic are the steps at which attention entropy is highest; the others follow the ODE.

    AEGPO (2602.06825). The curve is a moving average over iterations, the same for all prompts,
    that begins with the reference model's; see the section `attention`. With `count` at least the
    number of steps, this is every_step.
    """

    type: Literal["attention_peaks"] = "attention_peaks"
    share_noise: bool = Field(False, description="whether a group starts from one initial noise")

    needs_attention: ClassVar[bool] = True

    def plan(self, request: Request) -> Plan:
        """One row per rollout.

        Raises:
            InputError: see `PeakChoice.eligible`; the kernel lacks a step that may be chosen.
        """
        std = request.std_but_last()
        grid, eligible = request.base_grid, self.eligible(request)
        # All steps of a run at once: peaks that move must not end it halfway.
        refuse_undefined(std[eligible], grid[:-1][eligible], grid[1:][eligible])
        inside = torch.zeros(len(std), dtype=torch.bool)
        inside[self.chosen(request)] = True
        return fresh_rows(
            request.prompts, request.sizes, request.first_member, request.base_grid,
            torch.where(inside, std, 0.0), share_noise=self.share_noise,
        )  # fmt: skip
