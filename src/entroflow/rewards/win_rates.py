"""Win rates of the images of a group: who meets whom, what answers say, how far to trust them.

Pref-GRPO (2508.20751) rewards an image with the share of the others of its group that a judge finds
it better than. All indices are places within one group of n images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Order = Literal["swap", "random", "fixed"]
OnDisagree = Literal["tie", "average"]


# --- who meets whom -------------------------------------------------------------------------------


def round_robin(n: int) -> Tensor:
    """[n (n - 1) / 2, 2] every unordered pair once, the lower index first."""
    pairs = list(combinations(range(n), 2))
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def circulant(n: int, k: int) -> Tensor:
    """[n k / 2, 2] pairs in which every image meets its k nearest neighbours on a ring.

    All meet all where k is n - 1 or more; where n k is odd, every image meets one more.
    """
    k = min(k, n - 1)
    k += n * k % 2
    if k >= n - 1:
        return round_robin(n)
    image = torch.arange(n)
    rings = [torch.stack([image, (image + away) % n], dim=1) for away in range(1, k // 2 + 1)]
    if k % 2:
        half = image[: n // 2]
        rings.append(torch.stack([half, half + n // 2], dim=1))
    return torch.cat(rings).sort(dim=1).values


def random_pairs(n: int, k: int, source: np.random.Generator) -> Tensor:
    """[n k / 2, 2] as `circulant`, on a ring in random order."""
    ring = torch.from_numpy(source.permutation(n))
    return ring[circulant(n, k)].sort(dim=1).values


def shown(pairs: Tensor, order: Order, source: np.random.Generator) -> Tensor:
    """[m, 2] what a judge sees first and second.

    `swap` asks twice, with either first, the second time in the second half; `random` tosses a
    coin; `fixed` shows the lower index first, as published.
    """
    if order == "swap":
        return torch.cat([pairs, pairs.flip(1)])
    if order == "random":
        turned = torch.from_numpy(source.integers(0, 2, len(pairs)).astype(bool))
        return torch.where(turned[:, None], pairs.flip(1), pairs)
    return pairs


# --- what the answers say -------------------------------------------------------------------------


def settled(
    points: Tensor, pairs: Tensor, sides: Tensor, order: Order, on_disagree: OnDisagree = "tie"
) -> Tensor:
    """[m] points of the first of each pair, in [0, 1]; NaN where no answer is left.

    Of two answers to one pair, one that failed leaves the other. Where they contradict each other,
    the pair is a tie, or their mean; else it is their mean.

    Args:
        points: [len(sides)] of the image that was shown first; NaN where the answer failed.
        sides: as `shown` made them of `pairs`.
    """
    points = points.to(torch.float64)
    if order != "swap":
        return torch.where(sides[:, 0] == pairs[:, 0], points, 1 - points)
    answers = torch.stack([points[: len(pairs)], 1 - points[len(pairs) :]])
    opposed = (answers[0] - 0.5) * (answers[1] - 0.5) < 0
    both = answers.nanmean(dim=0)
    return torch.where(opposed & (on_disagree == "tie"), 0.5, both)


def win_rates(n: int, pairs: Tensor, points: Tensor, min_valid: float = 0.0) -> Tensor:
    """[n] mean points of every image over its comparisons, in float64.

    Args:
        points: [m] of the first of each pair; NaN is no comparison.
        min_valid: least share of comparisons that must be there; below, nothing is known.

    Returns:
        NaN for an image without a comparison; the sum is n / 2 where all were made as often.
    """
    valid = ~points.isnan()
    if not valid.any() or valid.double().mean() < min_valid:
        return torch.full((n,), torch.nan, dtype=torch.float64)
    first, second = pairs[valid].unbind(dim=1)
    won = torch.zeros(n, dtype=torch.float64)
    met = torch.zeros(n, dtype=torch.float64)
    for image, gained in ((first, points[valid]), (second, 1 - points[valid])):
        won.index_add_(0, image, gained.to(torch.float64))
        met.index_add_(0, image, torch.ones(len(image), dtype=torch.float64))
    return won / met.masked_fill(met == 0, torch.nan)


# --- how far to trust it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Trust:
    """What the answers to one group say of the judge.

    Attributes:
        spread: standard deviation (of n - 1) of the win rates.
        discriminability: of its variance the share between tossing coins (0) and a strict ranking
            (1); a coin-tossing judge has a spread too.
        ties, disagreements, failed: shares of pairs (failed: of answers).
        first: mean points of what was shown first; 0.5 without preference for a place.
        triads, intransitive: triples of images of which all pairs were decided, and how many go in
            a circle.
    """

    spread: float
    discriminability: float
    ties: float
    disagreements: float
    failed: float
    first: float
    triads: int
    intransitive: int


def trust(
    n: int, pairs: Tensor, sides: Tensor, answers: Tensor, points: Tensor, rates: Tensor
) -> Trust:
    """What is known of one group; NaN where nothing is.

    Args:
        answers: [len(sides)] points of what was shown first.
        points: [m] as `settled`.
        rates: [n] as `win_rates`.
    """
    known, answered = ~points.isnan(), ~answers.isnan()
    twice = len(sides) > len(pairs)
    opposed = torch.zeros(len(pairs), dtype=torch.bool)
    if twice:
        there, back = answers[: len(pairs)], 1 - answers[len(pairs) :]
        opposed = (there - 0.5) * (back - 0.5) < 0
    triads, circles = _triads(n, pairs, points)
    known_rates = rates[~rates.isnan()]
    spread = known_rates.std(correction=1).item() if len(known_rates) > 1 else math.nan
    return Trust(
        spread=spread,
        discriminability=discriminability(
            spread, n, 2 * len(pairs) / n, answers_per_pair=1 + twice
        ),
        ties=_share((points == 0.5) & ~opposed, known),
        disagreements=_share(opposed, known),
        failed=_share(~answered, torch.ones_like(answered)),
        first=answers[answered].mean().item() if answered.any() else math.nan,
        triads=triads,
        intransitive=circles,
    )


def discriminability(spread: float, n: int, k: float, answers_per_pair: int = 1) -> float:
    """Where a spread of win rates lies between those of a coin-tossing judge and of a strict order.

    Each of n images meets k others. The variance (of n - 1) is in expectation n / (n - 1) times
    1 / (4 k m) for coins, of which m are tossed for each pair, and times (k + 2) / (12 k) for an
    order.
    """
    scale = n / (n - 1)
    coins, strict = scale / (4 * k * answers_per_pair), scale * (k + 2) / (12 * k)
    return (spread**2 - coins) / (strict - coins) if strict > coins else math.nan


def _share(some: Tensor, of: Tensor) -> float:
    return (some & of).sum().item() / of.sum().item() if of.any() else math.nan


def _triads(n: int, pairs: Tensor, points: Tensor) -> tuple[int, int]:
    """Triples with three decided pairs, and those in which each beats the next in a circle."""
    beats = torch.zeros(n, n, dtype=torch.bool)
    first, second = pairs.unbind(dim=1)
    beats[first[points > 0.5], second[points > 0.5]] = True
    beats[second[points < 0.5], first[points < 0.5]] = True
    decided = beats | beats.T
    b, d = beats.double(), decided.double()
    circles = (b @ b @ b).diagonal().sum().item() / 3
    triples = (d @ d @ d).diagonal().sum().item() / 6
    return round(triples), round(circles)
