"""Noise with an address: a pure function of (run seed, stream, iteration, group, row, step).

Nothing else decides what is drawn: not the batch layout, the number of processes, the device, or
what was drawn before. So runs resume without the state of any random generator.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What a random number is for; streams never share numbers."""

    INITIAL = 0
    STEP = 1
    WINDOW = 2
    MINIBATCH = 3
    JUDGE = 4
    EVALUATION = 5
    PROMPTS = 6
    PROBE = 7
    FORWARD = 8


@dataclass(frozen=True)
class Address:
    """What the addresses of all noise of one iteration have in common."""

    seed: int
    iteration: int = 0


def generator(
    seed: int, stream: Stream, iteration: int = 0, group: int = 0, row: int = 0, step: int = 0
) -> np.random.Generator:
    """The random generator at an address."""
    address = struct.pack("<6q", seed, stream, iteration, group, row, step)
    key = int.from_bytes(hashlib.blake2b(address, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def gaussian(
    shape: Sequence[int],
    address: Address,
    stream: Stream,
    groups: Tensor,
    rows: Tensor,
    steps: Tensor,
) -> Tensor:
    """Standard normal noise [n, *shape] in float32, one address per entry.

    Args:
        shape: of one entry.
        address, stream: shared by all entries.
        groups, rows, steps: [n] each.
    """
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    places = zip(groups.tolist(), rows.tolist(), steps.tolist(), strict=True)
    for entry, (group, row, step) in enumerate(places):
        source = generator(address.seed, stream, address.iteration, group, row, step)
        source.standard_normal(dtype=np.float32, out=noise[entry])
    return torch.from_numpy(noise)
