"""Image statistics against their closed forms on pictures that are known pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from entroflow.evaluation.image_statistics import (
    black,
    brightness,
    colors,
    detail,
    diversity,
    edges,
    saturated,
    statistics,
    white,
)


def flat(red, green, blue, side=8):
    return torch.tensor([red, green, blue]).reshape(1, 3, 1, 1).expand(1, 3, side, side)


def test_a_flat_picture_has_the_luma_of_its_colour_and_nothing_else():
    images = torch.cat([flat(1.0, 0, 0), flat(0, 1.0, 0), flat(0, 0, 1.0), flat(0.25, 0.25, 0.25)])
    assert brightness(images).tolist() == pytest.approx([0.299, 0.587, 0.114, 0.25])
    assert saturated(images).tolist() == [1, 1, 1, 0]
    for nothing in (black, white, edges, colors):
        assert nothing(images).tolist() == [0, 0, 0, 0], nothing
    assert detail(images).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_light_gray_is_not_white_nor_dark_gray_black():
    """A background that is a little lighter than before has lost nothing."""
    images = torch.cat([flat(*3 * [level]) for level in (0.0, 0.015, 0.03, 0.96, 0.985, 1.0)])
    assert black(images).tolist() == [1, 1, 0, 0, 0, 0]
    assert white(images).tolist() == [0, 0, 0, 0, 1, 1]


def test_shares_of_pixels_are_counted():
    """Of 16 pixels 4 are black, 4 white, 2 of a pure red, and the rest gray."""
    image = torch.full((1, 3, 4, 4), 0.5)
    image[..., 0, :], image[..., 1, :] = 0, 1
    image[:, :, 2, :2] = torch.tensor([1.0, 0, 0])[:, None]
    assert (black(image).item(), white(image).item()) == (4 / 16, 4 / 16)
    assert saturated(image).item() == 2 / 16
    shares = np.array([4, 4, 2, 6]) / 16
    assert colors(image).item() == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-6)


def test_all_colours_alike_have_six_bits():
    level = (torch.arange(4) + 0.5) / 4
    image = torch.stack(torch.meshgrid(level, level, level, indexing="ij")).reshape(1, 3, 8, 8)
    assert colors(image).item() == pytest.approx(6, abs=1e-5)
    assert colors(torch.ones(1, 3, 2, 2)).item() == 0, "1 is of the highest level, not beyond"


def test_edges_are_where_neighbours_differ():
    """A vertical line parts a picture: of the seven pixels of each row one has it to its right."""
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 0.5
    assert edges(image).item() == pytest.approx(1 / 7)
    assert edges(image.mT).item() == pytest.approx(1 / 7)
    image[..., 4:] = 0.09
    assert edges(image).item() == 0


def test_diversity_is_of_each_prompt_that_occurs():
    """Between images of two values the distance is their difference; one image has none."""
    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.1, 0.5, 0.3, 0.9)])
    found = diversity(images, torch.tensor([0, 4, 0, 2]))
    assert found[0].item() == pytest.approx(0.2, abs=1e-6)
    assert found[1:].isnan().all()
    assert len(found) == 3


def test_all_statistics_are_of_each_image_and_prompt():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = statistics(images, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert {name: len(values) for name, values in found.items()} == {
        **dict.fromkeys(
            ("brightness", "black", "white", "saturated", "edges", "detail", "colors"), 6
        ),
        "diversity": 2,
    }
    assert all(values.isfinite().all() for values in found.values())


def test_detail_is_what_a_mean_filter_removes():
    """Against scipy; inside, where no border matters, and with a border that counts no pixels."""
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    luma = np.einsum("bchw,c->bhw", images.double().numpy(), [0.299, 0.587, 0.114])
    box = np.ones((3, 3))
    for picture, found in zip(luma, detail(images).tolist(), strict=True):
        total = scipy.ndimage.convolve(picture, box, mode="constant")
        counted = scipy.ndimage.convolve(np.ones_like(picture), box, mode="constant")
        assert found == pytest.approx(np.sqrt(np.mean((picture - total / counted) ** 2)), rel=1e-5)


def test_a_checkerboard_has_more_detail_than_large_squares():
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    fine = ((rows + columns) % 2).float().expand(1, 3, 16, 16)
    coarse = ((rows // 8 + columns // 8) % 2).float().expand(1, 3, 16, 16)
    assert detail(fine).item() > 2 * detail(coarse).item() > 0
    assert brightness(fine).item() == pytest.approx(brightness(coarse).item())
