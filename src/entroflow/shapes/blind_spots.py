"""What the shapes reward can't see, and reward hacking therefore shows up in.

A policy may paint a texture on the background, or change the contrast, while the score rises. These
numbers are monitors: nothing trains on them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from entroflow.shapes.recognise import recognise


def background_texture(images: Tensor) -> Tensor:
    """[B] standard deviation, over background pixels, of what a 3x3 mean removes (RGB mean).

    Background are the pixels more than two pixels from every object; specks that the score ignores
    belong to it. 0 on rendered scenes. NaN where no background is left.
    """
    images = images.detach().float()
    seen = recognise(images)
    near = F.max_pool2d(seen.solid.float()[:, None], 5, stride=1, padding=2)
    free = 1 - near
    fine = images - _masked_mean(images, free)
    count = free.flatten(1).sum(dim=1)
    energy = (fine.square().mean(dim=1, keepdim=True) * free).flatten(1).sum(dim=1)
    return torch.where(count > 0, energy / count, torch.nan).sqrt()


def contrast(images: Tensor) -> Tensor:
    """[B] mean distance (RGB, root mean square) of object pixels from the background colour.

    NaN where there is no object.
    """
    seen = recognise(images)
    solid = seen.solid.float()
    distance = (images - seen.background[:, :, None, None]).square().mean(dim=1).sqrt()
    count = solid.flatten(1).sum(dim=1)
    total = (distance * solid).flatten(1).sum(dim=1)
    return torch.where(count > 0, total / count, torch.nan)


def _masked_mean(images: Tensor, mask: Tensor) -> Tensor:
    """3x3 mean over the pixels where the mask [B, 1, H, W] is 1."""
    box = torch.ones(1, 1, 3, 3)
    weight = F.conv2d(mask, box, padding=1).clamp(min=1)
    channels = (images * mask).flatten(0, 1)[:, None]
    total = F.conv2d(channels, box, padding=1).view_as(images)
    return total / weight
