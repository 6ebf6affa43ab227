"""What can be said of any images without a model: monitors of what a reward may do to them.

All take images [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""


def brightness(images: Tensor) -> Tensor:
    """[B] mean luma, in [0, 1]."""
    return _luma(images).flatten(1).mean(dim=1)


def contrast(images: Tensor) -> Tensor:
    """[B] standard deviation of the luma over pixels, in [0, 0.5]."""
    return _luma(images).flatten(1).std(dim=1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """[B] mean distance of a pixel's largest channel from its smallest, in [0, 1]; gray is 0."""
    return (images.amax(dim=1) - images.amin(dim=1)).flatten(1).mean(dim=1)


def detail(images: Tensor) -> Tensor:
    """[B] root mean square of what a 3x3 mean removes from the luma: fine lines, texture, noise.

    The mean leaves out what lies beyond the border, so a flat image has 0.
    """
    luma = _luma(images)[:, None]
    smooth = F.avg_pool2d(luma, 3, stride=1, padding=1, count_include_pad=False)
    return (luma - smooth).square().flatten(1).mean(dim=1).sqrt()


def diversity(images: Tensor, prompt: Tensor) -> float:
    """Mean root-mean-square pixel distance between two images of the same prompt.

    Args:
        images: [B, 3, H, W].
        prompt: [B] prompt numbers.

    Returns:
        NaN if no prompt has two images.
    """
    flat = images.flatten(1).double()
    distances = []
    for number in prompt.unique().tolist():
        mine = flat[prompt == number]
        if len(mine) > 1:
            pairs = torch.pdist(mine) / mine.shape[1] ** 0.5
            distances.append(pairs.mean())
    return torch.stack(distances).mean().item() if distances else float("nan")


def _luma(images: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA, dtype=images.dtype))
