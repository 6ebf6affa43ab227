"""Scenes: anti-aliased coverage, placement, and what a caption leaves open."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from entroflow.shapes.grammar import COLORS, SHAPES, SKILLS, SPLITS, draw, parse
from entroflow.shapes.scenes import (
    AREA,
    MOST_OBJECTS,
    PALETTE,
    RESOLUTION,
    SIZE_BOUNDARY,
    Scenes,
    coverage,
    lay_out,
    pixel_axes,
    render,
)

# Area of each shape of radius 1, from its description, and the mean of the area over outlines moved
# outward by t in [-0.5, 0.5], which is area + c / 12 for an area that is quadratic in t.
UNIT_AREA = {
    "circle": math.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 3 * math.sqrt(3) * 0.58**2,
    "cross": 2 * (2 * 0.72) - 0.72**2,
    "ring": math.pi * (1 - 0.5**2),
}
CURVATURE = {
    "circle": math.pi,
    "square": 4,
    "triangle": 3 * math.sqrt(3),
    "cross": 4,
    "ring": 0,
}
RADII = (3.3, 4.0, 5.1, 6.6)


def covered(shape, radius, x0, y0):
    """[n] total coverage of one shape at n centres."""
    x, y = pixel_axes()
    centre = [torch.as_tensor(c, dtype=torch.float32)[:, None, None] for c in (x0, y0)]
    index = torch.tensor(SHAPES.index(shape))
    return coverage(index, torch.tensor(radius), x - centre[0], y - centre[1]).double()


def subpixel_centres(side=8):
    steps = (np.arange(side) + 0.5) / side + 15.5
    return [grid.ravel() for grid in np.meshgrid(steps, steps)]


def outline(shape, radius, points=240):
    """[points, 2] points on the outer outline of a shape at the origin, y down."""
    turn = np.linspace(0, 2 * np.pi, points, endpoint=False)
    if shape in ("circle", "ring"):
        return radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "square":
        corners = 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        at = np.deg2rad([-90, 30, 150])
        corners = 2 * 0.58 * np.stack([np.cos(at), np.sin(at)], axis=1)
    else:
        m = 0.36
        quarter = [(m, -1), (m, -m), (1, -m)]
        corners = np.array([(x, y) for x, y in quarter])
        turned = [corners]
        for _ in range(3):
            turned.append(np.stack([-turned[-1][:, 1], turned[-1][:, 0]], axis=1))
        corners = np.concatenate(turned)
    share = np.linspace(0, 1, points // len(corners), endpoint=False)[:, None, None]
    edges = corners * (1 - share) + np.roll(corners, -1, axis=0) * share
    return radius * edges.reshape(-1, 2)


@pytest.fixture(scope="module")
def drawn():
    """Specs of every skill and split, and their scenes."""
    rng = np.random.default_rng(0)
    specs = [draw(rng, split, [skill]) for split in SPLITS for skill in SKILLS for _ in range(100)]
    return specs, lay_out(specs, rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_the_closed_form(shape):
    assert AREA[SHAPES.index(shape)].item() == pytest.approx(UNIT_AREA[shape], rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", RADII)
def test_coverage_integrates_to_the_area(shape, radius):
    """The mean over subpixel offsets within 3% of the area, each single one within 5%."""
    total = covered(shape, radius, *subpixel_centres()).sum(dim=(1, 2))
    area = UNIT_AREA[shape] * radius**2
    assert total.mean().item() == pytest.approx(area, rel=0.03)
    assert total.numpy() == pytest.approx(np.full(64, area), rel=0.05)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", RADII)
def test_coverage_integrates_to_the_area_averaged_over_the_ramp(shape, radius):
    """A ramp one pixel wide adds c / 12 pixels, whatever the radius: within 0.1 pixels."""
    total = covered(shape, radius, *subpixel_centres()).sum(dim=(1, 2)).mean().item()
    area = UNIT_AREA[shape] * radius**2 + CURVATURE[shape] / 12
    assert total == pytest.approx(area, abs=0.1)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_1_deep_inside_0_outside_and_between_at_the_edge(shape):
    """Against point-in-polygon tests on 15 x 15 points per pixel, to what a ramp can be off."""
    radius, fine = 5.3, 15
    here = covered(shape, radius, [16.2], [15.7])[0].numpy()
    at = (np.arange(RESOLUTION * fine) + 0.5) / fine
    x, y = at[None, :] - 16.2, at[:, None] - 15.7
    inside = {
        "circle": np.hypot(x, y) < radius,
        "ring": (np.hypot(x, y) < radius) & (np.hypot(x, y) > 0.5 * radius),
        "square": (abs(x) < 0.88 * radius) & (abs(y) < 0.88 * radius),
        "cross": ((abs(x) < 0.36 * radius) & (abs(y) < radius))
        | ((abs(y) < 0.36 * radius) & (abs(x) < radius)),
        "triangle": (y < 0.58 * radius) & (abs(x) * math.sqrt(3) < y + 2 * 0.58 * radius),
    }[shape]
    true = inside.reshape(RESOLUTION, fine, RESOLUTION, fine).mean(axis=(1, 3))
    assert here.min() >= 0
    assert here.max() <= 1
    assert np.all(abs(here - true) < 0.4)
    assert abs(here - true).mean() < 0.005
    # Exact where no outline passes within a pixel's width.
    flat = ((true == 0) | (true == 1)) & (abs(here - true) > 0)
    assert abs(here - true)[flat].max(initial=0) < 0.3


@pytest.mark.parametrize("shape", SHAPES)
def test_the_origin_is_the_centroid(shape):
    x, y = pixel_axes()
    centres = subpixel_centres()
    here = covered(shape, 5.0, *centres)
    mass = here.sum(dim=(1, 2))
    off_x = (here * x).sum(dim=(1, 2)) / mass - torch.as_tensor(centres[0])
    off_y = (here * y).sum(dim=(1, 2)) / mass - torch.as_tensor(centres[1])
    assert abs(off_x).max() < 0.06
    assert abs(off_y).max() < 0.06


def test_scenes_hold_the_objects_of_their_captions(drawn):
    specs, scenes = drawn
    assert scenes.present.shape == (len(specs), MOST_OBJECTS)
    for b, spec in enumerate(specs):
        assert scenes.present[b].tolist() == [k < len(spec.objects) for k in range(MOST_OBJECTS)]
        for k, thing in enumerate(spec.objects):
            assert SHAPES[scenes.shape[b, k]] == thing.shape
            assert thing.color in (None, COLORS[scenes.color[b, k]])
            if thing.size:
                assert (thing.size == "large") == (scenes.radius[b, k].item() > SIZE_BOUNDARY)


def test_sizes_keep_away_from_the_boundary(drawn):
    """A stated size is off the boundary by half a pixel or more, so that it can be told."""
    specs, scenes = drawn
    sized = [(b, k) for b, s in enumerate(specs) for k, t in enumerate(s.objects) if t.size]
    radius = torch.stack([scenes.radius[b, k] for b, k in sized])
    assert len(radius) > 200
    assert (radius - SIZE_BOUNDARY).abs().min() > 0.5


def test_relations_hold(drawn):
    """The offset in the stated direction is positive and exceeds the one across."""
    specs, scenes = drawn
    seen = set()
    for b, spec in enumerate(specs):
        if spec.relation is None:
            continue
        seen.add(spec.relation)
        (x1, y1), (x2, y2) = scenes.center[b, :2].tolist()
        ahead, across = {
            "left of": (x2 - x1, y2 - y1),
            "right of": (x1 - x2, y2 - y1),
            "above": (y2 - y1, x2 - x1),
            "below": (y1 - y2, x2 - x1),
        }[spec.relation]
        assert ahead > abs(across) + 2
    assert len(seen) == 4


def outlines_of(scenes, b):
    return [
        outline(SHAPES[scenes.shape[b, k]], scenes.radius[b, k].item())
        + scenes.center[b, k].numpy()
        for k in torch.where(scenes.present[b])[0]
    ]


def test_objects_never_touch(drawn):
    """Distance of the outer outlines, as polygons."""
    _, scenes = drawn
    for b in range(len(scenes.radius)):
        for one, other in itertools.combinations(outlines_of(scenes, b), 2):
            assert cdist(one, other).min() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_are_inside_the_frame(shape):
    """Large ones, which reach out furthest: no point of the outline is outside the picture."""
    scenes = lay_out([parse(f"a large {shape}")] * 3000, np.random.default_rng(4))
    for b in range(3000):
        (points,) = outlines_of(scenes, b)
        assert points.min() >= 0
        assert points.max() <= RESOLUTION


def test_no_pixel_is_half_covered_by_two_objects(drawn):
    _, scenes = drawn
    x, y = pixel_axes()
    part = coverage(
        scenes.shape[:, :, None, None],
        scenes.radius[:, :, None, None],
        x - scenes.center[:, :, 0, None, None],
        y - scenes.center[:, :, 1, None, None],
    )
    solid = (part > 0.5) & scenes.present[:, :, None, None]
    assert solid.sum(dim=1).max() == 1


def test_what_a_caption_leaves_open_varies():
    """Colour uniform (chi-square), small and large, places everywhere, tint and background."""
    rng = np.random.default_rng(1)
    scenes = lay_out([parse("a ring")] * 2000, rng)
    colors = np.bincount(scenes.color[:, 0].numpy(), minlength=len(COLORS))
    assert stats.chisquare(colors).pvalue > 1e-3
    large = (scenes.radius[:, 0] > SIZE_BOUNDARY).double().mean().item()
    assert 0.25 < large < 0.75
    where = scenes.center[:, 0].numpy()
    occupied = np.histogram2d(where[:, 0], where[:, 1], bins=4, range=[[0, 32], [0, 32]])[0]
    assert occupied.min() > 0
    for part in (scenes.tint[:, 0], scenes.background):
        assert part.std(dim=0).min() > 0.005


def test_the_colours_of_counted_objects_are_drawn_one_by_one():
    scenes = lay_out([parse("four rings")] * 500, np.random.default_rng(2))
    same = (scenes.color[:, :1] == scenes.color[:, 1:]).double().mean().item()
    assert same == pytest.approx(1 / 7, abs=4 * math.sqrt(6 / 49 / 1500))


def test_the_background_is_light_and_far_from_every_palette_colour():
    scenes = lay_out([parse("a ring")] * 500, np.random.default_rng(3))
    distance = (scenes.background[:, None] - PALETTE).norm(dim=2)
    assert distance.min() > 0.5


def test_lay_out_is_a_pure_function_of_the_generator():
    specs = [parse("a red ring above a blue cross"), parse("three squares")]
    one, two = (lay_out(specs, np.random.default_rng(5)) for _ in range(2))
    for name in Scenes.__dataclass_fields__:
        assert torch.equal(getattr(one, name), getattr(two, name))


def block_scene(**changes):
    """One square of half width 4 pixels centred at (10, 20): it covers whole pixels only."""
    values = {
        "center": torch.tensor([[[10.0, 20.0]]]),
        "radius": torch.tensor([[4 / 0.88]]),
        "shape": torch.tensor([[1]]),
        "color": torch.tensor([[2]]),
        "present": torch.tensor([[True]]),
        "tint": torch.zeros(1, 1, 3),
        "background": torch.full((1, 3), 0.9),
    }
    return Scenes(**(values | changes))


def test_a_square_on_the_pixel_grid_is_a_block_of_its_colour():
    """x is the column, y the row, and nothing else is painted."""
    expected = torch.full((1, 3, RESOLUTION, RESOLUTION), 0.9)
    expected[:, :, 16:24, 6:14] = PALETTE[2][:, None, None]
    torch.testing.assert_close(render(block_scene()), expected, atol=1e-5, rtol=0)


def test_tint_is_added_to_the_colour_and_cut_to_the_range():
    tint = torch.tensor([[[0.02, -0.5, 0.9]]])
    image = render(block_scene(tint=tint))
    torch.testing.assert_close(
        image[0, :, 20, 10], (PALETTE[2] + tint[0, 0]).clamp(0, 1), atol=1e-5, rtol=0
    )
    assert image.min() >= 0
    assert image.max() <= 1


def test_absent_objects_are_not_painted():
    image = render(block_scene(present=torch.tensor([[False]])))
    assert torch.equal(image, torch.full_like(image, 0.9))


def test_pixels_lie_between_background_and_colour(drawn):
    """Coverage of an anti-aliased pixel: a share of the one colour, the rest background."""
    _, scenes = drawn
    images = render(scenes)
    assert images.shape == (len(scenes.radius), 3, RESOLUTION, RESOLUTION)
    assert images.dtype == torch.float32
    colors = (PALETTE[scenes.color] + scenes.tint).where(
        scenes.present[:, :, None], scenes.background[:, None]
    )
    low = torch.minimum(colors.amin(dim=1), scenes.background).clamp(0, 1)
    high = torch.maximum(colors.amax(dim=1), scenes.background).clamp(0, 1)
    assert (images >= low[:, :, None, None] - 1e-6).all()
    assert (images <= high[:, :, None, None] + 1e-6).all()
