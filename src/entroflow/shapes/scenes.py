"""Scenes: where the objects of a caption stand, and the pixels they make.

A scene batch is a struct of arrays over B scenes and K object slots. Coordinates are pixels, x to
the right and y down, the image spanning [0, 32] on both axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entroflow.shapes.grammar import COLORS, SHAPES, Spec

RESOLUTION = 32
MOST_ROUNDS = 2000
"""Rounds of placement, 16 tries each, before a scene counts as impossible."""
MOST_OBJECTS = 4
PALETTE = torch.tensor(
    [
        [0.90, 0.12, 0.12],
        [0.10, 0.65, 0.18],
        [0.12, 0.22, 0.90],
        [0.98, 0.85, 0.05],
        [0.72, 0.10, 0.72],
        [0.05, 0.75, 0.85],
        [0.06, 0.06, 0.06],
    ]
)
"""RGB in [0, 1], one row per name in `COLORS`."""
assert len(PALETTE) == len(COLORS)

REACH = 1.16
"""Farthest extent of any shape along x or y from its centroid, in radii: the triangle's apex."""
SIZE_BOUNDARY = 5.5
"""Radius in pixels that parts small from large."""
_RADII = {"small": (4.0, 5.0), "large": (6.0, 6.8)}
_RADII_BY_COUNT = {1: (4.2, 6.8), 2: (4.2, 6.2), 3: (4.0, 5.2), 4: (3.8, 4.6)}


@dataclass(frozen=True)
class Scenes:
    """B scenes of up to K objects.

    Attributes:
        center: [B, K, 2] pixels, (x, y).
        radius: [B, K] pixels; no shape of radius r extends farther than `REACH` r along x or y.
        shape, color: [B, K] indices into `SHAPES` and `COLORS`.
        present: [B, K] bool.
        tint: [B, K, 3] small offsets added to the palette colour.
        background: [B, 3] RGB.
    """

    center: Tensor
    radius: Tensor
    shape: Tensor
    color: Tensor
    present: Tensor
    tint: Tensor
    background: Tensor


def lay_out(specs: Sequence[Spec], rng: np.random.Generator) -> Scenes:
    """Random scenes that fulfil `specs`: attributes left open are drawn, objects never touch."""
    B, K = len(specs), MOST_OBJECTS
    shape, color = np.zeros((2, B, K), dtype=np.int64)
    present = np.zeros((B, K), dtype=bool)
    low, high = np.full((2, B, K), 4.0)
    relation = np.array([spec.relation or "" for spec in specs])
    drawn_color = rng.integers(len(COLORS), size=(B, K))
    for b, spec in enumerate(specs):
        for k, thing in enumerate(spec.objects):
            present[b, k] = True
            shape[b, k] = SHAPES.index(thing.shape)
            color[b, k] = COLORS.index(thing.color) if thing.color else drawn_color[b, k]
            default = _RADII_BY_COUNT[len(spec.objects)]
            low[b, k], high[b, k] = _RADII[thing.size] if thing.size else default
    radius = rng.uniform(low, high)
    center = _place(radius, present, relation, rng)
    background = rng.uniform(0.84, 0.95, (B, 1)) + rng.uniform(-0.015, 0.015, (B, 3))
    tint = rng.uniform(-0.03, 0.03, (B, K, 3))

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.float32))

    return Scenes(
        center=tensor(center),
        radius=tensor(radius),
        shape=torch.from_numpy(shape),
        color=torch.from_numpy(color),
        present=torch.from_numpy(present),
        tint=tensor(tint),
        background=tensor(background),
    )


def _place(
    radius: np.ndarray, present: np.ndarray, relation: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Centres by rejection: inside the frame, apart from each other, and as the relation says."""
    B, K = radius.shape
    center = np.zeros((B, K, 2))
    open_scenes = np.arange(B)
    tries = 16
    for _ in range(MOST_ROUNDS):
        if not len(open_scenes):
            return center
        r = radius[open_scenes][:, None, :, None]
        margin = 0.5 + REACH * r
        trial = rng.uniform(margin, RESOLUTION - margin, (len(open_scenes), tries, K, 2))
        fits = _apart(trial, radius[open_scenes], present[open_scenes])
        fits &= _related(trial, relation[open_scenes])
        found = fits.any(axis=1)
        center[open_scenes[found]] = trial[found, fits[found].argmax(axis=1)]
        open_scenes = open_scenes[~found]
    raise RuntimeError("objects too large to stand apart; a radius range is wrong.")


def _apart(center: np.ndarray, radius: np.ndarray, present: np.ndarray) -> np.ndarray:
    """[n, tries]: whether all present objects keep their distance."""
    K = radius.shape[-1]
    fits = np.ones(center.shape[:2], dtype=bool)
    for one in range(K):
        for other in range(one):
            distance = np.linalg.norm(center[:, :, one] - center[:, :, other], axis=-1)
            # Corners of squares lie at 1.245 radii: of two, not as much beyond 1.2 as 0.8 pixels.
            needed = 1.2 * (radius[:, one] + radius[:, other]) + 0.8
            both = present[:, one] & present[:, other]
            fits &= (distance >= needed[:, None]) | ~both[:, None]
    return fits


def _related(center: np.ndarray, relation: np.ndarray) -> np.ndarray:
    """[n, tries]: whether the first object stands to the second as `relation` says, clearly."""
    dx, dy = np.moveaxis(center[:, :, 1] - center[:, :, 0], -1, 0)
    clearly = {
        "": np.ones_like(dx, dtype=bool),
        "left of": dx >= np.abs(dy) + 3,
        "right of": -dx >= np.abs(dy) + 3,
        "above": dy >= np.abs(dx) + 3,
        "below": -dy >= np.abs(dx) + 3,
    }
    fits = np.zeros(dx.shape, dtype=bool)
    for name, holds in clearly.items():
        rows = relation == name
        fits[rows] = holds[rows]
    return fits


def coverage(shape: Tensor, radius: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """How much of a pixel each shape covers, in [0, 1].

    The signed distance to the outline, in pixels, is cut to a ramp one pixel wide: anti-aliasing in
    closed form. The origin is the centroid of the shape.

    Args:
        shape, radius: broadcastable to the pixel offsets.
        dx, dy: offsets of the pixel centre from the centroid of the shape.
    """
    ax, ay = dx.abs(), dy.abs()
    round_distance = torch.hypot(dx, dy)
    circle = round_distance - radius
    square = torch.maximum(ax, ay) - 0.88 * radius
    # Equilateral triangle, apex up: three half planes at the inradius from the centroid.
    inradius = 0.58 * radius
    triangle = torch.maximum(dy, 0.8660254 * ax - 0.5 * dy) - inradius
    arm = 0.36 * radius
    cross = torch.minimum(
        torch.maximum(ax - radius, ay - arm), torch.maximum(ay - radius, ax - arm)
    )
    ring = (round_distance - 0.75 * radius).abs() - 0.25 * radius
    distance = torch.where(
        shape == 0,
        circle,
        torch.where(
            shape == 1,
            square,
            torch.where(shape == 2, triangle, torch.where(shape == 3, cross, ring)),
        ),
    )
    return (0.5 - distance).clamp(0, 1)


AREA = torch.tensor(
    [3.14159265, 4 * 0.88**2, 0.58**2 * 5.19615242, 8 * 0.36 - 4 * 0.36**2, 2.35619449]
)
"""Area of each shape of radius 1."""


def pixel_axes() -> tuple[Tensor, Tensor]:
    """x [1, W] and y [H, 1] of the pixel centres."""
    axis = torch.arange(RESOLUTION) + 0.5
    return axis[None, :], axis[:, None]


def render(scenes: Scenes) -> Tensor:
    """Pixels of the scenes: [B, 3, 32, 32], RGB in [0, 1], anti-aliased."""
    x, y = pixel_axes()
    image = scenes.background[:, :, None, None].expand(-1, -1, RESOLUTION, RESOLUTION)
    colors = PALETTE[scenes.color] + scenes.tint
    for k in range(scenes.radius.shape[1]):
        here = coverage(
            scenes.shape[:, k, None, None],
            scenes.radius[:, k, None, None],
            x - scenes.center[:, k, 0, None, None],
            y - scenes.center[:, k, 1, None, None],
        )
        here = (here * scenes.present[:, k, None, None])[:, None]
        image = image + here * (colors[:, k, :, None, None] - image)
    return image.clamp(0, 1)
