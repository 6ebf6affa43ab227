"""How much of a reward is noise? Scores of images that were changed in ways no one would mind."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from entroflow.errors import InputError
from entroflow.pictures import to_pil
from entroflow.prompts import Prompt
from entroflow.rewards.parts import Part
from entroflow.rewards.scoring import score_images

QUALITIES = (95, 90)
"""Of JPEG."""
ZOOMS = (0.98, 1.02)
FLOOR = 2.0
"""Standard deviations of the noise that a floor is made of."""


@dataclass(frozen=True)
class Floor:
    """What was found of one reward, in its own units.

    Attributes:
        noise: standard deviation of the score of one image under harmless changes.
        spread: standard deviation within a group, root mean square over groups.
        failed: share of the scores that are missing.
    """

    noise: float
    spread: float
    failed: float

    @property
    def floor(self) -> float:
        """The least standard deviation that should divide: `FLOOR` times the noise."""
        return FLOOR * self.noise

    @property
    def signal(self) -> float:
        """Share of the variance within a group that is none of the noise, in [0, 1]."""
        return max(0.0, 1 - (self.noise / self.spread) ** 2) if self.spread else 0.0


def harmless(images: Tensor) -> Iterator[Tensor]:
    """Images [n, 3, H, W] in [0, 1] as they are, and changed in ways that no one would mind.

    The same again, as JPEG, moved by a pixel to either side, and a little smaller and larger.
    """
    yield images
    yield images
    for quality in QUALITIES:
        yield torch.stack([_compressed(image, quality) for image in images])
    # What moves in from beyond the border is the border.
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    yield padded[..., 1:-1, 2:]
    yield padded[..., 1:-1, :-2]
    for zoom in ZOOMS:
        yield _zoomed(images, zoom)


def floor_of(part: Part, groups: Sequence[Tensor], prompts: Sequence[Prompt]) -> Floor:
    """Calibrate a reward on images.

    Of a reward that compares, all images of a group are changed alike.

    Args:
        groups: images [n, 3, H, W] in [0, 1] of each prompt, two or more.
        prompts: one for each.

    Raises:
        InputError: hardly any image has a score.
    """
    noise, spread, missing = [], [], []
    for images, prompt in zip(groups, prompts, strict=True):
        # Whatever a reward draws for itself is noise, too.
        values = torch.stack(
            [score_images(part, each, prompt, n).values for n, each in enumerate(harmless(images))]
        )
        noise.append(_variance(values, 0))
        spread.append(_variance(values[:1], 1))
        missing.append(values.isnan().double().flatten())
    found = [torch.cat(each).nanmean().item() for each in (noise, spread)]
    if any(map(math.isnan, found)):
        raise InputError(f"reward {part.name} scored too few images to say; see the warnings.")
    return Floor(
        noise=math.sqrt(found[0]),
        spread=math.sqrt(found[1]),
        failed=torch.cat(missing).mean().item(),
    )


def as_yaml(found: Mapping[str, Floor]) -> str:
    """The key `floors` of a mixture."""
    each = ", ".join(f"{name}: {floor.floor:.2g}" for name, floor in found.items())
    return f"floors: {{{each}}}"


def _variance(values: Tensor, dim: int) -> Tensor:
    """Variances along one of two axes, over the values that are numbers; NaN of fewer than two."""
    count = (~values.isnan()).sum(dim=dim)
    apart = values - values.nanmean(dim=dim, keepdim=True)
    total = apart.square().nansum(dim=dim) / (count - 1).clamp(min=1)
    return total.where(count > 1, torch.nan)


def _compressed(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=quality)
    pixels = np.array(Image.open(buffer))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(image) / 255


def _zoomed(images: Tensor, zoom: float) -> Tensor:
    """Larger or smaller about the middle; what comes into sight is the border drawn out."""
    turn = torch.eye(2, 3)[None].expand(len(images), 2, 3) / zoom
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
