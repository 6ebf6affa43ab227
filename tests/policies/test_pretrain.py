"""Pretraining: its data, its loss, and runs that stop and go on."""

import dataclasses
import functools
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from entroflow.checkpoints import CheckpointError, read_state, read_tensors
from entroflow.cli import options
from entroflow.policies.shapes import pretrain as module
from entroflow.policies.shapes.network import ShapesNetwork
from entroflow.policies.shapes.pretrain import (
    Phase,
    Pretraining,
    batch_of_scenes,
    export_weights,
    flow_matching_loss,
    learning_rate_at,
    pretrain,
)
from entroflow.policies.shapes.tokenizer import CAPTION_LENGTH, VOCABULARY, tokenize
from entroflow.shapes.grammar import SKILLS, WORDS, forms, parse, split_of, text
from entroflow.shapes.recognise import recognise
from entroflow.shapes.scoring import judge

EVERY = [text(spec) for skill in SKILLS for form in forms()[skill] for spec in form]


def captions_of(words):
    """The captions that word ids stand for."""
    return [" ".join(WORDS[i - 1] for i in row if i > 0) for row in words.tolist()]


# --- words ----------------------------------------------------------------------------------------


def test_words_of_every_caption_read_back_and_fill_the_row_from_the_left():
    words = tokenize(EVERY)
    assert words.shape == (len(EVERY), CAPTION_LENGTH)
    assert captions_of(words) == EVERY
    assert words.max() == VOCABULARY - 1 == len(WORDS)
    length = torch.tensor([len(caption.split()) for caption in EVERY])
    assert torch.equal(words > 0, torch.arange(CAPTION_LENGTH) < length[:, None])


def test_the_longest_sentence_of_the_grammar_fits():
    longest = "a small red circle left of a large blue square"
    assert captions_of(tokenize([longest])) == [longest]


def test_the_empty_caption_is_all_zero_and_writing_does_not_matter():
    words = tokenize(["", "A red ring, above a blue cross.", "a red ring above a blue cross"])
    assert not words[0].any()
    assert torch.equal(words[1], words[2])


def test_a_caption_outside_the_grammar_has_no_words():
    with pytest.raises(ValueError, match="Did you mean 'ring'"):
        tokenize(["a ring", "a rink"])


# --- data -----------------------------------------------------------------------------------------


def mixture(**settings):
    """All skills, a quarter of the captions wrong."""
    return Pretraining((Phase(1000, 1.0, label_noise=0.25),), **settings)


@pytest.fixture(scope="module")
def scanned():
    """Captions of 160 steps of 128, and the images of the first 32 steps."""
    settings = mixture(seed=3)
    captions, images = [], []
    for step in range(160):
        pictures, words = batch_of_scenes(settings, step)
        captions += captions_of(words)
        if step < 32:
            images.append(pictures)
    return captions, torch.cat(images)


def within(count, n, probability):
    """Within 4 standard deviations of the binomial."""
    return abs(count - n * probability) < 4 * math.sqrt(n * probability * (1 - probability))


def test_no_caption_of_the_data_is_held_out(scanned):
    captions, _ = scanned
    seen = set(captions) - {""}
    assert {split_of(parse(caption)) for caption in seen} == {"train"}
    # Of forms with few captions, every training caption comes up.
    few = {
        text(spec)
        for skill in SKILLS
        for form in forms()[skill]
        if len(form) < 120
        for spec in form
    }
    assert {caption for caption in few if split_of(parse(caption)) == "train"} <= seen


def test_captions_are_dropped_as_often_as_set(scanned):
    captions, _ = scanned
    assert within(captions.count(""), len(captions), 0.1)


def test_captions_are_wrong_as_often_as_set(scanned):
    """Told by the scorer, which is right on 99.5% of the scenes or more."""
    captions, images = scanned
    rows = [row for row in range(len(images)) if captions[row]]
    wrong = 0
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        verdict = judge(recognise((images[part] + 1) / 2), [parse(captions[r]) for r in part])
        wrong += int((~verdict.strict).sum())
    margin = 4 * math.sqrt(0.25 * 0.75 / len(rows)) + 0.005
    assert wrong / len(rows) == pytest.approx(0.25, abs=margin)


def test_every_skill_comes_up_equally(scanned):
    """Label noise keeps the skill of a caption."""
    captions, _ = scanned
    skills = Counter(parse(caption).skill for caption in captions if caption)
    for skill in SKILLS:
        assert within(skills[skill], skills.total(), 1 / len(SKILLS))


@pytest.mark.parametrize(("noise", "dropout"), [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0)])
def test_rates_at_their_limits(noise, dropout):
    """No noise: all right. All noise: all wrong. All dropped: no caption."""
    settings = Pretraining((Phase(1, 1.0, noise),), batch=96, caption_dropout=dropout)
    images, words = batch_of_scenes(settings, 0)
    captions = captions_of(words)
    if dropout == 1:
        assert set(captions) == {""}
        return
    strict = judge(recognise((images + 1) / 2), [parse(caption) for caption in captions]).strict
    assert strict.all() if noise == 0 else not strict.any()


def test_a_batch_is_a_function_of_the_seed_and_the_step():
    """The same again in any order and whatever the other settings; else different."""
    settings = mixture(batch=16, seed=5)
    first = {step: batch_of_scenes(settings, step) for step in (7, 2, 3)}
    torch.manual_seed(123)
    np.random.seed(9)
    other = Pretraining((Phase(10, 1.0, label_noise=0.25),), batch=16, seed=5, ema=0.5)
    for step in (2, 3, 7):
        images, words = batch_of_scenes(other, step)
        assert torch.equal(images, first[step][0])
        assert torch.equal(words, first[step][1])
    assert not torch.equal(first[2][0], first[3][0])
    assert not torch.equal(first[2][0], batch_of_scenes(mixture(batch=16, seed=6), 2)[0])


def test_images_are_scaled_to_minus_1_and_1():
    images, _ = batch_of_scenes(mixture(batch=64), 0)
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.8
    assert 0.6 < images.max() <= 1


# --- loss and learning rate -----------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Knows the images, and so the velocity of each state; records what it is asked."""

    def __init__(self, images, offset):
        super().__init__()
        self.images, self.offset, self.asked = images, offset, []

    def forward(self, state, sigma, words):
        self.asked.append((state, sigma, words))
        wide = sigma[:, None, None, None]
        noise = (state - (1 - wide) * self.images) / wide
        return noise - self.images + self.offset


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_loss_is_the_mean_square_of_what_the_velocity_is_off(offset):
    """The velocity of a state between data and noise is noise - data."""
    settings = mixture(batch=64)
    images, words = batch_of_scenes(settings, 4)
    oracle = Oracle(images, offset)
    loss = flow_matching_loss(oracle, settings, 4).item()
    assert loss == pytest.approx(offset**2, abs=1e-5)
    (state, sigma, asked_words), *others = oracle.asked
    assert not others
    assert torch.equal(asked_words, words)
    assert state.shape == images.shape
    assert ((sigma > 0) & (sigma < 1)).all()


def test_every_seed_of_the_command_line_gives_noise():
    """Torch takes 64 bits; seeds that differ, and only those, give other noise."""
    losses = []
    for seed in (0, 1, options.MOST, options.MOST):
        settings = mixture(batch=2, seed=seed)
        losses.append(flow_matching_loss(lambda x, *_: torch.zeros_like(x), settings, 0).item())
    assert losses[2] == losses[3]
    assert len(set(losses)) == 3


def test_sigmas_are_logit_normal_and_noise_is_standard():
    """Logit of sigma: mean 0.2, standard deviation 1.2; noise: mean 0, variance 1."""
    settings = mixture(batch=8)
    sigmas, noises = [], []
    for step in range(80):
        images, _ = batch_of_scenes(settings, step)
        oracle = Oracle(images, 0.0)
        flow_matching_loss(oracle, settings, step)
        state, sigma, _ = oracle.asked[0]
        wide = sigma[:, None, None, None]
        sigmas.append(sigma)
        noises.append((state - (1 - wide) * images) / wide)
    logit = torch.cat(sigmas).logit()
    assert logit.mean().item() == pytest.approx(0.2, abs=4 * 1.2 / math.sqrt(640))
    assert logit.std().item() == pytest.approx(1.2, rel=4 / math.sqrt(2 * 640))
    noise = torch.cat(noises)
    assert noise.mean().item() == pytest.approx(0, abs=4 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(1, abs=0.005)


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    settings = Pretraining((Phase(1000, 2.0, 0.1),), warm_up=100)
    rates = [learning_rate_at(settings, step) for step in range(1000)]
    for step in range(100):
        cosine = 1 + math.cos(math.pi * step / 1000)
        assert rates[step] == pytest.approx((step + 1) / 100 * cosine)
    assert rates[500] == pytest.approx(1.0)
    assert rates[999] == pytest.approx(1 + math.cos(math.pi * 0.999))
    assert all(one > two for one, two in itertools.pairwise(rates[100:]))


def test_every_phase_is_a_warm_up_and_a_cosine_of_its_own():
    lengths, peaks = (100, 200, 40), (2.0, 1.0, 4.0)
    phases = tuple(Phase(n, rate, 0.1) for n, rate in zip(lengths, peaks, strict=True))
    settings = Pretraining(phases, warm_up=10)
    assert settings.steps == 340
    rates = iter([learning_rate_at(settings, step) for step in range(settings.steps)])
    for length, peak in zip(lengths, peaks, strict=True):
        for step in range(length):
            expected = peak / 2 * (1 + math.cos(math.pi * step / length)) * min(1, (step + 1) / 10)
            assert next(rates) == pytest.approx(expected), (length, step)


def test_every_phase_has_its_label_noise():
    """None in the first step, all captions wrong in the second."""
    phases = (Phase(1, 1.0, label_noise=0.0), Phase(1, 1.0, label_noise=1.0))
    settings = Pretraining(phases, batch=64, caption_dropout=0.0)
    for step, right in ((0, True), (1, False)):
        images, words = batch_of_scenes(settings, step)
        specs = [parse(caption) for caption in captions_of(words)]
        strict = judge(recognise((images + 1) / 2), specs).strict
        assert (strict == right).all()


def test_every_phase_has_its_skills_and_its_noise():
    """Counting at little noise in the first step, pairs at much noise in the second."""
    phases = (
        Phase(1, 1.0, label_noise=1.0, skills=("counting",), noisiness=-2.0),
        Phase(1, 1.0, label_noise=1.0, skills=("position", "color_attr"), noisiness=2.0),
    )
    settings = Pretraining(phases, batch=96, caption_dropout=0.0)
    for step, phase in enumerate(phases):
        images, words = batch_of_scenes(settings, step)
        assert {parse(caption).skill for caption in captions_of(words)} == set(phase.skills)
        oracle = Oracle(images, 0.0)
        flow_matching_loss(oracle, settings, step)
        logit = oracle.asked[0][1].logit()
        assert logit.mean().item() == pytest.approx(phase.noisiness, abs=4 * 1.2 / math.sqrt(96))


def test_scaled_phases_keep_their_shares():
    scaled = Pretraining((Phase(600, 2.0, 0.2), Phase(300, 1.0, 0.1))).scaled_to(90)
    assert scaled.phases == (Phase(60, 2.0, 0.2), Phase(30, 1.0, 0.1))
    shortest = Pretraining().scaled_to(1).phases
    assert [phase.steps for phase in shortest] == [1] * len(Pretraining().phases)


# --- runs -----------------------------------------------------------------------------------------

TINY = Pretraining((Phase(2, 6e-3, 0.3), Phase(4, 3e-3, 0.1)), batch=4, warm_up=2, ema=0.9)


@pytest.fixture
def tiny_network(monkeypatch):
    """Runs with a network of one narrow block."""
    small = functools.partial(ShapesNetwork, width=16, depth=1, heads=2)
    monkeypatch.setattr(module, "ShapesNetwork", small)


def tensors_of(folder):
    return {
        f"{path.stem}.{key}": value
        for path in sorted((folder / "checkpoint").glob("*.safetensors"))
        for key, value in read_tensors(path).items()
    }


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_run_stopped_and_resumed_is_bit_equal_to_one_in_one_go(tmp_path, stop):
    """Wherever it is closed, no step is lost."""
    whole = list(pretrain(TINY, tmp_path / "whole", checkpoint_every=2))
    run = pretrain(TINY, tmp_path / "parts", checkpoint_every=2)
    before = [next(run) for _ in range(stop)]
    run.close()
    assert read_state(tmp_path / "parts" / "checkpoint")["step"] == stop
    torch.manual_seed(99)
    after = list(pretrain(TINY, tmp_path / "parts", checkpoint_every=2))
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    assert before == whole[:stop]
    assert after == whole[stop:]
    assert_same(tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole"))
    assert read_state(tmp_path / "parts" / "checkpoint")["step"] == 6
    logged = [
        [json.loads(line) for line in (tmp_path / name / "loss.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logged[0] == logged[1] == [{"step": step, "loss": loss} for step, loss in whole]


@pytest.mark.usefixtures("tiny_network")
def test_steps_after_the_last_checkpoint_are_done_again_after_a_crash(tmp_path):
    whole = list(pretrain(TINY, tmp_path / "whole", checkpoint_every=2))
    run = pretrain(TINY, tmp_path / "parts", checkpoint_every=2)
    for _ in range(3):
        next(run)
    with pytest.raises(RuntimeError, match="a crash"):
        run.throw(RuntimeError("a crash"))
    assert list(pretrain(TINY, tmp_path / "parts", checkpoint_every=2)) == whole[2:]
    assert_same(tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole"))


def test_the_full_network_resumes_bit_equal(tmp_path):
    """As above with the network that is shipped, at two steps."""
    settings = Pretraining((Phase(2, 6e-3, 0.1),), batch=2, warm_up=1)
    list(pretrain(settings, tmp_path / "whole", checkpoint_every=1))
    run = pretrain(settings, tmp_path / "parts", checkpoint_every=1)
    next(run)
    run.close()
    assert read_state(tmp_path / "parts" / "checkpoint")["step"] == 1
    assert len(list(pretrain(settings, tmp_path / "parts", checkpoint_every=1))) == 1
    assert_same(tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole"))


@pytest.mark.usefixtures("tiny_network")
def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    list(pretrain(TINY, tmp_path))
    before = tensors_of(tmp_path)
    assert list(pretrain(TINY, tmp_path)) == []
    assert_same(tensors_of(tmp_path), before)


@pytest.mark.usefixtures("tiny_network")
def test_a_finished_run_goes_on_with_more_phases(tmp_path):
    """As if all phases had been asked for at once."""
    list(pretrain(dataclasses.replace(TINY, phases=TINY.phases[:1]), tmp_path / "parts"))
    assert read_state(tmp_path / "parts" / "checkpoint")["step"] == 2
    assert [step for step, _ in pretrain(TINY, tmp_path / "parts")] == [3, 4, 5, 6]
    list(pretrain(TINY, tmp_path / "whole"))
    assert_same(tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole"))


@pytest.mark.usefixtures("tiny_network")
def test_a_phase_that_has_begun_can_not_change(tmp_path):
    """The second has, after three steps."""
    run = pretrain(TINY, tmp_path, checkpoint_every=1)
    for _ in range(3):
        next(run)
    run.close()
    first, second = TINY.phases
    for phases in ((first, Phase(5, 3e-3, 0.1)), (first,), (Phase(2, 1e-3, 0.3), second)):
        with pytest.raises(CheckpointError, match="made with phases="):
            next(pretrain(dataclasses.replace(TINY, phases=phases), tmp_path))
    assert next(pretrain(TINY, tmp_path))[0] == 4


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize(
    "change",
    [
        {"batch": 5},
        {"warm_up": 3},
        {"weight_decay": 0.1},
        {"caption_dropout": 0.2},
        {"ema": 0.99},
        {"seed": 1},
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, change):
    """The message names the setting and both values; the checkpoint stays."""
    run = pretrain(TINY, tmp_path, checkpoint_every=1)
    next(run)
    run.close()
    before = tensors_of(tmp_path)
    (name, value), *_ = change.items()
    message = f"{name}={getattr(TINY, name)}, not {value}"
    with pytest.raises(CheckpointError, match=message):
        next(pretrain(Pretraining(**{**vars(TINY), **change}), tmp_path))
    assert_same(tensors_of(tmp_path), before)


@pytest.mark.usefixtures("tiny_network")
@pytest.mark.parametrize("left", [0, 5, 200, -1])
def test_a_torn_checkpoint_is_refused(tmp_path, left):
    """Whichever of its files is cut, and wherever."""
    run = pretrain(TINY, tmp_path, checkpoint_every=1)
    next(run)
    run.close()
    files = sorted((tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:left])
        with pytest.raises(CheckpointError, match=f"{path.name} is torn"):
            next(pretrain(TINY, tmp_path))
        path.write_bytes(whole)
    assert next(pretrain(TINY, tmp_path))[0] == 2


@pytest.mark.usefixtures("tiny_network")
def test_a_checkpoint_without_a_file_or_with_a_torn_state_is_refused(tmp_path):
    run = pretrain(TINY, tmp_path, checkpoint_every=1)
    next(run)
    run.close()
    (tmp_path / "checkpoint" / "average.safetensors").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"average\.safetensors is missing"):
        next(pretrain(TINY, tmp_path))
    (tmp_path / "kept").rename(tmp_path / "checkpoint" / "average.safetensors")
    state = tmp_path / "checkpoint" / "state.json"
    whole = state.read_text()
    for left in (0, 1, len(whole) // 2, len(whole) - 1):
        state.write_text(whole[:left])
        with pytest.raises(CheckpointError, match=r"state\.json is torn"):
            next(pretrain(TINY, tmp_path))


@pytest.mark.usefixtures("tiny_network")
def test_the_average_is_the_exponential_moving_average(tmp_path):
    """From checkpoints of every step, with the decay min(ema, (step + 1) / (step + 10))."""
    torch.manual_seed(TINY.seed)
    start = dict(module.ShapesNetwork(VOCABULARY, CAPTION_LENGTH).named_parameters())
    expected = {name: value.detach().double() for name, value in start.items()}
    run = pretrain(TINY, tmp_path, checkpoint_every=1)
    for step in range(TINY.steps):
        next(run)
        weights = read_tensors(tmp_path / "checkpoint" / "network.safetensors")
        decay = min(TINY.ema, (step + 1) / (step + 10))
        for name, average in expected.items():
            expected[name] = decay * average + (1 - decay) * weights[name]
    averages = read_tensors(tmp_path / "checkpoint" / "average.safetensors")
    assert averages.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(averages[name].double(), value, atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("tiny_network")
def test_exported_weights_are_the_average_in_half_precision(tmp_path):
    list(pretrain(TINY, tmp_path))
    exported = read_tensors(export_weights(tmp_path))
    averages = read_tensors(tmp_path / "checkpoint" / "average.safetensors")
    assert exported.keys() == averages.keys()
    for name, value in exported.items():
        assert torch.equal(value, averages[name].to(torch.float16))


@pytest.mark.usefixtures("tiny_network")
def test_training_lowers_the_loss(tmp_path):
    """Well below that of the velocity 0, which it starts from."""
    settings = Pretraining((Phase(40, 5e-3, 0.1),), batch=16, warm_up=5)
    losses = [loss for _, loss in pretrain(settings, tmp_path)]
    at_zero = [
        flow_matching_loss(lambda x, *_: torch.zeros_like(x), settings, step).item()
        for step in range(40)
    ]
    assert losses[0] == pytest.approx(at_zero[0], rel=1e-6)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(at_zero[-10:])
