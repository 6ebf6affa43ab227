"""Tiny pipelines of the real classes with random weights: to try commands without a model.

They draw noise-like images, but everything else is as with the models they stand in for: text
encoders, tokenizers, transformer, VAE and scheduler are those classes, saved and loaded as usual.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CORPUS = (
    "a red circle left of a blue square", "two green triangles and one yellow ring",
    "a photo of a small dog beside a large wooden bench", "a bright painting of hills at night",
)  # fmt: skip
"""What the tokenizers learn their few hundred tokens from; other words fall into letters."""
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WIDTH, T5_WIDTH = 32, 64
MAX_TOKENS = 77


def sd3() -> StableDiffusion3Pipeline:
    """A `StableDiffusion3Pipeline`, for images of 32 x 32 pixels or more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _clip_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2,
            attention_head_dim=16, num_attention_heads=4, joint_attention_dim=T5_WIDTH,
            caption_projection_dim=64, pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=32, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)).eval(),
            tokenizer_2=tokenizer,
            text_encoder_3=_t5(),
            tokenizer_3=_t5_tokenizer(),
        )


def flux() -> FluxPipeline:
    """A `FluxPipeline` with guidance embedding and dynamic shift, for the same images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _clip_tokenizer()
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=T5_WIDTH, pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        return FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
                base_image_seq_len=256, max_image_seq_len=4096,
            ),
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(_clip_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=_t5(),
            tokenizer_2=_t5_tokenizer(),
        )  # fmt: skip


STAND_INS: dict[str, Callable[[], Any]] = {"sd3": sd3, "flux": flux}
"""By the name of the policy that they serve."""


def _autoencoder() -> Any:
    vae: Any = AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        sample_size=32,
    )  # fmt: skip
    return vae.eval()


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=64,
        projection_dim=CLIP_WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _t5() -> Any:
    config = T5Config(
        vocab_size=256, d_model=T5_WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding of the corpus, from the two files that CLIP's is made of."""
    learner = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[START, END], end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(CORPUS, trainer)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = learner.model.save(folder)
        return CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)


def _t5_tokenizer() -> T5Tokenizer:
    """Pieces of the corpus by a unigram model, with T5's special tokens."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(CORPUS, trainer)
    return T5Tokenizer(tokenizer_object=learner, extra_ids=0)
