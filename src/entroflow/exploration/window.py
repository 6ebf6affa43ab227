"""A window of stochastic steps; the other steps follow the ODE. It may stand, slide or jump."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.errors import InputError
from entroflow.exploration.base import Request, refuse_undefined
from entroflow.noise import Stream, generator
from entroflow.sampling.plan import Plan, fresh_rows


class Window(Component):
    """`size` neighbouring steps from a start on are stochastic, never the last of the grid.

    Fewer random steps mean fewer transitions to train on and a closer tie between noise and reward.
    Where the window starts, by `move`:

    - `fixed`: always at `start`;
    - `progressive`: `stride` further every `every` iterations, and from `start` again after
      `last_start` (MixGRPO, 2507.21802);
    - `decay`: the same, but it stays at start l for `every` exp(-decay_rate max(0, l - decay_from))
      iterations, rounded up, so that late windows pass sooner (MixGRPO's exponential decay);
    - `random`: anywhere up to `last_start`, sampled anew in every iteration (MixGRPO);
    - `random_per_group`: sampled anew for every group and iteration (Flow-GRPO-Fast, which samples
      it for each process instead).

    The place is a function of the iteration, so a resumed run goes on with the same windows. A
    window is always whole: the released code of MixGRPO keeps windows off the last two steps, and
    goes on with shorter and shorter ones, and then none, before it begins again.
    """

    type: Literal["window"] = "window"
    size: int = Field(3, ge=1, description="number of stochastic steps")
    start: int = Field(0, ge=0, description="first stochastic step of the (first) window")
    move: Literal["fixed", "progressive", "decay", "random", "random_per_group"] = Field(
        "fixed", description="how the start changes, see above"
    )
    last_start: int | None = Field(
        None, ge=0, description="largest start; the last possible one if not given"
    )
    every: int = Field(25, ge=1, description="iterations between moves: progressive, decay")
    stride: int = Field(1, ge=1, description="steps between the starts of two windows")
    decay_rate: float = Field(0.1, ge=0, description="of move: decay")
    decay_from: int = Field(13, ge=0, description="start from which on windows pass sooner")
    share_noise: bool = Field(False, description="whether a group starts from one initial noise")

    def plan(self, request: Request) -> Plan:
        """One row per rollout.

        Raises:
            InputError: a window would reach the last step, or one that the kernel does not have.
        """
        std = request.std_but_last()
        T, P = len(std), len(request.prompts)
        largest = T - 1 - self.size
        last = largest if self.last_start is None else self.last_start
        for name, start in (("start", self.start), ("last_start", max(last, 0))):
            if start > largest:
                raise InputError(
                    f"exploration.{name} + exploration.size is {start + self.size}, but must stay "
                    f"below sampling.steps ({T}): noise of the last step would stay visible."
                )
        if last < self.start:
            raise InputError(
                f"exploration.last_start is {last}, before exploration.start ({self.start})."
            )
        # All places of a run at once: a window that moves must not end it halfway.
        places = slice(self.start, (self.start if self.move == "fixed" else last) + self.size)
        grid = request.base_grid
        refuse_undefined(std[places], grid[:-1][places], grid[1:][places])
        starts = self._starts(request, last, P)[:, None]
        step = torch.arange(T)
        inside = (step >= starts) & (step < starts + self.size)
        return fresh_rows(
            request.prompts, request.sizes, request.first_member, request.base_grid,
            torch.where(inside, std, 0.0), share_noise=self.share_noise,
        )  # fmt: skip

    def _starts(self, request: Request, last: int, groups: int) -> Tensor:
        """[P] start of the window of every group."""
        seed, iteration = request.seed, request.iteration
        if self.move == "fixed":
            start = self.start
        elif self.move == "progressive":
            places = range(self.start, last + 1, self.stride)
            start = places[iteration // self.every % len(places)]
        elif self.move == "decay":
            start = self._decayed(iteration, last)
        elif self.move == "random":
            start = int(generator(seed, Stream.WINDOW, iteration).integers(self.start, last + 1))
        else:
            drawn = [
                int(generator(seed, Stream.WINDOW, iteration, group).integers(self.start, last + 1))
                for group in range(groups)
            ]
            return torch.tensor(drawn, dtype=torch.long)
        return torch.full((groups,), start)

    def _decayed(self, iteration: int, last: int) -> int:
        """The start at an iteration where the time at a start shrinks as it grows."""
        places = range(self.start, last + 1, self.stride)
        shrunk = [math.exp(-self.decay_rate * max(0, at - self.decay_from)) for at in places]
        stays = [max(1, math.ceil(self.every * factor)) for factor in shrunk]
        left = iteration % sum(stays)
        for at, stay in zip(places, stays, strict=True):
            if left < stay:
                return at
            left -= stay
        raise AssertionError("the rest of a division is less than the divisor")
