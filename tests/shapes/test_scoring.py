"""The scorer: rates on rendered scenes right and wrong, and brute force on random objects."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from entroflow.shapes.grammar import (
    COLORS,
    SHAPES,
    SIZES,
    SKILLS,
    SPLITS,
    draw,
    forms,
    one_attribute_wrong,
    parse,
)
from entroflow.shapes.recognise import MOST_DETECTED, Detections, recognise
from entroflow.shapes.scenes import RESOLUTION, SIZE_BOUNDARY, Scenes, lay_out, render
from entroflow.shapes.scoring import judge, score

PER_CELL = 340
"""Scenes per skill and split: 6120 in all."""


def recognise_many(images):
    """Detections of many images, some at a time: that takes a third of the time."""
    parts = [recognise(part) for part in images.split(32)]
    names = Detections.__dataclass_fields__
    return Detections(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})


def rate(images, specs):
    return judge(recognise_many(images), specs).strict.double().mean().item()


def scenes_of(rng, per_cell):
    specs = [
        draw(rng, split, [skill]) for split in SPLITS for skill in SKILLS for _ in range(per_cell)
    ]
    return specs, lay_out(specs, rng)


@pytest.fixture(scope="module")
def large():
    """Captions of every skill and split and what is seen on their scenes."""
    specs, scenes = scenes_of(np.random.default_rng(0), PER_CELL)
    seen = recognise_many(render(scenes))
    return specs, scenes, seen


@pytest.fixture(scope="module")
def small():
    """Fewer of them, with the pixels."""
    specs, scenes = scenes_of(np.random.default_rng(1), 60)
    return specs, scenes, render(scenes)


def changed_attribute(spec, other):
    if spec.count != other.count:
        return "count"
    if spec.relation != other.relation:
        return "relation"
    names = [
        name
        for one, two in zip(spec.things, other.things, strict=True)
        for name in ("shape", "color", "size")
        if getattr(one, name) != getattr(two, name)
    ]
    assert len(names) == 1
    return names[0]


# --- rates on rendered scenes ---------------------------------------------------------------------


def test_right_scenes_are_strictly_right(large):
    """At least 99.5% in all, and 99% in each skill of each split."""
    specs, _, seen = large
    assert len(specs) >= 6000
    strict = judge(seen, specs).strict.double()
    assert strict.mean() >= 0.995
    assert strict.view(len(SPLITS) * len(SKILLS), PER_CELL).mean(dim=1).min() >= 0.99


def test_a_caption_with_one_attribute_wrong_is_strictly_wrong(large):
    """At most 0.5% pass, whichever attribute it is."""
    specs, _, seen = large
    rng = np.random.default_rng(2)
    wrong = [one_attribute_wrong(spec, rng, None) for spec in specs]
    strict = judge(seen, wrong).strict.double()
    names = np.array([changed_attribute(*pair) for pair in zip(specs, wrong, strict=True)])
    assert strict.mean() <= 0.005
    for name in ("shape", "color", "size", "count", "relation"):
        rows = torch.from_numpy(names == name)
        assert rows.sum() > 100
        assert strict[rows].mean() <= 0.01


def test_graded_is_lower_when_an_attribute_is_wrong(large):
    """By a tenth or more on average, for every kind of attribute."""
    specs, _, seen = large
    rng = np.random.default_rng(3)
    wrong = [one_attribute_wrong(spec, rng, None) for spec in specs]
    loss = judge(seen, specs).graded - judge(seen, wrong).graded
    names = np.array([changed_attribute(*pair) for pair in zip(specs, wrong, strict=True)])
    for name in ("shape", "color", "size", "count", "relation"):
        assert loss[torch.from_numpy(names == name)].mean() > 0.1


def test_graded_of_right_scenes_is_1_but_for_how_clear_the_relation_is(large):
    """Without a relation exactly 1; with one the closed form from the true centres."""
    specs, scenes, seen = large
    verdict = judge(seen, specs)
    dx, dy = (scenes.center[:, 1] - scenes.center[:, 0]).unbind(1)
    offsets = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}
    expected = torch.ones(len(specs))
    for b, spec in enumerate(specs):
        if spec.relation:
            along, across = (part[b].item() for part in offsets[spec.relation])
            margin = min(along - abs(across), along - 2)
            expected[b] = (2 + min(1, 0.5 + margin / 6)) / 3
    # Half a pixel of the centres is 1/36 of the score.
    close = (verdict.graded - expected).abs() < 0.028
    assert close.double().mean() >= 0.995
    assert verdict.graded.mean() > 0.99


def test_blurred_and_noisy_scenes_are_still_right(small):
    """Gaussian blur of 0.5 pixels and noise of 0.05: 99% each, 98% together."""
    specs, _, images = small
    rng = np.random.default_rng(4)

    def blurred(x):
        return torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, 0.5, 0.5)))

    def noisy(x):
        noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        return (x + 0.05 * noise).clamp(0, 1)

    assert rate(blurred(images), specs) >= 0.99
    assert rate(noisy(images), specs) >= 0.99
    assert rate(noisy(blurred(images)), specs) >= 0.98


def with_extra_object(scenes, rng):
    """Scenes with a fifth object, apart from the others, and which of them had room for it."""
    B = len(scenes.radius)
    radius = torch.full((B, 1), 3.4)
    trial = torch.from_numpy(rng.uniform(5, 27, (B, 400, 2)).astype(np.float32))
    gap = (trial[:, :, None] - scenes.center[:, None]).norm(dim=3) - 1.25 * (
        scenes.radius[:, None] + 3.4
    )
    free = ((gap > 1) | ~scenes.present[:, None]).all(dim=2)
    place = trial[torch.arange(B), free.int().argmax(dim=1)]

    def extended(part, extra):
        return torch.cat([part, extra], dim=1)

    more = Scenes(
        center=extended(scenes.center, place[:, None]),
        radius=extended(scenes.radius, radius),
        shape=extended(scenes.shape, torch.from_numpy(rng.integers(len(SHAPES), size=(B, 1)))),
        color=extended(scenes.color, torch.from_numpy(rng.integers(len(COLORS), size=(B, 1)))),
        present=extended(scenes.present, torch.ones(B, 1, dtype=torch.bool)),
        tint=extended(scenes.tint, torch.zeros(B, 1, 3)),
        background=scenes.background,
    )
    return more, free.any(dim=1)


def test_a_scene_with_an_object_too_many_is_wrong(small):
    specs, scenes, _ = small
    more, room = with_extra_object(scenes, np.random.default_rng(5))
    assert room.double().mean() > 0.5
    verdict = judge(recognise_many(render(more)), specs)
    assert verdict.strict[room].double().mean() <= 0.005
    assert verdict.graded[room].mean() < 0.9


def test_a_scene_with_an_object_missing_is_wrong(small):
    """Whichever object of the caption it is."""
    specs, scenes, _ = small
    rng = np.random.default_rng(6)
    present = scenes.present.clone()
    for b, spec in enumerate(specs):
        present[b, rng.integers(len(spec.objects))] = False
    verdict = judge(recognise_many(render(replace(scenes, present=present))), specs)
    assert verdict.strict.double().mean() <= 0.005
    assert verdict.graded.mean() < 0.6


def test_objects_whose_captions_are_swapped_are_wrong(small):
    """Colours exchanged between the two objects, or the relation turned round."""
    specs, _, images = small
    rows = [
        b for b, s in enumerate(specs) if len(s.things) == 2 and (s.relation or s.things[0].color)
    ]
    swapped = []
    for b in rows:
        one, two = specs[b].things
        if specs[b].relation:
            swapped.append(replace(specs[b], things=(two, one)))
        else:
            things = (replace(one, color=two.color), replace(two, color=one.color))
            swapped.append(replace(specs[b], things=things))
    assert len(rows) > 300
    assert rate(images[rows], swapped) <= 0.005


# --- batches, degenerate images -------------------------------------------------------------------


def test_a_permuted_batch_gets_permuted_scores_and_company_does_not_matter(small):
    specs, _, images = small
    specs, images = specs[::24], images[::24]
    whole = score(images, specs)
    order = np.random.default_rng(7).permutation(len(specs))
    permuted = score(images[order], [specs[i] for i in order])
    assert torch.equal(permuted.strict, whole.strict[order])
    torch.testing.assert_close(permuted.graded, whole.graded[order], atol=1e-5, rtol=0)
    for b in range(len(specs)):
        alone = score(images[b : b + 1], specs[b : b + 1])
        assert alone.strict[0] == whole.strict[b]
        torch.testing.assert_close(alone.graded[0], whole.graded[b], atol=1e-5, rtol=0)


def degenerate():
    generator = torch.Generator().manual_seed(0)
    size = (60, 3, RESOLUTION, RESOLUTION)
    colors = torch.rand(60, 3, 1, 1, generator=generator)
    half = torch.ones(size)
    half[..., : RESOLUTION // 2] = 0.06
    return {
        "one colour": colors.repeat(1, 1, RESOLUTION, RESOLUTION),
        "black": torch.zeros(size),
        "white": torch.ones(size),
        "noise": torch.rand(size, generator=generator),
        "two halves": half,
        "checkerboard": (torch.arange(32)[:, None] + torch.arange(32))
        .remainder(2)
        .expand(size)
        .float(),
        "not a number": torch.full(size, torch.nan),
    }


@pytest.mark.parametrize("kind", list(degenerate()))
def test_degenerate_images_are_wrong_and_score_a_number(kind):
    images = degenerate()[kind]
    rng = np.random.default_rng(8)
    specs = [draw(rng, "test", [SKILLS[b % len(SKILLS)]]) for b in range(len(images))]
    verdict = score(images, specs)
    assert not verdict.strict.any()
    assert ((verdict.graded >= 0) & (verdict.graded <= 1)).all()


@pytest.mark.parametrize("kind", ["one colour", "black", "white"])
def test_an_empty_picture_scores_0(kind):
    images = degenerate()[kind]
    specs = [parse("a ring"), parse("a ring above a cross"), parse("four rings")] * 20
    assert torch.equal(score(images, specs).graded, torch.zeros(60))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 31, 32), (1, 4, 32, 32)])
def test_other_shapes_than_images_are_refused(shape):
    with pytest.raises(ValueError, match="reads images"):
        score(torch.zeros(shape), [parse("a ring")])


def test_as_many_captions_as_images_are_needed():
    with pytest.raises(ValueError, match="caption"):
        score(torch.zeros(2, 3, 32, 32), [parse("a ring")])


# --- brute force ----------------------------------------------------------------------------------


def detections(pictures, rng):
    """Detections of objects (shape, color, radius, x, y); the empty slots hold anything."""
    B = len(pictures)
    shape = torch.from_numpy(rng.integers(len(SHAPES), size=(B, MOST_DETECTED)))
    seen = Detections(
        present=torch.zeros(B, MOST_DETECTED, dtype=torch.bool),
        shape=shape,
        color=torch.from_numpy(rng.integers(len(COLORS), size=(B, MOST_DETECTED))),
        radius=torch.from_numpy(rng.uniform(3, 7, (B, MOST_DETECTED))).float(),
        center=torch.from_numpy(rng.uniform(0, 32, (B, MOST_DETECTED, 2))).float(),
        overlap=torch.from_numpy(rng.uniform(0.05, 1, (B, MOST_DETECTED, len(SHAPES)))).float(),
        solid=torch.zeros(B, RESOLUTION, RESOLUTION, dtype=torch.bool),
        background=torch.zeros(B, 3),
    )
    for b, objects in enumerate(pictures):
        for k, (kind, color, radius, x, y) in enumerate(objects):
            seen.present[b, k] = True
            seen.shape[b, k], seen.color[b, k], seen.radius[b, k] = kind, color, radius
            seen.center[b, k] = torch.tensor([x, y])
    return seen


def random_object(rng, thing=None):
    """An object of any kind, or one that fits a thing but for one attribute now and then."""
    kind, color = rng.integers(-1, len(SHAPES)), rng.integers(len(COLORS))
    size = SIZES[rng.integers(2)]
    if thing is not None:
        if rng.random() < 0.95:
            kind = SHAPES.index(thing.shape)
        if thing.color and rng.random() < 0.95:
            color = COLORS.index(thing.color)
        if thing.size and rng.random() < 0.9:
            size = thing.size
    radius = SIZE_BOUNDARY + rng.uniform(0.1, 2) * (1 if size == "large" else -1)
    return int(kind), int(color), float(radius), *rng.uniform(2, 30, 2).round(1)


def random_case(rng, spec):
    objects = [random_object(rng, thing) for thing in spec.objects]
    if rng.random() < 0.15:
        del objects[rng.integers(len(objects))]
    if rng.random() < 0.2:
        objects += [random_object(rng) for _ in range(rng.integers(1, 4))]
    rng.shuffle(objects)
    return objects


def holds(relation, one, other):
    """Whether `one` stands to `other` in the relation: further along than across, and 2 pixels."""
    dx, dy = other[3] - one[3], other[4] - one[4]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = abs(dy if relation in ("left of", "right of") else dx)
    return along > across and along > 2


def is_one(thing, seen):
    kind, color, radius = seen[:3]
    return (
        kind == SHAPES.index(thing.shape)
        and (thing.color is None or COLORS[color] == thing.color)
        and (thing.size is None or SIZES[radius > SIZE_BOUNDARY] == thing.size)
    )


def brute_force_strict(spec, objects):
    if len(objects) != len(spec.objects):
        return False
    return any(
        all(is_one(thing, seen) for thing, seen in zip(spec.objects, chosen, strict=True))
        and (spec.relation is None or holds(spec.relation, *chosen))
        for chosen in itertools.permutations(objects)
    )


def brute_force_fit(thing, seen, overlap):
    """Mean over the stated attributes; another shape earns up to a half by its overlap."""
    if seen is None:
        return 0.0
    kind, color, radius = seen[:3]
    index = SHAPES.index(thing.shape)
    terms = [1.0 if kind == index else min(0.5, 0.5 * overlap[index] / 0.7)]
    if thing.color:
        terms.append(float(COLORS[color] == thing.color))
    if thing.size:
        terms.append(float(SIZES[radius > SIZE_BOUNDARY] == thing.size))
    return sum(terms) / len(terms)


@pytest.fixture(scope="module")
def cases():
    """Captions of all forms with random objects, right and wrong."""
    rng = np.random.default_rng(9)
    listed = [form for skill in SKILLS for form in forms()[skill]]
    specs = [form[rng.integers(len(form))] for form in listed for _ in range(150)]
    # Captions outside the listed forms are scored as well.
    specs += [parse("a small red ring above a large red ring")] * 50
    specs += [parse("a red ring and a ring"), parse("two small rings")] * 50
    pictures = [random_case(rng, spec) for spec in specs]
    return specs, pictures, detections(pictures, rng)


def test_strict_agrees_with_trying_all_assignments(cases):
    specs, pictures, seen = cases
    expected = [brute_force_strict(*case) for case in zip(specs, pictures, strict=True)]
    assert 0.2 < np.mean(expected) < 0.8
    assert judge(seen, specs).strict.tolist() == expected


def assignments(spec, objects, overlap):
    """(mean fit, objects chosen) of every way to give each thing its own object, or none."""
    slots = [*range(len(objects)), *[None] * len(spec.objects)]
    fits = [
        [
            brute_force_fit(
                thing, None if k is None else objects[k], None if k is None else overlap[k]
            )
            for k in slots
        ]
        for thing in spec.objects
    ]
    for chosen in set(itertools.permutations(range(len(slots)), len(spec.objects))):
        fit = np.mean([fits[r][position] for r, position in enumerate(chosen)])
        yield fit, [slots[position] for position in chosen]


def test_graded_agrees_with_the_best_of_all_assignments(cases):
    """Mean of count, objects and relation; the relation is that of a best assignment."""
    specs, pictures, seen = cases
    graded = judge(seen, specs).graded
    kinds = set()
    for b in range(0, len(specs), 4):
        spec, objects = specs[b], pictures[b]
        if spec.relation and len(objects) < 2:
            continue  # see test_a_relation_to_a_missing_object_earns_nothing
        needed = len(spec.objects)
        count = max(0.0, 1 - abs(len(objects) - needed) / needed)
        ways = list(assignments(spec, objects, seen.overlap[b].tolist()))
        best = max(fit for fit, _ in ways)
        kinds.add((spec.skill, len(objects) - needed))
        if spec.relation is None:
            assert graded[b].item() == pytest.approx((count + best) / 2, abs=1e-5)
            continue
        possible = []
        for fit, chosen in ways:
            if fit > best - 2e-3:
                (x1, y1), (x2, y2) = (objects[k][3:] for k in chosen)
                along, across = {
                    "left of": (x2 - x1, y2 - y1),
                    "right of": (x1 - x2, y2 - y1),
                    "above": (y2 - y1, x2 - x1),
                    "below": (y1 - y2, x2 - x1),
                }[spec.relation]
                margin = min(along - abs(across), along - 2)
                related = min(1.0, max(0.0, 0.5 + margin / 6))
                possible.append((count + fit + related) / 3)
        assert np.min(np.abs(np.array(possible) - graded[b].item())) < 1e-5
    assert len(kinds) > 20


def test_graded_is_clamped_term_by_term():
    """Absurd detections: overlaps above 1, places far outside, eight objects where one is asked."""
    rng = np.random.default_rng(10)
    listed = [form for skill in SKILLS for form in forms()[skill]]
    specs = [form[rng.integers(len(form))] for form in listed for _ in range(20)]
    pictures = [
        [
            (*random_object(rng)[:2], 10 ** rng.uniform(-3, 3), *rng.normal(0, 1e4, 2))
            for _ in range(rng.integers(MOST_DETECTED + 1))
        ]
        for _ in specs
    ]
    seen = detections(pictures, rng)
    seen.overlap.mul_(50)
    verdict = judge(seen, specs)
    assert ((verdict.graded >= 0) & (verdict.graded <= 1)).all()
    # Eight right objects instead of one: the count earns 0, the object 1, their mean is a half.
    ring = (SHAPES.index("ring"), 0, 4.0, 16.0, 16.0)
    eight = detections([[ring] * MOST_DETECTED], rng)
    assert judge(eight, [parse("a ring")]).graded.tolist() == [0.5]


def test_strictly_right_objects_get_full_marks(cases):
    """Where strict holds, the count and the objects earn 1: graded is 1, or above 2.5 / 3."""
    specs, _, seen = cases
    verdict = judge(seen, specs)
    related = torch.tensor([spec.relation is not None for spec in specs])
    assert torch.equal(verdict.graded[verdict.strict & ~related].unique(), torch.ones(1))
    assert (verdict.graded[verdict.strict & related] > 2.5 / 3).all()


def test_graded_below_1_without_a_relation_is_not_strict(cases):
    specs, _, seen = cases
    verdict = judge(seen, specs)
    related = torch.tensor([spec.relation is not None for spec in specs])
    assert not verdict.strict[(verdict.graded < 1) & ~related].any()
    assert verdict.strict[(verdict.graded == 1) & ~related].all()


def test_a_relation_to_a_missing_object_earns_nothing():
    """One of two objects: count 1/2, objects 1/2, relation 0, wherever the object stands."""
    circle = SHAPES.index("circle")
    rng = np.random.default_rng(11)
    places = [(4, 4), (28, 4), (4, 28), (28, 28), (16, 16)]
    seen = detections([[(circle, 0, 4.0, *place)] for place in places], rng)
    for relation in ("left of", "right of", "above", "below"):
        specs = [parse(f"a circle {relation} a square")] * len(places)
        assert judge(seen, specs).graded.tolist() == pytest.approx([1 / 3] * len(places))


def test_what_empty_slots_hold_does_not_matter(cases):
    specs, pictures, seen = cases
    other = detections(pictures, np.random.default_rng(12))
    other = replace(
        other, overlap=torch.where(seen.present[..., None], seen.overlap, other.overlap)
    )
    one, two = judge(seen, specs), judge(other, specs)
    assert torch.equal(one.strict, two.strict)
    assert torch.equal(one.graded, two.graded)
