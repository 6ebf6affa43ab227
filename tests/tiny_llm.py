"""A tiny causal language model and what TRL needs to train it, without a download."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

WORDS = [f"w{n}" for n in range(20)]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]


def tokenizer():
    special = ["<pad>", "<end>", "<unknown>"]
    known = {word: number for number, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>",
        padding_side="left",
    )  # fmt: skip


@cache
def _folder():
    """Where the model lies: TRL loads the reference of a KL from there."""
    folder = TemporaryDirectory(prefix="tiny_llm_")
    _built().save_pretrained(folder.name)
    return folder


def model():
    """Weights so large that its tokens have probabilities of all sizes."""
    return Qwen2ForCausalLM.from_pretrained(_folder().name)


def _built():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def reward(completions, **_):
    """How many of the words are even: differs between completions."""
    found = []
    for text in completions:
        words = [word for word in text.split() if word.startswith("w")]
        found.append(sum(int(word[1:]) % 2 == 0 for word in words) / max(len(words), 1))
    return found


def prompts():
    return Dataset.from_dict({"prompt": PROMPTS})


def settings(folder, **changed):
    """Of TRL, for the CPU."""
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 8, "max_steps": 3, "learning_rate": 1e-2, "save_strategy": "no",
        "logging_steps": 1, "seed": 0, "disable_tqdm": True, **changed,
    }  # fmt: skip


def save_qwen2(folder):
    """A random Qwen2 with its own tokenizer (bytes, no merges) and a chat template.

    Its own settings for generation are those that nobody may take over: no two tokens twice.
    """
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[name] = len(vocabulary)
    words = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    network.generation_config.no_repeat_ngram_size = 1
    network.save_pretrained(folder)
    words.save_pretrained(folder)
