"""What is read out of a judge's answer, and what is not."""

from __future__ import annotations

import time

import pytest

from entroflow.rewards import verdicts
from entroflow.rewards.verdicts import (
    END,
    PAIR_FORMATS,
    answer,
    better,
    dimension_scores,
    final_score,
    shares,
    weighted_scores,
    winner,
)

THOUGHT = "<think>1. Image 2 is better in style: 8 vs 7 ...</think>"


@pytest.mark.parametrize(
    ("text", "points"),
    [
        (f"{THOUGHT}<answer>Image 1 is better</answer>", 1),
        (f"{THOUGHT}<answer>\n  Image 2 is better\n</answer>\nThank you.", 0),
        ("<answer>image 1 is BETTER</answer>", 1),
        ("<answer>Video 2 is better</answer>", 0),
        ("<answer>Both images are equally good</answer>", 0.5),
        ("<answer>图像1更好：Image 1 is better</answer>", 1),
        ("<answer>Image 2 is better</answer><answer>Image 2 is better</answer>", 0),
        # Missing, contradictory, twice, cut off, or off the format.
        (THOUGHT, None),
        ("Image 1 is better", None),
        ("<answer>Image 1 is better than expected, but Image 2 is better</answer>", None),
        ("<answer>Image 1 is better</answer><answer>Image 2 is better</answer>", None),
        ("<answer>Image 1 is better</answer><answer>hm</answer>", None),
        ("<think>so long that <answer>Image 1 is bet", None),
        ("<answer>图像1更好</answer>", None),
        ("<answer>1</answer>", None),
        ("<answer>Image 12 is better</answer>", None),
        ("", None),
    ],
)
def test_an_answer_in_its_tag(text, points):
    assert answer(text) == points


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("Image 1 is better.", 1),
        ("I think image 2 is better, because ...", 0),
        ("Both images are equally good", 0.5),
        ("Image 1 is better. Image 1 is better.", 1),
        ("Image 1 is better, no, Image 2 is better", None),
        ("Neither.", None),
    ],
)
def test_a_sentence(text, points):
    assert better(text) == points


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ('{"winner": "Image 1"}', 1),
        ('```json\n{"categories": [{"cat_winner": "Image 1"}], "winner": "Image 2",}\n```', 0),
        ('{"winner": "video 2 wins"}', 0),
        ('{"winner": "Tie"}', 0.5),
        ('{"winner": "equal"}', 0.5),
        ('caption {x} aside: {"note": "a } and a \\" quote {", "winner": "image 1", }', 1),
        ('{"winner": "Image 1 or Image 2"}', None),
        ('{"winner": 1}', None),
        ('{"best": "Image 1"}', None),
        ('{"winner": "Image 1"', None),
        ("[1, 2]", None),
        ("Image 1", None),
    ],
)
def test_a_winner_in_json(text, points):
    assert winner(text) == points


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ('{"alignment": [0.7, 0.3], "style": [0.4, 0.6], "coherence": [1, 0]}', 0.7),
        ('{"alignment": [0.72, 0.3]}', 0.72 / 1.02),
        ('{"alignment": [NaN, 0.3]}', None),
        ('{"alignment": [0.9, 0.3]}', None),
        ('{"alignment": [-0.2, 1.2]}', None),
        ('{"alignment": [0.5]}', None),
        ('{"alignment": ["a", "b"]}', None),
        ("{}", None),
    ],
)
def test_shares_of_1(text, points):
    assert shares(text) == pytest.approx(points)


@pytest.mark.parametrize("name", PAIR_FORMATS)
@pytest.mark.parametrize("text", ["", "{", "<answer>", "\0", "{" * 5000, "}" * 50, "🙂"])
def test_no_answer_makes_it_raise(name, text):
    assert PAIR_FORMATS[name](text) is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1. The ring is red. 2. ...\nFinal Score: 4", 0.8),
        ("Final Score: 4.5/5", 0.9),
        ("**final score :1**", 0.2),
        ("Final Score: 5\nSo, Final Score: 5.0", 1.0),
        # Beyond the scale, none, or several that contradict each other.
        ("Final Score: 6", None),
        ("Final Score: 0.5", None),
        ("Final Score: 45", None),
        ("Final Score: 4/10", None),
        ("Final Score: 4 / 50", None),
        ("Final Score: 4,5", None),
        ("Final Score: 3-4", None),
        ("Final Score: 4.5.", 0.9),
        ("**Final Score:** 4.5 / 5", 0.9),
        ("Final Score: high", None),
        ("Final Score: 3, or rather Final Score: 4", None),
        ("Score: 4", None),
        ("", None),
    ],
)
def test_a_final_score(text, score):
    assert final_score(text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.5", 1.47),
        ("style score: 2.5, alignment score: 4", 1.47),
        ("Alignment Score (1-5): 4", None),
        ("Alignment Score (1-5): 4\nStyle Score (1-5): 7", None),
        ("Alignment Score (1-5): 4\nLifestyle Score (1-5): 3", None),
    ],
)
def test_scores_of_dimensions_are_summed_with_their_weights(text, score):
    """1.4 * 4 / 5 + 0.7 * 2.5 / 5; a dimension that is missing is never 0."""
    found = weighted_scores(text, {"Alignment": 1.4, "Style": 0.7})
    assert found == (None if score is None else pytest.approx(score))


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        (answer, "<answer>Image 1 is better</answer><answer>Image 2 is better</answer>"),
        (answer, "<answer>Image 1 is better, or: both images are equally good</answer>"),
        (better, "Image 1 is better, no, Image 2 is better"),
        (winner, '{"winner": "Image 1"} No: {"winner": "Image 2"}'),
        (winner, '[{"winner": "Image 2"}, {"winner": "tie"}]'),
        (shares, '{"style": [0.7, 0.3]} {"style": [0.3, 0.7]}'),
        (final_score, "Final Score: 3. On second thought, Final Score: 4"),
        (dimension_scores({"Style": 1.0}), "Style score: 3\nStyle score: 4"),
    ],
)
def test_verdicts_that_contradict_each_other_are_not_merely_missing(reading, text):
    assert reading(text) is None
    assert reading.contradicts(text)
    assert not reading.contradicts("Well.")


@pytest.mark.parametrize(
    ("reading", "text"),
    [
        (answer, "<answer>Image 1 is better</answer><answer>hm</answer>"),
        (final_score, "Final Score: 3. Final Score: 9"),
        (winner, '{"winner": "Image 1"} {"winner": 2}'),
        # An object inside of one that is broken is not taken for the whole.
        (winner, '{"all": {"winner": "Image 1"}, "winner": Image 2}'),
        (shares, '{"style": [true, false]}'),
        (shares, '{"style": [1%s, 0]}' % ("0" * 400)),
        (shares, '{"style": [1%s, 0]}' % ("0" * 5000)),
    ],
)
def test_one_that_can_not_be_read_beside_one_that_can_is_neither(reading, text):
    assert reading(text) is None
    assert not reading.contradicts(text)


HOSTILE = [
    "<answer>", "</answer>", "<answer>Image 1 is better", "image 1 is ", "both images ", "Image ",
    "Final Score: 4 ", "Final Score:\n", "final score *_ ", "Final Score: 4 / ", "4.4", "1", " ",
    ",", ", ", "Style score ", "Style score: 4 ", "Style", "{", '{"', '{"a":', '{"a":1,', "[", "}",
    '{"winner": "x"}', '{"a', "<think>", "tie ",
]  # fmt: skip


@pytest.mark.parametrize(
    "begin", ["", "Final Score: ", "Style score", '{"winner": "', "Image 1 is"]
)
@pytest.mark.parametrize(("end", "length"), [(END, 1_000_000), (10**7, 100_000)])
def test_time_is_linear_whatever_comes(monkeypatch, begin, end, length):
    """It would take minutes if a pattern went back over what it has seen; also in a long end."""
    monkeypatch.setattr(verdicts, "END", end)
    readings = [*PAIR_FORMATS.values(), final_score, dimension_scores({"Style": 1.0, "": 0.5})]
    start = time.monotonic()
    for piece in HOSTILE:
        text = begin + piece * (length // len(piece)) + " - x"
        for reading in readings:
            reading(text)
            reading.contradicts(text)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("length", [0, 9_000, 200_000])
def test_a_verdict_is_at_the_end(length):
    """However long an answer is; far from its end there is none."""
    words = "well " * (length // 5)
    assert final_score(f"{words}Final Score: 4") == 0.8
    assert answer(f"{words}<answer>Image 2 is better</answer>") == 0
    assert winner(words + '{"winner": "Image 1"}') == 1
    after = final_score(f"Final Score: 4{words}")
    assert after == (0.8 if length < END else None)
