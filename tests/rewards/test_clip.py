"""Similarity by CLIP, with a tiny model of the real class."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from entroflow.errors import InputError
from entroflow.pictures import to_pil
from entroflow.prompts import Prompt
from entroflow.recipe.load import build_recipe
from entroflow.rewards.clip import CLIPScore
from tiny_run import only

TEXTS = ["a red circle", "two green triangles and one yellow ring", "a red circle"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def score(clip_folder, images, texts, **settings):
    reward = CLIPScore(model=str(clip_folder), device="cpu", **settings)
    return reward.score(images, [Prompt(text) for text in texts]).values


def test_it_is_the_cosine_that_the_model_says(clip_folder, images):
    """Against the logits of transformers, one image and one text at a time."""
    model, processor = (
        CLIPModel.from_pretrained(clip_folder),
        CLIPProcessor.from_pretrained(clip_folder),
    )
    with torch.no_grad():
        logits = [
            model(**processor(text=[text], images=[to_pil(image)], return_tensors="pt"))
            .logits_per_image.item()
            for image, text in zip(images, TEXTS, strict=True)
        ]  # fmt: skip
    expected = torch.tensor(logits, dtype=torch.float64)
    scale = model.logit_scale.exp().item()
    torch.testing.assert_close(
        score(clip_folder, images, TEXTS, scaled=True), expected, rtol=1e-5, atol=0
    )
    found = score(clip_folder, images, TEXTS)
    torch.testing.assert_close(found, expected / scale, rtol=1e-5, atol=1e-7)
    assert found.abs().max() <= 1


def test_batches_do_not_count(clip_folder, images):
    """But for the rounding of products in float32, whose order the shape of a batch decides."""
    together = score(clip_folder, images, TEXTS)
    apart = score(clip_folder, images, TEXTS, batch_size=2)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


def test_long_prompts_are_cut(clip_folder, images):
    words = " ".join(["a red circle"] * 200)
    assert score(clip_folder, images[:1], [words]).isfinite().all()


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path, images):
    with pytest.raises(InputError, match=r"the CLIP model .*nowhere can't be loaded"):
        score(tmp_path / "nowhere", images, TEXTS)


def damaged(clip_folder, path, change):
    """A copy of the model whose tensors are changed in place."""
    shutil.copytree(clip_folder, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_model_that_lacks_weights_is_refused(clip_folder, tmp_path, images):
    """transformers would make them up, at random and anew each time."""
    folder = damaged(clip_folder, tmp_path / "part", lambda t: t.pop("text_projection.weight"))
    with pytest.raises(InputError, match=r"lacks 1 tensors, as text_projection\.weight"):
        score(folder, images, TEXTS)


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


@pytest.mark.parametrize("damage", [cut, lambda folder: (folder / "config.json").write_text("[]")])
def test_a_damaged_model_is_one_clear_line(clip_folder, tmp_path, images, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(clip_folder, folder)
    damage(folder)
    with pytest.raises(InputError, match=r"the CLIP model .*damaged can't be loaded"):
        score(folder, images, TEXTS)


def test_weights_of_another_shape_are_one_clear_line(clip_folder, tmp_path, images):
    def widen(tensors):
        tensors["visual_projection.weight"] = torch.zeros(8, 32)

    folder = damaged(clip_folder, tmp_path / "wide", widen)
    with pytest.raises(InputError, match=r"the CLIP model .*wide can't be loaded"):
        score(folder, images, TEXTS)


def test_a_device_that_is_not_there_is_one_clear_line(clip_folder, images):
    reward = CLIPScore(model=str(clip_folder), device="abacus")
    with pytest.raises(InputError, match=r"device: can't use abacus"):
        reward.score(images, [Prompt(text) for text in TEXTS])


def test_pickscore_is_a_recipe():
    fields = {
        "type": "clip", "model": "yuvalkirstain/PickScore_v1", "scaled": True,
        "processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    }  # fmt: skip
    reward = only(build_recipe({"reward": fields}))
    assert isinstance(reward, CLIPScore)
    assert reward.scaled
