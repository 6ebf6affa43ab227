"""What a language model is asked while it trains and when it is judged, and what is right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from datasets import Dataset
from pyarrow import ArrowException
from torch import Tensor

from entroflow.data_sets import load_data_set, read_data_set
from entroflow.errors import InputError
from entroflow.evaluation.base import mean_over_prompts
from entroflow.inputs import digest_of_records
from entroflow.llm.countdown import Puzzle, fault, puzzles
from entroflow.llm.embedded import answers
from entroflow.llm.passing import avg_at, pass_at
from entroflow.llm.recipe import Task
from entroflow.prompt_checks import remarks_on_texts
from entroflow.shapes.grammar import Split
from entroflow.users_code import imported
from entroflow.wrong_keys import hint

Rows = list[dict[str, Any]]
Reward = Callable[..., Sequence[float | None]]
PUZZLES, HELD_OUT = 4000, 400
"""Of countdown, to train on and of each split that is held out."""


@dataclass(frozen=True)
class Problems:
    """Of a task.

    Attributes:
        train: with a column `prompt`, and what the reward takes besides.
        validation, test: rows of the same columns, held out.
        reward: (completions, **columns) -> one number per completion, None where it has none.
    """

    train: Dataset
    validation: Rows
    test: Rows
    reward: Reward

    def digest(self) -> str:
        """Of all rows, in their order."""
        return digest_of_records([*self.train.to_list(), *self.validation, *self.test])

    def remarks(self) -> list[str]:
        """What is odd about them, each in a line; see `prompt_checks`."""
        held_out: dict[Split, list[str]] = {
            "validation": [_words(row["prompt"]) for row in self.validation],
            "test": [_words(row["prompt"]) for row in self.test],
        }
        return remarks_on_texts([_words(prompt) for prompt in self.train["prompt"]], held_out)


def problems_of(task: Task, tokenizer: Any) -> Problems:
    """Those of a recipe.

    Args:
        tokenizer: one with a chat template gets the prompts of a dataset as a user's message.

    Raises:
        InputError: the data lack a column, or are too few.
    """
    return _countdown(task) if task.type == "countdown" else _of_dataset(task, tokenizer)


def _words(prompt: Any) -> str:
    """What is asked: a text, or the messages of a chat as one."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def solved(completions: Sequence[str], prompts: Sequence[str], **_: Any) -> list[float]:
    """The reward of countdown: 1 for a right answer."""
    pairs = zip(prompts, completions, strict=True)
    return [float(fault(Puzzle.of(prompt), answer) is None) for prompt, answer in pairs]


def _countdown(task: Task) -> Problems:
    data = Dataset.from_dict({"prompt": _asked("train", task.problems or PUZZLES)})
    validation, test = (
        [{"prompt": text} for text in _asked(split, HELD_OUT)] for split in ("validation", "test")
    )
    return Problems(data, validation, test, solved)


def _asked(split: Any, count: int) -> list[str]:
    return [puzzle.text for puzzle in puzzles(split, count)]


def _of_dataset(task: Task, tokenizer: Any) -> Problems:
    assert task.path is not None
    data = _loaded(task, task.path)
    for column in (task.prompt, task.answer):
        if column not in data.column_names:
            raise InputError(
                f"task: {task.path} has no column {column!r}{hint(column, data.column_names)}"
            )
    _check_prompts(data[task.prompt], task, tokenizer)
    # Drawn, not the last ones: a file may be sorted. The same ones whatever the run's seed is.
    data = data.shuffle(seed=0)
    if len(data) < 2 * task.held_out + 2:
        raise InputError(
            f"task: {task.path} has {len(data)} problems, too few to hold out {task.held_out} for "
            "validation and as many for the test; lower task.held_out."
        )

    def row(given: Mapping[str, Any]) -> dict[str, Any]:
        asked = given[task.prompt]
        if isinstance(asked, str) and getattr(tokenizer, "chat_template", None):
            asked = [{"role": "user", "content": asked}]
        return {"prompt": asked, "solution": given[task.answer]}

    data = data.map(row, remove_columns=data.column_names)
    first, second = task.held_out, 2 * task.held_out
    last = len(data) if task.problems is None else min(len(data), second + task.problems)
    return Problems(
        data.select(range(second, last)),
        data.select(range(first)).to_list(),
        data.select(range(first, second)).to_list(),
        guarded(imported(task.reward, "task.reward"), task.reward),
    )


def _loaded(task: Task, path: str) -> Dataset:
    """The rows of a file, or of what `datasets` finds."""
    try:
        if not os.path.isfile(path):
            return load_data_set(path, task.name, task.split)
        rows = [
            {task.prompt: record.content} if isinstance(record.content, str) else record.content
            for record in read_data_set(path, task.name, task.split, task.prompt)
        ]
        return Dataset.from_list(rows)
    except (ArrowException, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"task: {path} holds rows of different kinds: {reason}") from None
    except InputError as error:
        raise InputError(f"task: {path} can't be loaded: {error}") from None


def _check_prompts(prompts: Sequence[Any], task: Task, tokenizer: Any) -> None:
    for number, asked in enumerate(prompts):
        if not isinstance(asked, str | list) or not asked or str(asked).isspace():
            raise InputError(
                f"task: {task.path}, column {task.prompt!r}: row {number} is {asked!r}, but must "
                "be a text or a list of messages."
            )
        if isinstance(asked, list) and not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"task: {task.path}, column {task.prompt!r} holds messages, but the model's "
                "tokenizer has no chat template; give texts."
            )


def guarded(reward: Reward, name: str) -> Reward:
    """A reward of the user's, whose failure is said in one line.

    Raises:
        InputError: when it is called and raises, or returns another number of values.
    """

    @wraps(reward)
    def safe(completions: Sequence[Any], **columns: Any) -> Sequence[float | None]:
        try:
            found = reward(completions=completions, **columns)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"task.reward: {name} failed: {type(error).__name__}: {reason}"
            ) from error
        if not isinstance(found, Sequence):
            raise InputError(f"task.reward: {name} gave no list of numbers, but {found!r}.")
        if len(found) != len(completions):
            raise InputError(
                f"task.reward: {name} gave {len(found)} values for {len(completions)} completions."
            )
        return found

    return safe


@dataclass(frozen=True)
class Judged:
    """Answers to problems.

    Attributes:
        said: [P][n] the answers.
        right: [P, n] bool.
    """

    said: list[list[str]]
    right: Tensor

    def numbers(self) -> dict[str, tuple[float, float, float]]:
        """Avg@n, and Pass@k for k = 1, 2, 4, ... and n: mean and 95% interval over problems."""
        n = self.right.shape[1]
        ks = sorted({n, *(2**i for i in range(n.bit_length()))})
        found = {f"avg@{n}": _share(avg_at(self.right))}
        return found | {f"pass@{k}": _share(pass_at(self.right, k)) for k in ks}


def _share(by_problem: Tensor) -> tuple[float, float, float]:
    """Mean and 95% interval, which ends where shares do."""
    mean, low, high = mean_over_prompts(by_problem)
    return mean, max(low, 0.0), min(high, 1.0)


def judge(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Rows,
    reward: Reward,
    *,
    each: int,
    most_words: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> Judged:
    """Sample `each` answers to every problem; right is what earns more than a half.

    Args:
        rows, reward: see `Problems`.
        most_words, temperature, seed, batch_size: see `embedded.answers`.
    """
    chat = isinstance(rows[0]["prompt"], list)
    asked = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        if chat else row["prompt"]
        for row in rows
    ]  # fmt: skip
    said = answers(
        model, tokenizer, asked, each=each, most_words=most_words, temperature=temperature,
        seed=seed, batch_size=batch_size, special_tokens=not chat,
    )  # fmt: skip
    flat = [answer for mine in said for answer in mine]
    completions = [[{"role": "assistant", "content": text}] for text in flat] if chat else flat
    columns = {key: [row[key] for row in rows for _ in range(each)] for key in rows[0]}
    prompts = columns.pop("prompt")
    earned = reward(completions=completions, prompts=prompts, **columns)
    right = torch.tensor([value is not None and value > 0.5 for value in earned])
    return Judged(said, right.view(len(rows), each))
