"""Flow-GRPO on a tiny SD3 against the published sampling loop and loss, written out here.

The loop calls the transformer as the stock pipeline does: guidance from a doubled batch, the
scheduler's sigmas. The published code averages log-densities over all values of a latent and leaves
sqrt(-dt) out of the standard deviation in its KL (2505.05470, eq. 9-12 and the released code).
"""

from __future__ import annotations

import math

import pytest
import torch

from entroflow.noise import Address, Stream, gaussian
from entroflow.objectives.update import update
from entroflow.recipe.load import load_recipe
from entroflow.rewards.combined import as_rewards
from entroflow.training import trainer as trainer_module
from entroflow.training.trainer import Trainer

pytest.importorskip("diffusers")

from entroflow.policies.diffusers.stand_ins import STAND_INS

STEPS, GROUP, LEVEL, GUIDANCE, BETA, CLIP = 10, 4, 0.7, 4.5, 0.04, 1e-4
CAPTION = "an ant"
REWARDS = [0.1, 0.9, 0.4, 0.5]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A trainer after one iteration on a LoRA that is not 0, and the transitions it was made of."""
    folder, captions = tmp_path_factory.mktemp("sd3"), tmp_path_factory.mktemp("captions")
    STAND_INS["sd3"]().save_pretrained(folder)
    (captions / "one.txt").write_text(CAPTION)
    recipe = load_recipe(
        "sd35_flow_grpo",
        [
            f"policy.model={folder}", "policy.resolution=32", "policy.tokens=24",
            "policy.precision=fp32", f"prompts.path={captions / 'one.txt'}",
            "prompts.per_iteration=1", f"allocation.group_size={GROUP}", "sampling.batch_size=4",
            "objective.minibatches=1",
        ],
    )  # fmt: skip
    policy = recipe.policy.build()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.weights.live.values():
            parameter.normal_(std=0.1)
    values = iter(REWARDS)
    made = Trainer(recipe, policy, as_rewards(lambda images, *_: [next(values) for _ in images]))
    seen = []

    def kept(*arguments, **options):
        seen.append(arguments[2])
        return update(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer_module, "update", kept)
        # The weights must be those that sampled when the loop below samples again.
        patched.setattr(torch.optim.AdamW, "step", lambda self: None)
        line = made.step()
    return made, seen[0], line


def velocity(pipe, x, sigma):
    """Of one latent, in two passes, as in `StableDiffusion3Pipeline.__call__`."""
    embedded, negative, pooled, negative_pooled = pipe.encode_prompt(
        CAPTION, CAPTION, CAPTION, negative_prompt="", do_classifier_free_guidance=True,
        max_sequence_length=24,
    )  # fmt: skip
    both = pipe.transformer(
        hidden_states=torch.cat([x[None]] * 2),
        timestep=torch.tensor([1000 * float(sigma)] * 2),
        encoder_hidden_states=torch.cat([negative, embedded]),
        pooled_projections=torch.cat([negative_pooled, pooled]),
        return_dict=False,
    )[0]
    without, with_text = both.chunk(2)
    return (without + GUIDANCE * (with_text - without))[0]


def step_of(x, v, sigmas, i):
    """Mean, standard deviation, and sigma_t of the published step, in float64."""
    x, v = x.double(), v.double()
    t, dt = float(sigmas[i]), float(sigmas[i + 1]) - float(sigmas[i])
    sigma_t = LEVEL * math.sqrt(t / (1 - (float(sigmas[1]) if t == 1 else t)))
    mean = x * (1 + sigma_t**2 / (2 * t) * dt) + v * (1 + sigma_t**2 * (1 - t) / (2 * t)) * dt
    return mean, sigma_t * math.sqrt(-dt), sigma_t


def density(reached, mean, std):
    """Mean over all values, as published."""
    each = -((reached.double() - mean) ** 2) / (2 * std**2)
    return float((each - math.log(std) - math.log(math.sqrt(2 * math.pi))).mean())


@torch.no_grad()
def plain_rollouts(pipe, shape):
    """Per rollout the states, and mean, standard deviation and density of its stochastic steps."""
    pipe.scheduler.set_timesteps(STEPS)
    sigmas, none = pipe.scheduler.sigmas, torch.zeros(1, dtype=torch.long)
    found = []
    for member in range(GROUP):
        own = torch.tensor([member])
        x = gaussian(shape, Address(0), Stream.INITIAL, none, own, none)[0]
        states, steps = [x], []
        for i in range(STEPS - 1):
            mean, std, _ = step_of(x, velocity(pipe, x, sigmas[i]), sigmas, i)
            drawn = gaussian(shape, Address(0), Stream.STEP, none, own, torch.tensor([i]))[0]
            x = (mean + std * drawn.double()).float()
            states.append(x)
            steps.append((mean, std, density(x, mean, std)))
        found.append((states, steps))
    return found


def test_transitions_are_those_of_the_published_loop(sampled):
    """Mean, standard deviation, density and states of all nine trained steps, to 1e-5."""
    trainer, table, line = sampled
    pipe = trainer.policy.pipeline
    assert len(table) == GROUP * (STEPS - 1)
    assert line["ledger/network_evaluations"] == 2 * GROUP * (STEPS + 2 * (STEPS - 1))
    wanted = plain_rollouts(pipe, trainer.policy.latent_shape)
    for n in range(len(table)):
        row, step = int(table.row[n]), int(table.step[n])
        states, steps = wanted[row]
        mean, std, log_prob = steps[step]
        x, reached = table.states[table.state[n]], table.states[table.next_state[n]]
        torch.testing.assert_close(x, states[step], rtol=0, atol=1e-5)
        torch.testing.assert_close(reached, states[step + 1], rtol=0, atol=1e-5)
        assert float(table.std[n]) == pytest.approx(std, rel=1e-5)
        assert float(table.log_prob[n]) == pytest.approx(log_prob, abs=1e-5)
        with torch.no_grad():
            own = trainer.recipe.kernel.mean(
                x[None], velocity(pipe, x, table.sigma[n])[None],
                table.sigma[n : n + 1], table.sigma_next[n : n + 1], table.std[n : n + 1],
            )[0]  # fmt: skip
        torch.testing.assert_close(own.double(), mean, rtol=0, atol=1e-5)


def test_advantages_are_those_of_the_published_statistics(sampled):
    """Mean of the prompt, standard deviation (of n) over all images, plus 1e-4."""
    _, table, _ = sampled
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    wanted = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
    torch.testing.assert_close(table.advantage.double(), wanted[table.row], rtol=0, atol=1e-6)


def test_the_loss_is_the_published_one(sampled):
    """With weights that have moved: ratio, clipped term, and beta times a KL without sqrt(-dt)."""
    trainer, table, _ = sampled
    policy, pipe = trainer.policy, trainer.policy.pipeline
    policy.weights.keep("before")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.weights.live.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    still = torch.optim.SGD(trainer.parameters, lr=0.0)
    found = update(
        policy, policy.encode([CAPTION]), table, trainer.recipe.objective,
        still, trainer.parameters, seed=0, iteration=0, guidance=GUIDANCE, micro_batch=4,
        max_grad_norm=1.0, ledger=trainer.ledger,
    ).terms  # fmt: skip
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas
    policy_loss, kl_loss, ratios = [], [], []
    with torch.no_grad():
        for n in range(len(table)):
            x, reached = table.states[table.state[n]], table.states[table.next_state[n]]
            i = int(table.step[n])
            mean, std, sigma_t = step_of(x, velocity(pipe, x, sigmas[i]), sigmas, i)
            with policy.weights("reference"):
                reference, _, _ = step_of(x, velocity(pipe, x, sigmas[i]), sigmas, i)
            ratio = math.exp(density(reached, mean, std) - float(table.log_prob[n]))
            advantage = max(-5.0, min(5.0, float(table.advantage[n])))
            clipped = max(1 - CLIP, min(1 + CLIP, ratio))
            ratios.append(ratio)
            policy_loss.append(max(-advantage * ratio, -advantage * clipped))
            kl_loss.append(float(((mean - reference) ** 2).mean()) / (2 * sigma_t**2))
    policy.weights.load(policy.weights.tensors("before"))
    assert max(abs(ratio - 1) for ratio in ratios) > 10 * CLIP
    assert found["ratio"] == pytest.approx(sum(ratios) / len(ratios), abs=1e-5)
    assert found["weighted_kl"] == pytest.approx(sum(kl_loss) / len(kl_loss), rel=1e-4)
    wanted = (sum(policy_loss) + BETA * sum(kl_loss)) / len(table)
    assert found["loss"] == pytest.approx(wanted, abs=1e-5)
    assert sum(kl_loss) > 0
