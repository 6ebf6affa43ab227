"""How much memory do the recipes of SD3.5 Medium and FLUX.1-dev take?

    python benchmarks/memory.py

Computed as `entroflow doctor` does, from configurations of the full size that are written down here;
no weights are made. Raw results go to docs/claims/memory.json, the table to docs/real-models.md.
Takes a few minutes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from transformers import CLIPTextConfig, T5Config

from entroflow.recipe.load import load_recipe
from entroflow.writing import to_json, write_text

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims" / "memory.json"
PAGE = ROOT / "docs" / "real-models.md"
GIB = 2**30

CLIP_L = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    projection_dim=768,
)  # fmt: skip
CLIP_G = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
    projection_dim=1280,
)  # fmt: skip
T5_XXL = T5Config(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
VAE = {
    "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False, "sample_size": 1024,
}  # fmt: skip


def sd35_medium() -> dict:
    """Components by name: a module without values, or a configuration and its class."""
    transformer = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
        attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": transformer,
        "vae": AutoencoderKL(**VAE),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": (CLIP_L, "CLIPTextModelWithProjection"),
        "text_encoder_2": (CLIP_G, "CLIPTextModelWithProjection"),
        "text_encoder_3": (T5_XXL, "T5EncoderModel"),
    }


def flux_dev() -> dict:
    """See `sd35_medium`."""
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
        num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
        guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    return {
        "_class_name": "FluxPipeline",
        "transformer": transformer,
        "vae": AutoencoderKL(**{**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "scheduler": FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=4096,
        ),
        "text_encoder": (CLIP_L, "CLIPTextModel"),
        "text_encoder_2": (T5_XXL, "T5EncoderModel"),
    }  # fmt: skip


SMALL = "optimizer.micro_batch=1", "sampling.batch_size=1"
SAVING = "policy.gradient_checkpointing=true", "policy.offload_encoders=true"
SETTINGS = [
    (sd35_medium, "sd35_flow_grpo", ()),
    (sd35_medium, "sd35_flow_grpo", SAVING),
    (sd35_medium, "sd35_flow_grpo", (*SMALL, *SAVING[:1])),
    (sd35_medium, "sd35_flow_grpo", (*SMALL, *SAVING, "policy.lora_rank=null")),
    (flux_dev, "flux_flow_grpo", ()),
    (flux_dev, "flux_flow_grpo", SAVING[1:]),
    (flux_dev, "flux_flow_grpo", (*SMALL, *SAVING[1:])),
    (flux_dev, "flux_e_grpo", ()),
]


def write_configuration(folder: Path, components: dict) -> int:
    """What `from_pretrained` would read but for the weights; gives the transformer's parameters."""
    index: dict = {"_class_name": components["_class_name"]}
    for name, part in components.items():
        if name == "_class_name":
            continue
        if isinstance(part, tuple):
            part[0].save_pretrained(folder / name)
            index[name] = ["transformers", part[1]]
            tokenizer = "CLIPTokenizer" if part[1].startswith("CLIP") else "T5Tokenizer"
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", tokenizer]
        else:
            part.save_config(folder / name)
            index[name] = ["diffusers", type(part).__name__]
    write_text(folder / "model_index.json", json.dumps(index))
    return sum(p.numel() for p in components["transformer"].parameters())


def table(results: list[dict]) -> str:
    """A Markdown table with a line for every setting."""
    lines = [
        "| recipe, and what is changed | always there | training pass | sampling pass | optimizer step | encoding | most |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        kept, passing = sum(result["kept"].values()), result["passing"]
        most = kept + max(passing.values())
        works = ("a training pass", "a sampling pass", "an optimizer step", "encoding prompts")
        cells = (kept, *(passing[work] for work in works), most)
        names = [f"`{name}`" for name in (result["recipe"], *result["changes"])]
        lines.append(
            f"| {' '.join(names)} | " + " | ".join(f"{cell / GIB:.1f}" for cell in cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    results = []
    for model, recipe, changes in SETTINGS:
        with torch.device("meta"):
            components = model()
        with tempfile.TemporaryDirectory() as folder:
            parameters = write_configuration(Path(folder), components)
            loaded = load_recipe(recipe, [f"policy.model={folder}", *changes])
            found = loaded.policy.memory(
                guidance=loaded.sampling.guidance,
                batch_size=loaded.sampling.batch_size,
                micro_batch=loaded.optimizer.micro_batch,
            )
        results.append(
            {
                "recipe": recipe, "changes": list(changes), "parameters": parameters,
                "torch": torch.__version__, "kept": found.kept, "passing": found.passing,
            }
        )  # fmt: skip
        print(recipe, *changes, f"{found.peak / GIB:.1f} GiB", flush=True)
        write_text(CLAIMS, to_json({"results": results}, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    before, mark, rest = page.partition("<!-- memory -->\n")
    write_text(
        PAGE, before + mark + table(results) + "\n" + "".join(rest.partition("<!-- end -->")[1:])
    )


if __name__ == "__main__":
    main()
