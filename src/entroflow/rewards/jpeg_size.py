"""Compressibility: a reward that any images have, without a model (DDPO, 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.pictures import to_pil
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores, Status

SIGNS = {"small": -1, "large": 1}


class JPEGSize(Component):
    """Size of an image as a JPEG file, in kB (1000 bytes); negative where small ones are preferred.

    It knows nothing of the prompt. It is there to try a set-up with: it costs next to nothing, and
    whether a policy learns it is plain to see.
    """

    type: Literal["jpeg_size"] = "jpeg_size"
    prefer: Literal["small", "large"] = Field(
        "small", description="small: smooth images earn more; large: detailed and noisy ones"
    )
    quality: int = Field(95, ge=1, le=100, description="of the JPEG encoder")

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """See `Reward.score`."""
        sizes = [self._bytes(to_pil(image)) for image in images]
        values = torch.tensor(sizes, dtype=torch.float64) * SIGNS[self.prefer] / 1000
        return Scores(values, (Status.OK,) * len(sizes))

    def _bytes(self, image: Image.Image) -> int:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=self.quality)
        return len(buffer.getvalue())
