"""What can be said of any images without a model, so that one sees what a reward does to them.

All take images [B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""
BLACK, WHITE = 0.02, 0.98
"""Luma below and above which a pixel has lost what there was to see; five levels of 255."""
SATURATED = 0.8
"""Distance of the largest from the smallest channel above which a pixel counts as saturated."""
EDGE = 0.1
"""Difference in luma from one pixel to the next above which there is an edge."""
CHUNK = 8
LEVELS = 4
"""Levels of each channel that are told apart as colours."""


def statistics(images: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    """All of them by name: one number per image, of `diversity` one per prompt.

    Args:
        images: [B, 3, H, W].
        prompt: [B] prompt numbers.
    """
    # A few at a time: of large images, copies of all would fill the memory.
    chunks = [chunk.float() for chunk in images.split(CHUNK)]
    by_image = {one.__name__: torch.cat([one(chunk) for chunk in chunks]) for one in OF_AN_IMAGE}
    return {**by_image, "diversity": diversity(images, prompt)}


def brightness(images: Tensor) -> Tensor:
    """[B] mean luma, in [0, 1]."""
    return _luma(images).flatten(1).mean(dim=1)


def black(images: Tensor) -> Tensor:
    """[B] share of pixels that are black, or too dark to differ."""
    return (_luma(images) < BLACK).float().flatten(1).mean(dim=1)


def white(images: Tensor) -> Tensor:
    """[B] share of pixels that are white, or too bright to differ."""
    return (_luma(images) > WHITE).float().flatten(1).mean(dim=1)


def saturated(images: Tensor) -> Tensor:
    """[B] share of pixels whose largest channel is far above the smallest."""
    chroma = images.amax(dim=1) - images.amin(dim=1)
    return (chroma > SATURATED).float().flatten(1).mean(dim=1)


def edges(images: Tensor) -> Tensor:
    """[B] share of pixels from which the luma differs to the right or below by more than `EDGE`."""
    luma = _luma(images)
    right = (luma[:, :-1, 1:] - luma[:, :-1, :-1]).abs()
    below = (luma[:, 1:, :-1] - luma[:, :-1, :-1]).abs()
    return (torch.maximum(right, below) > EDGE).float().flatten(1).mean(dim=1)


def detail(images: Tensor) -> Tensor:
    """[B] root mean square of what a 3x3 mean removes from the luma: fine lines, texture, noise.

    The mean leaves out what lies beyond the border, so a flat image has 0.
    """
    luma = _luma(images)[:, None]
    smooth = F.avg_pool2d(luma, 3, stride=1, padding=1, count_include_pad=False)
    return (luma - smooth).square().flatten(1).mean(dim=1).sqrt()


def colors(images: Tensor) -> Tensor:
    """[B] entropy in bits of the colours, `LEVELS` of each channel: 0 is one, 6 all alike."""
    level = (images * LEVELS).long().clamp(0, LEVELS - 1)
    red, green, blue = level.flatten(2).unbind(1)
    number = (red * LEVELS + green) * LEVELS + blue
    counts = torch.zeros(len(images), LEVELS**3).scatter_add_(
        1, number, torch.ones_like(red).float()
    )
    share = counts / counts.sum(dim=1, keepdim=True)
    return -torch.xlogy(share, share).sum(dim=1) / torch.log(torch.tensor(2.0))


def diversity(images: Tensor, prompt: Tensor) -> Tensor:
    """[P] mean root-mean-square pixel distance between two images of the same prompt.

    Args:
        images: [B, 3, H, W].
        prompt: [B] prompt numbers.

    Returns:
        For each prompt that occurs; NaN where it has one image.
    """
    found = [_apart(images[prompt == number]) for number in prompt.unique()]
    return torch.tensor(found, dtype=torch.float64)


def _apart(images: Tensor) -> float:
    """Mean distance between two of n images."""
    flat = images.flatten(1).double()
    mean = torch.pdist(flat).mean()
    return float(mean) / math.sqrt(flat.shape[1])


def _luma(images: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA, dtype=images.dtype))


OF_AN_IMAGE = (brightness, black, white, saturated, edges, detail, colors)
NAMES = (*(one.__name__ for one in OF_AN_IMAGE), diversity.__name__)
"""Names of all that `statistics` returns."""
