"""What the examination of a reward finds: each fault by a reward that has it."""

from __future__ import annotations

import itertools

import pytest
import torch

from entroflow.checks.examination import examine_reward
from entroflow.checks.findings import Verdict
from entroflow.cli import main as cli
from entroflow.prompts import Prompt
from entroflow.rewards.pairwise import Pairwise
from tiny_run import ByBrightness, part

CHECKS = ["values", "repeated", "batches", "noise", "spread", "cost"]
PROMPTS = [Prompt("a ring"), Prompt("a cross")]


def groups(size=4):
    """Bright images of different levels; noise is gray on average."""
    levels = torch.linspace(0.7, 0.95, 2 * size).reshape(2, size, 1, 1, 1)
    return list(levels.expand(-1, -1, 3, 8, 8))


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(dim=1).tolist()


def examined(reward, size=4):
    found = {f.check: f for f in examine_reward(part(reward), groups(size), PROMPTS)}
    assert list(found) == CHECKS
    return found


def odd(found):
    return {check: f.verdict for check, f in found.items() if f.verdict is not Verdict.OK}


def test_a_sound_reward():
    found = examined(brightness)
    assert odd(found) == {}
    assert "from 0.7 to 0.95" in found["spread"].said
    assert "100% of the images earn more than noise" in found["noise"].said
    assert "8 images of 2 prompts" in found["values"].said


def test_a_sound_judge():
    reward = Pairwise().model_copy(update={"judge": ByBrightness()})
    assert odd(examined(reward)) == {}


def test_a_judge_with_a_preference_for_a_place():
    """Asked in one order it ranks by the place; asked in both, it says nothing."""
    judge = ByBrightness(always_first=True)
    once = Pairwise(order="fixed").model_copy(update={"judge": judge})
    found = examined(once)
    assert found["batches"].verdict is Verdict.WARNING
    assert "in another order the images of a group earn other rewards" in found["batches"].said
    twice = examined(Pairwise().model_copy(update={"judge": judge}))
    assert "nothing to learn" in twice["spread"].said
    assert twice["noise"].verdict is Verdict.WARNING


def test_one_that_fails():
    found = examined(lambda images, *_: [float("nan"), *brightness(images[1:], None, None)])
    assert found["values"].verdict is Verdict.FAILED
    assert "2 of 8 images have none (2 unparsed)" in found["values"].said
    assert {f.verdict for name, f in found.items() if name != "values"} == {Verdict.SKIPPED}


def test_one_that_raises_and_one_that_returns_too_few():
    def raising(*_):
        raise KeyError("level")

    assert "8 of 8 images have none (8 error)" in examined(raising)["values"].said
    assert "one number per image" in examined(lambda *_: [1.0])["values"].said


def test_one_that_changes_its_mind():
    count = itertools.count()
    found = examined(lambda images, *_: [next(count) * 0.1 for _ in images])
    assert found["repeated"].verdict is Verdict.WARNING


def test_one_that_depends_on_the_batch():
    def relative(images, *_):
        levels = images.flatten(1).mean(dim=1)
        return (levels - levels.mean()).tolist()

    found = examined(relative)
    assert found["batches"].verdict is Verdict.WARNING
    assert "alone an image earns another reward" in found["batches"].said


def test_one_that_likes_noise():
    found = examined(lambda images, *_: images.flatten(1).std(dim=1).tolist())
    assert found["noise"].verdict is Verdict.WARNING
    assert "only 0% of the images earn more than noise" in found["noise"].said


def test_one_that_never_differs():
    found = examined(lambda images, *_: [0.5] * len(images))
    assert found["spread"].verdict is Verdict.WARNING
    assert "nothing to learn" in found["spread"].said
    few = examined(lambda images, *_: [0.5] * len(images), size=2)
    assert few["spread"].verdict is Verdict.OK


# --- the command ----------------------------------------------------------------------------------


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["entroflow", "reward", "test", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_command_takes_a_type_a_path_and_a_recipe(monkeypatch, capsys, tmp_path):
    few = ("--prompts", "1", "--images", "2")
    assert run(monkeypatch, "shapes", *few) == 0
    assert "2 images of 1 prompts have one" in capsys.readouterr().out.replace("\n", " ")
    assert run(monkeypatch, "tiny_run.brightness", *few) == 0
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("reward: {type: jpeg_size}")
    assert run(monkeypatch, str(recipe), *few) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shaps"], "there is no recipe 'shaps'"),
        (["no_such.reward"], "can't import 'no_such'"),
        ([], "Missing argument"),
        (["shapes", "flow_grpo"], "name one reward, or a recipe."),
    ],
)
def test_wrong_names_are_refused(monkeypatch, capsys, words, said):
    assert run(monkeypatch, *words) == 2
    assert said in capsys.readouterr().err
