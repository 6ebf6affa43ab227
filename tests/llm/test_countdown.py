"""Puzzles, their answers, and who says what is right."""

from __future__ import annotations

import re
from itertools import islice, permutations

import pytest

from entroflow.llm.countdown import (
    COUNT,
    LARGEST,
    LONGEST,
    WORDS,
    Puzzle,
    fault,
    puzzles,
    puzzles_with_answers,
)

PUZZLE = Puzzle((2, 3, 5, 7), 24)


@pytest.mark.parametrize(("answer", "said"), [
    ("2 + 3 = 5 ; 7 + 5 = 12 ; 12 + 5 = 17", "17 is not 24"),
    ("7 - 5 = 2 ; 2 * 2 = 4 ; 4 * 3 = 12", "12 is not 24"),
    ("3 * 5 = 15 ; 15 + 7 = 22 ; 22 + 2 = 24", None),
    ("7 + 5 = 12 ; 3 - 2 = 1 ; 12 * 1 = 12", "12 is not 24"),
    ("3 * 5 = 14 ; 14 + 7 = 21 ; 21 + 2 = 23", "'3 * 5 = 14' is not true"),
    ("3 * 5 = 15 ; 15 + 9 = 24", "there is no 9 left"),
    ("3 * 3 = 9 ; 9 + 7 = 16 ; 16 + 5 = 21", "there is no 3 left"),
    ("3 * 5 = 15 ; 15 + 7 = 22", "2 numbers are left"),
    ("", "'' is no step"),
    ("3 * 5 = 15 ;", "'' is no step"),
    ("3 / 5 = 15", "'3 / 5 = 15' is no step"),
    ("3 * 5 = -> ; 15 + 7 = 22", "'3 * 5 = ->' is no step"),
    ("3 * 5 = 15 15 + 7 = 22", "no step"),
    ("24", "'24' is no step"),
])  # fmt: skip
def test_what_is_wrong_with_an_answer(answer, said):
    found = fault(PUZZLE, answer)
    assert found is None if said is None else said in found


def by_brute_force(numbers):
    """All that can be made of the numbers with every one of them, each result in 0 to 99."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for places in permutations(range(len(numbers)), 2):
        a, b = (numbers[place] for place in places)
        rest = [n for place, n in enumerate(numbers) if place not in places]
        for result in (a + b, a - b, a * b):
            if 0 <= result <= LARGEST:
                found |= by_brute_force([*rest, result])
    return found


def test_every_puzzle_can_be_solved_and_its_answer_does():
    for puzzle, answer in islice(puzzles_with_answers(seed=3), 200):
        assert len(puzzle.numbers) == COUNT
        assert list(puzzle.numbers) == sorted(puzzle.numbers)
        assert fault(puzzle, answer) is None
        assert {*puzzle.text.split(), *answer.split()} <= {*WORDS}
        assert len(answer.split()) == LONGEST
        assert re.fullmatch(r"(\d+ ){4}-> \d+ :", puzzle.text)
        assert Puzzle.of(puzzle.text) == puzzle
    for puzzle in puzzles("test", 20):
        assert puzzle.target in by_brute_force(list(puzzle.numbers))


def test_splits_share_no_puzzle_and_are_always_the_same():
    parts = {split: puzzles(split, 150) for split in ("train", "validation", "test")}
    for split, found in parts.items():
        assert len({*found}) == 150
        assert all(puzzle.split == split for puzzle in found)
        assert found == puzzles(split, 150)
    assert parts["train"] != puzzles("train", 150, seed=1)
    of_all = [puzzle.split for puzzle, _ in islice(puzzles_with_answers(seed=0), 3000)]
    assert 0.07 < of_all.count("test") / 3000 < 0.13
    assert 0.07 < of_all.count("validation") / 3000 < 0.13
