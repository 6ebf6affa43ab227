"""What a judge's answer says: text in, points out. Nothing here guesses; what is unclear is None.

Formats are those of the UnifiedReward family (Think, Flex, 2.0) and of plain sentences. Only the
answer is read, never the question, so nothing in a prompt can be taken for a verdict. A verdict
stands at the end of an answer, and is searched for there; the time that takes is linear in what is
searched, whatever a server sends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

END = 10_000
"""Characters at the end of an answer in which a verdict is searched for."""
FAILURES = 100
"""Braces that begin no JSON, after which none is searched for any more."""

# Possessive (`*+`, `(?>...)`) wherever two parts could share the same characters: what does not
# match is given up at once, and not tried again at every length.
_WINNER = re.compile(r"\b(?:image|video)\s*+([12])\b", re.IGNORECASE)
_BETTER = re.compile(r"\b(?:image|video)\s*+([12])\s++is\s++better\b", re.IGNORECASE)
_EQUAL = re.compile(r"\bboth\s++(?:images|videos)\s++are\s++equally\s++good\b", re.IGNORECASE)
_TIE = re.compile(r"\b(?:tie|tied|draw|equal|equally good)\b", re.IGNORECASE)
_COLON = r"[\s*_]*+:[\s*_]*+"
_NUMBER = r"((?>\d+(?:\.\d+)?))(?![.,]*+\d)(?!\s*+[-–])(?!\s*+/(?!\s*+5(?!\d)))"
"""A number, whole: no part of a range or of another number, and out of five if out of anything."""
_FINAL = re.compile(rf"\bfinal\s++score{_COLON}{_NUMBER}", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """A way to read an answer.

    Attributes:
        all_of: the verdicts in an answer: none, one, or several that contradict each other; None
            among them is one that can't be read.
    """

    all_of: Callable[[str], Iterable[float | None]]

    def __call__(self, text: str) -> float | None:
        """The verdict of an answer; None unless there is exactly one."""
        verdicts = set(self.all_of(text))
        return verdicts.pop() if len(verdicts) == 1 else None

    def contradicts(self, text: str) -> bool:
        """Whether there are several verdicts that contradict each other."""
        return len(set(self.all_of(text)) - {None}) > 1


def _better(text: str) -> set[float]:
    points = {"1": 1.0, "2": 0.0}
    verdicts = {points[number] for number in _BETTER.findall(text[-END:])}
    return verdicts | ({0.5} if _EQUAL.search(text[-END:]) else set())


better = Reading(_better)
"""Points of image 1 by a sentence: `Image 1 is better`, or `Both images are equally good`."""


def _answers(text: str) -> Iterator[float | None]:
    *before, _ = text[-END:].split("</answer>")
    for part in before:
        _, opened, inside = part.partition("<answer>")
        if opened:
            yield from _better(inside) or (None,)


answer = Reading(_answers)
"""The same inside of `<answer>...</answer>` (UnifiedReward-Think).

None where the tag is missing, cut off, or there are two that contradict each other.
"""


def _winners(text: str) -> Iterator[float | None]:
    for verdict in _objects(text):
        if "winner" not in verdict:
            continue
        said = str(verdict["winner"]) if isinstance(verdict["winner"], str) else ""
        numbers = set(_WINNER.findall(said[-END:]))
        if len(numbers) == 1:
            yield 1.0 if numbers == {"1"} else 0.0
        else:
            yield 0.5 if not numbers and _TIE.search(said[-END:]) else None


winner = Reading(_winners)
"""Points of image 1 by the key `winner` of a JSON object (UnifiedReward-Flex)."""


def _shares(text: str) -> Iterator[float | None]:
    for verdict in _objects(text):
        first = [_share(pair) for pair in verdict.values()]
        known = [share for share in first if share is not None]
        yield sum(known) / len(known) if known and len(known) == len(first) else None


def _share(pair: Any) -> float | None:
    """The first of two numbers that sum to 1, divided by the sum."""
    if not (isinstance(pair, list) and len(pair) == 2):
        return None
    if not all(type(x) in (int, float) and 0 <= x <= 2 for x in pair):
        return None
    return float(pair[0] / sum(pair)) if abs(sum(pair) - 1) <= 0.05 else None


shares = Reading(_shares)
"""Points of image 1 by pairs of numbers that sum to 1, in JSON (UnifiedReward-2.0).

A soft preference: the mean over the dimensions. None where a pair is no number, or does not sum to
1 within 0.05.
"""


def _final_scores(text: str) -> set[float | None]:
    return {_on_the_scale(number) for number in _FINAL.findall(text[-END:])}


final_score = Reading(_final_scores)
"""What follows `Final Score:`, from 1 to 5, divided by 5 (UnifiedReward).

None where there is none, several that contradict each other, or one beyond the scale.
"""


def dimension_scores(weights: Mapping[str, float]) -> Reading:
    """Weighted sums of lines like `Alignment Score (1-5): 4`, each divided by 5 (UnifiedReward).

    None where one of them can't be read.
    """
    lines = {
        name: re.compile(
            rf"\b{re.escape(name)}\s++score\s*+(?:\(1-5\))?{_COLON}{_NUMBER}", re.IGNORECASE
        )
        for name in weights
    }

    def sums(text: str) -> set[float | None]:
        totals: set[float | None] = {0.0}
        for name, line in lines.items():
            scores = {_on_the_scale(number) for number in line.findall(text[-END:])} or {None}
            # Two are enough to contradict each other.
            totals = set(
                [
                    None if total is None or score is None else total + weights[name] * score
                    for total in totals
                    for score in scores
                ][:4]
            )
        return totals

    return Reading(sums)


def weighted_scores(text: str, weights: Mapping[str, float]) -> float | None:
    """The weighted sum of `dimension_scores`, if there is one."""
    return dimension_scores(weights)(text)


def _on_the_scale(number: str) -> float | None:
    return float(number) / 5 if 1 <= float(number) <= 5 else None


PAIR_FORMATS: dict[str, Reading] = {
    "answer": answer,
    "better": better,
    "winner": winner,
    "shares": shares,
}
"""Name -> points of image 1 in [0, 1], or None."""


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, forgiving what stands around them and commas at an end."""
    text = re.sub(r",(\s*+[}\]])", r"\1", text)
    decoder, start, failures = json.JSONDecoder(), text.find("{"), 0
    while start >= 0 and failures < FAILURES:
        try:
            found, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # Up to there it was read already: to begin inside again could take a part for all.
            failures, end = failures + 1, max(error.pos, start + 1)
        except (RecursionError, ValueError):
            return
        else:
            yield found
        start = text.find("{", end)
