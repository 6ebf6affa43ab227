"""What the files of a run of a language model hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from entroflow.checkpoints import PROGRESS, TRAINER_STATE, CheckpointError, Named
from entroflow.contents import Contents, Count, Number, read_object, require
from entroflow.writing import finite

Interval = Annotated[list[Number], Field(min_length=3, max_length=3)]


Passing = dict[Annotated[str, Field(pattern=r"^(avg|pass)@[0-9]{1,9}$")], Interval]


Answer = Annotated[list[str | bool], Field(min_length=2, max_length=2)]


class Answers(Contents):
    """What both models answered to a problem, and whether it was right."""

    prompt: Any
    base: list[Answer]
    tuned: list[Answer]


class PassingComparison(Contents):
    """`evaluation.json` of a language model's run. Older versions do not say by which recipe."""

    iteration: Count
    recipe: str | None = None
    problems: Count
    each: Count
    base: Passing
    tuned: Passing
    gain: Passing
    answers: list[Answers]

    @model_validator(mode="after")
    def _the_same(self) -> PassingComparison:
        whole = self.base.keys() == self.tuned.keys() >= self.gain.keys()
        whole = whole and any(name.startswith("pass@") for name in self.base)
        require(whole, "base and tuned differ in what they have")
        return self


class BaseAnswers(Contents):
    """`base.json`: [P, each] what the model answered before it was trained."""

    said: Annotated[list[list[str]], Field(min_length=1)]
    right: list[list[bool]]

    @model_validator(mode="after")
    def _one_each(self) -> BaseAnswers:
        lengths = {*map(len, self.said)}
        whole = len(lengths) == 1 and [*map(len, self.said)] == [*map(len, self.right)]
        require(whole, "answers differ in number")
        return self


class LibraryState(Contents):
    """The random states of a process."""

    python: Annotated[list[Any], Field(min_length=3, max_length=3)]
    numpy: dict[str, Any]
    torch: list[Count]
    cuda: list[Count] | None


class Progress(Contents):
    """`progress.json` in a checkpoint of a language model."""

    model_config = ConfigDict(allow_inf_nan=True)

    rates: list[float]
    moments: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    adapted: dict[str, Any]
    recipe: str | None = None
    inputs: dict[str, Named] | None = None
    code: dict[str, Named] = {}
    random: Annotated[list[LibraryState], Field(min_length=1)]


class TRLState(Contents):
    """`trainer_state.json`, which TRL writes."""

    model_config = ConfigDict(allow_inf_nan=True)

    global_step: Count
    log_history: list[dict[str, Any]]


class LLMModelSection(Contents):
    """Where the model of a run came from."""

    path: str


class LLMClipSection(Contents):
    """How entropy was controlled."""

    type: Literal["none", "b", "v"]


class LLMRunSection(Contents):
    """How long a run is."""

    seed: Count
    updates: Count


class LLMRecipeText(Contents):
    """What a report shows of a language model's recipe."""

    model: LLMModelSection
    clip: LLMClipSection
    run: LLMRunSection
    trainer: dict[str, Any]


OTHERWISE = "; restore it from a copy, or start a new run from the model."


def read_progress(folder: Path) -> dict[str, Any]:
    """`progress.json` of a checkpoint of a language model.

    Raises:
        CheckpointError: missing or torn.
    """
    return read_object(folder / PROGRESS, Progress, remedy=OTHERWISE, error=CheckpointError)


def trl_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint of a language model.

    Raises:
        CheckpointError: missing or torn.
    """
    return read_object(folder / TRAINER_STATE, TRLState, remedy=OTHERWISE, error=CheckpointError)


def logged_at(folder: Path) -> dict[str, Any]:
    """What the line of metrics of a language model's checkpoint must hold.

    Raises:
        CheckpointError: see `trl_state`.
    """
    (*_, last) = trl_state(folder)["log_history"] or [{}]
    kept = {key: last.get(key) for key in ("loss", "reward", "learning_rate")}
    return {key: value for key, value in finite(kept).items() if value is not None}
