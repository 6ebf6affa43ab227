"""What rewards may return and what they are given, whoever calls them."""

import array
import asyncio
import collections
import decimal
import fractions
import itertools
import math
import threading

import numpy as np
import pandas as pd
import pytest
import torch

from entroflow.errors import InputError
from entroflow.noise import generator
from entroflow.prompts import Prompt
from entroflow.rewards.awaiting import awaited
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.combined import as_rewards
from entroflow.rewards.contract import LARGEST, numbers_of, told, undisturbed
from entroflow.rewards.mixture import Mixture
from entroflow.rewards.pairwise import Answers, Pairwise
from entroflow.rewards.scoring import attempt, score_against, score_alone, score_images
from tiny_run import part

HALF, NONE = 0.5, math.nan
MASKED = np.ma.masked_array([HALF, 9.0, 2.0], mask=[False, True, False])


class Settled:
    """Not a coroutine, but it can be awaited."""

    def __init__(self, value):
        self.value = value

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return self.value


# --- numbers --------------------------------------------------------------------------------------

FORMS = {
    "list": [HALF, None, 2],
    "tuple of bools": (True, None, False),
    "float16": np.array([HALF, np.nan, 2], dtype=np.float16),
    "longdouble": np.array([HALF, np.nan, 2], dtype=np.longdouble),
    "objects": np.array([HALF, None, 2], dtype=object),
    "numpy scalars": [np.float32(HALF), np.float64("nan"), np.uint8(2)],
    "elements without axes": [np.array(HALF), None, torch.tensor(2)],
    "elements with one axis": [torch.tensor([HALF]), None, np.array([2])],
    "an object without axes": [np.array(HALF), np.array(None), np.array(2)],
    "bfloat16": torch.tensor([HALF, NONE, 2], dtype=torch.bfloat16),
    "with a gradient": torch.tensor([HALF, NONE, 2], requires_grad=True) * 1,
    "a view": torch.tensor([[HALF, 0], [NONE, 0], [2, 0]])[:, 0],
    "series": pd.Series([HALF, None, 2], index=[7, 7, 1]),
    "nullable series": pd.Series([HALF, None, 2], dtype="Float32"),
    "series of objects": pd.Series([HALF, pd.NA, 2], dtype=object),
    "masked array": MASKED,
    "masked elements": [*MASKED],
    "generator": (x for x in (HALF, None, 2)),
    "values of a mapping": {"a": HALF, "b": None, "c": 2}.values(),
    "deque": collections.deque([HALF, None, 2]),
    "array": array.array("d", [HALF, NONE, 2]),
    "exact numbers": [fractions.Fraction(1, 2), None, decimal.Decimal(2)],
    "not finite": [HALF, math.inf, 2],
    "-inf in half": torch.tensor([HALF, -math.inf, 2], dtype=torch.half),
    "too large to square": [HALF, 1e300, 2],
    "too large for a float": [HALF, 10**400, 2],
}


@pytest.mark.parametrize("name", FORMS)
def test_numbers_in_any_form(name):
    found = numbers_of(FORMS[name], 3, "it")
    wanted = [1.0, NONE, 0.0] if name == "tuple of bools" else [HALF, NONE, 2.0]
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float64, "cpu", False)


def test_the_largest_number_is_a_number():
    assert numbers_of([LARGEST, -LARGEST], 2, "it").tolist() == [LARGEST, -LARGEST]


REFUSED = {
    "text": "123",
    "bytes": b"123",
    "bytearray": bytearray(b"123"),
    "texts": ["1", "2", "3"],
    "numpy texts": np.array(["1", "2", "3"]),
    "mapping": {0: 1.0, 1: 2.0, 2: 3.0},
    "counter": collections.Counter("abc"),
    "set": {1.0, 2.0, 3.0},
    "none": None,
    "complex array": np.ones(3, dtype=np.complex64),
    "complex tensor": torch.ones(3, dtype=torch.complex64),
    "complex numbers": [1j, 2j, 3j],
    "numpy complex numbers": [np.complex64(1), np.complex64(2), 3],
    "dates": np.array(["2020-01-01"] * 3, dtype="datetime64[D]"),
    "durations": np.array([1, 2, 3], dtype="timedelta64[s]"),
    "lists": [[1.0], [2.0], [3.0]],
    "rows of two": [torch.ones(2), torch.ones(2), torch.ones(2)],
    "mappings": [{"score": 1.0}] * 3,
    "functions": [len] * 3,
    "an object": object(),
    "a class": float,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_numbers_is_refused_in_one_line(name):
    with pytest.raises(InputError, match=r"^it must return one number per image, not .+\.$") as e:
        numbers_of(REFUSED[name], 3, "it")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300


WRONG_SHAPES = {
    "()": 1.0, "() ": np.float32(1), "()  ": torch.tensor(1.0), "()   ": True,
    "(2,)": [1.0, 2.0], "(4,)": (1.0 for _ in range(9)), "(4,) ": itertools.count(),
    "(3, 1)": torch.ones(3, 1), "(1, 3)": np.ones((1, 3)), "(0,)": [],
    "(3, 3)": pd.DataFrame(np.eye(3)),
}  # fmt: skip


@pytest.mark.parametrize("shape", WRONG_SHAPES)
def test_the_wrong_number_of_them_is_refused(shape):
    """Also of an iterator without an end."""
    with pytest.raises(InputError, match="3 images, but a result of shape") as error:
        numbers_of(WRONG_SHAPES[shape], 3, "it")
    assert f"shape {shape.strip()}." in str(error.value)


def test_what_an_iterator_raises_is_its_own():
    """And no wrong input: also where that is a TypeError."""

    def halfway():
        yield 1.0
        raise TypeError("of my own")

    with pytest.raises(TypeError, match="of my own"):
        numbers_of(halfway(), 2, "it")


class Elsewhere(torch.Tensor):
    """Stands for a tensor on an accelerator without float64: it can be looked at, and brought here.

    Whatever else is done with it is what fails between devices.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            here = args[0].as_subclass(torch.Tensor)
            if function in (torch.Tensor.cpu, torch.Tensor.item):
                return function(here)
            if function is torch.Tensor.detach:
                return here.detach().as_subclass(cls)
            found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            raise RuntimeError("Expected all tensors to be on the same device")
        return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_values_on_an_accelerator_are_brought_here(dtype):
    there = torch.tensor([3, 1, 2], dtype=dtype).as_subclass(Elsewhere)
    with pytest.raises(RuntimeError):
        there.to(torch.float64)
    for form in (lambda x: Scores(x, ["ok"] * 3), lambda x: x):
        found = scored(form(there))
        assert type(found.values) is torch.Tensor
        assert found.values.tolist() == [3, 1, 2]
        assert found.statuses == (Status.OK,) * 3
    one = torch.tensor([3], dtype=dtype).as_subclass(Elsewhere)
    assert numbers_of([one, 1], 2, "it").tolist() == [3, 1]


# --- statuses, facts ------------------------------------------------------------------------------


def scored(returned, count=3):
    return attempt("mine", lambda: returned, count)


def test_a_reward_may_return_what_it_likes_as_scores():
    found = scored(
        Scores(
            np.array([1, 2, 3], dtype=np.int32),
            ["ok", "timeout", Status.OK],
            floor=torch.tensor(0.25),
            facts={"x": np.float32(0.5), "none": None},
        )
    )
    np.testing.assert_array_equal(found.values, [1, NONE, 3])
    assert found.statuses == (Status.OK, Status.TIMEOUT, Status.OK)
    assert found.floor == 0.25
    assert found.facts["x"] == 0.5
    assert math.isnan(found.facts["none"])
    assert scored([1, None, 3]).statuses == (Status.OK, Status.UNPARSED, Status.OK)
    assert scored(Scores([1, 2, 3], ["ok"] * 3, floor=math.nan)).floor == 0


@pytest.mark.parametrize(("scores", "said"), [
    (Scores([1, 2, 3], ["ok", "fine", "ok"]), "not the status 'fine'; there are ok, error"),
    (Scores([1, 2, 3], "ok"), "not the statuses 'ok'"),
    (Scores([1, 2, 3], None), None),
    (Scores([1, 2, 3], 3), "not the statuses 3"),
    (Scores([1, 2, 3], {"ok": 1}), "not the statuses {'ok': 1}"),
    (Scores([1, 2, 3], itertools.repeat("ok")), "3 values, but another number of statuses"),
    (Scores("123", ["ok"] * 3), "one value and one status per image, not '123'"),
    (Scores([1, 2, 3], ["ok"] * 3, floor="a lot"), "a number as its floor, not 'a lot'"),
    (Scores([1, 2, 3], ["ok"] * 3, facts={"n": "two"}), "a number as its n, not 'two'"),
])  # fmt: skip
def test_what_is_no_status_or_fact_is_refused_in_one_line(scores, said):
    if said is None:
        assert scored(scores).statuses == (Status.OK,) * 3
        return
    with pytest.raises(InputError, match="reward mine must return") as error:
        scored(scores)
    assert said in str(error.value)


def test_a_buffer_that_is_used_again_changes_nothing_that_was_returned():
    buffer = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = scored(buffer, 2)
    buffer.fill_(7)
    assert found.values.tolist() == [1, 2]


# --- async ----------------------------------------------------------------------------------------


async def _later(value, seconds=0.0):
    await asyncio.sleep(seconds)
    return value


def test_what_can_be_awaited_is():
    assert awaited(_later(3)) == 3
    assert awaited(Settled(4)) == 4
    assert awaited(5) == 5
    with pytest.raises(ZeroDivisionError):
        awaited(_divided())


async def _divided():
    return 1 / await _later(0)


def test_it_is_awaited_inside_of_a_running_loop():
    """As in a notebook."""

    async def cell():
        return scored(_later([1.0, 2.0, 3.0])).values.tolist()

    assert asyncio.run(cell()) == [1, 2, 3]


def test_all_are_awaited_in_one_loop():
    """A client that keeps its connections belongs to the loop in which it was made."""

    async def loop():
        return asyncio.get_running_loop()

    loops = [awaited(loop()), awaited(loop())]
    threads = [threading.Thread(target=lambda: loops.append(awaited(loop()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(loops) == 5
    assert len({*loops}) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_an_exit_inside_of_a_coroutine_is_a_failure_like_any(nested, caplog):
    """Also of a task of its own; and those that come after it are awaited as ever."""

    async def leaving():
        raise SystemExit(0)

    async def both():
        return await asyncio.gather(leaving(), _later(1))

    found = attempt("mine", both if nested else leaving, 2)
    assert found.statuses == (Status.ERROR,) * 2
    assert "SystemExit: 0" in caplog.text
    assert awaited(_later(3)) == 3


# --- failures -------------------------------------------------------------------------------------


class Refusal(BaseException):
    """As those that are no `Exception` are made."""


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("not even that")


def _deeper(*_):
    return _deeper()


@pytest.mark.parametrize("error", [
    SystemExit(0), SystemExit("done"), Refusal("no"), GeneratorExit(), asyncio.CancelledError(),
    Unprintable(), MemoryError("big"), ValueError("long\n" * 10**6), StopIteration(3),
])  # fmt: skip
def test_whatever_is_raised_is_a_failure_that_is_said_in_one_line(error, caplog):
    def raising():
        raise error

    found = attempt("mine", raising, 2)
    assert found.statuses == (Status.ERROR,) * 2
    (record,) = caplog.records
    assert f"reward mine failed on 2 images: {type(error).__name__}" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 700
    with pytest.raises(InputError, match=f"{type(error).__name__}.*on_failure is raise"):
        attempt("mine", raising, 2, "raise")


def test_endless_recursion_is_a_failure(caplog):
    assert attempt("mine", _deeper, 1).statuses == (Status.ERROR,)
    assert "RecursionError" in caplog.text


def test_ctrl_c_is_none():
    def raising():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("mine", raising, 1)


# --- what they are given --------------------------------------------------------------------------


class Greedy:
    """Changes all that it is given, in place, and returns what it saw."""

    def _took(self, images, *prompts):
        seen = [(p.text, str(p.metadata)) for p in prompts]
        values = images.flatten(1).mean(dim=1)
        images.fill_(-1)
        for p in prompts:
            p.metadata.get("objects", [{}])[0]["count"] = 99
            p.metadata["mine"] = True
        self.seen = seen
        return values

    def score(self, images, prompts):
        return self._took(images, *prompts)


class GreedyGroup(Greedy):
    score = None

    def score_group(self, images, prompt, source):
        return self._took(images, prompt)

    def score_against(self, images, others, prompts, source):
        others.fill_(-1)
        return self._took(images, *prompts)


def test_what_a_reward_is_given_is_its_own():
    """Images, those they are compared with, and metadata, also what lies deeper in it."""
    images, others = torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    before = images.clone(), others.clone()
    prompt = Prompt("two cups", {"objects": [{"count": 2}]})
    group, alone = GreedyGroup(), Greedy()
    for _ in range(2):
        found = [
            score_images(part(alone), images, prompt),
            score_images(part(group), images, prompt),
            score_alone(part(alone), images, [prompt] * 3),
            score_against(part(group), images, others, [prompt] * 3, generator(0, 0)),
        ]  # fmt: skip
        for scores in found:
            assert torch.allclose(scores.values, before[0].flatten(1).mean(dim=1).double())
        assert {*alone.seen, *group.seen} == {("two cups", "{'objects': [{'count': 2}]}")}
    assert torch.equal(images, before[0])
    assert torch.equal(others, before[1])
    assert prompt.metadata == {"objects": [{"count": 2}]}


def test_metadata_that_can_not_be_copied_is_handed_over(tmp_path):
    """A file of the user's own source of prompts."""
    with open(tmp_path / "open", "w", encoding="utf-8") as there:
        prompt = Prompt("a ring", {"file": there, "list": [1]})

        class Reads:
            def score(self, images, prompts):
                prompts[0].metadata["list"].append(2)
                return [float(prompts[0].metadata["file"] is there)]

        assert score_images(part(Reads()), torch.zeros(1, 3, 2, 2), prompt).values.tolist() == [1]
    assert prompt.metadata["list"] == [1]


def test_what_a_reward_sets_for_all_of_torch_is_set_back():
    def switching():
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        torch.set_grad_enabled(True)
        return [1.0, 2.0]

    assert torch.is_grad_enabled()
    assert attempt("mine", switching, 2).values.tolist() == [1, 2]
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")
    with torch.no_grad():
        attempt("mine", switching, 2)
        assert not torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        attempt("mine", switching, 2)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_of_two_at_a_time_the_later_does_not_bring_back_what_the_earlier_set():
    earlier, later = threading.Event(), threading.Event()

    def first():
        with undisturbed():
            torch.set_default_dtype(torch.float16)
            earlier.set()
            assert later.wait(timeout=20)

    thread = threading.Thread(target=first)
    thread.start()
    assert earlier.wait(timeout=20)
    with undisturbed():
        later.set()
        thread.join(timeout=20)
    assert torch.get_default_dtype() == torch.float32


def test_no_gradients_are_kept_whoever_scores():
    network, kept = torch.nn.Linear(12, 1), []

    class Score:
        def score(self, images, prompts):
            kept.append(network(images.flatten(1)))
            return kept[-1][:, 0]

        async def compare(self, images, sides, prompts):
            kept.append(network(images.flatten(1)))
            return (kept[-1][sides[:, 0], 0] > 0).double()

    images, prompt = torch.rand(3, 3, 2, 2), Prompt("a ring")
    with torch.enable_grad():
        score_images(part(Score()), images, prompt)
        score_images(part(Pairwise(judge=Score())), images, prompt)
    assert len(kept) == 2
    assert not any(each.requires_grad for each in kept)


# --- functions ------------------------------------------------------------------------------------


def light(images, prompts, metadata, scale=1.0):
    return (scale * images.mean(dim=(1, 2, 3))).tolist()


class Instance:
    def __call__(self, images, prompts, metadata):
        return light(images, prompts, metadata)

    async def asynchronous(self, images, prompts, metadata):
        return light(images, prompts, metadata)


def callables():
    from functools import cache, lru_cache, partial

    return {
        "light": light, "light ": partial(light, scale=1.0), "light  ": cache(light),
        "light   ": partial(lru_cache(maxsize=4)(light), scale=1.0),
        "Instance": Instance(), "Instance.asynchronous": Instance().asynchronous,
    }  # fmt: skip


@pytest.mark.parametrize("name", callables())
def test_whatever_can_be_called_is_a_reward(name):
    reward = part(callables()[name])
    images = torch.rand(4, 3, 2, 2)
    found = score_images(reward, images, Prompt("a ring"))
    assert torch.allclose(found.values, images.mean(dim=(1, 2, 3)).double())
    assert reward.name == name.strip()


def test_a_cached_function_keeps_no_images():
    from functools import cache

    cached = cache(light)
    score_images(part(cached), torch.rand(4, 3, 2, 2), Prompt("a ring"))
    assert cached.cache_info().currsize == 0


@pytest.mark.parametrize(("given", "said"), [
    (Instance, "rewards.x: Instance is a class; give an instance"),
    (3, "rewards.x: int is no reward"),
])  # fmt: skip
def test_members_of_a_mixture_are_rewards_like_any(given, said):
    mixed = Mixture(rewards={"x": light, "y": Greedy()})
    assert {name: each.name for name, each in as_rewards(mixed).parts.items()} == {
        "x": "light", "y": "Greedy",
    }  # fmt: skip
    with pytest.raises(InputError, match=said):
        as_rewards(Mixture(rewards={"x": given}))


# --- judges ---------------------------------------------------------------------------------------


class Judge:
    """Prefers the brighter; hands its points over in some form."""

    def __init__(self, form):
        self.form = form

    def compare(self, images, sides, prompts):
        level = images.flatten(1).mean(dim=1)
        better = (level[sides[:, 0]] > level[sides[:, 1]]).double()
        images.zero_()
        sides.zero_()
        for prompt in prompts:
            prompt.metadata["mine"] = True
        return self.form(better)


def _twice(points):
    return Answers([*points.tolist(), None], ["ok"] * (len(points) + 1))


@pytest.mark.parametrize("form", [
    lambda p: p.bfloat16(), lambda p: p.bool().tolist(), lambda p: p.numpy().astype(np.int8),
    _later, lambda p: Answers(p.tolist(), ["ok"] * len(p)),
    lambda p: (bool(x) for x in p),
])  # fmt: skip
def test_a_judge_may_hand_over_its_points_in_any_form(form):
    images = torch.tensor([0.3, 0.9, 0.1])[:, None, None, None].expand(3, 3, 2, 2)
    prompt = Prompt("a ring", {})
    reward = part(Pairwise(judge=Judge(form)))
    assert score_images(reward, images, prompt).values.tolist() == [0.5, 1, 0]
    against = score_against(reward, images, images.flip(0), [prompt] * 3, generator(0, 0))
    assert against.values.tolist() == [1, 0.5, 0]
    assert prompt.metadata == {}


def test_a_probability_may_be_off_by_rounding():
    images = torch.tensor([0.3, 0.9])[:, None, None, None].expand(2, 3, 2, 2)
    reward = part(Pairwise(judge=Judge(lambda p: p + 1e-7), order="fixed"))
    assert score_images(reward, images, Prompt("")).values.tolist() == [1e-7, 1 - 1e-7]


def test_an_answer_that_is_none_is_a_comparison_that_failed():
    def first_fails(points):
        return [None, *points.tolist()[1:]]

    images = torch.tensor([0.3, 0.9, 0.1])[:, None, None, None].expand(3, 3, 2, 2)
    found = score_images(part(Pairwise(judge=Judge(first_fails))), images, Prompt(""))
    # The other order of the first pair was answered.
    assert found.values.tolist() == [0.5, 1, 0]
    assert found.facts["failed"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(("form", "said"), [
    (lambda p: p[:-1], r"one number per comparison: 6 comparisons, but a result of shape \(5,\)"),
    (lambda p: Answers(p, ["ok"]), "6 values, but another number of statuses"),
    (_twice, r"but a result of shape \(7,\)"),
    (lambda p: 1 + p, r"points in \[0, 1\], 1 where the first image is better, not 2"),
    (lambda p: 2 * p - 1, r"points in \[0, 1\], .* not -1"),
    (lambda p: ["first"] * len(p), "not 'first'"),
    (lambda p: {"points": p}, "one number per comparison, not"),
])  # fmt: skip
def test_a_judge_that_hands_over_something_else_is_refused(form, said):
    """It is a bug; were it masked, every group would be, and nobody knew why."""
    images = torch.rand(3, 3, 2, 2)
    with pytest.raises(InputError, match=f"^judge Judge must return .*{said}"):
        score_images(part(Pairwise(judge=Judge(form))), images, Prompt(""))


def test_told_is_short():
    assert told(KeyError("a")) == "KeyError: 'a'"
    assert told(ValueError(" a\n b ")) == "ValueError: a b"
