"""Pictures for people: what stands where in a grid, and files that are whole."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from entroflow import pictures, writing

GAP, SCALE, SIDE = 6, 4, 32
GREEN, RED, WHITE = (42, 157, 74), (209, 73, 91), (255, 255, 255)


def images(n, side=SIDE, seed=0):
    """Random bytes as images in [0, 1]."""
    values = np.random.default_rng(seed).integers(0, 256, (n, 3, side, side))
    return torch.from_numpy(values / 255)


def pixels(image):
    """[H, W, 3] bytes of one image, by hand."""
    return np.round(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def enlarged(image, scale=SCALE):
    return pixels(image).repeat(scale, axis=0).repeat(scale, axis=1)


def cells(sheet, n, columns, side=SIDE, scale=SCALE):
    """The part of every image in the sheet, and what is below it."""
    rows = -(-n // columns)
    table = np.asarray(sheet)
    height = (table.shape[0] - GAP) // rows
    size = side * scale
    for i in range(n):
        top, left = GAP + i // columns * height, GAP + i % columns * (size + GAP)
        column = table[top : top + height, left : left + size]
        yield column[:size], column[size:]


def test_png_holds_every_pixel():
    image = images(1)[0]
    with Image.open(io.BytesIO(pictures.to_png(image))) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), pixels(image))


def test_values_outside_of_0_and_1_are_cut_and_others_rounded():
    image = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0]).reshape(1, 1, 6)
    with Image.open(io.BytesIO(pictures.to_png(image.expand(3, 1, 6)))) as picture:
        assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_images_of_any_precision_with_gradients_are_taken(dtype):
    image = torch.ones(3, 2, 2, dtype=dtype, requires_grad=True)
    assert pictures.to_png(image) == pictures.to_png(torch.ones(3, 2, 2))


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (3, 2), (4, 2), (2, 5)])
@pytest.mark.parametrize("decorated", [False, True])
def test_a_grid_shows_every_image_whole(n, columns, decorated):
    """Row by row, each pixel four times as wide and high, whatever is written below."""
    given = images(n)
    captions = ["a long caption that needs three lines or even more " * 2, "short"] * n
    options = {"captions": captions[:n], "passed": ([True, False] * n)[:n]} if decorated else {}
    sheet = pictures.grid(given, columns, **options)
    assert sheet.width == columns * (SIDE * SCALE + GAP) + GAP
    for image, (shown, below) in zip(given, cells(sheet, n, columns), strict=True):
        assert np.array_equal(shown, enlarged(image))
        assert decorated == (below != 255).any()
        # Nothing reaches into the gap above the next row.
        assert (below[-GAP:] == 255).all()


def test_a_bar_is_green_where_right_and_red_where_not():
    """And absent where nobody knows."""
    passed = [True, False, None]
    for right, (_, below) in zip(
        passed, cells(pictures.grid(images(3), 2, passed=passed), 3, 2), strict=True
    ):
        assert (below[:3] == {True: GREEN, False: RED, None: WHITE}[right]).all()
        assert (below[3:] == WHITE).all()


def test_captions_stand_under_their_image():
    """Of two images only the second has a caption."""
    sheet = pictures.grid(images(2), 2, captions=["", "a ring"])
    (_, first), (_, second) = cells(sheet, 2, 2)
    assert (first == 255).all()
    assert (second < 128).any()


def test_long_captions_are_wrapped_within_their_column():
    """As wide as the image: nothing is written to the right of it, and every word is there."""
    caption = "a small red circle left of a large blue square"
    sheet = np.asarray(pictures.grid(images(1), 1, captions=[caption]))
    assert (sheet[:, -GAP:] == 255).all()
    font = pictures.ImageFont.load_default(size=11)
    lines = pictures._wrapped(caption, SIDE * SCALE, font)
    assert " ".join(lines) == caption
    assert len(lines) > 1
    assert all(font.getlength(line) <= SIDE * SCALE for line in lines)
    assert pictures._wrapped("unbreakable" * 9, SIDE * SCALE, font) == ["unbreakable" * 9]


def test_scale_and_size_of_images_are_free():
    given = images(2, side=5)
    sheet = pictures.grid(given, 2, scale=3)
    assert sheet.size == (2 * 15 + 3 * GAP, 15 + 2 * GAP)
    for image, (shown, _) in zip(given, cells(sheet, 2, 2, side=5, scale=3), strict=True):
        assert np.array_equal(shown, enlarged(image, 3))


@pytest.mark.parametrize(("side", "shown"), [(8, 128), (32, 128), (100, 100), (512, 512)])
def test_small_images_are_enlarged_and_large_ones_are_not(side, shown):
    assert pictures.grid(images(1, side=side), 1).size == (shown + 2 * GAP,) * 2


def test_a_picture_is_saved_whole_with_its_folder(tmp_path, monkeypatch):
    """A crash while writing leaves the old one."""
    path = tmp_path / "deep" / "sheet.png"
    first, second = (pictures.grid(images(1, seed=seed), 1) for seed in (0, 1))
    pictures.save(first, path)

    def crash(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", crash)
        with pytest.raises(OSError, match="disk full"):
            pictures.save(second, path)
    with Image.open(path) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(first))
    pictures.save(second, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]
    with Image.open(path) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(second))
