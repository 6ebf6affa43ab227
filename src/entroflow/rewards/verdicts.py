"""What a judge's answer says: text in, points out. Nothing here guesses; what is unclear is None.

Formats are those of the UnifiedReward family (Think, Flex, 2.0) and of plain sentences. Only the
answer is read, never the question, so nothing in a prompt can be taken for a verdict.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_WINNER = re.compile(r"\b(?:image|video)\s*([12])\b", re.IGNORECASE)
_BETTER = re.compile(r"\b(?:image|video)\s*([12])\s+is\s+better\b", re.IGNORECASE)
_EQUAL = re.compile(r"\bboth\s+(?:images|videos)\s+are\s+equally\s+good\b", re.IGNORECASE)
_TIE = re.compile(r"\b(?:tie|tied|draw|equal|equally good)\b", re.IGNORECASE)
_COLON = r"[\s*_]*:[\s*_]*"
_NUMBER = r"(\d+(?:\.\d+)?)(?![\d.,]*\d)(?!\s*[-–])(?!\s*/(?!\s*5(?!\d)))"
"""A number, whole: no part of a range or of another number, and out of five if out of anything."""
_FINAL = re.compile(rf"\bfinal\s+score{_COLON}{_NUMBER}", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def better(text: str) -> float | None:
    """Points of image 1 by a sentence: `Image 1 is better`, or `Both images are equally good`.

    None where there is no such sentence, or several that contradict each other.
    """
    said = {"1": 1.0, "2": 0.0}
    found = {said[number] for number in _BETTER.findall(text)}
    if _EQUAL.search(text):
        found.add(0.5)
    return found.pop() if len(found) == 1 else None


def answer(text: str) -> float | None:
    """The same inside of `<answer>...</answer>` (UnifiedReward-Think).

    None where the tag is missing, cut off, or there are two that contradict each other.
    """
    found = {better(inside) for inside in _ANSWER.findall(text)}
    return found.pop() if len(found) == 1 else None


def winner(text: str) -> float | None:
    """Points of image 1 by the key `winner` of a JSON object (UnifiedReward-Flex)."""
    found = _object(text)
    said = found.get("winner") if found is not None else None
    if not isinstance(said, str):
        return None
    numbers = set(_WINNER.findall(said))
    if len(numbers) == 1:
        return 1.0 if numbers == {"1"} else 0.0
    return 0.5 if not numbers and _TIE.search(said) else None


def shares(text: str) -> float | None:
    """Points of image 1 by pairs of numbers that sum to 1, in JSON (UnifiedReward-2.0).

    A soft preference: the mean over the dimensions. None where a pair is no number, or does not sum
    to 1 within 0.05.
    """
    found = _object(text)
    if not found:
        return None
    first: list[float] = []
    for pair in found.values():
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in pair)
            and abs(sum(pair) - 1) <= 0.05
        ):
            return None
        first.append(pair[0] / sum(pair))
    return sum(first) / len(first)


def final_score(text: str) -> float | None:
    """What follows `Final Score:`, from 1 to 5, divided by 5 (UnifiedReward).

    None where there is none, several that contradict each other, or one beyond the scale.
    """
    return _on_the_scale(_FINAL.findall(text))


def weighted_scores(text: str, weights: Mapping[str, float]) -> float | None:
    """Weighted sum of lines like `Alignment Score (1-5): 4`, each divided by 5 (UnifiedReward).

    None where one of them can't be read.
    """
    total = 0.0
    for name, weight in weights.items():
        line = rf"\b{re.escape(name)}\s+score\s*(?:\(1-5\))?{_COLON}{_NUMBER}"
        found = _on_the_scale(re.findall(line, text, re.IGNORECASE))
        if found is None:
            return None
        total += weight * found
    return total


def _on_the_scale(said: Sequence[str]) -> float | None:
    numbers = {float(number) for number in said}
    if len(numbers) != 1 or not 1 <= min(numbers) <= 5:
        return None
    return numbers.pop() / 5


PAIR_FORMATS: dict[str, Callable[[str], float | None]] = {
    "answer": answer,
    "better": better,
    "winner": winner,
    "shares": shares,
}
"""Name -> points of image 1 in [0, 1], or None."""


def _object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, forgiving what stands around it and commas at an end."""
    text = re.sub(r",(\s*[}\]])", r"\1", text)
    start = text.find("{")
    while start >= 0:
        try:
            found, _ = json.JSONDecoder().raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            start = text.find("{", start + 1)
        else:
            return found if isinstance(found, dict) else None
    return None
