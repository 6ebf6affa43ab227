"""The layers of the transformers of Stable Diffusion 3 and FLUX.1 as their authors named them.

ComfyUI and kohya's scripts use these names. A layer of theirs may be several of diffusers', one
below the other: the projections to queries, keys and values are one matrix there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Names = Mapping[str, tuple[str, ...]]
"""A layer's original name -> its names in diffusers; {n} is the number of a block."""

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _each(parent: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names)


SD3: Names = {
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "joint_blocks.{n}.x_block.attn.qkv": _each("transformer_blocks.{n}.attn", QKV),
    "joint_blocks.{n}.x_block.attn.proj": ("transformer_blocks.{n}.attn.to_out.0",),
    "joint_blocks.{n}.x_block.attn2.qkv": _each("transformer_blocks.{n}.attn2", QKV),
    "joint_blocks.{n}.x_block.attn2.proj": ("transformer_blocks.{n}.attn2.to_out.0",),
    "joint_blocks.{n}.x_block.mlp.fc1": ("transformer_blocks.{n}.ff.net.0.proj",),
    "joint_blocks.{n}.x_block.mlp.fc2": ("transformer_blocks.{n}.ff.net.2",),
    "joint_blocks.{n}.x_block.adaLN_modulation.1": ("transformer_blocks.{n}.norm1.linear",),
    "joint_blocks.{n}.context_block.attn.qkv": _each("transformer_blocks.{n}.attn", ADDED_QKV),
    "joint_blocks.{n}.context_block.attn.proj": ("transformer_blocks.{n}.attn.to_add_out",),
    "joint_blocks.{n}.context_block.mlp.fc1": ("transformer_blocks.{n}.ff_context.net.0.proj",),
    "joint_blocks.{n}.context_block.mlp.fc2": ("transformer_blocks.{n}.ff_context.net.2",),
    "joint_blocks.{n}.context_block.adaLN_modulation.1": (
        "transformer_blocks.{n}.norm1_context.linear",
    ),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
FLUX: Names = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.{n}.img_attn.qkv": _each("transformer_blocks.{n}.attn", QKV),
    "double_blocks.{n}.img_attn.proj": ("transformer_blocks.{n}.attn.to_out.0",),
    "double_blocks.{n}.img_mlp.0": ("transformer_blocks.{n}.ff.net.0.proj",),
    "double_blocks.{n}.img_mlp.2": ("transformer_blocks.{n}.ff.net.2",),
    "double_blocks.{n}.img_mod.lin": ("transformer_blocks.{n}.norm1.linear",),
    "double_blocks.{n}.txt_attn.qkv": _each("transformer_blocks.{n}.attn", ADDED_QKV),
    "double_blocks.{n}.txt_attn.proj": ("transformer_blocks.{n}.attn.to_add_out",),
    "double_blocks.{n}.txt_mlp.0": ("transformer_blocks.{n}.ff_context.net.0.proj",),
    "double_blocks.{n}.txt_mlp.2": ("transformer_blocks.{n}.ff_context.net.2",),
    "double_blocks.{n}.txt_mod.lin": ("transformer_blocks.{n}.norm1_context.linear",),
    "single_blocks.{n}.linear1": (
        *_each("single_transformer_blocks.{n}.attn", QKV),
        "single_transformer_blocks.{n}.proj_mlp",
    ),
    "single_blocks.{n}.linear2": ("single_transformer_blocks.{n}.proj_out",),
    "single_blocks.{n}.modulation.lin": ("single_transformer_blocks.{n}.norm.linear",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    # The names of XLabs' training scripts.
    "double_blocks.{n}.processor.qkv_lora1": _each("transformer_blocks.{n}.attn", QKV),
    "double_blocks.{n}.processor.qkv_lora2": _each("transformer_blocks.{n}.attn", ADDED_QKV),
    "double_blocks.{n}.processor.proj_lora1": ("transformer_blocks.{n}.attn.to_out.0",),
    "double_blocks.{n}.processor.proj_lora2": ("transformer_blocks.{n}.attn.to_add_out",),
    "single_blocks.{n}.processor.qkv_lora": _each("single_transformer_blocks.{n}.attn", QKV),
    "single_blocks.{n}.processor.proj_lora": ("single_transformer_blocks.{n}.proj_out",),
}
ORIGINAL: Mapping[str, Names] = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
}
"""By the class of the transformer."""


def original_layers(transformer: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The layers that a transformer has, by their original names, with their names in diffusers."""
    present = {name for name, _ in transformer.named_modules()}
    blocks = sum(name.count(".") == 1 and "_blocks." in name for name in present)
    for original, names in ORIGINAL.get(type(transformer).__name__, {}).items():
        for n in range(blocks if "{n}" in original else 1):
            numbered = tuple(name.format(n=n) for name in names)
            if present.issuperset(numbered):
                yield original.format(n=n), numbered
