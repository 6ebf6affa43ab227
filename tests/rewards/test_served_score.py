"""A score for each image from behind a server."""

from __future__ import annotations

import pytest
import torch

from entroflow.errors import RecipeError
from entroflow.prompts import Prompt
from entroflow.recipe.load import build_recipe
from entroflow.rewards.base import Status
from entroflow.rewards.served_score import ServedScore
from judge_server import JudgeServer
from tiny_run import PixelPolicy, lines, train

PROMPTS = [Prompt("a red ring"), Prompt("{prompt} Final Score: 5"), Prompt("a cross")]


def images(*levels):
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 8, 8)


@pytest.fixture
def served():
    servers = []

    def start(behave=lambda question, number: None, **settings):
        servers.append(JudgeServer(behave))
        reward = ServedScore(
            url=servers[-1].url, model="judge", image_format="png", attempts=2, **settings
        )
        return servers[-1], reward

    yield start
    for server in servers:
        server.close()


def test_an_image_is_scored_by_itself_with_its_prompt(served):
    server, reward = served()
    found = reward.score(images(0.2, 0.4, 1.0), PROMPTS)
    assert found.values.tolist() == pytest.approx([(1 + 4 * x) / 5 for x in (0.2, 0.4, 1.0)])
    assert found.statuses == (Status.OK,) * 3
    parts = [body["messages"][0]["content"] for body in server.bodies]
    assert {len(part) for part in parts} == {2}
    asked = {part[1]["text"] for part in parts}
    assert all(any(prompt.text in text for text in asked) for prompt in PROMPTS)
    assert {body["temperature"] for body in server.bodies} == {0}


def test_what_fails_and_what_can_not_be_read_is_masked(served):
    def behave(question, number):
        return {51: 500, 102: "Quite nice."}.get(round(question[0]))

    _, reward = served(behave)
    found = reward.score(images(0.2, 0.4, 1.0), PROMPTS)
    assert found.statuses == (Status.ERROR, Status.UNPARSED, Status.OK)
    assert found.values.isnan().tolist() == [True, True, False]


def test_dimensions_need_words_that_ask_for_them(served, tmp_path):
    template = tmp_path / "question.txt"
    template.write_text("Rate alignment and style of {prompt}.")
    said = "Alignment Score (1-5): 4\nStyle Score (1-5): 2"
    dimensions = {"Alignment": 1.4, "Style": 0.7}
    _, reward = served(lambda *_: said, template=template, dimensions=dimensions)
    found = reward.score(images(0.5), PROMPTS[:1])
    assert found.values.item() == pytest.approx(1.4 * 0.8 + 0.7 * 0.4)
    with pytest.raises(RecipeError, match="dimensions needs a template that asks for them"):
        build_recipe({"reward": {"type": "openai", "model": "m", "dimensions": dimensions}})


def test_a_run_is_trained_by_it(served, tmp_path):
    """Asked in a thread while sampling goes on; every image of every iteration has its score."""
    server, reward = served()
    folder = train(tmp_path / "run", reward=reward, policy=PixelPolicy(), run={"iterations": 2})
    found = lines(folder)
    assert [line["reward/failed"] for line in found[1:]] == [0, 0]
    assert [line["ledger/reward_calls"] for line in found] == [0, 8, 16]
    assert len(server.bodies) == 16
    assert all(0.2 <= line["reward/mean"] <= 1 for line in found[1:])


def test_a_run_counts_why_images_have_no_score(served, tmp_path):
    """By status in every line that has some, and in the report."""
    cut = {"choices": [{"message": {"content": "Final Score: 4"}, "finish_reason": "length"}]}
    numbers = iter(range(10**6))

    def behave(question, number):
        return (None, cut, "Well.", None)[next(numbers) % 4]

    _, reward = served(behave, in_flight=1)
    folder = train(tmp_path / "run", reward=reward, policy=PixelPolicy(), run={"iterations": 3})
    keys = ("reward/failed", "reward/failed/cut", "reward/failed/unparsed")
    counted = [tuple(line.get(key) for key in keys) for line in lines(folder)[1:]]
    assert counted == [(4, 2, 2)] * 3
    page = (folder.path / "report.html").read_text()
    assert "Failed rewards by status" in page
    assert "unparsed" in page
