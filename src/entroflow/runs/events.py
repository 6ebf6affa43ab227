"""TensorBoard events of a run: the numbers of `metrics.jsonl`, and the pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from tensorboardX import SummaryWriter


class Events:
    """Writes event files that TensorBoard shows.

    From the first iteration that is written here on, TensorBoard hides what earlier files hold: a
    crash left it behind.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: SummaryWriter | None = None

    def numbers(self, metrics: Mapping[str, Any]) -> None:
        """Every finite number of one iteration."""
        iteration = metrics["iteration"]
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "iteration":
                self._writer(iteration).add_scalar(name, value, iteration)

    def picture(self, name: str, picture: Image, iteration: int) -> None:
        """One picture."""
        writer = self._writer(iteration)
        writer.add_image(name, np.asarray(picture), iteration, dataformats="HWC")
        writer.flush()

    def close(self) -> None:
        """Write what is left."""
        if self._open is not None:
            self._open.close()

    def _writer(self, iteration: int) -> SummaryWriter:
        if self._open is None:
            # A resumed run must not write into the file of its first part.
            part = len(list(self._folder.glob("events*")))
            self._open = SummaryWriter(
                str(self._folder), purge_step=iteration, filename_suffix=f".{part}"
            )
        return self._open
