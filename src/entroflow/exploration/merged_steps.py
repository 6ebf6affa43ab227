"""E-GRPO: one stochastic step per rollout, made long enough to matter; all else is the ODE."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from entroflow.errors import InputError
from entroflow.exploration.attention_peaks import PeakChoice
from entroflow.exploration.base import Request
from entroflow.exploration.step_entropy import Scale, merge_length
from entroflow.sampling.kernels import FlowSDE, VarianceMatched
from entroflow.sampling.plan import Plan, Role, fresh_rows, with_children

Part = Literal["first_quarter", "first_half", "second_half", "all"]


class MergedSteps(PeakChoice):
    """Branches off one deterministic trajectory per prompt, each by one stochastic step.

    E-GRPO (2601.00423). A prompt has one initial noise and one anchor that follows the ODE. At
    every start, the rollouts of its group leave the anchor's state by one stochastic step over
    `merge` steps of the grid, and follow the ODE from there. Their rewards are compared within
    (prompt, start), where they share state and velocity, so that only this one step can make them
    differ. The number of rollouts that the allocation gives a prompt is that of each of its groups.
    """

    type: Literal["merged_steps"] = "merged_steps"
    starts: Part | Literal["attention_peaks"] | tuple[int, ...] = Field(
        "first_half",
        description="where rollouts branch off: a part of the steps, their indices, or where "
        "attention is most spread out, by count, select, separation and exclude",
    )
    merge: Literal["entropy"] | int | tuple[int, ...] = Field(
        "entropy",
        description="steps that make one stochastic step: as many as reach tau, or a number, or "
        "one for each start; 1 merges none",
    )
    tau: float = Field(2.2, description="of merge: entropy; least entropy of a stochastic step")
    out_of_reach: Literal["refuse", "highest"] = Field(
        "refuse",
        description="of merge: entropy; what is done at a start from which tau can't be reached: "
        "an error, or the step of highest entropy that ends before the last",
    )
    scale: Scale = Field(
        "perplexity", description="of tau, per value: e^h, e^(2h), 2h, or h in nats"
    )
    overlap: bool = Field(
        True, description="false: the next start is where the last merged step ended"
    )

    @model_validator(mode="after")
    def _chooses_only_by_attention(self) -> Self:
        if self.starts != "attention_peaks":
            for key, field in PeakChoice.model_fields.items():
                if getattr(self, key) != field.default:
                    raise ValueError(
                        f"{key} chooses among starts by attention: set starts: attention_peaks, or "
                        f"leave {key} out"
                    )
        return self

    @property
    def needs_attention(self) -> bool:
        """Whether starts are chosen by it."""
        return self.starts == "attention_peaks"

    def steps(self, request: Request) -> list[tuple[int, int]]:
        """Start and end of every stochastic step, as indices into the base grid.

        Raises:
            InputError: a start or a length is outside the grid, tau is out of reach, or the kernel
                does not gain entropy by merging.
        """
        T = len(request.base_grid) - 1
        starts = self._peaks(request) if self.starts == "attention_peaks" else self._starts(T)
        if isinstance(self.merge, tuple) and len(self.merge) != len(starts):
            raise InputError(
                f"exploration.merge has {len(self.merge)} numbers for {len(starts)} starts: "
                f"{', '.join(map(str, starts))}."
            )
        found: list[tuple[int, int]] = []
        for number, start in enumerate(starts):
            if self.overlap or not found or start >= found[-1][1]:
                found.append((start, start + self._length(request, number, start)))
        return found

    def plan(self, request: Request) -> Plan:
        """One anchor per prompt, and `sizes` branches for every prompt and start.

        Raises:
            InputError: see `steps`.
        """
        grid, P, T = request.base_grid, len(request.prompts), len(request.base_grid) - 1
        steps = self.steps(request)
        # A prompt that gets no rollouts in this round needs no anchor in it.
        anchored, none = (request.sizes > 0).long(), torch.zeros(P, dtype=torch.long)
        anchors = fresh_rows(
            request.prompts, anchored, none, grid, torch.zeros(T, dtype=grid.dtype),
            share_noise=True, role=Role.ANCHOR, scored=False,
        )  # fmt: skip
        # Groups are numbered so that those of a prompt are neighbours: the anchor's, then by start.
        anchors = replace(anchors, group=anchors.prompt * (T + 1))
        counts = request.sizes.repeat_interleave(len(steps))
        branch = torch.arange(P * len(steps)).repeat_interleave(counts)
        prompt, which = branch // len(steps), branch % len(steps)
        within = torch.arange(len(branch)) - (counts.cumsum(0) - counts)[branch]
        start, end = torch.tensor(steps)[which].unbind(dim=1)
        points = (end[:, None] + torch.arange(-1, T)).clamp(max=T)
        points[:, 0] = start
        points = points[:, : T + 2 - min(end for _, end in steps)]
        std = torch.zeros(len(branch), points.shape[1] - 1, dtype=grid.dtype)
        std[:, 0] = request.kernel.std(grid[start], grid[end], grid)
        return with_children(
            anchors, (anchored.cumsum(0) - 1)[prompt], start, role=Role.ROLLOUT,
            group=prompt * (T + 1) + 1 + start,
            member=within + request.first_member[prompt], points=points, std=std,
        )  # fmt: skip

    def _starts(self, T: int) -> tuple[int, ...]:  # noqa: N803
        if isinstance(self.starts, str):
            half = T // 2
            parts = {
                "first_quarter": range(T // 4),
                "first_half": range(half),
                "second_half": range(half, T - 1),
                "all": range(T - 1),
            }
            if not parts[self.starts]:
                raise InputError(
                    f"exploration.starts is {self.starts}, of which {T} steps have none; take more "
                    "sampling.steps, or list the starts."
                )
            return tuple(parts[self.starts])
        wrong = [start for start in self.starts if not 0 <= start < T - 1]
        if wrong or list(self.starts) != sorted(set(self.starts)) or not self.starts:
            raise InputError(
                f"exploration.starts must be rising numbers from 0 to {T - 2} (the last of the {T} "
                f"steps stays deterministic), not {list(self.starts)}."
            )
        return self.starts

    def _peaks(self, request: Request) -> tuple[int, ...]:
        """Starts where attention is most spread out."""
        if isinstance(self.merge, tuple):
            raise InputError(
                "exploration.merge is a list, which is for starts that are listed, too; these are "
                "chosen by attention and may move."
            )
        # All that may ever be chosen: peaks that move must not end a run halfway.
        for start in self.eligible(request).nonzero()[:, 0].tolist():
            self._length(request, 0, start)
        return tuple(self.chosen(request).tolist())

    def _length(self, request: Request, number: int, start: int) -> int:
        """How many steps are merged at one start, the `number`-th."""
        kernel, grid, merge = request.kernel, request.base_grid, self.merge
        length = merge[number] if isinstance(merge, tuple) else merge
        if length != 1 and not isinstance(kernel, FlowSDE | VarianceMatched):
            raise InputError(
                "exploration merged_steps merges steps to gain entropy, which only the kernels "
                "flow_sde and variance_matched do; choose one of them, or set exploration.merge=1."
            )
        if length == "entropy":
            return merge_length(
                kernel, grid, start, self.tau, self.scale, highest=self.out_of_reach == "highest"
            )
        if length < 1:
            raise InputError(f"exploration.merge must be at least 1, not {length}.")
        end, last = start + length, len(grid) - 1
        if end >= last:
            raise InputError(
                f"exploration.merge is {length} at step {start}, but must end before the last of "
                f"the {last} steps, whose noise would stay visible."
            )
        if length > 1 and kernel.std(grid[start], grid[end], grid) <= kernel.std(
            grid[start], grid[end - 1], grid
        ):
            raise InputError(
                f"exploration.merge is {length} at step {start}, where one less has as much "
                "entropy: variance_matched adds no more noise than the next sigma stands for. "
                "Merge less, or choose flow_sde."
            )
        return length
