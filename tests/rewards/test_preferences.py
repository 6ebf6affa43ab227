"""The learnt preferences: how they are learnt, how good they are, and how they are asked."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from scipy import stats

from entroflow.checkpoints import read_tensors
from entroflow.errors import InputError
from entroflow.prompts import Prompt
from entroflow.rewards.preferences import learn, models, network
from entroflow.rewards.preferences.learn import Compared, Learning, accuracy
from entroflow.rewards.preferences.models import ShapesJudge, ShapesPreference
from entroflow.rewards.preferences.network import Pairwise, Pointwise, features
from entroflow.shapes import grammar
from entroflow.shapes.scenes import lay_out, render

CLAIMS = json.loads(
    (Path(__file__).parents[2] / "docs" / "claims" / "preferences.json").read_text()
)
CAPTIONS = ("a red circle", "a large blue square", "three green rings", "a cyan cross above a ring")


@pytest.fixture(scope="module")
def images():
    import numpy as np

    specs = [grammar.parse(text) for text in CAPTIONS]
    return render(lay_out(specs, np.random.default_rng(0)))


def prompts(*texts):
    return [Prompt(text) for text in texts]


def synthetic(groups, sharpness=12.0, seed=0):
    """Features that say the quality in one of their values; labels by Bradley-Terry."""
    source = torch.Generator().manual_seed(seed)
    quality = torch.rand(groups, 4, generator=source)
    tokens = 0.1 * torch.randn(groups, 4, 74, network.WIDTH, generator=source)
    tokens[..., 0] += quality[..., None]
    first, second = torch.triu_indices(4, 4, 1)
    likely = (sharpness * (quality[:, first] - quality[:, second])).sigmoid()
    preferred = torch.rand(likely.shape, generator=source) < likely
    return Compared(tokens, quality, first, second, preferred)


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Pointwise, Pairwise])
def test_the_better_one_is_learnt_from_noisy_labels(kind):
    """Many of the labels are wrong, and yet the order is found, also of what was never seen."""
    torch.manual_seed(0)
    settings = Learning(captions=60, batch=12, epochs=12, warm_up=5, learning_rate=2e-3)
    student, seen, unseen = kind(), synthetic(60), synthetic(60, seed=1)
    losses = list(learn.learn(student, seen, settings))
    assert len(losses) == settings.steps == 60
    found = accuracy(student, unseen)
    assert found["order"] > 0.85
    assert found["labels"] < found["order"]
    assert found["pairs"] == 60 * 6
    assert found["contradictions"] == 0 or kind is Pairwise


def test_the_share_of_wrong_labels_is_that_of_bradley_and_terry():
    data = synthetic(500)
    expected = (-12 * data.difference.abs()).sigmoid().mean().item()
    found = accuracy(Pointwise(), data)["noise"]
    assert found == pytest.approx(expected, abs=4 * (0.25 / data.difference.numel()) ** 0.5)


def test_accuracy_counts_pairs_that_differ():
    """A network that says what it is told: of two equal images none is the better one."""

    class Told:
        def reader(self, tokens):
            return tokens[:, 0, :1]

        def logit(self, first, second):
            return (first - second)[..., 0]

    says = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    quality = torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.5, 0.5]])
    first, second = torch.triu_indices(3, 3, 1)
    preferred = torch.tensor([[True, True, True], [True, False, True]])
    data = Compared(says[..., None, None], quality, first, second, preferred)
    found = accuracy(Told(), data)
    assert found == {
        "order": 0.5, "labels": 0.75, "noise": 0.25, "contradictions": 0.0, "pairs": 4
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    seen = []

    @contextmanager
    def progress(what, total, number):
        yield lambda step, value: seen.append((what, step, total))

    settings = Learning(captions=12, held_out=6, images=4, batch=4, epochs=2)
    return folder, learn.make(settings, folder, progress), seen


def test_the_command_makes_weights_that_can_be_used(made, images):
    folder, found, seen = made
    assert json.loads((folder / "accuracy.json").read_text())["accuracy"] == found
    assert {"pointwise", "pairwise"} == found.keys()
    assert {what: (step, total) for what, step, total in seen} == {
        "drawing train captions": (12, 12),
        "drawing validation captions": (6, 6),
        "learning, pointwise": (6, 6),
        "learning, pairwise": (6, 6),
    }
    own = ShapesPreference(weights=folder / "pointwise.safetensors")
    shipped = ShapesPreference()
    texts = prompts(*CAPTIONS)
    assert not torch.equal(own.score(images, texts).values, shipped.score(images, texts).values)
    judge = ShapesJudge(weights=folder / "pairwise.safetensors")
    assert judge.compare(images, torch.tensor([[0, 1]]), texts[:1]).points.item() in (0, 1)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        (
            "pointwise.safetensors",
            lambda path, images: ShapesPreference(weights=path).score(images, prompts(*CAPTIONS)),
        ),
        (
            "pairwise.safetensors",
            lambda path, images: ShapesJudge(weights=path, answer="probability").compare(
                images, torch.tensor([[0, 1]]), prompts(CAPTIONS[0])
            ),
        ),
    ],
)
def test_weights_are_known_by_what_the_file_holds(made, images, tmp_path, name, score):
    """Not by its name: another reward in the same process reads it anew."""
    path = tmp_path / name
    shutil.copy(models.SHIPPED / name, path)
    before = vars(score(path, images))
    shutil.copy(made[0] / name, path)
    after, expected = vars(score(path, images)), vars(score(made[0] / name, images))
    values = next(key for key in before if isinstance(before[key], torch.Tensor))
    assert torch.equal(after[values], expected[values])
    assert not torch.equal(after[values], before[values])


def test_a_folder_in_use_is_refused_before_anything_is_made(made, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "accuracy.json").write_text("mine")
    for place in (made[0], own, own / "accuracy.json"):
        with pytest.raises(InputError, match="exists already"):
            learn.make(Learning(), place, pytest.fail)
    assert (own / "accuracy.json").read_text() == "mine"


def test_data_are_a_function_of_the_seed(monkeypatch):
    """Half of a group without step noise; other seeds and splits have other images."""
    settings = Learning(images=4)
    (one,) = learn.compared(settings, "train", 3)
    (again,) = learn.compared(settings, "train", 3)
    (other,) = learn.compared(Learning(images=4, seed=1), "train", 3)
    (held_out,) = learn.compared(settings, "validation", 3)
    assert torch.equal(one.features, again.features)
    assert torch.equal(one.preferred, again.preferred)
    for different in (other, held_out):
        assert not torch.equal(one.features, different.features)
    assert one.features.shape == (3, 4, 74, network.WIDTH)
    assert ((one.quality >= 0) & (one.quality <= 1)).all()


# --- what is shipped ------------------------------------------------------------------------------


def test_the_shipped_weights_are_those_of_the_claims():
    """Both as good as published judges, by the stored measurement and by a small new one."""
    data = learn.joined(list(learn.compared(Learning(seed=7, images=6), "validation", 40)))
    for name, kind in learn.KINDS.items():
        claimed = CLAIMS["accuracy"][name]
        assert 0.7 <= claimed["labels"] <= claimed["order"] <= 0.85
        shipped = models._loaded(kind, models.SHIPPED / f"{name}.safetensors")
        found = accuracy(shipped, data)
        # Pairs of a caption are no independent draws: the captions are.
        reach = stats.norm.ppf(0.999) * (0.25 / 40) ** 0.5
        assert found["order"] == pytest.approx(claimed["order"], abs=reach)
    assert CLAIMS["settings"] == json.loads(json.dumps(vars(Learning())))


def test_both_are_of_about_the_same_size():
    sizes = [
        sum(tensor.numel() for tensor in read_tensors(models.SHIPPED / f"{n}.safetensors").values())
        for n in learn.KINDS
    ]
    assert max(sizes) < 1.25 * min(sizes)
    assert max(sizes) < 250_000


# --- asking ---------------------------------------------------------------------------------------


def test_scores_are_of_each_image_alone_and_their_difference_is_the_log_odds(images):
    reward, texts = ShapesPreference(), prompts(*CAPTIONS)
    together = reward.score(images, texts).values
    alone = torch.cat([reward.score(images[i : i + 1], texts[i : i + 1]).values for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    shipped = models._loaded(Pointwise, models.SHIPPED / "pointwise.safetensors")
    read = shipped.reader(features(images, CAPTIONS))
    odds = shipped.logit(read[:2], read[2:])
    torch.testing.assert_close((together[:2] - together[2:]).float(), odds, rtol=1e-4, atol=1e-4)


def test_scenes_are_liked_better_with_their_own_captions(images):
    own = ShapesPreference().score(images, prompts(*CAPTIONS)).values
    turned = ShapesPreference().score(images, prompts(*CAPTIONS[1:], CAPTIONS[0])).values
    assert (own > turned).double().mean() >= 0.75


def test_the_judge_reads_an_image_once_for_each_prompt(images, monkeypatch):
    read = []

    def counted(shown, captions):
        read.extend(captions)
        return features(shown, captions)

    monkeypatch.setattr(models, "features", counted)
    sides = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [1, 2], [2, 1]])
    judge = ShapesJudge(answer="probability")
    likely = judge.compare(images, sides, prompts(*CAPTIONS[:1] * 6)).points
    assert read == [CAPTIONS[0]] * 3
    assert ((likely > 0) & (likely < 1)).all()
    winner = ShapesJudge().compare(images, sides, prompts(*CAPTIONS[:1] * 6)).points
    assert winner.tolist() == (likely > 0.5).double().tolist()
    # The same image for two prompts is two questions.
    read.clear()
    judge.compare(images, sides[:2], prompts(*CAPTIONS[:2]))
    assert sorted(read) == sorted(CAPTIONS[:2] * 2)


def test_wrong_input_is_one_clear_line(images, tmp_path):
    with pytest.raises(InputError, match="dragon"):
        ShapesPreference().score(images[:1], prompts("a dragon"))
    other = models.SHIPPED / "pairwise.safetensors"
    with pytest.raises(InputError, match="holds another network"):
        ShapesPreference(weights=other).score(images[:1], prompts(CAPTIONS[0]))
    with pytest.raises(InputError, match=r"none\.safetensors"):
        ShapesJudge(weights=tmp_path / "none.safetensors").compare(
            images, torch.tensor([[0, 1]]), prompts(CAPTIONS[0])
        )


def test_the_model_card_has_the_numbers_of_the_claims():
    card = (models.SHIPPED / "MODEL_CARD.md").read_text()
    for name, row in (("pointwise", "score"), ("pairwise", "judge")):
        found = CLAIMS["accuracy"][name]
        turned = f"{found['contradictions']:.1%}" if name == "pairwise" else "–"
        assert f"| {row} | {found['order']:.1%} | {found['labels']:.1%} | {turned} |" in card
    assert f"On {found['pairs']:,} pairs of images for {CLAIMS['settings']['held_out']}" in card
    assert f"{found['noise']:.1%} of the labels themselves name the worse image" in card
    for key, words in {
        "captions": "{} training captions", "sharpness": "sigmoid({:g} ×", "epochs": "{} epochs"
    }.items():  # fmt: skip
        assert words.format(CLAIMS["settings"][key]) in card
