"""What a language model is asked while it trains and when it is judged, and what is right."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pyarrow import ArrowException
from torch import Tensor
from transformers import TrainerState
from trl.chat_template_utils import parse_response

from entroflow.data_sets import load_data_set, read_data_set
from entroflow.errors import InputError
from entroflow.evaluation.base import mean_over_prompts
from entroflow.evaluation.prompt_checks import remarks_on_texts
from entroflow.llm.countdown import Puzzle, fault, puzzles
from entroflow.llm.embedded import Answer, Sampling, sampled
from entroflow.llm.passing import avg_at, pass_at
from entroflow.llm.recipe import Task
from entroflow.llm.reward import NOT_GIVEN, Reward, check_arguments, guarded
from entroflow.recipe.imports import users_function
from entroflow.recipe.messages import hint
from entroflow.records import TEXT, suffix_of
from entroflow.runs.inputs import digest_of_records
from entroflow.shapes.grammar import Split

Rows = list[dict[str, Any]]
log = logging.getLogger(__name__)

ANSWER = str(Task.model_fields["answer"].default)
"""The name under which a reward is given what is right."""
PUZZLES, HELD_OUT = 4000, 400
"""Of countdown, to train on and of each split that is held out."""


@dataclass(frozen=True)
class Problems:
    """Of a task.

    Attributes:
        train: with a column `prompt`, and all others of the data; what is right is `solution`.
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
    if not len(data):
        raise InputError(
            f"task.path: {task.path} holds no problems; give it rows with the columns "
            f"{task.prompt!r} and {task.answer!r}."
        )
    # What is right need not be a column: some rewards can tell without.
    has_answer = task.answer in data.column_names or task.answer != ANSWER
    for column in (task.prompt, task.answer)[: 1 + has_answer]:
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

    def row(asked: Any, *right: Any) -> dict[str, Any]:
        if isinstance(asked, str) and getattr(tokenizer, "chat_template", None):
            asked = [{"role": "user", "content": asked}]
        return {"prompt": asked, **dict(zip((ANSWER,), right, strict=False))}

    used = [task.prompt, task.answer][: 1 + has_answer]
    made = ["prompt", ANSWER][: 1 + has_answer]
    replaced = [name for name in data.column_names if name in (*made, *NOT_GIVEN)]
    if unseen := [name for name in replaced if name not in used]:
        log.warning(
            "task: the reward does not see these columns of %s, as others have their names: %s.",
            task.path, ", ".join(unseen),
        )  # fmt: skip
    data = data.map(row, input_columns=used, remove_columns=replaced)
    users = users_function(task.reward, "task.reward")
    reward = guarded(users, task.reward)
    check_arguments(users, task.reward, [n for n in data.column_names if n != "prompt"])
    first, second = task.held_out, 2 * task.held_out
    last = len(data) if task.problems is None else min(len(data), second + task.problems)
    return Problems(
        data.select(range(second, last)),
        # As they come while training: decoded, if they are pictures.
        [*data.select(range(first))],
        [*data.select(range(first, second))],
        reward,
    )


def _loaded(task: Task, path: str) -> Dataset:
    """The rows of a file, or of what `datasets` finds."""
    if os.path.isfile(path) and suffix_of(Path(path)) in TEXT:
        raise InputError(
            f"task.path: {path} is read as plain text by its name, and a text has no columns; "
            "give the file the ending .jsonl if every line is a JSON object, or write a table "
            f"(.csv, .tsv, .parquet) with the columns {task.prompt!r} and {task.answer!r}."
        )
    try:
        if not os.path.isfile(path):
            return load_data_set(path, task.name, task.split)
        rows = [
            {task.prompt: record.content} if isinstance(record.content, str) else record.content
            for record in read_data_set(path, task.name, task.split, task.prompt)
        ]
        # `from_list` knows the keys of the first row alone.
        columns = dict.fromkeys(key for row in rows for key in row)
        return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    except (ArrowException, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"task: {path} holds rows that make no table: {reason}") from None
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
    sampling: Sampling,
    state: TrainerState | None = None,
) -> Judged:
    """Sample answers to every problem; right is what earns more than a half.

    Args:
        rows, reward: see `Problems`. It is called with the same arguments as while training.
        state: of the training, for the reward; as before its first update if None.

    Raises:
        InputError: before the first update no answer has a reward: most likely none ever will.
    """
    state = state or TrainerState()
    chat = isinstance(rows[0]["prompt"], list)
    asked = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        if chat else row["prompt"]
        for row in rows
    ]  # fmt: skip
    said = sampled(model, tokenizer, asked, sampling, special_tokens=not chat)
    flat = [answer for mine in said for answer in mine]
    columns = {key: [row[key] for row in rows for _ in range(sampling.each)] for key in rows[0]}
    earned = reward(
        completions=[_message(tokenizer, one) for one in flat] if chat else [a.text for a in flat],
        prompts=columns.pop("prompt"),
        completion_ids=[answer.tokens for answer in flat],
        trainer_state=state,
        log_extra=_unlogged,
        log_metric=_unlogged,
        **columns,
    )
    missing = sum(value is None for value in earned)
    if missing == len(flat) and not state.global_step:
        raise InputError(
            f"task.reward gave no number for any of {missing} answers of the model before it is "
            "trained, so nothing could be learnt; mend the reward."
        )
    if missing:
        log.warning("%d of %d answers have no reward, and count as wrong.", missing, len(flat))
    right = torch.tensor([value is not None and value > 0.5 for value in earned])
    return Judged([[a.text for a in mine] for mine in said], right.view(len(rows), sampling.each))


def _message(tokenizer: Any, answer: Answer) -> list[dict[str, Any]]:
    """An answer as TRL hands it over: of some models it is read into its parts."""
    if any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema")):
        return [parse_response(tokenizer, answer.tokens, prefix=answer.prompt)]
    return [{"role": "assistant", "content": answer.text}]


def _unlogged(*_: Any) -> None:
    """What a reward logs is of the training alone."""
