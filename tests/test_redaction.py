"""Secrets of the environment are in no text that is printed, logged or stored."""

from __future__ import annotations

import html
import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from entroflow.checks.findings import finding_of
from entroflow.cli import main as cli
from entroflow.errors import InputError, RecipeError
from entroflow.prompts import Prompt
from entroflow.recipe.imports import raised
from entroflow.recipe.load import build_recipe
from entroflow.redaction import SHORTEST, without_secrets
from entroflow.rewards.parts import as_part
from entroflow.rewards.scoring import score_images
from entroflow.rewards.served_score import ServedScore
from raw_server import RawServer, chat, http
from tiny_run import PixelPolicy, train

KEY = "sk-Tr0ub4dor&3"
IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD2", "APIKEY"]
)
@pytest.mark.parametrize(
    "form",
    [str, repr, json.dumps, html.escape, lambda key: quote(key, safe=""), lambda k: f"a{k}b"],
)
def test_a_secret_is_cut_out_in_any_form(monkeypatch, name, form):
    secret = "p\\w&\"'<é>/+ x"
    monkeypatch.setenv(name, f" {secret}\n")
    text = without_secrets(f"refused: {form(secret)}.")
    assert f"<{name}>" in text
    assert "p\\w" not in text
    assert "p%5Cw" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENAI_API_KEY", "EMPTY"),
        ("MAX_TOKENS", "123456"),
        ("KEYBOARD", "qwerty-uk"),
        ("TOKEN", ""),
    ],
)
def test_what_is_no_secret_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert len(value) < SHORTEST or value in without_secrets(value)
    assert without_secrets("EMPTY 123456 qwerty-uk") == "EMPTY 123456 qwerty-uk"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("at http://bob:hunter2@host/v1", "at http://***@host/v1"),
        ("at https://token@host", "at https://***@host"),
        ("postgres://u:p@ss@host/x", "postgres://***@host/x"),
        ("http://h/v1?api_key=abc&x=1", "http://h/v1?api_key=***&x=1"),
        ("http://h/v1?x=1&sig=abc#f", "http://h/v1?x=1&sig=***#f"),
        ("http://h/v1?api-version=1", "http://h/v1?api-version=1"),
        ("http://h/v1, mail a@b.c", "http://h/v1, mail a@b.c"),
    ],
)
def test_a_url_keeps_its_password_to_itself(text, clean):
    assert without_secrets(text) == clean


@pytest.mark.parametrize("piece", ["://", "://a", "?key", "&token=", "a=", "?", "&a", "@", "x"])
def test_its_time_is_linear(piece):
    start = time.monotonic()
    without_secrets("http://" + piece * (1_000_000 // len(piece)))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "spelled",
    [
        r"abcd\/SECRET+4711\/efgh==", r"abcd/SECRET\u002B4711/efgh==",
        r"abcd\\/SECRET\u002b4711\/efgh==",
        "abcd%2FSECRET+4711%2fefgh%3D%3D", r"abcd\u002FSECRET\\u002B4711/efgh=\u003d",
    ],
)  # fmt: skip
def test_signs_of_a_key_may_be_escaped_in_any_way(monkeypatch, spelled):
    monkeypatch.setenv("OPENAI_API_KEY", "abcd/SECRET+4711/efgh==")
    assert without_secrets(f"wrong key {spelled}.") == "wrong key <OPENAI_API_KEY>."


def test_a_host_may_bear_the_name_that_is_set_in_the_place_of_a_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "ollama")
    ServedScore(url="http://ollama:11434/v1", model="m").check_parts()
    with pytest.raises(InputError, match="url holds"):
        ServedScore(url="http://127.0.0.1/ollama/v1", model="m").check_parts()


def test_keys_of_a_body_that_hold_no_secret_are_let_through():
    schema = {"properties": {"key": {"type": "string"}}}
    ServedScore(model="m", body={"prompt_cache_key": "mine", "guided_json": schema}).check_parts()


def test_no_message_quotes_a_secret(monkeypatch, caplog):
    """Of errors, findings, the user's code and rewards; a key of the user's own reward, too."""
    monkeypatch.setenv("MY_JUDGE_API_KEY", KEY)
    error = ConnectionError(f"401: wrong key {KEY}")

    def fail(*_):
        raise error

    assert KEY not in str(InputError(f"{error}"))
    assert KEY not in str(RecipeError(f"{error}"))
    assert KEY not in finding_of("reward", fail).said
    with pytest.raises(RecipeError) as refused:
        build_recipe({"reward": {"type": f"{__name__}.{Failing.__name__}"}})
    assert KEY not in str(refused.value)
    assert "MY_JUDGE_API_KEY" in str(refused.value)
    score_images(as_part(fail, "reward"), IMAGES, Prompt("a ring"))
    assert "<MY_JUDGE_API_KEY>" in caplog.text
    assert KEY not in caplog.text
    with pytest.raises(ConnectionError) as caught:
        fail()
    assert KEY not in str(InputError(raised(caught.value)))


class Failing:
    def __init__(self):
        raise ConnectionError(f"401: wrong key {os.environ['MY_JUDGE_API_KEY']}")

    def score(self, images, prompts): ...


# --- the key of a served reward -------------------------------------------------------------------


def score(server, **settings):
    reward = ServedScore(url=f"{server.address}/v1", model="m", attempts=1, **settings)
    scores = reward.score(IMAGES, [Prompt("a ring")] * 2)
    reward._asker.close()
    return scores


@pytest.mark.parametrize("around", ["\n", "\r\n", " ", "\t", "\u00a0"])
def test_white_space_around_a_key_is_cut_off(monkeypatch, around):
    monkeypatch.setenv("OPENAI_API_KEY", f"{around}{KEY}{around}")
    with RawServer(lambda *_: [chat("Final Score: 4")]) as server:
        assert score(server).statuses == ("ok", "ok")
        assert f"Authorization: Bearer {KEY}\r\n".lower() in server.requests[0][0].lower()


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_a_key_of_white_space_is_none(monkeypatch, blank):
    monkeypatch.setenv("OPENAI_API_KEY", blank)
    with RawServer(lambda *_: [chat("Final Score: 4")]) as server:
        assert score(server).statuses == ("ok", "ok")
        assert "authorization" not in server.requests[0][0].lower()


@pytest.mark.parametrize(
    "wrong", ["a\nb", "a\x07b", "a b", "aéb", "a\u2013b", "\ufeffab", "a\x7fb"]
)
def test_a_key_that_is_no_header_is_refused_by_its_variable(monkeypatch, wrong):
    key = f"sk-HIDDEN-{wrong}-HIDDEN"
    monkeypatch.setenv("JUDGE", key)
    settings = {"type": "openai", "model": "m", "key_variable": "JUDGE"}
    for reward in (settings, {"type": "pairwise", "judge": settings}):
        with pytest.raises(
            RecipeError, match="environment variable JUDGE holds no API key"
        ) as error:
            build_recipe({"reward": reward})
        assert "HIDDEN" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://bob:hunter2@h/v1"}, "url holds a user, a password or a key"),
        ({"url": "http://hunter2@h/v1"}, "url holds a user, a password or a key"),
        ({"url": "http://h/v1?api_key=hunter2"}, "url holds a user, a password or a key"),
        (
            {"url": "http://h/v1?x=1&Subscription-Key=hunter2"},
            "url holds a user, a password or a key",
        ),
        ({"url": f"http://h/{KEY}/v1"}, "url holds a user, a password or a key"),
        ({"url": "http://bob:hun/ter2@h/v1"}, "url must be the address of a server"),
        ({"url": "h/v1"}, "url must be the address of a server"),
        ({"url": "http://h/v1#a"}, "url must be the address of a server"),
        ({"url": "http://h:99999/v1"}, "url must be the address of a server"),
        ({"url": "http://[h/v1"}, "url must be the address of a server"),
        ({"url": "http://h/v 1"}, "url must be the address of a server"),
        ({"key_variable": "sk-hunter2"}, "key_variable is the name of an environment variable"),
        ({"body": {"user": KEY}}, "body holds a secret"),
        ({"body": {"extra": {"api_key": "hunter2"}}}, "body holds a secret"),
        ({"body": {"stream": True}}, "body.stream can't be set"),
        ({"body": {"seed": float("inf")}}, "body"),
    ],
)
def test_a_recipe_holds_no_secret(monkeypatch, settings, message):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(RecipeError, match=message) as error:
        build_recipe({"reward": {"type": "openai", "model": "m", **settings}})
    assert "hunter2" not in str(error.value)
    assert KEY not in str(error.value)


def test_a_query_that_is_no_secret_is_kept():
    with RawServer(lambda *_: [chat("Final Score: 4")]) as server:
        reward = ServedScore(url=f"{server.address}/v1/?api-version=7", model="m")
        assert reward.score(IMAGES[:1], [Prompt("a ring")]).statuses == ("ok",)
        reward._asker.close()
        assert server.requests[0][0].startswith("POST /v1/chat/completions?api-version=7 ")


def key_of(head):
    (line,) = [line for line in head.splitlines() if line.lower().startswith("authorization")]
    return line.partition("Bearer ")[2]


REPEATS = {
    "an error": lambda key: http(json.dumps({"error": f"bad key {key}"}).encode(), "401 No"),
    "an error that ends in it": lambda key: http(b"x" * 290 + key.encode(), "400 No"),
    "an answer": lambda key: chat(f"You sent {key}.\nFinal Score: 3"),
    "an answer without a verdict": lambda key: chat(f"You sent {key}."),
    "an answer in other letters": lambda key: http(
        b'{"choices": [{"message": {"content": "%s Final Score: 3"}}]}'
        % "".join(f"\\u{ord(letter):04x}" for letter in key).encode()
    ),
    "thoughts": lambda key: chat(None, message={"content": None, "reasoning": f"Key {key}"}),
    "a refusal": lambda key: chat(None, message={"refusal": f"No key like {key}"}),
    "an error in a 200": lambda key: http(json.dumps({"error": {"message": key}}).encode()),
    "what is no JSON": lambda key: http(f"<p>{html.escape(key)}".encode()),
    "a redirect": lambda key: http(b"", "302 Found", f"Location: http://h/?q={quote(key)}"),
    "a header": lambda key: http(b"no", "400 No", f"X-Key: {key}"),
    "a reason": lambda key: http(b"no", f"400 {key}"),
}


@pytest.mark.parametrize("how", REPEATS)
def test_a_server_that_repeats_the_key_leaves_no_trace_of_it(monkeypatch, tmp_path, caplog, how):
    """Neither in what is logged, nor in the cache or the run folder with its report."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE", KEY)
    with RawServer(lambda head, body: [REPEATS[how](key_of(head))]) as server:
        reward = ServedScore(
            url=f"{server.address}/v1", model="m", attempts=1, key_variable="JUDGE",
            cache=tmp_path / "answers.sqlite", revision="1",
        )  # fmt: skip
        with suppress(InputError):
            train(tmp_path / "run", reward=reward, policy=PixelPolicy(), run={"iterations": 1})
        reward._asker.close()
        assert key_of(server.requests[0][0]) == KEY
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for form in (KEY, quote(KEY), html.escape(KEY), json.dumps(KEY)[1:-1], KEY[:-1], KEY[1:]):
        assert form not in caplog.text
        assert form.encode() not in stored


@pytest.mark.parametrize("arguments", [[f"sampling.{KEY}=1"], []])
def test_the_command_line_shows_no_secret(monkeypatch, tmp_path, capsys, arguments):
    """Neither in its errors, nor in the traceback of a bug in the user's code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(sys, "argv", ["entroflow", "train", "r.yaml", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    Path("r.yaml").write_text(f"policy: {{type: {__name__}.Unbuilt}}\n")
    with pytest.raises(SystemExit if arguments else KeyError) as end:
        cli.main()
    if not arguments:
        sys.excepthook(end.type, end.value, end.tb)
    printed = "".join(capsys.readouterr())
    assert "<HF_TOKEN>" in printed
    assert ("Traceback" in printed) is not bool(arguments)
    assert KEY not in printed


class Unbuilt:
    def build(self):
        raise KeyError("no " + os.environ["HF_TOKEN"])
