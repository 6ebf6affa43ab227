"""The entropy of a denoising step, and how many steps must be merged to reach a threshold (E-GRPO).

A stochastic step is a Gaussian of standard deviation s, so per value of the latent its entropy is
h = ln(2 pi e s^2) / 2 nats. A merged step goes from sigma_i to sigma_(i + l) at once; with Flow-SDE
its s grows with l, so low-entropy steps become high-entropy ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from entroflow.errors import InputError
from entroflow.sampling.kernels import Kernel, entropy

Scale = Literal["perplexity", "squared_perplexity", "twice_nats", "nats"]
"""In what a threshold is given: e^h = sqrt(2 pi e) s, e^(2h) = 2 pi e s^2, 2h, or h itself.

The paper (2601.00423) writes e^h and leaves its dimension open; per value, the first reading is the
one in which 0 means no merging and all of its thresholds give lists that differ and can be reached.
"""


def scaled_entropy(std: Tensor, scale: Scale = "perplexity") -> Tensor:
    """The entropy per value of steps with standard deviation `std`, on a scale; same shape."""
    nats = entropy(std)
    if scale == "perplexity":
        return nats.exp()
    if scale == "squared_perplexity":
        return (2 * nats).exp()
    return 2 * nats if scale == "twice_nats" else nats


def merge_lengths(
    kernel: Kernel, grid: Tensor, starts: Sequence[int], tau: float, scale: Scale = "perplexity"
) -> list[int]:
    """The least number of steps to merge at each start so that the entropy reaches `tau`.

    Args:
        grid: [T + 1] sigmas.
        starts: indices into the grid.

    Returns:
        A length >= 1 for each start; a merged step ends before the last point of the grid.

    Raises:
        InputError: `tau` is out of reach for a start.
    """
    lengths = []
    for start in starts:
        ends = grid[start + 1 : -1]
        found = scaled_entropy(kernel.std(grid[start].expand(len(ends)), ends, grid), scale)
        enough = (found >= tau).nonzero()
        if not len(enough):
            most = f"at most {found.max():.3g}" if len(found) else "nothing"
            raise InputError(
                f"exploration.tau is {tau:g}, but from sigma {grid[start]:.3g} (step {start}) a "
                f"merged step reaches {most}; lower tau, or leave that start out."
            )
        lengths.append(int(enough[0]) + 1)
    return lengths
