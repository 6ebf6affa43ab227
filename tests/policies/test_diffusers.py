"""Policies over diffusers pipelines, on tiny pipelines of the real classes.

What they must equal is the stock pipeline's own call, from the same latents.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import entroflow
from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.recipe.load import chosen_type, load_recipe, shipped_recipes
from entroflow.runs.folder import RunFolder
from entroflow.runs.open import open_policy
from entroflow.sampling.kernels import ODE
from entroflow.sampling.solver import integrate
from entroflow.training.forecast import expected_of, rehearse
from entroflow.training.trainer import Trainer

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from entroflow.policies.diffusers.flux import FluxConfig
from entroflow.policies.diffusers.sd3 import SD3Config
from entroflow.policies.diffusers.stand_ins import STAND_INS
from tiny_run import groups_of

CONFIGS = {"sd3": SD3Config, "flux": FluxConfig}
GUIDANCE = {"sd3": 4.5, "flux": 3.5}
PROMPTS = ["a red circle left of a blue square", "two zebras"]
SIZE, TOKENS = 32, 24


@pytest.fixture
def built(folders):
    """Builds a policy of a kind with changed settings."""

    def build(kind, **settings):
        settings = {"resolution": SIZE, "tokens": TOKENS, "precision": "fp32"} | settings
        return CONFIGS[kind](model=str(folders[kind]), **settings).build()

    return build


def latents(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PROMPTS), *policy.latent_shape, generator=generator)


def sampled(policy, x, steps, guidance, ledger=None):
    rows = len(x)
    with torch.no_grad():
        *_, last = integrate(
            policy, ODE(), x, policy.encode(PROMPTS), torch.arange(rows),
            policy.sigmas(steps).expand(rows, -1), torch.zeros(rows, steps, dtype=torch.float64),
            noise=None, guidance=guidance, ledger=ledger,
        )  # fmt: skip
    return last.state


def by_the_pipeline(policy, x, steps, guidance):
    pipe = policy.pipeline
    if pipe.__class__.__name__ == "FluxPipeline":
        x = pipe._pack_latents(x, *x.shape)
    return pipe(
        PROMPTS, height=SIZE, width=SIZE, num_inference_steps=steps, guidance_scale=guidance,
        latents=x, output_type="pt", max_sequence_length=TOKENS,
    ).images  # fmt: skip


def redness(images, prompts, metadata):
    """Mean red over the mean of the others."""
    return (images[:, 0] - images[:, 1:].mean(dim=1)).mean(dim=(1, 2)).tolist()


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("guided", [True, False])
def test_without_noise_a_rollout_is_the_pipelines_own_image(built, kind, steps, guided):
    policy = built(kind)
    guidance = GUIDANCE[kind] if guided else 1.0
    x = latents(policy)
    found = policy.decode(sampled(policy, x, steps, guidance))
    wanted = by_the_pipeline(policy, x, steps, guidance)
    assert wanted.std() > 0.05
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    again = policy.decode(policy.by_pipeline(PROMPTS, x, steps, guidance))
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-5)
    other = policy.decode(sampled(policy, x, steps, guidance + 3))
    assert (other - found).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "passes"), [("sd3", 2), ("flux", 1)])
def test_the_ledger_counts_the_passes_of_the_transformer(built, kind, passes):
    """Classifier-free guidance sends every image through twice, distilled guidance once."""
    policy, ledger, images = built(kind), Ledger(), []
    policy.pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: images.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    sampled(policy, latents(policy), 4, GUIDANCE[kind], ledger)
    assert ledger.network_evaluations == sum(images) == passes * 4 * len(PROMPTS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_grid_is_that_of_the_pipelines_scheduler(built, kind):
    policy = built(kind)
    grid = policy.sigmas(5)
    by_the_pipeline(policy, latents(policy), 5, 1.0)
    assert torch.equal(grid, policy.pipeline.scheduler.sigmas.double())
    assert (grid[0], grid[-1]) == (1, 0)


def test_dynamic_shift_follows_the_resolution(built):
    """FLUX: larger images get more steps near noise."""
    small, large = (built("flux", resolution=r).sigmas(8) for r in (32, 256))
    assert (large[1:-1] > small[1:-1]).all()


def test_a_fixed_shift_replaces_the_schedulers(built):
    """That of DanceGRPO, MixGRPO and E-GRPO."""
    policy = built("flux", shift=3.0)
    u = torch.linspace(1, 0, 17, dtype=torch.float64)
    torch.testing.assert_close(policy.sigmas(16), 3 * u / (1 + 2 * u))
    torch.testing.assert_close(policy.own_sigmas(16), built("flux").sigmas(16))


# --- encoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_is_encoded_once_and_kept_on_disk(built, kind, tmp_path):
    first = built(kind, cache=tmp_path)
    wanted = first.encode(PROMPTS)
    again, asked = built(kind, cache=tmp_path), []
    again._embed = asked.append
    found = again.encode([PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert asked == []
    for name, value in wanted.tensors.items():
        assert torch.equal(found.tensors[name], value[[1, 0, 1]])
    assert not torch.equal(*wanted.tensors["embedded"])
    longer = built(kind, cache=tmp_path, tokens=TOKENS + 1).encode(PROMPTS).tensors["embedded"]
    assert longer.shape[1] == wanted.tensors["embedded"].shape[1] + 1


# --- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_lora_starts_from_the_model_itself(built, kind):
    """B = 0: the same velocity as without, to the bit."""
    with_lora, whole = built(kind), built(kind, lora_rank=None)
    x, sigma = latents(whole), torch.tensor([0.9, 0.3])
    cond = whole.encode(PROMPTS)
    with torch.no_grad():
        a, b = (p.velocity(x, sigma, p.encode(PROMPTS), 1.0) for p in (with_lora, whole))
    assert torch.equal(a, b)
    assert all(".lora_" in name for name in with_lora.weights.live)
    assert all(p.dtype == torch.float32 for p in with_lora.weights.live.values())
    count = sum(p.numel() for p in whole.pipeline.transformer.parameters())
    assert sum(p.numel() for p in whole.weights.live.values()) == count
    assert {name.removeprefix("negative_") for name in cond.tensors} == {"embedded", "pooled"}
    shapes = {name: tuple(value.shape[1:]) for name, value in cond.tensors.items()}
    assert shapes == whole.embedding_shapes()


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradient_checkpointing_changes_no_bit(built, kind):
    """Of the velocity, nor of its gradient."""
    plain, saving = built(kind), built(kind, gradient_checkpointing=True)
    assert saving.pipeline.transformer.is_gradient_checkpointing
    found = []
    for policy in (plain, saving):
        torch.manual_seed(0)
        for parameter in policy.weights.live.values():
            torch.nn.init.normal_(parameter, std=0.1)
        x, cond = latents(policy), policy.encode(PROMPTS)
        with torch.no_grad():
            still = policy.velocity(x, torch.tensor([0.9, 0.3]), cond, GUIDANCE[kind])
        velocity = policy.velocity(x, torch.tensor([0.9, 0.3]), cond, GUIDANCE[kind])
        assert torch.equal(still, velocity.detach())
        velocity.square().mean().backward()
        found.append([velocity.detach(), *(p.grad for p in policy.weights.live.values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    moved = [name for name, p in policy.weights.live.items() if p.grad.abs().max() > 0]
    assert len(moved) > 0.8 * len(policy.weights.live)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision_stays_near_and_gives_float32(built, kind, precision, dtype):
    exact, half = built(kind), built(kind, precision=precision)
    x, sigma = latents(exact), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        wanted, found = (
            policy.velocity(x, sigma, policy.encode(PROMPTS), GUIDANCE[kind])
            for policy in (exact, half)
        )
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert half.pipeline.transformer.proj_out.weight.dtype == dtype
    assert half.pipeline.vae.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_transformer_computes_and_learns_the_same(built):
    """Up to rounding, with gradients; in rollout and training alike."""
    plain, compiled = built("sd3"), built("sd3", compile=True)
    x, sigma, found = latents(plain), torch.tensor([0.9, 0.3]), []
    for policy in (plain, compiled):
        velocity = policy.velocity(x, sigma, policy.encode(PROMPTS), GUIDANCE["sd3"])
        velocity.square().mean().backward()
        gradient = next(p.grad for n, p in policy.weights.live.items() if ".lora_B." in n)
        found.append((velocity.detach(), gradient))
        with torch.no_grad():
            still = policy.velocity(x, sigma, policy.encode(PROMPTS), GUIDANCE["sd3"])
        torch.testing.assert_close(still, velocity.detach(), rtol=0, atol=1e-5)
    assert compiled._network is not compiled.pipeline.transformer
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_users_lora_is_where_training_starts_and_may_be_left_out_of_the_reference(
    built, trained, tmp_path, kind
):
    run = trained(kind, "policy.lora_rank=4", "policy.lora_alpha=32")
    lora = entroflow.export(run, tmp_path / "lora", weights="live")
    base = built(kind)
    x, sigma = latents(base), torch.tensor([0.9, 0.3])

    def velocity(policy, weights):
        policy.weights.keep_reference()
        with torch.no_grad(), policy.weights(weights):
            return policy.velocity(x, sigma, policy.encode(PROMPTS), 1.0)

    plain = velocity(base, "live")
    started = {r: built(kind, lora_start=lora, reference=r) for r in ("start", "base")}
    tuned = velocity(started["start"], "live")
    assert (tuned - plain).abs().max() > 1e-3
    assert torch.equal(velocity(started["start"], "reference"), tuned)
    assert torch.equal(velocity(started["base"], "live"), tuned)
    assert torch.equal(velocity(started["base"], "reference"), plain)
    name = next(iter(started["base"].weights.live))
    assert 4 in started["base"].weights.live[name].shape


def test_a_run_is_not_resumed_on_another_model(folders, trained, tmp_path):
    """The digest of the reference knows frozen weights too: a new LoRA is the same anywhere."""
    run = trained("sd3", "run.iterations=1")
    other = STAND_INS["sd3"]()
    with torch.no_grad():
        other.transformer.proj_out.weight.add_(1.0)
    moved = tmp_path / "other"
    other.save_pretrained(moved)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(folders["sd3"]), str(moved)))
    with pytest.raises(InputError, match="base weights"):
        entroflow.resume(run, ["run.iterations=2"])


# --- the recipes of the embedded model ------------------------------------------------------------

SMALL = (
    "prompts.per_iteration=2", "sampling.batch_size=4", "optimizer.micro_batch=4",
    "run.iterations=2",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("quickstart", "e_grpo") else pytest.mark.slow)
        for name in shipped_recipes("shapes")
    ],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_recipes_run_unchanged_but_for_the_policy(folders, kind, name, caplog):
    """On-policy ratio 1 and KL 0 in the first iteration, and a step of the weights in each."""
    other = [
        f"policy.type={kind}", f"policy.model={folders[kind]}", f"policy.resolution={SIZE}",
        f"policy.tokens={TOKENS}", "policy.precision=fp32", f"sampling.guidance={GUIDANCE[kind]}",
    ]  # fmt: skip
    if chosen_type(name, "reward") == "shapes":
        # The strict score of noise is 0.
        other.append("reward.value=graded")
    if chosen_type(name, "reward") == "pairwise":
        # Of noise the judge contradicts itself, which would make ties of all.
        other += ["reward.on_disagree=average", "reward.judge.answer=probability"]
    trainer = Trainer(load_recipe(name, [*other, *SMALL, *groups_of(name, 4)]))
    rehearse(trainer)
    first = trainer.step()
    assert first["policy/kl"] == 0
    assert first["policy/ratio_max_deviation"] < 0.1 * trainer.recipe.objective.clip(
        trainer.dimensions
    )
    assert first["policy/gradient_norm"] > 0
    # Of the second iteration: in the first there is nothing to compare with the reference yet.
    expected = expected_of(trainer)
    second = trainer.step()
    assert second["policy/kl"] > 0
    if second["policy/skipped"] == 0:
        for count in ("network_evaluations", "weighted_evaluations"):
            spent = second[f"ledger/{count}"] - first[f"ledger/{count}"]
            assert spent == expected[count]
    assert "policy ratio is off" not in caplog.text


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        # Per rollout 10 steps, then 9 with gradient and 9 of the reference.
        ("sd35_flow_grpo", 2 * 4 * (10 + 9 + 9)),
        # The anchor, eight groups of tails (83 steps after the merged ones), and eight states.
        ("sd35_e_grpo", 2 * ((16 + 4 * 83) + 8)),
    ],
)
def test_the_transformer_runs_as_often_as_predicted(folders, name, evaluations):
    """Counted at the transformer itself; one prompt, groups of four, two passes for guidance."""
    trainer = Trainer(
        load_recipe(
            name,
            [
                f"policy.model={folders['sd3']}", f"policy.resolution={SIZE}",
                f"policy.tokens={TOKENS}", "policy.precision=fp32", "prompts.per_iteration=1",
                "allocation.group_size=4", "sampling.batch_size=16", "optimizer.micro_batch=16",
                # File sizes are whole numbers of bytes, so groups may be tied.
                f"reward.type={__name__}.redness",
            ],
        )
    )  # fmt: skip
    images = []
    trainer.policy.pipeline.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: images.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    expected = expected_of(trainer)["network_evaluations"]
    line = trainer.step()
    assert line["policy/skipped"] == 0
    assert evaluations == expected == line["ledger/network_evaluations"]
    assert sum(images) == evaluations + line["ledger/check_evaluations"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_lora_learns_a_reward(folders, tmp_path, kind):
    """From the recipe to the comparison with the base: every prompt gets redder, clearly."""
    run = entroflow.train(
        f"{'sd35' if kind == 'sd3' else 'flux'}_flow_grpo_fast",
        [
            f"policy.model={folders[kind]}", f"policy.resolution={SIZE}", f"policy.tokens={TOKENS}",
            "policy.precision=fp32", f"reward.type={__name__}.redness", "sampling.batch_size=32",
            "prompts.per_iteration=2", "allocation.group_size=16", "optimizer.micro_batch=32",
            "optimizer.learning_rate=0.003", "optimizer.ema=0.5", "objective.clip_range=1e-3",
            "evaluation.images=16", "evaluation.test_images=16",
            "evaluation.steps=4", "run.iterations=12", "run.evaluate_every=12",
        ],
        run=tmp_path / "run",
    )  # fmt: skip
    gain = json.loads((run.path / "evaluation.json").read_text())["gain"]
    assert gain["low"] > 0.002
    rewards = [line["reward/mean"] for line in run.metrics()[1:]]
    assert sum(rewards[-3:]) > sum(rewards[:3])


# --- wrong settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": 33}, "resolution is 33, but must be a multiple of 4"),
        ({"lora_targets": ("attention.q",)}, "no module is named like attention.q; there are attn"),
        ({"lora_start": "nowhere"}, "lora_start: there is no nowhere"),
        ({"lora_start": Path(__file__).parent}, "lora_start: .* holds no LoRA for this model"),
    ],
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_settings_are_refused_in_one_line(built, kind, settings, said):
    with pytest.raises(InputError, match=said) as refused:
        built(kind, **settings)
    assert "\n" not in str(refused.value)


def test_larger_images_than_the_model_draws_are_refused(built):
    """The stand-in has places for 32 x 32 patches of 2 x 2 latents of 2 x 2 pixels."""
    assert built("sd3", resolution=128).latent_shape[1:] == (64, 64)
    with pytest.raises(InputError, match="resolution is 132, but this model draws up to 128"):
        built("sd3", resolution=132)


def test_who_lacks_the_extra_is_told_its_name(monkeypatch):
    monkeypatch.delitem(sys.modules, "entroflow.policies.diffusers.flux")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"policy.type: .* pip install 'entroflow\[diffusers\]'"):
        load_recipe("quickstart", ["policy.type=flux", "policy.model=any"])


def test_another_kind_of_pipeline_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match=r"is a FluxPipeline, not a StableDiffusion3Pipeline"):
        SD3Config(model=str(folders["flux"])).build()
    with pytest.raises(InputError, match=r"policy.model: no pipeline at .* `hf download`"):
        FluxConfig(model=str(tmp_path)).build()


# --- export ---------------------------------------------------------------------------------------


@pytest.fixture
def trained(folders, tmp_path):
    """Runs two iterations on a tiny pipeline; gives the run folder."""

    def run(kind, *changes):
        path = entroflow.train(
            "flow_grpo_fast",
            [
                f"policy.type={kind}", f"policy.model={folders[kind]}",
                f"policy.resolution={SIZE}", f"policy.tokens={TOKENS}", "policy.precision=fp32",
                "optimizer.learning_rate=0.03", "optimizer.ema=0.5",
                "evaluation.images=1", "evaluation.steps=1",
                "evaluation.test_images=1", "reward.value=graded", *SMALL,
                "allocation.group_size=4", *changes,
            ],
            run=tmp_path / "run",
        ).path  # fmt: skip
        # Noise-like images may be rated best before training; what was trained is what matters.
        (path / "checkpoints" / "best.json").unlink()
        for checkpoint in RunFolder.open(path).all_checkpoints()[:-1]:
            shutil.rmtree(checkpoint)
        return path

    return run


def image_of(pipeline, kind):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        PROMPTS, height=SIZE, width=SIZE, num_inference_steps=3, guidance_scale=GUIDANCE[kind],
        generator=generator, output_type="pt", max_sequence_length=TOKENS,
    ).images  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("weights", ["ema", "live"])
def test_an_exported_lora_and_a_merged_pipeline_draw_what_the_run_draws(
    folders, trained, tmp_path, kind, weights
):
    """Loaded as anyone would, with the strength that was trained: alpha is not the rank here."""
    run = trained(kind, "policy.lora_rank=4", "policy.lora_alpha=32")
    lora = entroflow.export(run, tmp_path / "lora", weights=weights)
    merged = entroflow.export(run, tmp_path / "merged", weights=weights, merged=True)
    opened = open_policy(run, weights).policy
    base = image_of(opened.pipeline, kind)
    with opened.weights("ema"):
        wanted = image_of(opened.pipeline, kind)
    assert (wanted - base).abs().max() > 0.02
    pipeline = DiffusionPipeline.from_pretrained(folders[kind])
    pipeline.load_lora_weights(lora)
    torch.testing.assert_close(image_of(pipeline, kind), wanted, rtol=0, atol=1e-5)
    whole = DiffusionPipeline.from_pretrained(merged)
    torch.testing.assert_close(image_of(whole, kind), wanted, rtol=0, atol=1e-5)


def test_a_wholly_trained_transformer_is_exported_with_its_pipeline(trained, tmp_path):
    run = trained("sd3", "policy.lora_rank=null", "optimizer.learning_rate=0.001")
    folder = entroflow.export(run, tmp_path / "out")
    opened = open_policy(run).policy
    with opened.weights("ema"):
        wanted = image_of(opened.pipeline, "sd3")
    found = image_of(DiffusionPipeline.from_pretrained(folder), "sd3")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
