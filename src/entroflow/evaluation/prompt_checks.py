"""All prompts are looked at before a run: does the model read them, are held-out ones held out?"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from entroflow.errors import InputError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.policies.base import ReadsPrompts
from entroflow.prompts import ListedSource
from entroflow.shapes.grammar import Split

SHOWN = 60
"""Characters of a prompt in a message."""


def remarks_on_prompts(source: Any, evaluation: Any, policy: Any) -> list[str]:
    """What is odd about the prompts of a run, each in a line; nothing of a source without end.

    Prompts count as the same whatever their case, their spaces and their form of Unicode.

    Args:
        source: of the prompts that are trained on.
        evaluation: with held-out prompts.
        policy: that is to read them.

    Raises:
        InputError: the policy can't read one of them.
    """
    trained = (
        [prompt.text for prompt in source.listed()] if isinstance(source, ListedSource) else []
    )
    held_out: dict[Split, list[str]] = {}
    if isinstance(evaluation, HeldOutEvaluation):
        held_out = {s: [p.text for p in prompts] for s, prompts in evaluation.held_out().items()}
    kinds = {"training": trained, "held-out": [t for texts in held_out.values() for t in texts]}
    return [*_cut(policy, kinds), *remarks_on_texts(trained, held_out)]


def remarks_on_texts(trained: Sequence[str], held_out: Mapping[Split, Sequence[str]]) -> list[str]:
    """What is odd about prompts alone: that some come several times, or on both sides.

    Args:
        trained: all that are trained on.
        held_out: by split.
    """
    return [
        *_repeated(trained), *_trained_on(trained, held_out), *_in_both(held_out),
    ]  # fmt: skip


def same(text: str) -> str:
    """A text by which prompts that differ in case, spaces or form of Unicode are told as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def overlap(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Those texts, with their repetitions, that are among others; see `same`."""
    known = {same(text) for text in others}
    return [text for text in texts if same(text) in known]


def _cut(policy: Any, kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """Prompts that are longer than a text encoder reads, and how many of each kind."""
    if not isinstance(policy, ReadsPrompts):
        return []
    readings: dict[str, Any] = {}
    for kind, texts in kinds.items():
        try:
            for reading in policy.readings(list(texts)):
                readings.setdefault(reading.encoder, {})[kind] = reading
        except InputError as error:
            raise InputError(f"{kind} prompts: {error}") from None
    remarks = []
    for encoder, by_kind in readings.items():
        counts, longest = [], (0, "")
        for kind, reading in by_kind.items():
            long = [
                (number, text)
                for number, text in zip(reading.tokens, kinds[kind], strict=True)
                if number > reading.limit
            ]
            if long:
                counts.append(f"{len(long)} of {len(kinds[kind])} {kind} prompts")
                longest = max(longest, max(long, key=lambda pair: pair[0]))
        if counts:
            limit = max(reading.limit for reading in by_kind.values())
            remarks.append(
                f"{' and '.join(counts)} have more than the {limit} tokens that {encoder} reads; "
                f"what follows is cut (the longest has {longest[0]}: {_shown(longest[1])})"
            )
    return remarks


def _repeated(trained: Sequence[str]) -> list[str]:
    different = len({same(text) for text in trained})
    if different == len(trained):
        return []
    return [
        f"of {len(trained)} training prompts {different} are different; one that stands there "
        "several times is trained on as often"
    ]


def _trained_on(trained: Sequence[str], held_out: Mapping[Split, Sequence[str]]) -> list[str]:
    shared = {split: overlap(texts, trained) for split, texts in held_out.items()}
    counts = [
        f"{len(both)} of {len(held_out[split])} for the {split}"
        for split, both in shared.items()
        if both
    ]
    if not counts:
        return []
    example = next(both[0] for both in shared.values() if both)
    return [
        f"held-out prompts are trained on: {', '.join(counts)} (as {_shown(example)}); what is "
        "measured on them says nothing of new prompts"
    ]


def _in_both(held_out: Mapping[Split, Sequence[str]]) -> list[str]:
    test = held_out.get("test", ())
    both = overlap(test, held_out.get("validation", ()))
    if not both:
        return []
    return [
        f"{len(both)} of {len(test)} prompts for the test are among those for the validation, by "
        f"which the best checkpoint is chosen (as {_shown(both[0])}); name each held-out prompt "
        "once"
    ]


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")
