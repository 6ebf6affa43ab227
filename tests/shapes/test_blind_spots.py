"""The monitors of what the scorer can't see, against closed forms on painted pictures."""

import math

import numpy as np
import pytest
import torch

from entroflow.evaluation.image_statistics import diversity
from entroflow.shapes.blind_spots import background_texture, contrast
from entroflow.shapes.grammar import SKILLS, SPLITS, draw, parse
from entroflow.shapes.scenes import PALETTE, RESOLUTION, Scenes, lay_out, render
from entroflow.shapes.scoring import score


def plain(level=0.9):
    return torch.full((1, 3, RESOLUTION, RESOLUTION), level)


def dots(amplitude):
    """49 single pixels, 4 apart and off the frame."""
    image = torch.zeros(RESOLUTION, RESOLUTION)
    image[2:28:4, 2:28:4] = amplitude
    return image


DOT_TEXTURE = math.sqrt(49 * 8 / 9) / RESOLUTION
"""A dot is 8/9 off its 3x3 mean, its 8 neighbours 1/9: together (64 + 8) / 81 = 8/9."""


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    specs = [draw(rng, split, [skill]) for split in SPLITS for skill in SKILLS for _ in range(5)]
    return specs, render(lay_out(specs, rng))


def test_rendered_scenes_have_no_texture(drawn):
    _, images = drawn
    assert background_texture(images).max() < 1e-5


@pytest.mark.parametrize("amplitude", [0.005, 0.02, -0.02, 0.08])
def test_texture_of_a_dot_pattern_is_its_closed_form(amplitude):
    """On an empty picture; dots brighter or darker alike."""
    texture = background_texture(plain() + dots(amplitude))
    assert texture.item() == pytest.approx(abs(amplitude) * DOT_TEXTURE, rel=1e-3)


@pytest.mark.parametrize("color", range(len(PALETTE)))
@pytest.mark.parametrize("size", [1, 2])
def test_dots_as_strong_as_an_object_but_too_small_for_the_score_are_texture(color, size):
    """The strict score stays 1, so this monitor alone can see them."""
    spec = parse("a large blue circle")
    image = render(lay_out([spec], np.random.default_rng(0)))
    dotted = image.clone()
    near = torch.nn.functional.max_pool2d((image - image[:, :, :1, :1]).abs().amax(1), 9, 1, 4)
    for y in range(2, 29, 6):
        for x in range(2, 29, 6):
            if near[0, y, x] < 0.1:
                dotted[0, :, y : y + size, x : x + size] = PALETTE[color][:, None, None]
    assert score(torch.cat([image, dotted]), [spec, spec]).strict.all()
    assert background_texture(image).item() < 1e-5
    assert background_texture(dotted).item() > 0.05


def test_texture_is_the_root_mean_square_over_the_channels():
    image = plain()
    image[:, 1] += dots(0.03)
    assert background_texture(image).item() == pytest.approx(
        0.03 * DOT_TEXTURE / math.sqrt(3), rel=1e-3
    )


def test_texture_grows_linearly_on_scenes_and_the_score_does_not_see_it(drawn):
    """Within 2% of proportional on every scene, near the closed form; strict stays."""
    specs, images = drawn
    amplitudes = (0.01, 0.03, 0.09)
    slopes = torch.stack([background_texture(images + dots(a)) / a for a in amplitudes])
    torch.testing.assert_close(slopes, slopes.mean(dim=0).expand_as(slopes), rtol=0.02, atol=0)
    assert slopes.mean().item() == pytest.approx(DOT_TEXTURE, rel=0.1)
    strict = score((images + dots(0.04)).clamp(0, 1), specs).strict
    assert strict.double().mean() > 0.99


def test_a_slope_or_a_tint_of_the_background_is_no_texture():
    """A 3x3 mean keeps a linear ramp, but for the frame."""
    ramp = torch.linspace(-0.02, 0.02, RESOLUTION)
    tinted = plain() + torch.tensor([0.02, -0.03, 0.01])[:, None, None]
    assert background_texture(tinted).item() < 1e-6
    # Off the mean by half a step in the two outer columns of 32.
    step = 0.04 / 31
    expected = math.sqrt(2 / 32) * step / 2
    assert background_texture(tinted + ramp).item() == pytest.approx(expected, rel=1e-2)


def test_texture_within_and_next_to_an_object_is_not_counted():
    """A mark inside the object or two pixels from it leaves 0, three pixels away it counts."""
    image = plain()
    image[:, :, 12:20, 12:20] = PALETTE[2][:, None, None]
    inside, next_to, away = image.clone(), image.clone(), image.clone()
    inside[:, :, 15, 15] += 0.05
    next_to[:, :, 15, 21] += 0.05
    away[:, :, 15, 22] += 0.05
    assert background_texture(inside).item() < 1e-6
    assert background_texture(next_to).item() < 1e-6
    assert background_texture(away).item() > 1e-4


def test_no_background_is_not_a_number():
    """Black stripes four pixels apart leave no pixel that is three away from one."""
    image = plain()
    image[:, :, :, 31] = PALETTE[6][:, None]
    image[:, :, :, ::4] = PALETTE[6][:, None, None]
    texture = background_texture(torch.cat([image, plain()]))
    assert texture.isnan().tolist() == [True, False]


@pytest.mark.parametrize("color", range(len(PALETTE)))
@pytest.mark.parametrize("level", [0.95, 0.85])
def test_contrast_of_a_painted_block_is_the_distance_of_its_colour(color, level):
    image = plain(level)
    image[:, :, 8:16, 8:16] = PALETTE[color][:, None, None]
    expected = np.sqrt(np.mean((PALETTE[color].numpy() - level) ** 2))
    assert contrast(image).item() == pytest.approx(expected, rel=1e-5)


def test_contrast_averages_over_the_pixels_of_all_objects():
    """A black block of 64 pixels and a red one of 16."""
    image = plain()
    image[:, :, 4:12, 4:12] = PALETTE[6][:, None, None]
    image[:, :, 20:24, 20:24] = PALETTE[0][:, None, None]
    black, red = ((PALETTE[[6, 0]] - 0.9).square().mean(dim=1).sqrt()).tolist()
    assert contrast(image).item() == pytest.approx((64 * black + 16 * red) / 80, rel=1e-5)


def test_contrast_of_a_rendered_scene_of_one_object():
    """Pixels at the edge count by their coverage, so a tenth may be missing, nothing added."""
    specs = [parse("a large circle")] * 40
    scenes = lay_out(specs, np.random.default_rng(1))
    color = PALETTE[scenes.color[:, 0]] + scenes.tint[:, 0]
    full = (color.clamp(0, 1) - scenes.background).square().mean(dim=1).sqrt()
    share = contrast(render(scenes)) / full
    assert (share <= 1 + 1e-5).all()
    assert (share > 0.9).all()


def test_contrast_shrinks_with_the_difference_to_the_background():
    """A square on the pixel grid, drawn in full and at three quarters of its colour."""
    scene = Scenes(
        center=torch.tensor([[[10.0, 20.0]]]),
        radius=torch.tensor([[4 / 0.88]]),
        shape=torch.tensor([[1]]),
        color=torch.tensor([[6]]),
        present=torch.tensor([[True]]),
        tint=torch.zeros(1, 1, 3),
        background=torch.full((1, 3), 0.9),
    )
    full = render(scene)
    faint = 0.9 + 0.75 * (full - 0.9)
    assert contrast(faint).item() == pytest.approx(0.75 * contrast(full).item(), rel=1e-4)


def test_no_object_is_not_a_number():
    image = plain()
    image[:, :, 8:16, 8:16] = PALETTE[0][:, None, None]
    assert contrast(torch.cat([plain(), image])).isnan().tolist() == [True, False]


def test_diversity_of_identical_pictures_is_0(drawn):
    _, images = drawn
    repeated = images[:5].repeat_interleave(3, dim=0)
    assert diversity(repeated, torch.arange(5).repeat_interleave(3)).tolist() == [0] * 5


def test_diversity_of_two_constant_pictures_is_their_difference():
    pair = torch.cat([plain(0.9), plain(0.4)])
    assert diversity(pair, torch.tensor([7, 7])).tolist() == pytest.approx([0.5], rel=1e-6)


def test_diversity_is_a_mean_over_pairs_then_over_prompts():
    """Levels 0, 0.3, 0.9 of one prompt and 0.2, 0.3 of another; a single picture is left out."""
    levels = [0.0, 0.2, 0.3, 0.9, 0.3, 0.6]
    prompt = torch.tensor([4, 9, 4, 4, 9, 1])
    images = torch.cat([plain(level) for level in levels])
    expected = ((0.3 + 0.9 + 0.6) / 3 + 0.1) / 2
    assert diversity(images, prompt).nanmean().item() == pytest.approx(expected, rel=1e-5)


def test_diversity_without_two_pictures_of_a_prompt_is_not_a_number():
    images = torch.rand(3, 3, RESOLUTION, RESOLUTION)
    assert diversity(images, torch.tensor([0, 1, 2])).isnan().tolist() == [True] * 3
    assert len(diversity(images[:0], torch.tensor([], dtype=torch.long))) == 0


@pytest.mark.parametrize("monitor", [background_texture, contrast])
def test_a_monitor_looks_at_every_picture_alone(monitor, drawn):
    _, images = drawn
    images = (images + dots(0.02)).clamp(0, 1)[::8]
    alone = torch.cat([monitor(image[None]) for image in images])
    torch.testing.assert_close(monitor(images), alone, atol=1e-6, rtol=1e-5)


def test_texture_takes_pictures_of_other_precision():
    image = (plain() + dots(0.05)).double()
    assert background_texture(image).item() == pytest.approx(0.05 * DOT_TEXTURE, rel=1e-3)
