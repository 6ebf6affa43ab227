"""The ledger: what a run has spent, in units that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from time import perf_counter

BACKWARD_WEIGHT = 3
"""One forward and backward pass costs as much as three forward passes (the usual estimate)."""


@dataclass
class Ledger:
    """Counts since the start of the run.

    Attributes:
        network_evaluations: images sent through the network; guidance with two passes counts two.
        weighted_evaluations: the same, where a forward and backward pass counts three.
        check_evaluations: passes that serve a run-time check alone; in neither of the above.
        reward_calls: images scored.
        decodes: latents decoded to images.
        optimizer_steps: updates of the weights.
        seconds: wall time by stage.
    """

    network_evaluations: int = 0
    weighted_evaluations: int = 0
    check_evaluations: int = 0
    reward_calls: int = 0
    decodes: int = 0
    optimizer_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def forward(self, evaluations: int) -> None:
        """Count passes without gradient."""
        self.network_evaluations += evaluations
        self.weighted_evaluations += evaluations

    def forward_backward(self, evaluations: int) -> None:
        """Count passes with gradient."""
        self.network_evaluations += evaluations
        self.weighted_evaluations += BACKWARD_WEIGHT * evaluations

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to `stage`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start

    def counts(self) -> dict[str, int]:
        """All counts, without the times."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seconds"}

    def state(self) -> dict[str, object]:
        """For the checkpoint."""
        return {**self.counts(), "seconds": dict(self.seconds)}

    def load_state(self, state: dict[str, object]) -> None:
        """Inverse of `state`."""
        for name, value in state.items():
            setattr(self, name, value)
