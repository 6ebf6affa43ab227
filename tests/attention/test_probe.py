"""What is measured of attention, and that nothing is changed by it (A-4, A-5)."""

from __future__ import annotations

import math

import pytest
import torch

from entroflow.attention.probe import (
    attention_shift,
    compared_states,
    entropy_by_step,
    probe_of,
    probed_velocity,
    stratified,
)
from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.noise import Address
from entroflow.policies import attention as shown
from entroflow.policies.shapes import network
from entroflow.policies.shapes.policy import ShapesPolicy
from entroflow.prompts import Prompt
from entroflow.sampling.kernels import FlowSDE
from entroflow.sampling.plan import Role, fresh_rows, with_children
from entroflow.sampling.rollouts import Rollouts, join_rollouts
from entroflow.sampling.solver import sample
from entroflow.settings import Attention
from random_network import random_weights
from tiny_run import PixelPolicy

PROMPTS = ["a red circle", "two blue squares", "a green ring"]
IMAGE = 64
EVERY = Attention(layer_stride=1)


@pytest.fixture
def policy():
    return ShapesPolicy(random_weights(), precision="fp32")


def inputs(policy, rows=3, seed=0):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 32, 32, generator=source)
    return x, torch.full((rows,), 0.6), policy.encode(PROMPTS[:rows])


def entropy(q, k):
    """[B, N] by the definition in float64, mean over heads."""
    p = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return -torch.xlogy(p, p).sum(dim=-1).mean(dim=1)


def of_the_network(policy, monkeypatch, x, sigma, cond, guidance):
    """Per layer, q [B, heads, N, d] of the image tokens and k of all, conditional rows first."""
    seen = []
    own = network.attention

    def attention(q, k, v, layer, text):
        seen.append((q[:, :, -IMAGE:], k))
        assert k.shape[2] == IMAGE + text
        return own(q, k, v, layer, text)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(network, "attention", attention)
        policy.velocity(x, sigma, cond, guidance)
    return [(q[: len(x)], k[: len(x)]) for q, k in seen]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("keys", ["all", "text", "image"])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_it_is_the_entropy_of_what_the_network_attends_to(
    policy, monkeypatch, guidance, keys, stride
):
    given = inputs(policy)
    settings = Attention(layer_stride=stride, keys=keys)
    with torch.no_grad():
        _, found = probed_velocity(policy, *given, guidance, torch.tensor([1, 0, 1]) > 0, settings)
    part = {"all": slice(None), "text": slice(0, -IMAGE), "image": slice(-IMAGE, None)}[keys]
    layers = [
        (entropy(q, k[:, :, part]) / math.log(k[:, :, part].shape[2])).mean(dim=1)
        for q, k in of_the_network(policy, monkeypatch, *given, guidance)[::stride]
    ]
    assert len(layers) == 4 // stride
    expected = torch.stack(layers).mean(dim=0)
    assert found[1].isnan()
    torch.testing.assert_close(found[[0, 2]].double(), expected[[0, 2]], rtol=1e-5, atol=0)
    assert not torch.allclose(expected[0], expected[2], rtol=1e-3)


def test_in_nats_and_of_some_image_tokens(policy, monkeypatch):
    given = inputs(policy)
    settings = Attention(layer_stride=4, normalised=False, queries=5, seed=3)
    with torch.no_grad():
        _, found = probed_velocity(policy, *given, 1.0, torch.ones(3) > 0, settings)
    q, k = of_the_network(policy, monkeypatch, *given, 1.0)[0]
    chosen = stratified(IMAGE, 5, seed=3)
    expected = entropy(q[:, :, chosen], k).mean(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_velocity_is_the_same_to_the_bit(guidance, precision):
    policy = ShapesPolicy(random_weights(), precision=precision)
    given = inputs(policy)
    with torch.no_grad():
        plain = policy.velocity(*given, guidance)
        probed, found = probed_velocity(policy, *given, guidance, torch.ones(3) > 0, EVERY)
        after = policy.velocity(*given, guidance)
    assert torch.equal(plain, probed)
    assert torch.equal(plain, after)
    assert ((found > 0) & (found < 1)).all()


def test_mixed_precision_leaves_the_entropy_in_float32(policy, monkeypatch):
    """Inside autocast a product would be rounded to 8 bits: off by some 1e-3."""
    policy = ShapesPolicy(random_weights(), precision="bf16")
    given = inputs(policy)
    with torch.no_grad():
        _, found = probed_velocity(policy, *given, 1.0, torch.ones(3) > 0, Attention())
    q, k = of_the_network(policy, monkeypatch, *given, 1.0)[0]
    expected = entropy(q, k).mean(dim=1) / math.log(k.shape[2])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_one_record_for_every_measured_layer_of_every_call(policy):
    """And none when nobody watches, or after an error."""
    seen = []

    class Watcher:
        def see(self, layer, q, k, text):
            seen.append((layer, tuple(q.shape), tuple(k.shape), text))

    x, sigma, cond = inputs(policy)
    with torch.no_grad(), shown.watched_by(Watcher()):
        policy.velocity(x, sigma, cond, 1.0)
        policy.velocity(x, sigma, cond, 4.0)
    words = seen[0][3].stop
    assert seen == [
        (layer, (3, 4, IMAGE, 32), (3, 4, IMAGE + words, 32), slice(0, words))
        for _ in range(2) for layer in range(4)
    ]  # fmt: skip
    with pytest.raises(RuntimeError), shown.watched_by(Watcher()):
        raise RuntimeError
    with torch.no_grad():
        policy.velocity(x, sigma, cond, 1.0)
    assert len(seen) == 8
    assert not shown.is_watched()


@pytest.mark.parametrize("text", [slice(0, 3), slice(5, None)])
def test_image_rows_are_found_in_both_token_orders(text):
    """Text first as in FLUX, or last as in SD3; queries of all tokens or of the image alone."""
    tokens = torch.arange(8.0).view(1, 1, 8, 1)
    image = tokens[:, :, 3:] if text.start == 0 else tokens[:, :, :5]
    seen = []

    class Watcher:
        def see(self, layer, q, k, text):
            seen.append((layer, q.flatten().tolist(), k.flatten().tolist(), text))

    with shown.watched_by(Watcher()):
        shown.show(2, tokens, tokens, text)
        shown.show(3, image, tokens, text)
    start, stop, _ = text.indices(8)
    expected = image.flatten().tolist(), list(range(8)), slice(start, stop)
    assert seen == [(2, *expected), (3, *expected)]


def test_a_call_in_which_nobody_sees_the_prompt_shows_nothing():
    tokens, seen = torch.ones(2, 1, 4, 1), []

    class Watcher:
        def see(self, *shown):
            seen.append(shown)

    with shown.watched_by(Watcher()), shown.conditional(slice(0, 0)):
        shown.show(0, tokens, tokens, slice(0, 1))
    assert seen == []


class TwoCalls(PixelPolicy):
    """Guidance by two calls of the network."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def velocity(self, x, sigma, cond, guidance):
        tokens = x.float().flatten(1).reshape(len(x), 1, 4, 3)
        for rows, scale in zip(self.rows, (1.0, 3.0), strict=True):
            with shown.conditional(rows):
                shown.show(0, scale * tokens, tokens, slice(0, 1))
        return super().velocity(x, sigma, cond, guidance)


def test_of_guidance_by_two_calls_one_is_measured_and_which_must_be_said():
    policy = TwoCalls([slice(None), slice(0, 0)])
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    given = x, torch.full((2,), 0.5), policy.encode(["a", "a"]), 2.0, torch.ones(2) > 0, EVERY
    _, found = probed_velocity(policy, *given)
    tokens = x.flatten(1).reshape(2, 1, 4, 3)
    expected = entropy(tokens[:, :, 1:], tokens).mean(dim=1) / math.log(4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="layer 0 twice"):
        probed_velocity(TwoCalls([slice(None), slice(None)]), *given)


@pytest.mark.parametrize(
    ("tokens", "count"), [(64, 128), (64, 64), (4096, 128), (100, 7), (4096, 4095), (7, 6)]
)
def test_the_measured_tokens_are_spread_over_the_image(tokens, count):
    chosen = stratified(tokens, count, seed=0)
    assert torch.equal(chosen, stratified(tokens, count, seed=0))
    assert len(chosen) == min(tokens, count)
    pieces = (chosen.double() * len(chosen) / tokens + 1e-9).long()
    assert len(chosen.unique()) == len(chosen)
    assert (pieces - torch.arange(len(chosen))).abs().max() <= 1
    if count < tokens:
        assert not torch.equal(chosen, stratified(tokens, count, seed=1))


def test_who_shows_no_attention_is_told():
    policy = PixelPolicy()
    given = torch.zeros(1, 3, 2, 2), torch.ones(1), policy.encode(["a"])
    with pytest.raises(InputError, match="the policy shows none"):
        probed_velocity(policy, *given, 1.0, torch.ones(1) > 0, EVERY)


# --- along rollouts -------------------------------------------------------------------------------


def rolled_out(policy, plan, settings=EVERY, **options):
    kept = compared_states(plan, settings.states)
    rollouts = Rollouts.empty(plan, policy.latent_shape, keep_states=kept)
    for _ in sample(policy, FlowSDE(noise_level=0.7), rollouts, policy.encode(plan.texts),
                    address=Address(0), probe=probe_of(settings), **options):  # fmt: skip
        pass
    return rollouts


def planned(policy, sizes=(2, 3), steps=5, first=(0, 0)):
    grid = policy.sigmas(steps)
    std = FlowSDE(noise_level=0.7).std(grid[:-1], grid[1:], grid)
    std[-1] = 0
    prompts = [Prompt(text) for text in PROMPTS[: len(sizes)]]
    return fresh_rows(prompts, torch.tensor(sizes), torch.tensor(first), grid, std)


def test_one_row_of_every_prompt_is_measured_at_all_its_steps(policy):
    plan = planned(policy)
    rollouts = rolled_out(policy, plan, batch_size=2)
    measured = ~rollouts.attention_entropy.isnan()
    assert measured.all(dim=1).tolist() == [True, False, True, False, False]
    assert measured.any(dim=1).tolist() == [True, False, True, False, False]
    with torch.no_grad():
        for row, prompt in ((0, 0), (2, 1)):
            for step in (1, 3):
                state = rollouts.states[rollouts.state_index[row, step]][None]
                cond = policy.encode([PROMPTS[prompt]])
                sigma = plan.base_grid[step].float()[None]
                _, found = probed_velocity(
                    policy, state, sigma, cond, 1.0, torch.ones(1) > 0, EVERY
                )
                own = rollouts.attention_entropy[row, step]
                torch.testing.assert_close(own, found[0], rtol=1e-5, atol=0)
    expected = rollouts.attention_entropy[[0, 2]].double().mean(dim=0)
    torch.testing.assert_close(entropy_by_step(rollouts), expected)


def test_of_an_anchor_and_its_branches_the_anchor_is_measured(policy):
    """Its grid is whole; branches and completions are left out."""
    grid = policy.sigmas(4)
    anchors = fresh_rows([Prompt(text) for text in PROMPTS[:2]], torch.ones(2).long(),
                         torch.zeros(2).long(), grid, torch.zeros(4).double(),
                         role=Role.ANCHOR, scored=False)  # fmt: skip
    plan = with_children(anchors, torch.tensor([0, 1]), torch.tensor([1, 2]), role=Role.COMPLETION)
    rollouts = rolled_out(policy, plan)
    assert (~rollouts.attention_entropy.isnan()).sum(dim=1).tolist() == [4, 4, 0, 0]


@pytest.mark.parametrize(("steps", "count", "chosen"), [
    (10, 4, [1, 3, 6, 8]), (4, 4, [0, 1, 2, 3]), (3, 4, [0, 1, 2]), (5, 1, [2]),
])  # fmt: skip
def test_states_are_compared_evenly_over_the_steps(policy, steps, count, chosen):
    states = compared_states(planned(policy, steps=steps), count)
    assert states[0].nonzero()[:, 0].tolist() == chosen
    assert states.any(dim=1).tolist() == [True, False, True, False, False]


def test_measuring_changes_no_rollout(policy):
    plan = planned(policy)
    measured, plain = rolled_out(policy, plan), rolled_out(policy, plan, settings=EVERY)
    bare = Rollouts.empty(plan, policy.latent_shape)
    for _ in sample(policy, FlowSDE(noise_level=0.7), bare, policy.encode(plan.texts),
                    address=Address(0), ):  # fmt: skip
        pass
    assert torch.equal(measured.images, bare.images)
    assert torch.equal(measured.log_prob, bare.log_prob)
    torch.testing.assert_close(
        measured.attention_entropy, plain.attention_entropy, rtol=0, atol=0, equal_nan=True
    )
    assert bare.attention_entropy.isnan().all()


def test_rounds_are_joined_with_what_was_measured(policy):
    first = rolled_out(policy, planned(policy, sizes=(2, 2)))
    first.attention_shift = torch.tensor([0.1, 0.2])
    second = Rollouts.empty(planned(policy, sizes=(0, 1), first=(2, 2)), policy.latent_shape)
    joined = join_rollouts([first, second])
    assert (~joined.attention_entropy.isnan()).all(dim=1).tolist() == [True, False] * 2 + [False]
    assert joined.attention_shift is first.attention_shift


# --- the shift ------------------------------------------------------------------------------------


def shift_of(policy, rollouts, settings=EVERY, guidance=1.0):
    ledger = Ledger()
    cond = policy.encode(rollouts.plan.texts)
    found = attention_shift(
        policy, rollouts, cond, settings, guidance=guidance, batch_size=3, ledger=ledger
    )
    return found, ledger.network_evaluations


def moved(policy, scale=0.05):
    """The policy with weights that have left the reference's."""
    policy.weights.keep("reference")
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.weights.live.values():
            parameter += scale * torch.randn(parameter.shape, generator=source)


def test_at_the_reference_there_is_none_and_it_costs_nothing(policy):
    policy.weights.keep("reference")
    rollouts = rolled_out(policy, planned(policy))
    assert [value.tolist() for value in shift_of(policy, rollouts)[:1]] == [[0.0, 0.0]]
    assert shift_of(policy, rollouts)[1] == 0


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_is_the_mean_difference_at_the_compared_states(policy, kind, guidance):
    """Against both models evaluated state by state; with guidance, one pass is all it takes."""
    moved(policy)
    plan, settings = planned(policy), Attention(layer_stride=1, states=2, shift=kind)
    rollouts = rolled_out(policy, plan, settings, guidance=guidance)
    found, evaluations = shift_of(policy, rollouts, settings, guidance)
    assert evaluations == 2 * 2
    for prompt, row in ((0, 0), (1, 2)):
        differences = []
        for step in (1, 3):
            given = (
                rollouts.states[rollouts.state_index[row, step]][None],
                plan.base_grid[step].float()[None], policy.encode([PROMPTS[prompt]]),
                guidance, torch.ones(1) > 0, settings,
            )  # fmt: skip
            with torch.no_grad():
                ours = probed_velocity(policy, *given)[1]
                with policy.weights("reference"):
                    theirs = probed_velocity(policy, *given)[1]
            size = (ours - theirs).abs().item()
            differences.append(size / theirs.item() if kind == "relative" else size)
        expected = sum(differences) / 2
        assert expected > 1e-3
        assert found[prompt].item() == pytest.approx(expected, rel=1e-3)


def test_the_absolute_shift_is_that_of_either_from_the_other(policy):
    """The same states, with policy and reference changed for each other."""
    moved(policy)
    rollouts = rolled_out(policy, planned(policy))
    there, _ = shift_of(policy, rollouts)
    row, step = compared_states(rollouts.plan, 4).nonzero(as_tuple=True)
    with torch.no_grad(), policy.weights("reference"):
        _, rollouts.attention_entropy[row, step] = probed_velocity(
            policy, rollouts.states[rollouts.state_index[row, step]],
            rollouts.plan.sigmas[row, step].float(),
            policy.encode(rollouts.plan.texts).take(rollouts.plan.prompt[row]), 1.0,
            torch.ones(len(row)) > 0, EVERY,
        )  # fmt: skip
    policy.weights._swap(policy.weights._sets["reference"])
    back, _ = shift_of(policy, rollouts)
    torch.testing.assert_close(there, back, rtol=1e-4, atol=0)
    assert (there > 1e-3).all()


def test_the_relative_shift_has_no_scale(policy):
    """In nats or over log K: the absolute one differs by that factor, the relative one does not."""
    moved(policy)
    found = {}
    for kind in ("absolute", "relative"):
        for normalised in (True, False):
            settings = Attention(shift=kind, normalised=normalised)
            rollouts = rolled_out(policy, planned(policy), settings)
            found[kind, normalised], _ = shift_of(policy, rollouts, settings)
    keys = IMAGE + policy.encode(PROMPTS).tensors["words"].shape[1]
    torch.testing.assert_close(found["relative", True], found["relative", False], rtol=1e-4, atol=0)
    scaled = found["absolute", True] * math.log(keys)
    torch.testing.assert_close(scaled, found["absolute", False], rtol=1e-4, atol=0)
