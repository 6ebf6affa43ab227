"""The entropy of a denoising step, and how many steps must be merged to reach a threshold (E-GRPO).

A stochastic step is a Gaussian of standard deviation s, so per value of the latent its entropy is
h = ln(2 pi e s^2) / 2 nats. A merged step goes from sigma_i to sigma_(i + l) at once; with Flow-SDE
its s grows with l, so low-entropy steps become high-entropy ones.
"""

from __future__ import annotations

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


def merge_length(
    kernel: Kernel,
    grid: Tensor,
    start: int,
    tau: float,
    scale: Scale = "perplexity",
    *,
    highest: bool = False,
) -> int:
    """The least number of steps to merge from a start on so that the entropy reaches `tau`.

    Args:
        grid: [T + 1] sigmas.
        start: index into the grid, at most T - 2.
        highest: where no length reaches `tau`, take that of the highest entropy.

    Returns:
        A length >= 1; the merged step ends before the last point of the grid.

    Raises:
        InputError: `tau` is out of reach.
    """
    ends = grid[start + 1 : -1]
    found = scaled_entropy(kernel.std(grid[start].expand(len(ends)), ends, grid), scale)
    enough = (found >= tau).nonzero()
    if len(enough):
        return int(enough[0]) + 1
    if highest:
        return int(found.argmax()) + 1
    raise InputError(
        f"exploration.tau is {tau:g}, but from sigma {grid[start]:.3g} (step {start}) a merged "
        f"step reaches at most {found.max():.3g}; lower tau, leave that start out, or take the "
        "most there is with exploration.out_of_reach=highest."
    )
