"""Drawing prompts with any policy: images for all, verdicts where the shapes world can judge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from entroflow.cli import main as cli
from entroflow.recipe.read import read
from entroflow.recipe.registry import IMAGES
from entroflow.runs.open import Opened
from entroflow.runs.sample import draw
from entroflow.shapes.grammar import parse
from entroflow.shapes.scenes import lay_out, render
from gaussian_policy import GaussianPolicy

GAP, SIDE = 6, 32
GREEN, RED, WHITE = (42, 157, 74), (209, 73, 91), (255, 255, 255)


class Painter(GaussianPolicy):
    """Draws the same picture whatever is asked."""

    def __init__(self, picture):
        super().__init__(latent_shape=(3, 2, 2))
        self.picture = picture

    def decode(self, latents):
        return self.picture.expand(len(latents), *self.picture.shape)


def bars(path, rows, columns, side=SIDE):
    """The colour below each image: [rows][columns]."""
    table = np.asarray(Image.open(path))
    height = (table.shape[0] - GAP) // rows
    shown = side * max(1, 128 // side)
    return [
        [
            tuple(table[GAP + row * height + shown, GAP + column * (shown + GAP)])
            for column in range(columns)
        ]
        for row in range(rows)
    ]


def drawn(policy, prompts, out, models=("base",)):
    opened = Opened(policy, models, read("quickstart", (), IMAGES))
    draw(opened, prompts, count=2, steps=1, guidance=None, seed=0, out=out)


def test_only_captions_of_the_shapes_world_are_judged(tmp_path):
    """Right, wrong, and two that the grammar can't read, of which one looks like a caption."""
    scene = render(lay_out([parse("a red circle")], np.random.default_rng(0)))[0]
    prompts = ["a red circle", "a blue ring", "a cat on a mat", "a red circle on a ring"]
    drawn(Painter(scene), prompts, tmp_path / "out.png")
    assert bars(tmp_path / "out.png", 4, 2) == [[GREEN] * 2, [RED] * 2, [WHITE] * 2, [WHITE] * 2]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 64, 64)])
def test_images_of_another_size_are_not_judged(tmp_path, shape):
    drawn(Painter(torch.zeros(shape)), ["a red circle"], tmp_path / "out.png")
    assert bars(tmp_path / "out.png", 1, 2, side=shape[1]) == [[WHITE] * 2]


def test_models_stand_below_each_other_by_prompt(tmp_path):
    """Prompt by prompt; the tuned policy paints another gray than the base."""
    policy = GaussianPolicy(variance=0.0, latent_shape=(3, 8, 8), offsets={"light": 0.5})
    policy.decode = lambda latents: latents.float()
    policy.weights.keep("ema", {"shift": torch.full((3, 8, 8), 0.25, dtype=torch.float64)})
    drawn(policy, ["dark", "light"], tmp_path / "out.png", models=("base", "tuned"))
    table = np.asarray(Image.open(tmp_path / "out.png"))
    height = (table.shape[0] - GAP) // 4
    assert [int(table[GAP + row * height, GAP, 0]) for row in range(4)] == [0, 64, 128, 191]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", "pictures"], "error: pictures is a folder; name the PNG to write.\n"),
        (["--guidance", "inf"], "error: guidance must be a finite number, not inf.\n"),
    ],
)
def test_what_no_picture_can_come_of_is_refused_before_the_work(
    tmp_path, monkeypatch, capsys, options, says
):
    monkeypatch.setattr("entroflow.runs.sample.sample_images", pytest.fail)
    monkeypatch.setattr("sys.argv", ["entroflow", "sample", "a ring", *options])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert (stopped.value.code, capsys.readouterr().err) == (2, says)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.parametrize("caption", ["a cat\nand a dog", "circle of life", "a red"])
def test_what_the_embedded_policy_refuses_is_one_clear_line(tmp_path, monkeypatch, capsys, caption):
    monkeypatch.setattr("sys.argv", ["entroflow", "sample", caption, "--steps", "1"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: the shapes world")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
