"""Countdown: reach a number from four others, step by step. A task whose answers can be verified.

    "3 5 7 2 -> 24 :"    asks for it
    "7 - 5 = 2 ; 2 * 2 = 4 ; ..."    answers: every step takes two numbers and leaves their result

Each number is used once, each step must be true, and the last result must be the target. Numbers
are 0 to 99 all the way, so that each is a word of its own; a difference is never negative.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from entroflow.noise import Stream, generator

COUNT = 4
"""Numbers of a puzzle."""
LARGEST_GIVEN, LARGEST = 12, 99
"""Of what is given, and of every result."""
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
ARROW, ASK, THEN, IS = "->", ":", ";", "="
NUMBERS = frozenset(map(str, range(LARGEST + 1)))
WORDS = (*map(str, range(LARGEST + 1)), *OPERATIONS, ARROW, ASK, THEN, IS)
"""All words that a puzzle or an answer has."""
STEP_WORDS = 5
LONGEST = STEP_WORDS * (COUNT - 1) + COUNT - 2
"""Words of an answer."""

Split = Literal["train", "validation", "test"]
SHARES: dict[int, Split] = {0: "validation", 1: "test"}
"""Of ten parts of all puzzles those that are held out."""


@dataclass(frozen=True)
class Puzzle:
    """Numbers in rising order, and what is to be made of them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def text(self) -> str:
        """As a model is asked."""
        return " ".join([*map(str, self.numbers), ARROW, str(self.target), ASK])

    @property
    def split(self) -> Split:
        """Where it belongs, for ever: by a hash of its text."""
        return SHARES.get(hashlib.blake2b(self.text.encode()).digest()[0] % 10, "train")

    @classmethod
    def of(cls, text: str) -> Puzzle:
        """Inverse of `text`."""
        words = text.split()
        return cls(tuple(map(int, words[: words.index(ARROW)])), int(words[-2]))


def fault(puzzle: Puzzle, answer: str) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    left = list(puzzle.numbers)
    steps = answer.split(THEN)
    result = None
    for step in steps:
        words = step.split()
        if len(words) != STEP_WORDS or words[1] not in OPERATIONS or words[3] != IS:
            return f"{step.strip()!r} is no step"
        if not {words[place] for place in (0, 2, 4)} <= NUMBERS:
            return f"{step.strip()!r} is no step"
        first, second, said = (int(words[place]) for place in (0, 2, 4))
        for number in (first, second):
            if number not in left:
                return f"there is no {number} left"
            left.remove(number)
        result = OPERATIONS[words[1]](first, second)
        if result != said:
            return f"{step.strip()!r} is not true"
        left.append(result)
    if len(left) != 1:
        return f"{len(left)} numbers are left"
    return None if result == puzzle.target else f"{result} is not {puzzle.target}"


def puzzles_with_answers(
    seed: int, stream: Stream = Stream.PROMPTS
) -> Iterator[tuple[Puzzle, str]]:
    """Puzzles without end, each with one way to solve it, which was drawn first.

    Of all that is possible at each step, two numbers and an operation are drawn until the result
    is in range.
    """
    source = generator(seed, stream)
    while True:
        given = sorted(source.integers(1, LARGEST_GIVEN + 1, COUNT).tolist())
        left, steps = list(given), []
        while len(left) > 1:
            first, second, sign, result = _step(left, source)
            steps.append(f"{first} {sign} {second} {IS} {result}")
            left.remove(first)
            left.remove(second)
            left.append(result)
        yield Puzzle(tuple(given), left[0]), f" {THEN} ".join(steps)


def _step(left: list[int], source: np.random.Generator) -> tuple[int, int, str, int]:
    while True:
        first, second = (left[place] for place in source.permutation(len(left))[:2])
        sign = str(source.choice([*OPERATIONS]))
        result = OPERATIONS[sign](first, second)
        if 0 <= result <= LARGEST:
            return first, second, sign, result


def puzzles(split: Split, count: int, seed: int = 0) -> list[Puzzle]:
    """Different puzzles of a split, always the same for a seed; all can be solved."""
    found: dict[Puzzle, None] = {}
    for puzzle, _ in puzzles_with_answers(seed):
        if puzzle.split == split:
            found.setdefault(puzzle)
        if len(found) == count:
            break
    return [*found]
