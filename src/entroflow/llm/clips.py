"""Clip_B and Clip_V: which tokens an update leaves out so that entropy does not collapse.

Of all penalised tokens those that would take most entropy are rare ones that are pushed down
further: S far below what is usual (2602.03392, and its released code). With D = S_bar - S:

    Clip_B   A < 0  and  S < mean(S) - mu std(S)     takes log p and H
    Clip_V   A <= 0 and  D > mu std(D)               takes the whole vocabulary, for S_bar

of which Clip_V leaves out no more than a cap allows.
Mean and deviation are those of all valid tokens of a generation batch, under the policy before its
update. D itself is compared, not its distance from the mean: that is 0 in theory (corollary 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entroflow.llm.processes import Alone, Processes, Spread, spread_of
from entroflow.llm.token_entropy import TokenStatistics

Sides = Literal["one", "two"]

TIE = 1e-12
"""A standard deviation below this means that all tokens are alike: none is left out."""
MU_B, MU_V = 2.5, 8.5
"""Thresholds as published, in standard deviations."""
MOST = 1e-4
"""Share of the tokens that Clip_V leaves out at most, as published."""


@dataclass(frozen=True)
class Clip:
    """What is left out of a batch.

    Attributes:
        keep: [B, T] bool; true where there is no token.
        spread: of what was compared: S, or S_bar - S.
    """

    keep: Tensor
    spread: Spread


def clip_b(
    tokens: TokenStatistics,
    advantages: Tensor,
    valid: Tensor,
    *,
    mu: float = MU_B,
    sides: Sides = "one",
    processes: Processes | None = None,
) -> Clip:
    """Leave out penalised tokens whose S is far below the batch's.

    Args:
        tokens: [B, T] each.
        advantages: [B, T], or [B, 1] of whole completions.
        valid: [B, T] bool, tokens that the policy wrote.
        mu: standard deviations that are far; inf leaves nothing out.
        sides: one, as in the released code; two: all tokens whose S is far on either side, whatever
            their advantage.
        processes: that share the batch; this one alone if None.
    """
    S = tokens.discriminator.double()
    spread = spread_of(S, valid, processes or Alone())
    away = S - spread.mean
    if sides == "one":
        drop = (away < -mu * spread.std) & (advantages < 0)
    else:
        drop = away.abs() > mu * spread.std
    return Clip(~(drop & valid) | (spread.std < TIE), spread)


def clip_v(
    tokens: TokenStatistics,
    advantages: Tensor,
    valid: Tensor,
    *,
    mu: float = MU_V,
    sides: Sides = "one",
    most: float = MOST,
    processes: Processes | None = None,
) -> Clip:
    """Leave out penalised tokens whose S is far below its mean over the vocabulary.

    Args:
        tokens, advantages, valid, processes: see `clip_b`.
        mu: standard deviations of S_bar - S that are far; inf leaves nothing out.
        sides: one, as in the released code; two: all tokens with S_bar - S as far from 0, whatever
            their advantage.
        most: share of the valid tokens that may be left out, but one at least. Where more would
            be, only those with an advantage other than 0 are, and of these the farthest, less those
            that are as far as the first that stays. The released code caps penalised tokens alone,
            leaves out all others beyond the threshold, and of equals takes any.
    """
    processes = processes or Alone()
    distance = (tokens.baseline - tokens.discriminator).double()
    spread = spread_of(distance, valid, processes)
    if spread.std < TIE:
        return Clip(torch.ones_like(valid), spread)
    if sides == "one":
        drop = (distance > mu * spread.std) & (advantages <= 0) & valid
    else:
        drop = (distance.abs() > mu * spread.std) & valid
    allowed = max(int(most * spread.count), 1)
    if processes.sum(drop.sum()).item() > allowed:
        drop &= advantages != 0
        far = distance.abs()
        largest = processes.gather(far[drop]).sort(descending=True).values
        if len(largest) > allowed:
            # Of equals at the border none is left out, as no order among them is fair.
            drop &= far > largest[allowed]
    return Clip(~drop, spread)
