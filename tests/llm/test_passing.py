"""Avg@k and Pass@k by counting every choice of k answers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entroflow.llm.passing import avg_at, pass_at

ANSWERS = st.lists(st.booleans(), min_size=1, max_size=7)


@settings(deadline=None)
@given(ANSWERS, st.data())
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    chosen = [*combinations(answers, k)]
    expected = sum(map(any, chosen)) / len(chosen)
    assert pass_at(torch.tensor([answers]), k).item() == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(ANSWERS)
def test_one_answer_passes_as_often_as_answers_are_right(answers):
    right = torch.tensor([answers, [False] * len(answers), [True] * len(answers)])
    torch.testing.assert_close(pass_at(right, 1), avg_at(right))
    assert avg_at(right).tolist() == [sum(answers) / len(answers), 0, 1]
    assert pass_at(right, len(answers)).tolist() == [float(any(answers)), 0, 1]


@pytest.mark.parametrize("k", [0, 4, -1])
def test_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match="between 1 and the 3 answers"):
        pass_at(torch.zeros(2, 3, dtype=torch.bool), k)
