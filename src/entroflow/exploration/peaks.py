"""Which steps of a curve over the grid stand out (AEGPO, 2602.06825)."""

from __future__ import annotations

import torch
from scipy.signal import find_peaks, peak_prominences
from torch import Tensor


def highest(curve: Tensor, eligible: Tensor, count: int) -> Tensor:
    """The eligible steps where a curve is highest; of equals the earlier, noisier one.

    Args:
        curve: [T].
        eligible: [T] bool.

    Returns:
        [min(count, number of eligible)] rising step numbers.
    """
    steps = eligible.nonzero()[:, 0]
    order = torch.argsort(curve[steps], descending=True, stable=True)
    return steps[order[:count]].sort().values


def prominent(curve: Tensor, eligible: Tensor, count: int, separation: int = 1) -> Tensor:
    """The eligible local maxima that stand out most; filled up by height where they are too few.

    A border counts as one if it is above its only neighbour, a plateau at its first step. First
    come those of the largest prominence (how far the curve falls before it rises above them), of
    equals the highest, then the earliest; then the other steps, the highest first.

    Args:
        curve, eligible, count: see `highest`.
        separation: a step nearer than this to a better one is passed over, unless too few are left.

    Returns:
        As `highest`.
    """
    values = curve.double()
    walls = torch.full((1,), -torch.inf, dtype=torch.float64)
    padded = torch.cat([walls, values, walls]).numpy()
    middle, plateau = find_peaks(padded, plateau_size=1)
    depth = peak_prominences(padded, middle)[0].tolist()
    peaks = (plateau["left_edges"] - 1).tolist()
    ranked = sorted(zip(peaks, depth, strict=True), key=lambda p: (-p[1], -values[p[0]], p[0]))
    best_first = [peak for peak, _ in ranked]
    best_first += torch.argsort(values, descending=True, stable=True).tolist()
    chosen: list[int] = []
    for least in (separation, 1):
        for step in best_first:
            apart = all(abs(step - other) >= least for other in chosen)
            if eligible[step] and apart and len(chosen) < count:
                chosen.append(step)
    return torch.tensor(sorted(chosen), dtype=torch.long)
