"""How the language model in the package was made: it read puzzles with one answer each.

Answers were drawn forwards, step by step, and the target is what came out. So the model learns to
write true steps, and less well to plan them: it is right now and then, and often in many ways.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from entroflow.evaluation.base import mean_over_prompts
from entroflow.llm.countdown import LONGEST, fault, puzzles, puzzles_with_answers
from entroflow.llm.embedded import Sampling, answers, new_model, new_tokenizer
from entroflow.llm.passing import avg_at, pass_at
from entroflow.writing import (
    refuse_used,
    to_json,
    whole_folder,
    write_text,
)

IGNORED = -100
"""The label of a token that is not learnt."""


@dataclass(frozen=True)
class Reading:
    """Settings; the defaults made the shipped weights.

    Attributes:
        steps, batch: updates, and puzzles in each.
        learning_rate: of AdamW at its highest, after `warm_up` steps; it falls to 0 as a cosine.
        held_out, each: validation puzzles, and answers to each.
        seed: of the weights and of the puzzles.
    """

    steps: int = 2000
    batch: int = 128
    learning_rate: float = 2e-3
    warm_up: int = 50
    weight_decay: float = 0.01
    held_out: int = 200
    each: int = 16
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Of the step-th update, from 0."""
        rise = min(1.0, (step + 1) / self.warm_up)
        return self.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def read(settings: Reading, folder: Path) -> Iterator[tuple[int, float]]:
    """Train from nothing; yields every step and its loss, and writes the model at the end.

    Raises:
        InputError: something is in the folder.
    """
    refuse_used(folder)
    tokenizer, model = new_tokenizer(), new_model(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    source = (pair for pair in puzzles_with_answers(settings.seed) if pair[0].split == "train")
    for step in range(settings.steps):
        texts = [next(source) for _ in range(settings.batch)]
        ids, labels = learnt(tokenizer, [(puzzle.text, answer) for puzzle, answer in texts])
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step + 1, loss.item()
    found = {"settings": asdict(settings), **judged(model, tokenizer, settings)}
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        write_text(part / "evaluation.json", to_json(found, indent=1))


def learnt(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] of questions with their answers, and the labels: the answers and their ends.

    All puzzles have as many words, so nothing is padded.
    """
    end = tokenizer.eos_token
    ids = torch.tensor(tokenizer([f"{q} {a} {end}" for q, a in pairs])["input_ids"])
    labels = ids.clone()
    labels[:, : -(LONGEST + 1)] = IGNORED
    return ids, labels


def judged(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Reading
) -> dict[str, Any]:
    """Avg@k and Pass@k on validation puzzles: value, and 95% interval over puzzles."""
    asked = puzzles("validation", settings.held_out, settings.seed)
    said = answers(
        model, tokenizer, [puzzle.text for puzzle in asked],
        Sampling(settings.each, LONGEST + 1, seed=settings.seed),
    )  # fmt: skip
    right = torch.tensor(
        [
            [fault(puzzle, answer) is None for answer in mine]
            for puzzle, mine in zip(asked, said, strict=True)
        ]
    )
    k = settings.each
    return {
        f"avg@{k}": mean_over_prompts(avg_at(right)),
        f"pass@{k}": mean_over_prompts(pass_at(right, k)),
        "puzzles": settings.held_out,
    }
