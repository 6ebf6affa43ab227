"""The attention function of the embedded models, and how a policy of any kind shows its attention.

A policy shows every layer's queries and keys to whoever watches, while its network runs as always:

    velocity         marks which rows of the network call are conditional      `conditional`
    attention        hands on q and k, after all that is done to them          `show`
    who watches      gets those of the conditional rows and the image queries  `watched_by`
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Watcher(Protocol):
    """Somebody who looks at attention and changes nothing."""

    def see(self, layer: int, q: Tensor, k: Tensor, text: slice) -> None:
        """The attention of one layer in one network call.

        Args:
            layer: number of the joint attention layer, from 0.
            q: [B, heads, N, d] queries of the N image tokens, of the conditional rows.
            k: [B, heads, K, d] keys of all tokens, of the same rows.
            text: which of the keys are text; the others are image.
        """
        ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)
_conditional: ContextVar[slice] = ContextVar("conditional", default=slice(None))


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Show it the attention of every network call inside."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def is_watched() -> bool:
    """Whether anybody looks."""
    return _watcher.get() is not None


@contextmanager
def conditional(rows: slice) -> Iterator[None]:
    """Mark rows of the network calls inside as those that see their prompt; the others don't."""
    token = _conditional.set(rows)
    try:
        yield
    finally:
        _conditional.reset(token)


def show(layer: int, q: Tensor, k: Tensor, text: slice) -> None:
    """Show the attention of a layer, if anybody looks.

    Args:
        layer: see `Watcher.see`.
        q: [B, heads, N or K, d]; of all tokens, those of the text are left out.
        k: [B, heads, K, d].
        text: which of the keys are text: the first or the last ones.
    """
    watcher = _watcher.get()
    if watcher is None:
        return
    rows, keys = _conditional.get(), k.shape[2]
    start, stop, _ = text.indices(keys)
    if q.shape[2] == keys:
        q = q[:, :, stop:] if start == 0 else q[:, :, :start]
    if len(q[rows]):
        watcher.see(layer, q[rows], k[rows], slice(start, stop))


def attention(q: Tensor, k: Tensor, v: Tensor, layer: int, text: int) -> Tensor:
    """Softmax attention, written out: faster than the fused kernel on CPUs with bfloat16 units.

    Args:
        q, k, v: [B, heads, L, head width].
        layer: index of the block that asks.
        text: how many of the keys are text; they come first.

    Returns:
        [B, heads, L, head width].
    """
    show(layer, q, k, slice(0, text))
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    return torch.softmax(scores, dim=-1) @ v
