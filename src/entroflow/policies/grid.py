"""Grids of sigma, from 1 (noise) to 0 (data)."""

from __future__ import annotations

import torch
from torch import Tensor


def shifted_grid(steps: int, shift: float = 1.0) -> Tensor:
    """sigma = s u / (1 + (s - 1) u) on u = 1, ..., 0 (Esser et al., 2024, eq. 23).

    Args:
        steps: number of steps S >= 1.
        shift: s > 0; above 1 more steps are spent near the noise.

    Returns:
        [S + 1] float64, strictly decreasing.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"a grid needs steps >= 1 and shift > 0, not {steps} and {shift}.")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)
