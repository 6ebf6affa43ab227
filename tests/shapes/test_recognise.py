"""Recognition: pictures with known objects, painted block by block or rendered from scenes."""

import numpy as np
import pytest
import torch

from entroflow.shapes.grammar import COLORS, SHAPES, SKILLS, SPLITS, draw, parse
from entroflow.shapes.recognise import MOST_DETECTED, SMALLEST_AREA, Detections, recognise
from entroflow.shapes.scenes import PALETTE, RESOLUTION, SIZE_BOUNDARY, Scenes, lay_out, render

SQUARE, CIRCLE, RED, BLUE = SHAPES.index("square"), SHAPES.index("circle"), 0, 2


def canvas(level=0.9):
    return torch.full((3, RESOLUTION, RESOLUTION), level)


def paint(image, x, y, width, height, color):
    """Paint whole pixels with a palette colour; x and y are the upper left corner."""
    image[:, y : y + height, x : x + width] = PALETTE[color][:, None, None]
    return image


def one_object(shape, color, radius, x, y, background=0.9):
    return render(
        Scenes(
            center=torch.tensor([[[x, y]]]),
            radius=torch.tensor([[radius]]),
            shape=torch.tensor([[SHAPES.index(shape)]]),
            color=torch.tensor([[color]]),
            present=torch.tensor([[True]]),
            tint=torch.zeros(1, 1, 3),
            background=torch.full((1, 3), background),
        )
    )


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    specs = [draw(rng, split, [skill]) for split in SPLITS for skill in SKILLS for _ in range(50)]
    scenes = lay_out(specs, rng)
    return scenes, render(scenes)


def test_every_object_of_a_scene_is_found_as_it_is(drawn):
    """Number, shape, colour, place and size, the objects compared nearest to nearest."""
    scenes, images = drawn
    seen = recognise(images)
    assert torch.equal(seen.count, scenes.present.sum(dim=1))
    for b, there in enumerate(scenes.present):
        for k in torch.where(there)[0]:
            distance = (seen.center[b] - scenes.center[b, k]).norm(dim=1)
            distance[~seen.present[b]] = torch.inf
            nearest = distance.argmin()
            assert distance[nearest] < 0.4
            assert seen.shape[b, nearest] == scenes.shape[b, k]
            assert seen.color[b, nearest] == scenes.color[b, k]
            assert abs(seen.radius[b, nearest] - scenes.radius[b, k]) < 0.35


def test_detections_are_largest_first_and_padded_at_the_end(drawn):
    _, images = drawn
    seen = recognise(images)
    assert seen.present.shape == (len(images), MOST_DETECTED)
    assert (seen.present[:, :-1] >= seen.present[:, 1:]).all()
    # A shape of radius r covers a fixed multiple of its square.
    area = seen.radius.square() * torch.tensor([3.1416, 3.0976, 1.748, 2.3616, 2.3562])[seen.shape]
    area = area.where(seen.present, torch.zeros(()))
    assert (area[:, :-1] >= area[:, 1:] - 1e-3).all()


def test_a_painted_block_is_a_square_of_its_area_and_centre():
    """8 x 8 whole pixels: centre exact, radius 4 / 0.88, overlap with its own template 1."""
    seen = recognise(paint(canvas(), 6, 16, 8, 8, BLUE)[None])
    assert seen.count.tolist() == [1]
    assert seen.shape[0, 0] == SQUARE
    assert seen.color[0, 0] == BLUE
    assert seen.center[0, 0].tolist() == pytest.approx([10, 20], abs=1e-4)
    assert seen.radius[0, 0].item() == pytest.approx(4 / 0.88, abs=1e-4)
    assert seen.overlap[0, 0, SQUARE].item() == pytest.approx(1, abs=1e-4)
    assert seen.background[0].tolist() == pytest.approx([0.9] * 3)
    expected = torch.zeros(RESOLUTION, RESOLUTION, dtype=torch.bool)
    expected[16:24, 6:14] = True
    assert torch.equal(seen.solid[0], expected)


def test_overlap_is_intersection_over_union_with_a_shape_of_the_same_area():
    """A block against the circle of its area, both sampled finely."""
    seen = recognise(paint(canvas(), 6, 16, 8, 8, BLUE)[None])
    at = (np.arange(800) + 0.5) / 100 * 1.5 - 6
    block = (abs(at[None]) < 4) & (abs(at[:, None]) < 4)
    circle = np.hypot(at[None], at[:, None]) < (64 / np.pi) ** 0.5
    expected = (block & circle).sum() / (block | circle).sum()
    assert seen.overlap[0, 0, CIRCLE].item() == pytest.approx(expected, abs=0.05)


def test_an_object_like_no_shape_is_found_without_a_shape():
    """A bar of 2 x 20 pixels."""
    seen = recognise(paint(canvas(), 6, 16, 20, 2, RED)[None])
    assert seen.count.tolist() == [1]
    assert seen.shape[0, 0] == -1
    assert seen.center[0, 0].tolist() == pytest.approx([16, 17], abs=1e-4)


@pytest.mark.parametrize(("width", "found"), [(2, 0), (3, 1)])
def test_specks_are_ignored(width, found):
    """A block of 2 x 2 pixels is below the smallest area, one of 3 x 3 above."""
    assert 2 * 2 < SMALLEST_AREA < 3 * 3
    seen = recognise(paint(canvas(), 10, 10, width, width, RED)[None])
    assert seen.count.tolist() == [found]


def test_only_the_largest_are_read():
    """Nine blocks, one of them small: the eight large ones are kept."""
    image = canvas()
    for index in range(9):
        side = 3 if index == 4 else 5
        paint(image, 2 + 10 * (index % 3), 2 + 10 * (index // 3), side, side, index % 7)
    seen = recognise(image[None])
    assert seen.count.tolist() == [MOST_DETECTED]
    assert (seen.radius[0] > 2.5).all()


def test_touching_objects_of_one_colour_are_one_and_of_two_colours_two():
    pair = torch.stack([paint(canvas(), 6, 12, 8, 8, RED) for _ in range(2)])
    paint(pair[0], 14, 12, 8, 8, RED)
    paint(pair[1], 14, 12, 8, 8, BLUE)
    seen = recognise(pair)
    assert seen.count.tolist() == [1, 2]
    assert sorted(seen.color[1, :2].tolist()) == [RED, BLUE]


def test_objects_that_meet_at_a_corner_only_are_two():
    image = paint(paint(canvas(), 6, 6, 6, 6, RED), 12, 12, 6, 6, RED)
    assert recognise(image[None]).count.tolist() == [2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", range(len(COLORS)))
def test_every_shape_in_every_colour_on_light_and_grey(shape, color):
    for background in (0.97, 0.85, 0.45):
        image = one_object(shape, color, 5.0, 15.3, 16.8, background)
        seen = recognise(image)
        assert seen.count.tolist() == [1]
        assert (seen.shape[0, 0], seen.color[0, 0]) == (SHAPES.index(shape), color)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_seen_moves_with_the_picture(shape):
    """A shift by whole pixels shifts the centre by as many and changes nothing else."""
    image = one_object(shape, RED, 4.6, 13.4, 14.1)
    one, two = recognise(image), recognise(image.roll((5, -3), dims=(2, 3)))
    torch.testing.assert_close(
        two.center - one.center,
        torch.tensor([-3.0, 5.0]).expand(1, 8, 2) * one.present[..., None],
        atol=1e-4,
        rtol=0,
    )
    torch.testing.assert_close(two.radius, one.radius, atol=1e-4, rtol=0)
    assert torch.equal(two.shape, one.shape)


def test_what_is_seen_turns_over_with_the_picture(drawn):
    """Mirrored left to right, x becomes 32 - x and everything else stays."""
    _, images = drawn
    one, two = recognise(images), recognise(images.flip(3))
    assert torch.equal(one.count, two.count)
    for b in range(len(images)):
        n = int(one.count[b])
        for k in range(n):
            mirrored = torch.tensor([RESOLUTION - one.center[b, k, 0], one.center[b, k, 1]])
            match = (two.center[b, :n] - mirrored).norm(dim=1).argmin()
            assert (two.center[b, match] - mirrored).norm() < 1e-3
            assert two.color[b, match] == one.color[b, k]
            assert two.shape[b, match] == one.shape[b, k]


def test_a_batch_is_read_image_by_image(drawn):
    """Permuting the batch permutes what is seen; alone, an image is seen as in company."""
    _, images = drawn
    images = images[::9]
    together = recognise(images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    permuted = recognise(images[order])
    for name in Detections.__dataclass_fields__:
        whole = getattr(together, name)
        torch.testing.assert_close(getattr(permuted, name), whole[order], atol=1e-5, rtol=0)
        for b in range(0, len(images), 10):
            alone = getattr(recognise(images[b : b + 1]), name)
            torch.testing.assert_close(alone[0], whole[b], atol=1e-5, rtol=0)


def test_images_are_only_read():
    """No gradient is asked for, and the input keeps its values."""
    image = one_object("ring", RED, 5.0, 16.0, 16.0).requires_grad_()
    before = image.detach().clone()
    seen = recognise(image)
    assert torch.equal(image, before)
    assert not seen.center.requires_grad


def test_no_images_are_no_detections():
    assert recognise(torch.zeros(0, 3, 32, 32)).present.shape == (0, MOST_DETECTED)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 16, 16), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_other_shapes_than_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"reads images \[B, 3, 32, 32\], not"):
        recognise(torch.zeros(shape))


@pytest.mark.parametrize("level", [0.0, 0.06, 0.5, 1.0])
def test_an_empty_picture_has_no_objects(level):
    seen = recognise(canvas(level)[None].repeat(2, 1, 1, 1))
    assert seen.count.tolist() == [0, 0]


def test_a_picture_all_in_one_palette_colour_is_all_background():
    images = PALETTE[:, :, None, None].repeat(1, 1, RESOLUTION, RESOLUTION)
    assert not recognise(images).solid.any()


def test_speckle_too_faint_to_see_is_no_object_on_a_background_near_the_palette():
    """Noise of 0.001 on each palette colour."""
    generator = torch.Generator().manual_seed(0)
    images = PALETTE[:, :, None, None].repeat(1, 1, RESOLUTION, RESOLUTION)
    images = images + 1e-3 * torch.randn(images.shape, generator=generator)
    assert recognise(images.clamp(0, 1)).count.sum() == 0


def test_an_expanded_picture_is_read_as_its_copy():
    """A view that repeats one pixel without copying it."""
    view = torch.rand(3, generator=torch.Generator().manual_seed(0))[None, :, None, None]
    view = view.expand(2, 3, RESOLUTION, RESOLUTION)
    assert torch.equal(recognise(view).background, recognise(view.contiguous()).background)


def test_recognition_agrees_with_captions_of_every_colour_and_size():
    """'a small red ring' and its kin: the size is told by the radius."""
    rng = np.random.default_rng(1)
    for size in ("small", "large"):
        specs = [parse(f"a {size} {color} {shape}") for color in COLORS for shape in SHAPES]
        seen = recognise(render(lay_out(specs, rng)))
        assert ((seen.radius[:, 0] > SIZE_BOUNDARY) == (size == "large")).all()
        assert [SHAPES[i] for i in seen.shape[:, 0]] == [s.things[0].shape for s in specs]
        assert [COLORS[i] for i in seen.color[:, 0]] == [s.things[0].color for s in specs]
