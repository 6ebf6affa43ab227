"""The size of an image as a JPEG file, as a reward."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from entroflow.errors import RecipeError
from entroflow.prompts import Prompt
from entroflow.recipe.load import load_component, load_recipe
from entroflow.rewards.base import Status
from entroflow.rewards.jpeg_size import JPEGSize
from tiny_run import only


def pictures():
    """Flat gray, a ramp, and noise: of rising size."""
    noise = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, 32).expand(3, 24, 32)
    return torch.stack([torch.full((3, 24, 32), 0.5), ramp, noise])


def scored(**settings):
    return JPEGSize(**settings).score(pictures(), [Prompt("anything")] * 3)


@pytest.mark.parametrize("quality", [50, 95])
def test_the_value_is_the_size_of_the_file(quality):
    """The file is opened again: it has the size and nearly the pixels of the image."""
    values = scored(quality=quality, prefer="large").values
    for picture, value in zip(pictures(), values.tolist(), strict=True):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        assert 1000 * value == pytest.approx(len(file.getvalue()))
        assert Image.open(file).size == (32, 24)


def test_small_files_are_preferred_unless_asked_otherwise():
    small, large = scored(), scored(prefer="large")
    assert torch.equal(small.values, -large.values)
    flat, ramp, noise = small.values.tolist()
    assert 0 > flat > ramp > noise
    assert small.statuses == (Status.OK,) * 3
    assert small.values.dtype == torch.float64


def test_values_outside_of_the_range_are_clamped():
    images = torch.full((1, 3, 8, 8), 1.5)
    assert (
        JPEGSize().score(images, [Prompt("")]).values
        == JPEGSize().score(images.clamp(max=1), [Prompt("")]).values
    )


def test_a_recipe_names_it():
    recipe = load_recipe("quickstart", ["reward.type=jpeg_size", "reward.prefer=large"])
    assert only(recipe) == JPEGSize(prefer="large")
    with pytest.raises(RecipeError, match="prefer: input should be 'small' or 'large'"):
        load_recipe("quickstart", ["reward.type=jpeg_size", "reward.prefer=medium"])
    assert load_component("quickstart", "reward").parts["reward"].reward.type == "shapes"
