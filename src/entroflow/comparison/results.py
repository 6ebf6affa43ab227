"""What `results.json` of a comparison of recipes holds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from entroflow.contents import Contents, Count, Number, require
from entroflow.runs.files import Measured


class Asked(Contents):
    """An arm of a comparison of recipes."""

    recipe: str
    overrides: list[str]


class Evaluation(Contents):
    """A point of a result's curve."""

    score: Annotated[Number, Field(alias="eval/score")]


class Value(Contents):
    """A number that is known."""

    value: float


class ResultModel(Contents):
    """What the table shows of a model."""

    scores: dict[str, Value]
    monitors: dict[str, Number]


class ResultTest(Contents):
    """What the table shows of a comparison with the base. Older versions have no `measure`."""

    measure: Measured | None = None
    models: dict[str, ResultModel]
    gain: Value

    @model_validator(mode="after")
    def _both(self) -> ResultTest:
        for name in ("base", "tuned"):
            whole = name in self.models and "overall" in self.models[name].scores
            require(whole, f"models have no {name}")
        return self


class Result(Contents):
    """A result in `results.json`."""

    recipe_hash: str
    seed: Count
    base: str
    version: str
    iterations: Count
    training_seconds: float
    arm: Asked
    curve: Annotated[list[Evaluation], Field(min_length=1)]
    ledger: dict[str, float]
    test: ResultTest


class Results(Contents):
    """`results.json`."""

    results: list[Result]
