"""Word tokens of the shapes world: one id per word of the grammar, 0 for the empty word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entroflow.shapes.grammar import WORDS, parse

CAPTION_LENGTH = 10
VOCABULARY = 1 + len(WORDS)
_IDS = {word: index for index, word in enumerate(WORDS, start=1)}


def tokenize(captions: Sequence[str]) -> Tensor:
    """Word ids [B, CAPTION_LENGTH], padded with 0; the empty caption is all 0.

    Raises:
        InputError: a caption is outside the grammar.
    """
    ids = torch.zeros(len(captions), CAPTION_LENGTH, dtype=torch.long)
    for row, caption in enumerate(captions):
        if caption:
            parse(caption)
            words = caption.lower().replace(",", " ").rstrip(". ").split()
            ids[row, : len(words)] = torch.tensor([_IDS[word] for word in words])
    return ids
