"""Image statistics against their closed forms on pictures that are known pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from entroflow.evaluation.image_statistics import brightness, contrast, detail, saturation


def flat(red, green, blue, side=8):
    return torch.tensor([red, green, blue]).reshape(1, 3, 1, 1).expand(1, 3, side, side)


def test_a_flat_picture_has_the_luma_of_its_colour_and_nothing_else():
    images = torch.cat([flat(1.0, 0, 0), flat(0, 1.0, 0), flat(0, 0, 1.0), flat(0.25, 0.25, 0.25)])
    assert brightness(images).tolist() == pytest.approx([0.299, 0.587, 0.114, 0.25])
    assert contrast(images).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert saturation(images).tolist() == [1, 1, 1, 0]
    assert detail(images).tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_half_black_half_white_has_the_most_contrast():
    images = torch.zeros(1, 3, 4, 4)
    images[..., 2:] = 1
    assert contrast(images).item() == pytest.approx(0.5)
    assert brightness(images).item() == pytest.approx(0.5)


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
    assert contrast(fine).item() == pytest.approx(contrast(coarse).item())
