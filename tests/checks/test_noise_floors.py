"""The noise of a reward, against rewards whose noise is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from entroflow.checks.noise_floors import Floor, as_yaml, floor_of, harmless
from entroflow.cli import main as cli
from entroflow.errors import InputError
from entroflow.prompts import Prompt
from entroflow.rewards.pairwise import Pairwise
from tiny_run import ByBrightness, brightness, part

PROMPTS = [Prompt(f"word {n}") for n in range(3)]


@pytest.fixture
def groups():
    """Smooth images of 32 x 32 pixels, eight of each prompt, of any brightness."""
    source = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 8, 3, 4, 4, generator=source).flatten(0, 1)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1)
    return list(smooth.unflatten(0, (3, 8)))


def test_changes_are_small_and_all_differ(groups):
    original, again, *changed = harmless(groups[0])
    assert torch.equal(original, again)
    assert len(changed) == 6
    for one, image in enumerate(changed):
        assert image.shape == original.shape
        assert image.dtype == original.dtype
        assert 0 < (image - original).abs().mean() < 0.05, one
    assert len({float(image.sum()) for image in changed}) == 6


def test_a_shift_moves_every_pixel_and_keeps_the_border():
    image = torch.arange(5.0).expand(1, 3, 5, 5) / 4
    left, right = list(harmless(image))[4:6]
    assert left[0, 0, 0].tolist() == [0.25, 0.5, 0.75, 1, 1]
    assert right[0, 0, 0].tolist() == [0, 0, 0.25, 0.5, 0.75]


def test_the_noise_of_a_reward_is_found(groups):
    """A reward that is nothing but noise, of a known size, beside one that has none."""
    source = np.random.default_rng(0)
    noisy = floor_of(part(lambda i, *_: source.normal(0, 0.2, len(i))), groups, PROMPTS)
    assert noisy.noise == pytest.approx(0.2, rel=0.15)
    assert noisy.floor == 2 * noisy.noise
    assert noisy.signal < 0.35
    still = floor_of(part(lambda i, *_: [1.0] * len(i)), groups, PROMPTS)
    assert (still.noise, still.spread, still.signal, still.failed) == (0, 0, 0, 0)


def test_brightness_hardly_changes(groups):
    found = floor_of(part(brightness), groups, PROMPTS)
    variances = [group.flatten(1).mean(dim=1).double().var() for group in groups]
    assert found.spread == pytest.approx(math.sqrt(torch.stack(variances).mean()), rel=1e-5)
    assert found.noise < 0.1 * found.spread
    assert found.signal == pytest.approx(1 - (found.noise / found.spread) ** 2)


def test_a_judge_of_pairs_is_calibrated_too(groups):
    judge = Pairwise().model_copy(update={"judge": ByBrightness()})
    found = floor_of(part(judge), groups, PROMPTS)
    # Of a strict ranking of eight: sqrt(G (G + 1) / (12 (G - 1)^2)), over n - 1.
    assert found.spread == pytest.approx(math.sqrt(8 * 9 / (12 * 49)), rel=1e-6)
    assert found.noise < 0.2 * found.spread


def test_what_failed_is_left_out_and_counted(groups):
    first = part(lambda i, *_: [math.nan, *i.flatten(1).mean(dim=1)[1:].tolist()])
    found = floor_of(first, groups, PROMPTS)
    assert found.failed == pytest.approx(1 / 8)
    assert math.isfinite(found.noise)
    assert math.isfinite(found.spread)


def test_the_command_prints_floors_that_a_recipe_takes(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["entroflow", "reward", "floors", "mixed_rewards", "--prompts=2", "--images=4"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("floors: {judge: ")
    assert "monitor graded" in " ".join(printed)


def test_as_yaml():
    assert as_yaml({"a": Floor(0.01, 1, 0), "b": Floor(2, 3, 0)}) == "floors: {a: 0.02, b: 4}"


def test_a_reward_that_is_down_has_no_floor(groups):
    with pytest.raises(InputError, match="scored too few images to say"):
        floor_of(part(lambda i, *_: [math.nan] * len(i)), groups, PROMPTS)
