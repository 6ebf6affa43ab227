"""Attention of diffusers' transformers, which never leaves the fused kernel, is measured (A-4)."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models.transformers import transformer_flux

from entroflow.attention.probe import probed_velocity
from entroflow.errors import InputError
from entroflow.policies import attention as shown
from entroflow.policies.diffusers.flux import FluxConfig
from entroflow.policies.diffusers.sd3 import SD3Config
from entroflow.settings import Attention

TEXTS = ["a red cat", "two dogs"]
EVERY = Attention(layer_stride=1)


@pytest.fixture
def built(folders):
    """Policies over stand-ins, in float32 unless said."""

    def build(kind, **settings):
        config = {"flux": FluxConfig, "sd3": SD3Config}[kind]
        given = {"model": str(folders[kind]), "resolution": 32, "precision": "fp32", "tokens": 16}
        return config(**(given | settings)).build()

    return build


def inputs(policy):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, *policy.latent_shape, generator=source)
    return x, torch.tensor([0.9, 0.4]), policy.encode(TEXTS)


def entropy(q, k):
    p = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return -torch.xlogy(p, p).sum(dim=-1).mean(dim=(1, 2)) / math.log(k.shape[2])


def heads(tokens, module):
    return tokens.unflatten(2, (module.heads, -1)).transpose(1, 2)


def by_its_modules(policy, given, guidance):
    """Of SD3: q of the image and k of both, from the inputs of every joint attention."""
    seen = []

    def keep(attn, args, kwargs):
        image, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        q, k = heads(attn.to_q(image), attn), heads(attn.to_k(image), attn)
        text_k = heads(attn.add_k_proj(text), attn)
        for norm in ("norm_q", "norm_k", "norm_added_k"):
            assert (getattr(attn, norm) is None) == (attn.norm_q is None)
        if attn.norm_q is not None:
            q, k, text_k = attn.norm_q(q), attn.norm_k(k), attn.norm_added_k(text_k)
        seen.append((q, k, text_k))

    hooks = [block.attn.register_forward_pre_hook(keep, with_kwargs=True)
             for block in policy.pipeline.transformer.transformer_blocks]  # fmt: skip
    with torch.no_grad():
        policy.velocity(*given, guidance)
    for hook in hooks:
        hook.remove()
    # The negative prompt's half comes first.
    return [tuple(part[-2:] for part in layer) for layer in seen]


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("keys", ["all", "text", "image"])
def test_of_sd3_it_is_the_entropy_of_the_rows_that_see_the_prompt(built, guidance, keys):
    policy = built("sd3")
    given = inputs(policy)
    layers = by_its_modules(policy, given, guidance)
    assert len(layers) == len(policy.pipeline.transformer.transformer_blocks)
    part = {"all": lambda k, t: torch.cat([k, t], dim=2), "text": lambda _, t: t,
            "image": lambda k, _: k}[keys]  # fmt: skip
    expected = torch.stack([entropy(q, part(k, t)) for q, k, t in layers]).mean(dim=0)
    settings = Attention(layer_stride=1, keys=keys)
    with torch.no_grad():
        _, found = probed_velocity(policy, *given, guidance, torch.ones(2) > 0, settings)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("keys", ["all", "text", "image"])
def test_of_flux_it_is_the_entropy_after_norms_and_rotation(built, monkeypatch, keys):
    """Against what its attention hands to the dispatcher, text first, in both kinds of blocks."""
    policy = built("flux")
    given, seen = inputs(policy), []
    own = transformer_flux.dispatch_attention_fn

    def dispatch(query, key, value, **options):
        seen.append((query[:, 16:].transpose(1, 2), key.transpose(1, 2)))
        assert query.shape[1] == key.shape[1]
        return own(query, key, value, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(transformer_flux, "dispatch_attention_fn", dispatch)
        policy.velocity(*given, 3.5)
    assert len(seen) == 2
    part = {"all": slice(None), "text": slice(0, 16), "image": slice(16, None)}[keys]
    expected = torch.stack([entropy(q, k[:, :, part]) for q, k in seen]).mean(dim=0)
    settings = Attention(layer_stride=1, keys=keys)
    with torch.no_grad():
        _, found = probed_velocity(policy, *given, 3.5, torch.ones(2) > 0, settings)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "guidance"), [("sd3", 1.0), ("sd3", 4.5), ("flux", 3.5)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_velocity_is_the_same_to_the_bit(built, kind, guidance, precision):
    policy = built(kind, precision=precision)
    given = inputs(policy)
    with torch.no_grad():
        plain = policy.velocity(*given, guidance)
        probed, found = probed_velocity(policy, *given, guidance, torch.ones(2) > 0, EVERY)
        after = policy.velocity(*given, guidance)
    assert torch.equal(plain, probed)
    assert torch.equal(plain, after)
    assert ((found > 0) & (found <= 1)).all()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_one_record_for_every_joint_attention_of_every_call(built, kind):
    """And no hook stays."""
    policy = built(kind)
    transformer = policy.pipeline.transformer
    blocks = [
        *transformer.transformer_blocks,
        *getattr(transformer, "single_transformer_blocks", []),
    ]
    seen = []

    class Watcher:
        def see(self, layer, q, k, text):
            assert q.shape[2] == k.shape[2] - (text.stop - text.start)
            seen.append((layer, q.shape[0]))

    given = inputs(policy)
    with torch.no_grad(), shown.watched_by(Watcher()):
        for _ in range(2):
            policy.velocity(*given, 4.5)
    assert seen == [(layer, 2) for _ in range(2) for layer in range(len(blocks))]
    for block in blocks:
        assert not block.attn._forward_pre_hooks
        assert not block.attn._forward_hooks


def test_a_lora_of_zero_attends_as_the_reference(built):
    """A-5: its second factor starts at 0; one that is trained attends otherwise."""
    policy = built("sd3", lora_rank=2, lora_alpha=2)
    policy.weights.keep("reference")
    given = inputs(policy)

    def measured():
        with torch.no_grad():
            return probed_velocity(policy, *given, 4.5, torch.ones(2) > 0, EVERY)[1]

    with policy.weights("reference"):
        base = measured()
    assert torch.equal(measured(), base)
    with torch.no_grad():
        for name, tensor in policy.weights.live.items():
            if ".lora_B." in name:
                tensor += 0.1
    assert not torch.equal(measured(), base)


def test_a_compiled_transformer_is_refused(built):
    policy = built("sd3", compile=True)
    with pytest.raises(InputError, match=r"set policy\.compile=false"):
        probed_velocity(policy, *inputs(policy), 1.0, torch.ones(2) > 0, EVERY)
