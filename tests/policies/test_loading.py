"""Models as people have them: folders of half-precision variants, and single files."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import entroflow
from entroflow.checks.doctor import Verdict, examine
from entroflow.errors import InputError, RecipeError
from entroflow.recipe.load import load_recipe

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from entroflow.policies.diffusers.flux import FluxConfig
from entroflow.policies.diffusers.loading import _check_whole
from entroflow.policies.diffusers.original_names import original_layers
from entroflow.policies.diffusers.sd3 import SD3Config
from entroflow.policies.diffusers.stand_ins import STAND_INS

CONFIGS = {"sd3": SD3Config, "flux": FluxConfig}
RECIPES = {"sd3": "sd35_flow_grpo", "flux": "flux_flow_grpo"}
TINY = {"resolution": 32, "tokens": 24, "precision": "fp32"}
OTHER_NAMES = {  # SD3: what is no linear layer, and what is called the same
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder", "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k", "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k", "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}  # fmt: skip


@pytest.fixture(scope="module")
def variant_folders(tmp_path_factory):
    made = {}
    for kind, stand_in in STAND_INS.items():
        made[kind] = tmp_path_factory.mktemp(f"{kind}-fp16")
        stand_in().to(torch.float16).save_pretrained(made[kind], variant="fp16")
    return made


def as_the_authors(transformer):
    """The weights of a Stable Diffusion 3 transformer in its authors' layout."""
    weights, tensors = transformer.state_dict(), {}
    for original, names in original_layers(transformer):
        for kind in ("weight", "bias"):
            rows = torch.cat([weights.pop(f"{name}.{kind}") for name in names])
            parent = transformer.get_submodule(names[0].rpartition(".")[0])
            if type(parent).__name__ == "AdaLayerNormContinuous":
                rows = torch.cat(rows.chunk(2)[::-1])
            tensors[f"model.diffusion_model.{original}.{kind}"] = rows
    for name, value in weights.items():
        for ours, theirs in OTHER_NAMES.items():
            if name.startswith("transformer_blocks.") and f".{ours}." in name:
                block = name.split(".")[1]
                name = f"joint_blocks.{block}.{theirs}.weight"
            elif name == ours or name.startswith(f"{ours}."):
                name = name.replace(ours, theirs, 1)
        tensors[f"model.diffusion_model.{name}"] = value
    return tensors


def velocity(policy):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *policy.latent_shape, generator=generator)
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.7]), policy.encode(["a dog"]), 1.0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_of_a_variant_is_loaded_by_its_name(folders, variant_folders, kind):
    folder = str(variant_folders[kind])
    policy = CONFIGS[kind](model=folder, variant="fp16", **TINY).build()
    exact = CONFIGS[kind](model=str(folders[kind]), **TINY).build()
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        found = dict(getattr(policy.pipeline, part).named_parameters())
        for name, value in getattr(exact.pipeline, part).named_parameters():
            if ".lora_" not in name:
                assert torch.equal(found[name], value.half().float())
    assert velocity(policy).isfinite().all()
    half = CONFIGS[kind](model=folder, variant="fp16", **TINY | {"precision": "bf16"})
    assert half.dtype_of("transformer") == torch.bfloat16
    assert half.memory(guidance=1.0, batch_size=1, micro_batch=1).peak > 0


def test_the_rest_of_a_file_may_be_a_variant(variant_folders, one_file):
    file, wanted = one_file("sd3")
    policy = SD3Config(
        model=str(file), config=str(variant_folders["sd3"]), variant="fp16", **TINY
    ).build()
    ours, theirs = (p.pipeline.transformer.proj_out.weight for p in (policy, wanted))
    assert torch.equal(ours, theirs)
    vae = wanted.pipeline.vae.decoder.conv_out.weight
    assert torch.equal(policy.pipeline.vae.decoder.conv_out.weight, vae.half().float())


def test_a_variant_that_is_there_is_proposed(variant_folders):
    folder = str(variant_folders["sd3"])
    with pytest.raises(InputError, match=r"of the variant fp16: set policy\.variant") as refused:
        SD3Config(model=folder, **TINY).build()
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"of the variant fp16: set policy\.variant"):
        SD3Config(model=folder, variant="bf16", **TINY).build()


@pytest.fixture
def one_file(folders, tmp_path):
    """A changed model as one file, in its authors' layout (sd3) or diffusers' (flux)."""

    def write(kind, **others):
        transformer = STAND_INS[kind]().transformer
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.mul_(1.1)
        tensors = as_the_authors(transformer) if kind == "sd3" else transformer.state_dict()
        file = tmp_path / f"{kind}-tuned.safetensors"
        save_file(
            {n: t.contiguous().to(torch.float16) for n, t in (tensors | others).items()}, file
        )
        pipeline = DiffusionPipeline.from_pretrained(folders[kind])
        pipeline.transformer = transformer.half().float()
        return file, CONFIGS[kind](model=str(folders[kind]), **TINY).over(pipeline)

    return write


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_file_is_loaded_with_the_rest_of_a_folder(folders, one_file, tmp_path, kind):
    """The transformer of the file; encoders, tokenizers and VAE of the folder; then exported."""
    file, wanted = one_file(kind)
    config = CONFIGS[kind](model=str(file), config=str(folders[kind]), **TINY)
    policy = config.build()
    torch.testing.assert_close(velocity(policy), velocity(wanted), rtol=0, atol=1e-5)
    vae = policy.pipeline.vae.state_dict()
    assert all(torch.equal(vae[n], v) for n, v in wanted.pipeline.vae.state_dict().items())
    of_folder = CONFIGS[kind](model=str(folders[kind]), **TINY)
    assert config.memory(guidance=1.0, batch_size=2, micro_batch=2) == of_folder.memory(
        guidance=1.0, batch_size=2, micro_batch=2
    )
    policy.export(tmp_path / "merged", merged=True)
    merged = CONFIGS[kind](model=str(tmp_path / "merged"), **TINY, lora_rank=None).build()
    torch.testing.assert_close(velocity(merged), velocity(wanted), rtol=0, atol=1e-5)


def test_a_vae_and_an_encoder_in_the_file_are_those_that_are_taken(folders, one_file):
    other = torch.full((3,), 0.25)
    vae = STAND_INS["sd3"]().vae
    tensors = {}
    for name, value in vae.state_dict().items():
        for ours, theirs in (
            ("down_blocks.0.resnets.0", "down.0.block.0"),
            ("down_blocks.1.resnets.0", "down.1.block.0"),
            ("down_blocks.0.downsamplers.0", "down.0.downsample"),
            ("up_blocks.0.upsamplers.0", "up.1.upsample"),
            ("up_blocks.0.resnets.0", "up.1.block.0"), ("up_blocks.0.resnets.1", "up.1.block.1"),
            ("up_blocks.1.resnets.0", "up.0.block.0"), ("up_blocks.1.resnets.1", "up.0.block.1"),
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0.to_q", "mid.attn_1.q"),
            ("mid_block.attentions.0.to_k", "mid.attn_1.k"),
            ("mid_block.attentions.0.to_v", "mid.attn_1.v"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        tensors[f"first_stage_model.{name}"] = value
    tensors["first_stage_model.decoder.conv_out.bias"] = other
    of_t5 = STAND_INS["sd3"]().text_encoder_3.state_dict()
    tensors |= {f"text_encoders.t5xxl.transformer.{n}": 2 * value for n, value in of_t5.items()}
    file, _ = one_file("sd3", **tensors)
    pipeline = SD3Config(model=str(file), config=str(folders["sd3"]), **TINY).build().pipeline
    assert torch.equal(pipeline.vae.decoder.conv_out.bias, other)
    found = pipeline.text_encoder_3.state_dict()
    assert all(torch.equal(found[n], (2 * value).half().float()) for n, value in of_t5.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_starts_and_goes_on_from_a_file(folders, one_file, tmp_path, kind):
    file, _ = one_file(kind)
    overrides = [
        f"policy.model={file}", f"policy.config={folders[kind]}", "policy.resolution=32",
        "policy.tokens=24", "policy.precision=fp32", "prompts.per_iteration=1",
        "allocation.group_size=4", "sampling.steps=3", "sampling.batch_size=4",
        "optimizer.micro_batch=4", "objective.minibatches=1", "evaluation.images=1",
        "evaluation.test_images=1", "evaluation.steps=1", "evaluation.guidance_tried=[1.0]",
        "run.iterations=1",
    ]  # fmt: skip
    findings = {f.check: f.verdict for f in examine(load_recipe(RECIPES[kind], overrides))}
    for check in ("memory", "model", "parity", "on-policy"):
        assert findings[check] is Verdict.OK
    run = entroflow.train(RECIPES[kind], overrides, run=tmp_path / "run").path
    entroflow.resume(run, ["run.iterations=2"])
    assert (entroflow.export(run, tmp_path / "out") / "pytorch_lora_weights.safetensors").exists()


# --- what is refused ------------------------------------------------------------------------------


def test_a_file_without_a_configuration_is_refused_when_the_recipe_is_read(tmp_path):
    with pytest.raises(RecipeError, match="model is one file, so config must name a folder"):
        load_recipe("sd35_flow_grpo", [f"policy.model={tmp_path / 'a.safetensors'}"])
    with pytest.raises(RecipeError, match="config is for a model that is one file"):
        load_recipe("sd35_flow_grpo", ["policy.model=models/sd35", "policy.config=models/sd35"])


def refused(folders, model, config="sd3", kind="sd3"):
    place = folders.get(config, config)
    with pytest.raises(InputError) as error:
        CONFIGS[kind](model=str(model), config=str(place), **TINY).build()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_no_model_of_the_kind_are_named(folders, one_file, tmp_path):
    file, _ = one_file("sd3")
    assert "there is no file" in refused(folders, tmp_path / "none.safetensors")
    pickled = tmp_path / "a.ckpt"
    pickled.write_bytes(b"x")
    assert "is no .safetensors file; convert it first" in refused(folders, pickled)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:-9])
    assert "is torn" in refused(folders, torn)
    said = refused(folders, file, kind="flux", config="flux")
    assert "is no FluxPipeline: none of its" in said
    assert "is called double_blocks.0. or transformer_blocks.0." in said
    assert "is a FluxPipeline, not a StableDiffusion3Pipeline" in refused(folders, file, "flux")
    assert "policy.config: no pipeline at" in refused(folders, file, tmp_path / "nowhere")


def test_quantised_files_are_refused(folders, one_file):
    """Their weights are to be multiplied by scales, which loading would leave out."""
    scale = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight": torch.ones(1)}
    file, _ = one_file("sd3", **scale)
    assert "are quantised" in refused(folders, file)


def test_what_neither_file_nor_folder_has_is_named(folders, one_file, tmp_path):
    file, _ = one_file("sd3")
    without = shutil.copytree(folders["sd3"], tmp_path / "without")
    (without / "text_encoder_3" / "model.safetensors").unlink()
    assert "what the file lacks must be there" in refused(folders, file, without)
    tensors = load_file(file)
    lacked = tensors.pop("model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight")
    save_file(tensors, tmp_path / "lacking.safetensors")
    said = refused(folders, tmp_path / "lacking.safetensors")
    assert "it has no 'joint_blocks.1.x_block.mlp.fc1.weight'" in said
    # A norm that diffusers' converter finds nowhere, and a block that the configuration lacks.
    tensors["model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"] = lacked
    norm = tensors.pop("model.diffusion_model.joint_blocks.0.x_block.attn2.ln_q.weight")
    save_file(tensors, tmp_path / "lacking.safetensors")
    assert "it has no 'joint_blocks.0.x_block.attn2.ln_q.weight'" in refused(
        folders, tmp_path / "lacking.safetensors"
    )
    tensors["model.diffusion_model.joint_blocks.0.x_block.attn2.ln_q.weight"] = norm
    tensors["model.diffusion_model.joint_blocks.0.x_block.extra.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "more.safetensors")
    assert "transformer hold" in refused(folders, tmp_path / "more.safetensors")


def test_a_guidance_that_the_file_lacks_is_named(folders, tmp_path):
    """FLUX.1-schnell has none; its weights with the configuration of FLUX.1-dev are no model."""
    tensors = STAND_INS["flux"]().transformer.state_dict()
    file = tmp_path / "schnell.safetensors"
    save_file({n: t for n, t in tensors.items() if "guidance_embedder" not in n}, file)
    said = refused(folders, file, config="flux", kind="flux")
    assert "can't be loaded with the configuration of" in said
    # In the authors' layout diffusers leaves what is lacking without values.
    with torch.device("meta"):
        pipeline = SimpleNamespace(transformer=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the file has no weight of the transformer"):
        _check_whole(pipeline, {"transformer"}, str(file))
