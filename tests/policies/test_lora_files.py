"""LoRAs as people have them: what is read is what the file means, or it is refused in one line.

The right change of a weight is alpha / rank B A of the test's own factors, or what diffusers'
converters make of the same file.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from entroflow.errors import InputError

pytest.importorskip("diffusers")

from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from entroflow.policies.diffusers.lora_files import read_lora
from entroflow.policies.diffusers.original_names import original_layers
from entroflow.policies.diffusers.stand_ins import STAND_INS

WIDTH = 64
RANKS = {
    "transformer_blocks.0.attn.to_q": 8, "transformer_blocks.0.attn.to_out.0": 4,
    "transformer_blocks.0.attn.add_k_proj": 8, "transformer_blocks.0.ff.net.2": 2,
}  # fmt: skip
"""Modules of both kinds of transformers, changed with mixed ranks."""


@pytest.fixture(scope="module")
def transformers():
    return {kind: stand_in().transformer for kind, stand_in in STAND_INS.items()}


def factors_of(transformer):
    """A and B of random numbers, by module."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, rank in RANKS.items():
        layer = transformer.get_submodule(name)
        found[name] = (
            torch.randn(rank, layer.in_features, generator=generator),
            torch.randn(layer.out_features, rank, generator=generator),
        )
    return found


def changes_in(path, transformer):
    """alpha / rank B A of every module, as read."""
    read = read_lora(path, transformer)
    return {name: each.alpha / each.rank * each.up @ each.down for name, each in read.items()}


def assert_means(path, transformer, wanted):
    found = changes_in(path, transformer)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def flat(name):
    return name.replace(".", "_")


FORMS = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft's modules": (
        "base_model.model.{}.lora_A.mine.weight", "base_model.model.{}.lora_B.mine.weight"
    ),
    "peft over diffusers": (
        "base_model.model.transformer.{}.lora_A.weight",
        "base_model.model.transformer.{}.lora_B.weight",
    ),
    "comfy": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "comfy, down": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "old diffusers": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "onetrainer": ("lora_transformer_{}.lora_down.weight", "lora_transformer_{}.lora_up.weight"),
    "lycoris": ("lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STAND_INS)
@pytest.mark.parametrize("form", FORMS)
def test_all_names_are_read(transformers, tmp_path, kind, form):
    """With alphas for some modules and none for others, whose strength is 1."""
    transformer, (down, up) = transformers[kind], FORMS[form]
    written = flat if "_{}" in down else str
    tensors, wanted = {}, {}
    for number, (name, (a, b)) in enumerate(factors_of(transformer).items()):
        tensors[down.format(written(name))] = a
        tensors[up.format(written(name))] = b
        wanted[name] = b @ a
        if number % 2:
            alpha = torch.tensor(3.0 * number, dtype=torch.bfloat16)
            tensors[f"{down.split('{}')[0]}{written(name)}.alpha"] = alpha
            wanted[name] = 3 * number / len(a) * b @ a
    save_file(tensors, tmp_path / "any name.safetensors")
    assert_means(tmp_path, transformer, wanted)
    assert_means(tmp_path / "any name.safetensors", transformer, wanted)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_settings_of_peft_give_the_strength(transformers, tmp_path, rslora):
    """alpha over the rank or its root, of the module where a pattern names it."""
    transformer, tensors, wanted = transformers["sd3"], {}, {}
    for name, (a, b) in factors_of(transformer).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        alpha = 5 if name.endswith("add_k_proj") else 16
        wanted[name] = alpha / len(a) ** (0.5 if rslora else 1) * b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": rslora,
        "rank_pattern": {"to_out.0": 4, "ff.net.2": 2}, "alpha_pattern": {"add_k_proj": 5},
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert_means(tmp_path, transformer, wanted)
    assert_means(tmp_path / "adapter_model.safetensors", transformer, wanted)
    # A file of another origin in the same folder is no business of PEFT's settings.
    save_file(tensors, tmp_path / "other.safetensors")
    plain = {name: b @ a for name, (a, b) in factors_of(transformer).items()}
    assert_means(tmp_path / "other.safetensors", transformer, plain)


def test_peft_itself_writes_what_is_read(tmp_path):
    """Through its own save_pretrained, ranks and alphas by patterns."""
    from peft import LoraConfig, get_peft_model

    base = STAND_INS["sd3"]().transformer
    config = LoraConfig(
        r=4, lora_alpha=12, rank_pattern={"to_k": 2}, alpha_pattern={"attn.to_q": 1},
        target_modules=["to_q", "to_k"], init_lora_weights=False, use_rslora=True,
    )  # fmt: skip
    model = get_peft_model(STAND_INS["sd3"]().transformer, config)
    model.save_pretrained(tmp_path)
    wanted = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
    }  # fmt: skip
    assert len(wanted) == 6
    assert_means(tmp_path, base, wanted)


# --- the authors' names ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_flux():
    """FLUX.1's own widths, without values; diffusers' converters know no other."""
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def original_tensors(transformer, form, *, skipped=()):
    """Random factors of every layer that has an original name."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for original, names in original_layers(transformer):
        if original.startswith(skipped):
            continue
        layers = [transformer.get_submodule(name) for name in names]
        stem = form.format(original if "." in form else flat(original))
        width, out = layers[0].in_features, sum(layer.out_features for layer in layers)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return tensors


def assert_does_what_diffusers_reads(path, transformer, tensors):
    """On two vectors, as the products of these factors would be large."""
    generator = torch.Generator().manual_seed(3)
    theirs = FluxPipeline.lora_state_dict(dict(tensors))
    read = read_lora(path, transformer)
    names = {key.split(".lora_")[0] for key in theirs}
    assert {f"transformer.{name}" for name in read} == names
    for name, each in read.items():
        x = torch.randn(each.down.shape[1], 2, generator=generator)
        down, up = (theirs[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        found = each.alpha / each.rank * each.up @ (each.down @ x)
        torch.testing.assert_close(found, up @ (down @ x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["lora_unet_{}", "diffusion_model.{}"])
def test_kohyas_names_of_flux_mean_what_diffusers_reads(large_flux, tmp_path, form):
    # What is no block, diffusers' converter puts under names that its loader leaves out.
    others = ("final_layer", "img_in", "txt_in", "time_in", "vector_in", "guidance_in")
    tensors = {
        name: tensor
        for name, tensor in original_tensors(large_flux, form, skipped=others).items()
        if "processor" not in name
    }
    assert len(tensors) == 3 * 13
    save_file(tensors, tmp_path / "x.safetensors")
    assert_does_what_diffusers_reads(tmp_path, large_flux, tensors)


def test_xlabs_names_mean_what_diffusers_reads(large_flux, tmp_path):
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for stem, out in {
        "double_blocks.0.processor.qkv_lora1": 3 * 3072,
        "double_blocks.0.processor.qkv_lora2": 3 * 3072,
        "double_blocks.0.processor.proj_lora1": 3072,
        "double_blocks.0.processor.proj_lora2": 3072,
        "single_blocks.0.processor.qkv_lora": 3 * 3072,
    }.items():
        tensors[f"{stem}.down.weight"] = torch.randn(2, 3072, generator=generator)
        tensors[f"{stem}.up.weight"] = torch.randn(out, 2, generator=generator)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_does_what_diffusers_reads(tmp_path, large_flux, tensors)


def test_the_other_layers_of_flux_have_their_names(transformers, tmp_path):
    """Told by their shapes, and the last norm's halves by hand: shift and scale change places."""
    transformer = transformers["flux"]
    tensors = original_tensors(transformer, "diffusion_model.{}", skipped=("double", "single"))
    save_file(tensors, tmp_path / "x.safetensors")
    found = changes_in(tmp_path, transformer)
    assert found.keys() == {
        "x_embedder", "context_embedder", "proj_out", "norm_out.linear",
        *(f"time_text_embed.{part}_embedder.linear_{n}" for part in ("timestep", "text", "guidance")
          for n in (1, 2)),
    }  # fmt: skip
    last = "diffusion_model.final_layer.adaLN_modulation.1"
    shift_first = 0.5 * tensors[f"{last}.lora_up.weight"] @ tensors[f"{last}.lora_down.weight"]
    shift, scale = shift_first.chunk(2)
    torch.testing.assert_close(found["norm_out.linear"], torch.cat([scale, shift]))
    for original, name in {
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    }.items():
        down, up = (tensors[f"diffusion_model.{original}.lora_{p}.weight"] for p in ("down", "up"))
        torch.testing.assert_close(found[name], 0.5 * up @ down)


def test_the_authors_names_of_sd3_mean_what_diffusers_converts(tmp_path):
    """A checkpoint in the authors' layout, converted by diffusers without and with the change."""
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH, pooled_projection_dim=WIDTH, pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )  # fmt: skip
    tensors = original_tensors(transformer, "lora_unet_{}")
    plain, changed = {}, {}
    for original, names in original_layers(transformer):
        weights = torch.cat([transformer.get_submodule(name).weight.detach() for name in names])
        stem = f"lora_unet_{flat(original)}"
        a, b = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        plain[f"{original}.weight"] = weights
        changed[f"{original}.weight"] = weights + 0.5 * b @ a
        for checkpoint in (plain, changed):
            checkpoint[f"{original}.bias"] = torch.zeros(len(weights))
    rest = {
        "pos_embed": torch.zeros(1, 64, WIDTH),
        "x_embedder.proj.weight": torch.zeros(WIDTH, 16, 2, 2),
        "x_embedder.proj.bias": torch.zeros(WIDTH),
    }
    for name in ("weight", "bias"):
        rest[f"context_embedder.{name}"] = torch.zeros(WIDTH)
    before, after = (
        convert_sd3_transformer_checkpoint_to_diffusers({**layers, **rest})
        for layers in (plain, changed)
    )
    wanted = {
        name.removesuffix(".weight"): after[name] - before[name]
        for name in after
        if not torch.equal(after[name], before[name])
    }
    assert len(wanted) == 4 + 2 * (3 + 1 + 2 + 1 + 3 + 1) + 4 + 3 + 2
    save_file(tensors, tmp_path / "x.safetensors")
    found = changes_in(tmp_path, transformer)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)


# --- what is refused ------------------------------------------------------------------------------

STEM = "transformer.transformer_blocks.0.attn.to_q"
HERE = STEM.removeprefix("transformer.")
A, B = torch.ones(4, WIDTH), torch.ones(WIDTH, 4)
PLAIN = {f"{STEM}.lora_A.weight": A, f"{STEM}.lora_B.weight": B}
LACKED = "transformer.transformer_blocks.40.attn.to_q"
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**PLAIN, f"{ENCODER}.lora_A.weight": A}, "1 of its 3 .* change a text encoder"),
        ({**PLAIN, "lora_te1_text_model_x.lora_down.weight": A}, "change a text encoder"),
        ({**PLAIN, "text_encoders.t5xxl.transformer.x.lora_A.weight": A}, "change a text encoder"),
        ({**PLAIN, f"{STEM}.lora_magnitude_vector": A[0]}, "lora_magnitude_vector, are no part"),
        ({**PLAIN, f"{STEM}.dora_scale": A[0]}, "dora_scale, are no part of a plain LoRA"),
        ({**PLAIN, f"{STEM}.lora_B.bias": A[0]}, "lora_B.bias, are no part of a plain LoRA"),
        ({**PLAIN, f"{STEM}.diff_b": A[0]}, "diff_b, are no part of a plain LoRA"),
        ({**PLAIN, "lora_unet_x.hada_w1_a": A}, "hada_w1_a, are no part of a plain LoRA"),
        ({**PLAIN, f"{LACKED}.lora_A.weight": A, f"{LACKED}.lora_B.weight": B},
         "2 of its 4 .* are for layers that this SD3Transformer2DModel lacks"),
        ({"weight": A}, "1 of its 1 .* are no LoRA's; names like transformer_blocks.0"),
        ({f"{STEM}.lora_A.weight": A}, "to_q has no lora_B"),
        ({f"{STEM}.lora_B.weight": B}, "to_q has no lora_A"),
        ({**PLAIN, "transformer.proj_out.alpha": torch.ones(1)}, "proj_out has no lora_"),
        ({**PLAIN, f"lora_unet_{flat(HERE)}.lora_down.weight": A,
          f"lora_unet_{flat(HERE)}.lora_up.weight": B}, "changed twice"),
        ({**PLAIN, f"diffusion_model.{HERE}.lora_A.weight": A}, "mean the same"),
        ({**PLAIN, f"{STEM}.lora_A.weight": A[:, :32]}, "leads from 32 to 64 values, .* 64 to 64"),
        ({**PLAIN, f"{STEM}.lora_B.weight": B[:, :2]}, "factors of .* are 4 x 64 and 64 x 2"),
        ({**PLAIN, f"{STEM}.lora_A.weight": A[..., None, None]}, "are 4 x 64 x 1 x 1 and 64 x 4"),
        ({**PLAIN, f"{STEM}.lora_A.weight": A.long()}, "no finite numbers"),
        ({**PLAIN, f"{STEM}.lora_A.weight": A / 0}, "no finite numbers"),
        ({**PLAIN, f"{STEM}.alpha": torch.zeros(())}, "alpha of .* is 0"),
        ({**PLAIN, f"{STEM}.alpha": torch.full((), torch.nan)}, "alpha of .* is nan"),
        ({**PLAIN, f"{STEM}.alpha": A}, "alpha of .* holds 256 values"),
        ({"pos_embed.proj.lora_A.weight": A, "pos_embed.proj.lora_B.weight": B},
         "which is no linear layer"),
        ({}, "it is empty"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_an_error_in_one_line(transformers, tmp_path, tensors, message):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    with pytest.raises(InputError, match=message) as refused:
        read_lora(tmp_path, transformers["sd3"])
    assert str(refused.value).startswith(f"policy.lora_start: {file} holds no LoRA for this model")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"lora_alpha": 4, "use_dora": true}', "sets use_dora to True, which is no plain LoRA"),
        ('{"lora_alpha": 4, "peft_type": "LOHA"}', "sets peft_type to 'LOHA'"),
        ('{"lora_alpha": 4, "init_lora_weights": "pissa"}', "sets init_lora_weights to 'pissa'"),
        ('{"lora_alpha": 4, "modules_to_save": ["proj_out"]}', "sets modules_to_save"),
        ('{"r": 4}', "its settings give no alpha"),
        ('{"lora_alpha": "much"}', "its settings give no alpha"),
        ('{"lora_alpha": 4, "alpha_pattern": ["to_q"]}', "its settings give no alpha"),
        ('["lora_alpha"]', "its settings are no JSON object"),
        ("{", "its settings are no JSON"),
    ],
)
def test_settings_that_mean_something_else_are_refused(transformers, tmp_path, settings, message):
    save_file(PLAIN, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(InputError, match=message) as refused:
        read_lora(tmp_path, transformers["sd3"])
    assert "\n" not in str(refused.value)


def test_files_that_are_none_or_too_many_are_named(transformers, tmp_path):
    with pytest.raises(InputError, match=r"it has 0 \.safetensors files; name one"):
        read_lora(tmp_path, transformers["sd3"])
    for name in "ab":
        save_file(PLAIN, tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"2 \.safetensors files: a.safetensors, b.safetensors"):
        read_lora(tmp_path, transformers["sd3"])
    save_file(PLAIN, tmp_path / "pytorch_lora_weights.safetensors")
    assert len(read_lora(tmp_path, transformers["sd3"])) == 1
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-100])
    (tmp_path / "b.safetensors").write_bytes(b"PK" + bytes(100))
    for name in "ab":
        with pytest.raises(InputError, match="it is no safetensors file, or torn"):
            read_lora(tmp_path / f"{name}.safetensors", transformers["sd3"])
