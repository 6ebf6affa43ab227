"""Memory computed without weights, against what the allocator gives out when there are some."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from entroflow.errors import InputError

pytest.importorskip("diffusers")

from entroflow.policies.diffusers.flux import FluxConfig
from entroflow.policies.diffusers.memory import Appearing, _as_on_cuda
from entroflow.policies.diffusers.sd3 import SD3Config
from entroflow.policies.diffusers.stand_ins import STAND_INS

CONFIGS = {"sd3": SD3Config, "flux": FluxConfig}
BATCH, GUIDANCE = 4, 4.5


@pytest.fixture
def config(folders):
    def make(kind, **settings):
        usual = {"model": str(folders[kind]), "resolution": 64, "tokens": 24, "precision": "fp32"}
        return CONFIGS[kind](**usual | settings)

    return make


def computed(settings, batch=BATCH):
    return settings.memory(guidance=GUIDANCE, batch_size=batch, micro_batch=batch)


def allocated(work):
    """Most bytes that the allocator had given out at once during some work, by the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_hold_what_the_allocator_gives_out(config, kind, checkpointing):
    """Real tensors on the CPU; the profiler counts what kernels take for themselves, too."""
    settings = config(kind, gradient_checkpointing=checkpointing)
    policy = settings.build()
    cond = policy.encode(["a dog"] * BATCH)
    x, sigma = torch.randn(BATCH, *policy.latent_shape), torch.full((BATCH,), 0.5)
    for parameter in policy.weights.live.values():
        parameter.grad = torch.zeros_like(parameter)

    def train():
        policy.velocity(x, sigma, cond, GUIDANCE).square().mean().backward()

    def sample():
        with torch.no_grad():
            policy.velocity(x, sigma, cond, GUIDANCE)

    passing = computed(settings).passing
    # Buffers that are made once are made now.
    train()
    assert passing["a training pass"] == pytest.approx(allocated(train), rel=0.03)
    assert passing["a sampling pass"] == pytest.approx(allocated(sample), rel=0.1)


def test_checkpointing_saves_where_there_are_many_blocks(config, tmp_path):
    """A transformer of twelve layers instead of two."""
    from diffusers import SD3Transformer2DModel

    pipeline = STAND_INS["sd3"]()
    deeper = {**pipeline.transformer.config, "num_layers": 12}
    pipeline.transformer = SD3Transformer2DModel.from_config(deeper)
    pipeline.save_pretrained(tmp_path)
    all_, few = (
        computed(config("sd3", model=str(tmp_path), gradient_checkpointing=on)).passing[
            "a training pass"
        ]
        for on in (False, True)
    )
    assert few < all_ / 3


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_kept_is_counted_from_the_weights(config, kind):
    settings = config(kind, lora_rank=4, precision="bf16")
    policy = settings.build()
    pipeline = policy.pipeline
    kept = computed(settings).kept
    live = sum(p.numel() for p in policy.weights.live.values())
    frozen = sum(p.numel() for p in pipeline.transformer.parameters()) - live
    buffers = sum(b.numel() * b.element_size() for b in pipeline.transformer.buffers())
    # bfloat16, and the LoRA in float32: itself, its gradient, two moments, average, reference.
    assert kept["transformer"] == 2 * frozen + 4 * live + buffers
    assert kept["gradients, AdamW, moving average, reference"] == 5 * 4 * live
    assert kept["VAE"] == 4 * sum(p.numel() for p in pipeline.vae.parameters())
    encoders = sum(
        p.numel() * p.element_size() for e in policy.encoders() for p in e.parameters()
    )  # fmt: skip
    assert kept["text encoders"] == pytest.approx(encoders, rel=0.02)


def test_encoders_that_rest_elsewhere_come_and_go(config):
    here, there = computed(config("sd3")), computed(config("sd3", offload_encoders=True))
    works = there.passing["encoding prompts"], here.passing["encoding prompts"]
    assert works[0] - works[1] == here.kept["text encoders"]
    assert "text encoders" not in there.kept
    assert here.peak == sum(here.kept.values()) + max(here.passing.values())
    assert there.peak < here.peak


@pytest.mark.parametrize("kind", CONFIGS)
def test_images_and_their_size_cost_in_proportion(config, kind):
    """Twice the images hold twice as much; so do twice the image tokens, text apart."""
    one, two = (computed(config(kind), batch).passing for batch in (2, 4))
    for name in ("a training pass", "a sampling pass"):
        assert two[name] == pytest.approx(2 * one[name], rel=0.05)
    small, large = (computed(config(kind, resolution=side)).passing for side in (64, 128))
    assert large["decoding an image"] == pytest.approx(4 * small["decoding an image"], rel=0.05)


def test_all_weights_cost_more_than_a_lora(config):
    whole, lora = computed(config("sd3", lora_rank=None)), computed(config("sd3", lora_rank=4))
    name = "gradients, AdamW, moving average, reference"
    parameters = STAND_INS["sd3"]().transformer.parameters()
    assert whole.kept[name] == 5 * 4 * sum(p.numel() for p in parameters) > 10 * lora.kept[name]


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(InputError, match=r"policy\.model: no pipeline at"):
        computed(SD3Config(model=str(tmp_path)))


def test_norms_give_float32_under_autocast_as_on_cuda():
    """On the CPU they would stay in half precision, and less would be held than on a GPU."""
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with _as_on_cuda():
        plain = torch.nn.functional.layer_norm(x, (8,))
        with torch.autocast("cpu", torch.bfloat16):
            cast = torch.nn.LayerNorm(8)(x)
            product = torch.nn.functional.linear(cast, torch.ones(3, 8))
    assert (plain.dtype, cast.dtype) == (torch.bfloat16, torch.float32)
    assert product.dtype == torch.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision_holds_less_in_passes(config, checkpointing):
    whole, half = (
        computed(config("sd3", precision=p, gradient_checkpointing=checkpointing)).passing
        for p in ("fp32", "bf16")
    )
    for name in ("a training pass", "a sampling pass"):
        assert 0.4 < half[name] / whole[name] < 1


def test_an_optimizer_step_holds_a_copy_of_what_is_trained(config):
    """The real AdamW on real weights, by the allocator: the roots of the second moments."""
    settings = config("sd3", lora_rank=None)
    weights = list(settings.build().weights.live.values())
    optimizer = torch.optim.AdamW(weights, foreach=True)
    for parameter in weights:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = computed(settings).passing["an optimizer step"]
    assert held == 4 * sum(p.numel() for p in weights)
    assert held == pytest.approx(allocated(optimizer.step), rel=0.05)


def test_what_is_gone_is_no_longer_counted():
    """Two buffers of 4 kB after each other, then two at once; one is there from the start."""
    held = torch.zeros(1000)
    with Appearing([held]) as seen:
        for _ in range(3):
            held + 1
        assert seen.most == 4000
        first = held + 1
        second = first.view(10, 100) * 2
        assert seen.most == 8000
        del first, second
        held.add_(1)
    assert seen.most == 8000
