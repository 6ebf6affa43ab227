"""The language model in the package: a Llama of a million parameters that plays Countdown.

`base/` holds it as transformers writes models, so that everything that loads a model from a folder
loads it. `pretrain.py` made it; MODEL_CARD.md says how good it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entroflow.llm.countdown import WORDS
from entroflow.noise import Stream, generator

BASE = Path(str(resources.files("entroflow"))) / "llm" / "base"
"""Folder of the shipped model."""
PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"
MOST_WORDS = 64


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the task is a token."""
    known = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *WORDS])}
    inner = Tokenizer(models.WordLevel(known, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
        padding_side="left", model_max_length=MOST_WORDS,
    )  # fmt: skip


def new_model(seed: int) -> LlamaForCausalLM:
    """Untrained."""
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=MOST_WORDS,
            tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        each: answers to a question.
        most_words: tokens after which an answer ends in any case.
        temperature: 0 takes the likeliest token.
        batch_size: most answers at a time; each batch draws from its own seed.
    """

    each: int
    most_words: int
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 256


@dataclass(frozen=True)
class Answer:
    """A sampled answer.

    Attributes:
        tokens: of the answer, with the one that ends it, if it came to an end.
        prompt: tokens of what was asked.
    """

    text: str
    tokens: list[int]
    prompt: list[int]


def answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, questions: list[str], sampling: Sampling
) -> list[list[str]]:
    """The texts of `sampled`."""
    return [
        [answer.text for answer in mine] for mine in sampled(model, tokenizer, questions, sampling)
    ]


@torch.no_grad()
def sampled(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    sampling: Sampling,
    *,
    special_tokens: bool = True,
) -> list[list[Answer]]:
    """Sampled answers to questions, `each` to every one; all of them in every process.

    The processes of accelerate share the work, which changes no answer. The global random state is
    left as it was.

    Args:
        model: of transformers, for causal language modelling.
        special_tokens: whether the tokenizer adds its own; not to questions that have them.
    """
    each, batch_size = sampling.each, sampling.batch_size
    asked = [question for question in questions for _ in range(each)]
    device = next(model.parameters()).device
    starts = range(0, len(asked), batch_size)
    state = PartialState()
    mine = [*starts[state.process_index :: state.num_processes]]
    # Where weights lie on all processes, each has to call the model as often as the others.
    turns = -(-len(starts) // state.num_processes)
    mine += [0] * (turns - len(mine))
    said: list[tuple[int, list[Answer]]] = []
    training = model.training
    model.eval()
    by_chance = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    own = {tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)}
    ends = sorted(end for end in own if end is not None)
    settings = GenerationConfig(
        max_new_tokens=sampling.most_words, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        **(by_chance if sampling.temperature else {"do_sample": False}),
    )  # fmt: skip
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, _without_own_settings(model):
        for start in mine:
            source = generator(sampling.seed, Stream.EVALUATION, row=start)
            torch.manual_seed(int(source.integers(2**62)))
            given = tokenizer(
                asked[start : start + batch_size], return_tensors="pt", padding=True,
                add_special_tokens=special_tokens,
            ).to(device)  # fmt: skip
            written: Tensor = model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"],
                generation_config=settings,
            )  # fmt: skip
            new = written[:, given["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            tokens = [_up_to_end(row, ends) for row in new.tolist()]
            prompts = [
                ids[seen.bool()].tolist()
                for ids, seen in zip(given["input_ids"], given["attention_mask"], strict=True)
            ]
            said.append((start, [*map(Answer, texts, tokens, prompts)]))
    model.train(training)
    known = dict(gather_object(said))
    flat = [answer for start in starts for answer in known[start]]
    return [flat[place : place + each] for place in range(0, len(flat), each)]


def _up_to_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """An answer without what fills up its batch."""
    last = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Within, generation is what is asked for.

    A model may come with settings of its own, as a repetition penalty; transformers takes from
    them whatever is not said.
    """
    models = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    own = [each.generation_config for each in models]
    for each in models:
        each.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for each, settings in zip(models, own, strict=True):
            each.generation_config = settings


def _as_list(value: int | list[int] | None) -> list[int | None]:
    return [*value] if isinstance(value, list) else [value]
