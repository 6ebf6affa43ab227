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

    Args:
        from_iteration: TensorBoard hides what earlier files hold from there on.
    """

    def __init__(self, folder: Path, from_iteration: int = 0) -> None:
        # A resumed run must not write into the file of its first part.
        part = len(list(folder.glob("events*"))) if folder.exists() else 0
        self._writer = SummaryWriter(
            str(folder), purge_step=from_iteration, filename_suffix=f".{part}"
        )

    def numbers(self, metrics: Mapping[str, Any]) -> None:
        """Every finite number of one iteration."""
        iteration = metrics["iteration"]
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "iteration":
                self._writer.add_scalar(name, value, iteration)

    def picture(self, name: str, picture: Image, iteration: int) -> None:
        """One picture."""
        self._writer.add_image(name, np.asarray(picture), iteration, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
