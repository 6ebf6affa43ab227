"""What a picture of the shapes world shows: objects with shape, colour, size and place.

Analysis by synthesis. Pixels are explained as background plus a share (the coverage) of one palette
colour; connected pixels of one colour are an object; the five shapes are rendered at the object's
place and area, and the one that covers the same pixels best is its shape.

Limits: objects must not touch others of the same colour; at most `MOST_DETECTED` objects are read
(the largest); specks below `SMALLEST_AREA` pixels are ignored; only the seven palette colours on a
lighter or darker background are told apart; background texture weaker than half the contrast of an
object goes unseen, on purpose: `blind_spots` measures it instead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from entroflow.errors import InputError
from entroflow.shapes.grammar import SHAPES
from entroflow.shapes.scenes import AREA, PALETTE, RESOLUTION, coverage, pixel_axes

MOST_DETECTED = 8
SMALLEST_AREA = 6.0
"""Pixels."""
CHUNK = 64
"""Images at a time: larger batches take longer per image, as they no longer fit the caches."""
LEAST_CONTRAST = 0.25
"""Distance (RGB) below which a background hides a palette colour: it can't be seen before it."""
RECOGNISABLE = 0.7
"""Overlap (intersection over union of coverage) below which an object has no recognised shape."""


@dataclass(frozen=True)
class Detections:
    """Objects found in B images, largest first, padded to K = `MOST_DETECTED` slots.

    Attributes:
        present: [B, K] bool.
        shape: [B, K] index into `SHAPES`, or -1 if no shape fits.
        color: [B, K] index into `COLORS`.
        radius: [B, K] pixels, of the best-fitting shape.
        center: [B, K, 2] pixels, (x, y).
        overlap: [B, K, 5] intersection over union with each shape.
        solid: [B, 32, 32] bool, pixels of the objects (specks that are ignored are none).
        background: [B, 3] RGB.
    """

    present: Tensor
    shape: Tensor
    color: Tensor
    radius: Tensor
    center: Tensor
    overlap: Tensor
    solid: Tensor
    background: Tensor

    @property
    def count(self) -> Tensor:
        """[B] number of objects."""
        return self.present.sum(dim=1)


def recognise(images: Tensor) -> Detections:
    """Find the objects of a batch of images.

    Args:
        images: [B, 3, 32, 32] RGB in [0, 1].

    Raises:
        InputError: images of another size.
    """
    if images.shape[1:] != (3, RESOLUTION, RESOLUTION):
        raise InputError(
            f"the shapes world reads images [B, 3, {RESOLUTION}, {RESOLUTION}], "
            f"not {list(images.shape)}; another policy needs another reward and evaluation."
        )
    parts = [_recognise(part) for part in images.detach().float().cpu().split(CHUNK)]
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Detections)}
    return Detections(**{name: torch.cat(column) for name, column in columns.items()})


def _recognise(images: Tensor) -> Detections:
    images = images.contiguous()
    B = len(images)
    background = images.flatten(2).median(dim=2).values
    share, color = _explain(images, background)
    labels, owner_image, owner_color = _objects(share, color)
    n = len(owner_image)
    detections = Detections(
        present=torch.zeros(B, MOST_DETECTED, dtype=torch.bool),
        shape=torch.full((B, MOST_DETECTED), -1),
        color=torch.zeros(B, MOST_DETECTED, dtype=torch.long),
        radius=torch.zeros(B, MOST_DETECTED),
        center=torch.zeros(B, MOST_DETECTED, 2),
        overlap=torch.zeros(B, MOST_DETECTED, len(SHAPES)),
        solid=labels > 0,
        background=background,
    )
    if n == 0:
        return detections
    # The fringe of an object belongs to it: its pixels below half coverage lie next to its label.
    own = _crop_of_each(share, labels, owner_image, n)
    area = own.sum(dim=(1, 2))
    x, y = pixel_axes()
    center = (
        torch.stack([(own * x).sum(dim=(1, 2)), (own * y).sum(dim=(1, 2))], dim=1) / area[:, None]
    )
    radius = (area[:, None] / AREA).sqrt()
    templates = coverage(
        torch.arange(len(SHAPES))[:, None, None],
        radius[:, :, None, None],
        (x - center[:, 0, None, None])[:, None],
        (y - center[:, 1, None, None])[:, None],
    )
    shared = torch.minimum(own[:, None], templates).sum(dim=(2, 3))
    overlap = shared / torch.maximum(own[:, None], templates).sum(dim=(2, 3))
    best_overlap, best = overlap.max(dim=1)

    order = torch.argsort(area, descending=True, stable=True)
    order = order[torch.argsort(owner_image[order], stable=True)]
    image = owner_image[order]
    first = torch.searchsorted(image, torch.arange(B))
    slot = torch.arange(n) - first[image]
    kept = slot < MOST_DETECTED
    image, slot, order = image[kept], slot[kept], order[kept]
    detections.present[image, slot] = True
    shape = torch.where(best_overlap >= RECOGNISABLE, best, -1)
    detections.shape[image, slot] = shape[order]
    detections.color[image, slot] = owner_color[order]
    detections.radius[image, slot] = radius[torch.arange(n), best][order]
    detections.center[image, slot] = center[order]
    detections.overlap[image, slot] = overlap[order]
    return detections


def _explain(images: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage [B, H, W] of each pixel and the palette colour [B, H, W] that explains it best.

    A pixel is background + share * (colour - background): an anti-aliased edge keeps the direction
    of its colour. The direction is judged on a 3x3 mean, so that noise does not flip single pixels.
    """
    difference = images - background[:, :, None, None]
    toward = PALETTE[None] - background[:, None]
    length = toward.norm(dim=2, keepdim=True)
    visible = length > LEAST_CONTRAST
    length = length.clamp(min=LEAST_CONTRAST)
    unit = toward / length * visible
    evidence = torch.einsum("bkc,bchw->bhwk", unit, _blur(difference) + difference)
    color = evidence.argmax(dim=3)
    chosen = (unit / length).gather(1, color.flatten(1)[:, :, None].expand(-1, -1, 3))
    share = (chosen.transpose(1, 2).unflatten(2, color.shape[1:]) * difference).sum(dim=1)
    return share.clamp(0, 1), color


def _blur(images: Tensor) -> Tensor:
    """3x3 box mean of [B, C, H, W]; sums of shifts are far faster than pooling here."""
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    return (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9


_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = [[False, True, False], [True, True, True], [False, True, False]]


def _objects(share: Tensor, color: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B, H, W] (0 = none) of the objects, and the image and colour of each."""
    solid = share > 0.5
    colors = len(PALETTE)
    planes = torch.zeros(len(share), colors, RESOLUTION, RESOLUTION, dtype=torch.bool)
    planes.scatter_(1, color[:, None], solid[:, None])
    # One plane per (image, colour); labels never cross planes.
    labelled, n = ndimage.label(planes.flatten(0, 1).numpy(), structure=_IN_PLANE)
    found = torch.from_numpy(labelled.astype(np.int64))
    area = torch.bincount(found.flatten(), minlength=n + 1)
    area[0] = 0
    large = area >= SMALLEST_AREA
    renumber = torch.where(large, large.cumsum(0), 0)
    flat = found.flatten()
    plane_of = torch.zeros(n + 1, dtype=torch.long)
    plane_of[flat] = torch.arange(len(flat)) // RESOLUTION**2
    planes_kept = plane_of[large]
    labels = renumber[found].unflatten(0, (len(share), colors)).amax(dim=1)
    return labels, planes_kept // colors, planes_kept % colors


def _crop_of_each(share: Tensor, labels: Tensor, owner_image: Tensor, n: int) -> Tensor:
    """Coverage [n, H, W] of each object: its label grown by one pixel, others removed."""
    numbers = torch.arange(1, n + 1)[:, None, None]
    of_image = labels[owner_image]
    mine = of_image == numbers
    grown = F.max_pool2d(mine.float(), 3, stride=1, padding=1) > 0
    return share[owner_image] * (grown & (mine | (of_image == 0)))
