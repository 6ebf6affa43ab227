"""Scoring a stream of finished rows: whatever a reward object returns, failures stay failures."""

import math
import threading
import time

import pytest
import torch

from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.noise import Address, Stream, generator
from entroflow.policies.grid import shifted_grid
from entroflow.prompts import Prompt
from entroflow.rewards.base import Scores, Status
from entroflow.rewards.parts import as_parts
from entroflow.rewards.scoring import CALLS, Scoring, score
from entroflow.sampling.kernels import ODE
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from gaussian_policy import GaussianPolicy
from tiny_run import Brightness, part

ROWS = 5


class Fixed:
    """Returns what it is told to, batch after batch."""

    def __init__(self, values, statuses):
        self.values, self.statuses = list(values), list(statuses)

    def score(self, images, prompts):
        n = len(images)
        values, statuses = self.values[:n], tuple(self.statuses[:n])
        self.values, self.statuses = self.values[n:], self.statuses[n:]
        return Scores(torch.tensor(values, dtype=torch.float64), statuses)


def scored(reward, batch_size=2):
    return scored_all({"reward": reward}, batch_size)["reward"]


def scored_all(rewards, batch_size=2, **options):
    policy, grid = GaussianPolicy(mean=0.3, variance=0.5), shifted_grid(2, 1.0)
    sizes, none = torch.tensor([ROWS]), torch.tensor([0])
    plan = fresh_rows([Prompt("a ring")], sizes, none, grid, torch.zeros(2))
    rollouts = Rollouts.empty(plan, policy.latent_shape)
    cond = policy.encode(rollouts.plan.texts)
    finished = sample(policy, ODE(), rollouts, cond, address=Address(0), batch_size=batch_size)
    return score(as_parts(rewards, "rewards"), rollouts, finished, **options)


def test_values_land_on_their_rows():
    found = scored(Fixed([1, 2, 3, 4, 5], [Status.OK] * ROWS))
    assert found.values.tolist() == [1, 2, 3, 4, 5]
    assert found.statuses == (Status.OK,) * ROWS


def test_a_value_beside_a_failure_is_never_used():
    """An object may report a failure and still fill in a 0."""
    statuses = [Status.OK, Status.ERROR, Status.UNPARSED, Status.OK, Status.OK]
    found = scored(Fixed([1, 0, 0, 4, 5], statuses))
    assert found.values.isnan().tolist() == [False, True, True, False, False]
    assert list(found.statuses) == statuses


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_is_a_failure_of_its_image_alone(bad):
    found = scored(Fixed([1, bad, 3, 4, 5], [Status.OK] * ROWS))
    assert found.values.isnan().tolist() == [False, True, False, False, False]
    assert found.statuses[1] == Status.UNPARSED


@pytest.mark.parametrize(("values", "statuses"), [(1, 2), (3, 2), (2, 1), (2, 3)])
def test_the_wrong_number_of_values_or_statuses_is_refused(values, statuses):
    """One value must not spread over a batch."""

    class Wrong:
        def score(self, images, prompts):
            return Scores(torch.ones(values), (Status.OK,) * statuses)

    with pytest.raises(InputError, match="Wrong must return one value and one status per image"):
        scored(Wrong())


def test_the_warning_of_a_failed_function_names_the_kind_of_error(caplog):
    def reward(images, prompts, metadata):
        return [entry["level"] for entry in metadata]

    found = scored(reward, batch_size=ROWS)
    assert found.values.isnan().all()
    assert "KeyError: 'level'" in caplog.text


# --- rewards that compare -------------------------------------------------------------------------


class Places:
    """The place of each image in the group, and who was asked about what."""

    def __init__(self):
        self.groups = []

    def score_group(self, images, prompt, source):
        self.groups.append((prompt.text, images.clone(), source.integers(0, 2**60)))
        values = torch.arange(len(images), dtype=torch.float64)
        return Scores(values, (Status.OK,) * len(images), facts={"size": float(len(images))})

    def score_against(self, images, others, prompts, source):
        raise NotImplementedError


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_a_group_is_compared_when_it_is_whole(batch_size):
    """Whatever the batches: the images of a group in the order of their rows, once."""
    policy, grid = GaussianPolicy(mean=0.3, variance=0.5), shifted_grid(2, 1.0)
    prompts = [Prompt("a ring"), Prompt("a cross")]
    plan = fresh_rows(prompts, torch.tensor([3, 2]), torch.tensor([0, 0]), grid, torch.zeros(2))
    rollouts = Rollouts.empty(plan, policy.latent_shape)
    cond, ledger = policy.encode(plan.texts), Ledger()
    finished = sample(policy, ODE(), rollouts, cond, address=Address(0, 4), batch_size=batch_size)
    reward = Places()
    found = score({"places": part(reward)}, rollouts, finished, ledger, seed=7, iteration=4)[
        "places"
    ]
    assert found.values.tolist() == [0, 1, 2, 0, 1]
    assert [text for text, *_ in reward.groups] == ["a ring", "a cross"]
    assert torch.equal(torch.cat([images for _, images, _ in reward.groups]), rollouts.images)
    drawn = [generator(7, Stream.JUDGE, 4, group).integers(0, 2**60) for group in (0, 1)]
    assert [number for *_, number in reward.groups] == drawn
    assert found.facts == {"size": 2.5}
    assert ledger.reward_calls == 5


def two_rounds(sizes):
    """Rollouts of two prompts in two rounds, each with its stream of finished rows."""
    policy, grid = GaussianPolicy(mean=0.3, variance=0.5), shifted_grid(2, 1.0)
    prompts, spent = [Prompt("a ring"), Prompt("a cross")], torch.tensor([0, 0])
    for size in map(torch.tensor, sizes):
        plan = fresh_rows(prompts, size, spent, grid, torch.zeros(2))
        rollouts = Rollouts.empty(plan, policy.latent_shape)
        cond = policy.encode(plan.texts)
        yield rollouts, sample(policy, ODE(), rollouts, cond, address=Address(0), batch_size=2)
        spent = spent + size


@pytest.mark.parametrize("known", [True, False])
def test_a_group_may_span_rounds(known):
    """Its images are compared once, when all are there; also those that end in the first round.

    Whether it is known in time which round is the last makes no difference.
    """
    reward, ledger = Places(), Ledger()
    scoring = Scoring({"places": part(reward), "light": part(Brightness())}, ledger)
    images = []
    for number, (rollouts, finished) in enumerate(two_rounds([[2, 3], [2, 0]]), start=1):
        scoring.take(rollouts, finished, last=known and number == 2)
        images.append(rollouts.images)
        assert bool(reward.groups) == (known and number == 2)
    found = scoring.scores()
    # Rows: two of the ring and three of the cross, then two more of the ring.
    assert found["places"].values.tolist() == [0, 1, 0, 1, 2, 2, 3]
    joined = torch.cat(images)
    compared = {text: shown for text, shown, _ in reward.groups}
    assert torch.equal(compared["a ring"], joined[[0, 1, 5, 6]])
    assert torch.equal(compared["a cross"], joined[2:5])
    light = joined.double().flatten(1).mean(dim=1)
    assert torch.equal(found["light"].values, light)
    assert ledger.reward_calls == 14
    assert set(ledger.seconds) >= {"score"}


class Slow(Places):
    """Answers only after the last image was drawn: sampling must go on while it is asked."""

    waits = True

    def __init__(self):
        super().__init__()
        self.drawn, self.threads = threading.Event(), set()

    def score_group(self, images, prompt, source):
        self.threads.add(threading.current_thread().name)
        assert self.drawn.wait(timeout=20), "nothing was drawn meanwhile"
        return super().score_group(images, prompt, source)


def test_a_reward_that_waits_is_asked_while_sampling_goes_on():
    """And says the same as one that does not, on the same rows."""
    slow = Slow()

    def stream(finished):
        yield from finished
        slow.drawn.set()

    ((rollouts, finished),) = two_rounds([[2, 3]])
    found = score({"places": part(slow)}, rollouts, stream(finished))["places"]
    assert found.values.tolist() == [0, 1, 0, 1, 2]
    assert slow.threads <= {f"reward places_{n}" for n in range(CALLS)}
    assert not [t for t in threading.enumerate() if t.name.startswith("reward places")]


@pytest.mark.parametrize("told", [True, False])
def test_left_by_an_exception_scoring_waits_for_no_reward(told):
    """One that can be told so is told to give up; another is left to itself."""

    class Hanging(Places):
        waits = True
        asked, over = threading.Event(), threading.Event()

        def score_group(self, images, prompt, source):
            self.asked.set()
            self.over.wait(30)
            return super().score_group(images, prompt, source)

    class Told(Hanging):
        def cancel(self):
            self.over.set()

    reward = Told() if told else Hanging()

    def stream(finished):
        yield from finished
        assert reward.asked.wait(20)
        raise RuntimeError("device lost")

    ((rollouts, finished),) = two_rounds([[2, 3]])
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="device lost"):
        score({"places": part(reward)}, rollouts, stream(finished))
    assert time.monotonic() - start < 15
    assert reward.over.is_set() is told
    reward.over.set()


def test_what_fails_in_a_thread_is_masked_or_ends_the_run(caplog):
    class Broken(Slow):
        def score_group(self, images, prompt, source):
            raise ConnectionError("no judge")

    for on_failure in ("mask", "raise"):
        ((rollouts, finished),) = two_rounds([[2, 3]])
        if on_failure == "raise":
            with pytest.raises(InputError, match=r"no judge \(scoring.on_failure is raise\)"):
                score({"places": part(Broken())}, rollouts, finished, on_failure=on_failure)
        else:
            found = score({"places": part(Broken())}, rollouts, finished, on_failure=on_failure)
            assert set(found["places"].statuses) == {Status.ERROR}
    assert not [t for t in threading.enumerate() if t.name.startswith("reward places")]


# --- failures -------------------------------------------------------------------------------------


class Raising:
    def __init__(self, error):
        self.error = error

    def score(self, images, prompts):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("no"), Status.ERROR), (TimeoutError("late"), Status.TIMEOUT)],
)
def test_what_an_object_raises_is_masked(error, status, caplog):
    found = scored(Raising(error))
    assert found.values.isnan().all()
    assert found.statuses == (status,) * ROWS
    assert f"{type(error).__name__}: {error}" in caplog.text


def test_one_reward_that_fails_leaves_the_other():
    rewards = {"bad": Raising(ValueError("no")), "good": Fixed([1, 2, 3, 4, 5], [Status.OK] * ROWS)}
    found = scored_all(rewards)
    assert found["bad"].values.isnan().all()
    assert found["good"].values.tolist() == [1, 2, 3, 4, 5]


def test_failures_can_end_the_run_in_one_line():
    with pytest.raises(InputError, match=r"Raising failed on 2 images: ValueError: no"):
        scored_all({"reward": Raising(ValueError("no"))}, on_failure="raise")
    shy = Fixed([1, 2, math.nan, 4, 5], [Status.OK] * ROWS)
    with pytest.raises(
        InputError, match=r"shy: an image of the prompt 'a ring' has none .unparsed."
    ):
        scored_all({"shy": shy}, on_failure="raise")
