"""Rewards for texts as people write them for TRL: called alike while training and when judging."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset

import tiny_llm
from entroflow.errors import InputError
from entroflow.llm import recipe as recipes
from entroflow.llm.embedded import Sampling, sampled
from entroflow.llm.problems import judge, problems_of
from entroflow.llm.recipe import Task
from entroflow.llm.reward import GIVEN, check_arguments, guarded
from entroflow.llm.run import load_model, train

SMALL = (
    "task.type=dataset", "task.prompt=question", "task.held_out=4", "run.updates=2",
    "evaluation.every=2", "evaluation.problems=2", "evaluation.each=2",
    "trainer.per_device_train_batch_size=4", "trainer.num_generations=2",
    "trainer.gradient_accumulation_steps=1",
)  # fmt: skip


def data(folder, **more):
    """Twelve problems with columns of several kinds."""
    rows = [
        {
            "question": f"{n + 1} 2 3 4 -> 10 :", "level": n, "tags": ["a", "b"],
            "about": {"source": "mine", "part": n}, **more,
        }
        for n in range(12)
    ]  # fmt: skip
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return str(folder)


SEEN = []


def remembering(completions, **given):
    """Notes what it is called with, changes all of it, and prefers long answers."""
    state = given["trainer_state"]
    columns = {key: value for key, value in given.items() if not callable(value)}
    columns["trainer_state"] = [state.global_step] * len(completions)
    SEEN.append({"completions": [*completions], **json.loads(json.dumps(columns))})
    given["log_metric"]("mine", 4.5)
    given["log_extra"]("more", [*completions])
    given["tags"][0].append("c")
    given["about"][0].clear()
    given["level"].clear()
    words = [len(text.split()) for text in completions]
    completions.clear()
    torch.manual_seed(0)
    return np.array(words, dtype=np.float32)


def test_columns_reach_the_reward_alike_while_training_and_when_judging(tmp_path):
    """All of them, with what TRL gives besides; and what a reward does to them stays with it."""
    SEEN.clear()
    path = data(tmp_path / "data")
    folder = train(
        recipes.load(
            "countdown",
            [*SMALL, f"task.path={path}", f"task.reward={__name__}.remembering", "clip.type=none"],
        ),
        tmp_path / "run",
    )
    names = {"completions", "prompts", "completion_ids", "trainer_state"} | {
        "question", "level", "tags", "about",
    }  # fmt: skip
    assert all(call.keys() == names for call in SEEN)
    _, tokenizer = load_model("embedded")
    for call in SEEN:
        assert {len(values) for values in call.values()} == {4}
        assert call["prompts"] == call["question"]
        assert call["prompts"] == [f"{n + 1} 2 3 4 -> 10 :" for n in call["level"]]
        assert all(tags == ["a", "b"] for tags in call["tags"])
        assert [about["part"] for about in call["about"]] == call["level"]
        read = tokenizer.batch_decode(call["completion_ids"], skip_special_tokens=True)
        assert read == call["completions"]
    # Twice before the first update, once and twice after the last; between, one for each update.
    steps = [call["trainer_state"][0] for call in SEEN]
    assert steps == [0, 0, 0, 1, 2, 2]
    # A seed that the reward sets would make all updates sample alike.
    assert SEEN[2]["completions"] != SEEN[3]["completions"] or SEEN[2]["level"] != SEEN[3]["level"]
    line = folder.metrics()[-1]
    assert line["mine"] == 4.5
    assert line["rewards/remembering/failed"] == 0


def test_the_tokens_of_an_answer_end_with_the_one_that_ends_it(tmp_path):
    """What fills up a batch of answers is part of none, as in TRL."""
    tiny_llm.save_qwen2(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    (found,) = sampled(model, tokenizer, ["a"], Sampling(each=64, most_words=16))
    ended = [answer for answer in found if tokenizer.eos_token_id in answer.tokens]
    assert 0 < len(ended) < len(found)
    for answer in found:
        assert answer.prompt == tokenizer("a")["input_ids"]
        assert answer.text == tokenizer.decode(answer.tokens, skip_special_tokens=True)
    for answer in ended:
        assert answer.tokens.index(tokenizer.eos_token_id) == len(answer.tokens) - 1


def test_a_seed_set_by_a_reward_does_not_repeat_the_answers():
    def seeding(completions, **_):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        return [0.0] * len(completions)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    guarded(seeding, "seeding")(completions=["a"])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32


def any_number(completions, **_):
    return [1.0] * len(completions)


def test_what_is_right_need_not_be_a_column(tmp_path):
    """And what is, is `solution`, whatever its name is in the data."""
    _, tokenizer = load_model("embedded")
    task = Task(
        type="dataset", path=data(tmp_path / "without"), prompt="question", held_out=4,
        reward=f"{__name__}.any_number",
    )  # fmt: skip
    found = problems_of(task, tokenizer)
    assert [*found.test[0]] == [*found.train.column_names]
    assert {*found.train.column_names} == {"question", "level", "tags", "about", "prompt"}
    with pytest.raises(InputError, match="no column 'rigth'"):
        problems_of(task.model_copy(update={"answer": "rigth"}), tokenizer)
    named = task.model_copy(update={"answer": "level"})
    assert problems_of(named, tokenizer).test[0].items() >= {
        "solution": (row := problems_of(named, tokenizer).test[0])["level"],
        "question": row["question"],
    }.items()  # fmt: skip


def test_columns_that_trl_would_take_for_its_own_are_left_out_and_named(tmp_path, caplog):
    """With two of one name a call would fail, and with images TRL wants another model."""
    _, tokenizer = load_model("embedded")
    task = Task(
        type="dataset", prompt="question", held_out=4, reward=f"{__name__}.any_number",
        path=data(tmp_path / "data", completions="x", completion="y", image="z", prompt="another"),
    )  # fmt: skip
    found = problems_of(task, tokenizer)
    assert {*found.train.column_names} == {"question", "level", "tags", "about", "prompt"}
    assert found.train[0]["prompt"] == found.train[0]["question"]
    assert "does not see these columns" in caplog.text
    for name in ("completions", "completion", "image", "prompt"):
        assert name in caplog.text.partition("names: ")[2]


def test_a_chat_is_judged_with_messages_as_trl_gives_them(tmp_path):
    """Of a tokenizer that reads answers into their parts, too."""
    tiny_llm.save_qwen2(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    calls = []

    def reward(completions, prompts, **_):
        calls.append((completions, prompts))
        return [1.0] * len(completions)

    rows = [{"prompt": [{"role": "user", "content": "a"}]}]
    sampling = Sampling(each=2, most_words=4)
    judge(model, tokenizer, rows, reward, sampling)
    tokenizer.response_template = {
        "defaults": {"role": "assistant", "by": "template"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"}},
    }
    judge(model, tokenizer, rows, reward, sampling)
    for (completions, prompts), made in zip(calls, (None, "template"), strict=True):
        assert prompts == [rows[0]["prompt"]] * 2
        for (message,) in completions:
            assert (message["role"], message.get("by")) == ("assistant", made)


# --- what they return -----------------------------------------------------------------------------


def _called(returned):
    return guarded(lambda completions, **_: returned, "it")(completions=["a", "b", "c"])


async def _later(value):
    return value


@pytest.mark.parametrize("form", [
    lambda: np.array([1, 0, 2], dtype=np.int8), lambda: torch.tensor([1, 0, 2]).bfloat16(),
    lambda: (x for x in (True, False, 2)), lambda: pd.Series([1.0, 0.0, 2.0], index=[5, 5, 5]),
    lambda: _later([1, 0, 2]), lambda: [torch.tensor(1), np.float16(0), 2],
])  # fmt: skip
def test_numbers_in_any_form(form):
    assert _called(form()) == [1.0, 0.0, 2.0]


def test_what_is_no_number_is_none_and_counted():
    logged = {}

    def reward(completions, **_):
        return [None, math.inf, 1.0, math.nan]

    safe = guarded(functools.partial(reward), "it")
    found = safe(completions=[""] * 4, log_metric=logged.__setitem__)
    assert found == [None, None, 1.0, None]
    assert logged == {"rewards/reward/failed": 0.75}
    assert safe.__name__ == "reward"


@pytest.mark.parametrize(("returned", "said"), [
    (["1", "0", "1"], "not '1'"), ("101", "not '101'"), ({"a": 1}, "not {'a': 1}"),
    (None, "not None"), ([1.0], r"3 completions, but a result of shape \(1,\)"),
    (np.ones((3, 1)), r"shape \(3, 1\)"), ({1.0, 2.0, 3.0}, "not {1.0"),
])  # fmt: skip
def test_what_holds_no_numbers_is_refused_in_one_line(returned, said):
    with pytest.raises(InputError, match=f"task.reward: it must return one number per .*{said}"):
        _called(returned)


@pytest.mark.parametrize("error", [SystemExit(0), ValueError("a\nb"), GeneratorExit("x")])
def test_what_it_raises_ends_the_run_in_one_line(error):
    def raising(**_):
        raise error

    with pytest.raises(
        InputError, match=rf"task.reward: it failed: {type(error).__name__}: \S+"
    ) as e:
        guarded(raising, "it")(completions=["a"])
    assert "\n" not in str(e.value)


def test_ctrl_c_is_no_failure():
    def raising(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(raising, "it")(completions=["a"])


@pytest.mark.parametrize("given", [3, dict, None])
def test_what_is_no_function_is_refused(given):
    with pytest.raises(InputError, match=r"task.reward: it is no function"):
        guarded(given, "it")


def test_a_reward_that_never_has_a_number_is_refused_before_training():
    model, tokenizer = load_model("embedded")
    rows = [{"prompt": "1 2 3 4 -> 10 :"}]
    sampling = Sampling(each=2, most_words=4)
    with pytest.raises(InputError, match="no number for any of 2 answers"):
        judge(model, tokenizer, rows, lambda **_: [None, None], sampling)
    found = judge(model, tokenizer, rows, lambda **_: [None, 1.0], sampling)
    assert found.right.tolist() == [[False, True]]


# --- what they need -------------------------------------------------------------------------------


def _wrapped(function):
    """Gives what the data lacks."""

    @functools.wraps(function)
    def wrapper(*positional, **named):
        return function(*positional, weight=2.0, **named)

    return wrapper


def needs(completions, weight, **_):
    return [weight] * len(completions)


class Instance:
    def __call__(self, completions, levels, **_):
        return [0.0] * len(completions)


@pytest.mark.parametrize(("reward", "said"), [
    (needs, "it needs 'weight', which is no column .* given: level, tags"),
    (Instance(), "it needs 'levels', which is no column"),
    (lambda completions, *, level, missing, **_: 0, "it needs 'missing'"),
    (lambda completions, prompts, level: 0, "it takes no completion_ids, .*, tags; end"),
    (lambda completions, /, **_: 0, "it takes completions by its place alone"),
])  # fmt: skip
def test_a_reward_that_can_not_be_called_is_refused_before_a_run(reward, said):
    with pytest.raises(InputError, match=f"^task.reward: {said}"):
        check_arguments(reward, "it", ["level", "tags"])


@pytest.mark.parametrize("reward", [
    functools.partial(needs, weight=1.0), _wrapped(needs), lambda **_: 0, max,
    lambda completions, level=None, absent=1, **_: 0,
    lambda prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **tags: 0,
])  # fmt: skip
def test_one_that_can_be_is_not(reward):
    check_arguments(reward, "it", ["level", "tags"])


def test_what_is_given_is_what_trl_gives():
    """By its own source: the arguments of a reward besides the columns."""
    from inspect import getsource

    from trl import GRPOTrainer

    source = getsource(GRPOTrainer._calculate_rewards)
    assert {name for name in GIVEN if name in source} == {*GIVEN}
    of_trainer = {
        line.split('"')[1]
        for line in source.splitlines()
        if line.strip().startswith('reward_kwargs["')
    }
    assert of_trainer - {"environments"} == {"trainer_state", "log_extra", "log_metric"}
