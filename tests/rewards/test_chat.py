"""What is in a chat server's reply: an answer, or why there is none."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from entroflow.noise import Stream, generator
from entroflow.prompts import Prompt
from entroflow.rewards.chat import KEPT, read_reply
from entroflow.rewards.pairwise import Pairwise
from entroflow.rewards.served_judge import ServedJudge
from entroflow.rewards.served_score import ServedScore
from judge_server import JudgeServer

PROMPT = Prompt("a red ring")


def body(content="Final Score: 4", ended="stop", **more):
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": ended}]}


def text(said):
    return {"type": "text", "text": said}


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (body("Yes."), "Yes."),
        (body("Yes.", ended=None), "Yes."),
        (body("Yes.", ended="eos_token"), "Yes."),
        (body("Yes.", refusal=None, tool_calls=[], reasoning_content="No?"), "Yes."),
        ({**body("Yes."), "error": None}, "Yes."),
        # Parts: text in its order, and nothing of thoughts or of what is no text.
        (body([text("Ye"), text("s.")]), "Yes."),
        (body([{"type": "output_text", "text": "Yes."}]), "Yes."),
        (body(["Yes."]), "Yes."),
        (body([{"type": "thinking", "thinking": [text("No?")]}, text("Yes.")]), "Yes."),
        (body([{"type": "image_url", "image_url": {}}, text("Yes.")]), "Yes."),
        # Thoughts in the text: what follows their end, also where the template has begun them.
        (body("<think>No?</think>Yes."), "Yes."),
        (body("No?\n</think>Yes."), "Yes."),
        (body("<think>No?</think>Well.<think>No!</think>Yes."), "Yes."),
        (body("[THINK]No?[/THINK]Yes."), "Yes."),
        (body("◁think▷No?◁/think▷Yes."), "Yes."),
        (body([text("<think>No?"), text("</think>Yes.")]), "Yes."),
        # Several choices: the first.
        ({"choices": [*body("Yes.")["choices"], *body("No.")["choices"]]}, "Yes."),
    ],
)
def test_an_answer(reply, answer):
    found = read_reply(reply)
    assert (found.body, found.status.value) == (answer, "ok")


@pytest.mark.parametrize(
    ("reply", "status", "example"),
    [
        (body("Final Score: 4", ended="length"), "cut", "Final Score: 4"),
        (body(None, ended="length", reasoning_content="It shows"), "cut", "It shows"),
        (body("It is", ended="MAX_TOKENS"), "cut", "It is"),
        (body("It is", ended="abort"), "cut", "It is"),
        (body("<think>Final Score: 4"), "cut", "<think>Final Score: 4"),
        (body("<think>a</think>b<think>Final Score: 4"), "cut", "Score: 4"),
        (body(None), "empty", ""),
        (body(""), "empty", ""),
        (body("  \n"), "empty", ""),
        (body([]), "empty", ""),
        (body([{"type": "thinking", "thinking": "Final Score: 4"}]), "empty", ""),
        (body("<think>Final Score: 4</think>\n"), "empty", "Final Score: 4</think>"),
        (body(None, reasoning="Final Score: 4"), "empty", "Final Score: 4"),
        ({"choices": []}, "empty", ""),
        (body("Final Score: 4", ended="content_filter"), "refused", "Final Score: 4"),
        (body(None, refusal="I can't."), "refused", "I can't."),
        (body([{"type": "refusal", "refusal": "I can't."}]), "refused", "I can't."),
        (body(None, tool_calls=[{"function": {"name": "zoom"}}]), "tool_call", "zoom"),
        (body("Final Score: 4", ended="tool_calls"), "tool_call", "Final Score: 4"),
        (body(None, function_call={"name": "zoom"}), "tool_call", "zoom"),
        ({"error": {"message": "overloaded", "code": 503}}, "error", "overloaded"),
        ({"error": "overloaded"}, "error", "overloaded"),
        ({**body(), "error": {"code": 503}}, "error", "503"),
        ({"choices": [{"error": {"message": "overloaded"}}]}, "error", "overloaded"),
        ([1, 2], "error", "[1, 2]"),
        (None, "error", "None"),
        ({"choices": None}, "error", "choices"),
        ({"choices": {"0": 1}}, "error", "choices"),
        ({"choices": [1]}, "error", "1"),
        ({"choices": [{"message": "Final Score: 4"}]}, "error", "Final Score"),
        (body(17), "error", "17"),
        (body([17]), "error", "17"),
        (body([{"type": "text", "text": 17}]), "error", "17"),
    ],
)
def test_no_answer(reply, status, example):
    found = read_reply(reply)
    assert (found.body, found.status.value) == (None, status)
    assert found.why
    assert example.strip() in found.example


def test_of_a_long_answer_the_end_is_kept():
    assert read_reply(body("a" * KEPT + "b")).body == "a" * (KEPT - 1) + "b"


@pytest.fixture
def served():
    servers, rewards = [], []

    def start(kind, how, **settings):
        servers.append(JudgeServer(lambda *_: how))
        rewards.append(kind(url=servers[-1].url, model="m", image_format="png", **settings))
        return servers[-1], rewards[-1]

    yield start
    for reward in rewards:
        reward._asker.close()
    for server in servers:
        server.close()


IMAGES = torch.linspace(0, 1, 4)[:, None, None, None].expand(-1, 3, 4, 4)
VERDICT = "Final Score: 4 <answer>Image 1 is better</answer>"


@pytest.mark.parametrize(
    ("how", "status", "hint"),
    [
        (body(VERDICT, ended="length"), "cut", "max_tokens=34"),
        (body(f"<think>{VERDICT}"), "cut", "max_tokens=34"),
        (body(None, reasoning_content=VERDICT), "empty", "thoughts"),
        (body(None, refusal="No."), "refused", "refusal"),
        (
            body(f"{VERDICT} Final Score: 2 <answer>Image 2 is better</answer>"),
            "contradictory",
            "one",
        ),
        (body("Well."), "unparsed", "'Well.'"),
        ({"error": {"message": "out of memory"}}, "error", "out of memory"),
    ],
)
@pytest.mark.parametrize("kind", [ServedScore, ServedJudge])
def test_what_is_no_verdict_has_a_status_and_one_warning(served, caplog, kind, how, status, hint):
    caplog.set_level(logging.WARNING)
    server, reward = served(kind, how, max_tokens=17)
    if kind is ServedScore:
        found = reward.score(IMAGES, [PROMPT] * 4)
        values = found.values
    else:
        found = reward.compare(IMAGES, torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]), [PROMPT] * 4)
        values = found.points
    assert {s.value for s in found.statuses} == {status}
    assert values.isnan().all()
    (warning,) = caplog.messages
    assert hint in warning
    assert server.url in warning


def test_a_cut_answer_is_no_tie_and_one_without_a_verdict_may_be():
    """As published, what can't be read is a tie; what was cut off says nothing at all."""
    for how, rates, cut, unparsed in (
        (body(VERDICT, ended="length"), None, 1, 0),
        (body("Well."), 0.5, 0, 1),
        (body(f"{VERDICT}<answer>Image 2 is better</answer>"), 0.5, 0, 1),
    ):
        server = JudgeServer(lambda *_, how=how: how)
        judge = ServedJudge(url=server.url, model="m")
        reward = Pairwise(on_unparsed="tie").model_copy(update={"judge": judge})
        found = reward.score_group(IMAGES, PROMPT, generator(0, Stream.JUDGE))
        assert set(found.values.nan_to_num(-1).tolist()) == {-1 if rates is None else rates}
        assert (found.facts["cut"], found.facts["unparsed"]) == (cut, unparsed)
        judge._asker.close()
        server.close()


@pytest.mark.parametrize(
    ("extra", "changes"),
    [
        ({}, {}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"max_tokens": None, "max_completion_tokens": 5}, {"max_completion_tokens": 5}),
        ({"temperature": 0.3}, {"temperature": 0.3}),
    ],
)
def test_a_request_has_what_body_adds_replaces_and_leaves_out(served, extra, changes):
    server, reward = served(ServedScore, None, body=extra, max_tokens=17)
    reward.score(IMAGES[:1], [PROMPT])
    (sent,) = server.bodies
    wanted = {
        "model": "m",
        "temperature": 0,
        "max_tokens": 17,
        **(extra if changes is None else changes),
    }
    wanted = {key: value for key, value in wanted.items() if extra.get(key, value) is not None}
    assert {key: value for key, value in sent.items() if key != "messages"} == wanted
    assert len(sent["messages"]) == 1


def test_a_limit_in_the_body_is_the_one_that_is_named(served, caplog):
    extra = {"max_tokens": None, "max_completion_tokens": 32}
    _, reward = served(ServedScore, body("Well", ended="length"), body=extra)
    reward.score(IMAGES[:1], [PROMPT])
    assert "reward.body.max_completion_tokens=64" in caplog.text


def test_every_prefix_of_a_reply_has_a_status():
    """Whatever JSON there is, nothing is raised."""
    parts = [None, True, 0, "x", [], {}, [None], {"type": "text"}, {"text": None}, {"message": {}}]
    for one in parts:
        for reply in (one, {"choices": one}, {"choices": [one]}, {"error": one, "choices": [one]},
                      body(one), body([one]), body(None, refusal=one), body(None, tool_calls=one),
                      body(None, reasoning_content=one), body("x", ended=one)):  # fmt: skip
            assert json.dumps(read_reply(reply).status)
