"""Does a picture show what its caption says? A score that can be verified, with no network.

`strict` asks for everything: the right number of objects and nothing else, every stated shape,
colour and size, and the relation. `graded` is the mean of terms, each clamped to [0, 1]: the count,
the objects, and the relation if one is stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entroflow.shapes.grammar import COLORS, RELATIONS, SHAPES, SIZES, Spec
from entroflow.shapes.recognise import MOST_DETECTED, RECOGNISABLE, Detections, recognise
from entroflow.shapes.scenes import MOST_OBJECTS, SIZE_BOUNDARY


@dataclass(frozen=True)
class Verdict:
    """Scores of B images: `strict` [B] bool, `graded` [B] in [0, 1]."""

    strict: Tensor
    graded: Tensor


def score(images: Tensor, specs: Sequence[Spec]) -> Verdict:
    """Judge images [B, 3, 32, 32] against the meanings of their captions."""
    return judge(recognise(images), specs)


def judge(seen: Detections, specs: Sequence[Spec]) -> Verdict:
    """Judge what was recognised; `specs` has one entry per image.

    Raises:
        ValueError: the numbers of images and specs differ.
    """
    if len(specs) != len(seen.present):
        raise ValueError(f"{len(seen.present)} images need as many captions, not {len(specs)}.")
    shape, color, size, needed, relation = _requirements(specs)
    fit, exact = _matches(seen, shape, color, size)
    slots = torch.arange(MOST_OBJECTS) < needed[:, None]
    fit = fit.where(seen.present[:, None], torch.zeros(()))
    exact = exact & seen.present[:, None]

    related, clearly = _relations(seen, relation)
    graded_objects, graded_relation, all_exact = _best_assignment(
        fit, exact, related, clearly, slots, needed
    )
    count_error = (seen.count - needed).abs() / needed
    graded_count = (1 - count_error).clamp(0, 1)
    stated = (relation >= 0).float()
    graded = (graded_count + graded_objects + stated * graded_relation) / (2 + stated)
    return Verdict(strict=all_exact & (seen.count == needed), graded=graded)


def _requirements(specs: Sequence[Spec]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Required shape, colour, size [B, R] (-1: any), number of objects [B] and relation [B]."""
    shape, color, size = np.full((3, len(specs), MOST_OBJECTS), -1)
    needed, relation = np.full((2, len(specs)), -1)
    for b, spec in enumerate(specs):
        objects = spec.objects
        needed[b] = len(objects)
        relation[b] = RELATIONS.index(spec.relation) if spec.relation else -1
        for r, thing in enumerate(objects):
            shape[b, r] = SHAPES.index(thing.shape)
            color[b, r] = COLORS.index(thing.color) if thing.color else -1
            size[b, r] = SIZES.index(thing.size) if thing.size else -1
    return tuple(torch.from_numpy(part) for part in (shape, color, size, needed, relation))  # type: ignore[return-value]


def _matches(seen: Detections, shape: Tensor, color: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """How well detected object k fits requirement r: graded [B, R, K] and exact [B, R, K].

    Graded: the mean over the stated attributes. A shape earns its overlap relative to the overlap
    that counts as recognised when it is not the best-fitting one, so that progress shows.
    """
    K = seen.present.shape[1]
    index = shape.clamp(min=0)[:, :, None, None].expand(-1, -1, K, 1)
    overlap = seen.overlap[:, None].expand(-1, shape.shape[1], -1, -1).gather(3, index)[..., 0]
    shape_exact = seen.shape[:, None] == shape[:, :, None]
    shape_fit = torch.where(shape_exact, 1.0, (0.5 * overlap / RECOGNISABLE).clamp(0, 0.5))
    color_exact = seen.color[:, None] == color[:, :, None]
    large = (seen.radius > SIZE_BOUNDARY).long()
    size_exact = large[:, None] == size[:, :, None]
    color_stated, size_stated = (color >= 0)[:, :, None], (size >= 0)[:, :, None]
    fit = shape_fit + color_stated * color_exact + size_stated * size_exact
    fit = fit / (1 + color_stated.float() + size_stated.float())
    exact = shape_exact & (color_exact | ~color_stated) & (size_exact | ~size_stated)
    return fit, exact


def _relations(seen: Detections, relation: Tensor) -> tuple[Tensor, Tensor]:
    """Whether object i stands to object j as stated: graded and strict [B, K, K].

    The offset along the stated axis must exceed the offset across it (so that exactly one relation
    holds) and two pixels.
    """
    offset = seen.center[:, None, :] - seen.center[:, :, None]
    dx, dy = offset.unbind(-1)
    along = torch.stack([dx, -dx, dy, -dy], dim=-1)
    across = torch.stack([dy, dy, dx, dx], dim=-1).abs()
    chosen = relation.clamp(min=0)[:, None, None, None].expand(*dx.shape, 1)
    along, across = along.gather(3, chosen)[..., 0], across.gather(3, chosen)[..., 0]
    margin = torch.minimum(along - across, along - 2)
    free = (relation < 0)[:, None, None]
    both = seen.present[:, :, None] & seen.present[:, None, :]
    # Full marks from three pixels on, the least that rendered scenes show.
    return (0.5 + margin / 6).clamp(0, 1) * both, (margin > 0) | free


def _best_assignment(
    fit: Tensor, exact: Tensor, related: Tensor, clearly: Tensor, slots: Tensor, needed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign detected objects to requirements: mean fit, relation, all exact (each [B]).

    Two requirements are assigned by trying all pairs. One, three or four are alike (only counting
    asks for more than two), and take the best-fitting objects.
    """
    alike = fit[:, 0].sort(dim=1, descending=True).values[:, :MOST_OBJECTS]
    alike_fit = (alike * slots).sum(dim=1) / needed
    alike_exact = exact[:, 0].sum(dim=1) >= needed

    K = MOST_DETECTED
    same = torch.eye(K, dtype=torch.bool)
    pair_fit = ((fit[:, 0, :, None] + fit[:, 1, None, :]) / 2).masked_fill(same, 0)
    # The pair is chosen by how well its objects fit; the relation only breaks ties.
    best = (pair_fit + 1e-3 * related).masked_fill(same, -1).flatten(1).argmax(dim=1)
    pair_exact = (
        (exact[:, 0, :, None] & exact[:, 1, None, :] & clearly & ~same).flatten(1).any(dim=1)
    )
    best_fit = pair_fit.flatten(1).gather(1, best[:, None])[:, 0]
    best_related = related.flatten(1).gather(1, best[:, None])[:, 0] * (best_fit > 0)

    is_pair = needed == 2
    return (
        torch.where(is_pair, best_fit, alike_fit),
        best_related,
        torch.where(is_pair, pair_exact, alike_exact),
    )
