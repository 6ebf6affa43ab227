"""What `results.json` of a comparison of recipes holds, and the result of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from entroflow.comparison.jobs import Job
from entroflow.contents import Contents, Count, Number, read_object, require
from entroflow.errors import InputError
from entroflow.runs.files import METRICS, Measured, RunsComparison
from entroflow.runs.folder import EVALUATION, RunFolder

RESULTS = "results.json"
OTHERWISE = "; restore it from a copy, or remove it: the runs beside it tell it anew."
CURVE = ("iteration", "seconds", "ledger/weighted_evaluations", "hacking")
"""What the curve of a result has besides the evaluations."""


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


def stored_results(out: Path) -> list[dict[str, Any]]:
    """What `results.json` holds; nothing where there is none yet.

    Raises:
        InputError: it is torn.
    """
    path = out / RESULTS
    if not path.exists():
        return []
    results: list[dict[str, Any]] = read_object(path, Results, remedy=OTHERWISE)["results"]
    if not all("measure" in result["test"] for result in results):
        raise InputError(f"{path} is of an older version; give another --out.")
    return results


def result_of(folder: Path, job: Job) -> dict[str, Any]:
    """What a finished run left behind, without pictures; ready for JSON.

    Raises:
        InputError: no image of the comparison could be judged.
    """
    run = RunFolder.open(folder)
    metrics = run.metrics()
    if (gap := run.gap(metrics)) or not metrics:
        raise InputError(f"{folder / METRICS} {gap or 'is missing'}; restore it from a copy.")
    last = metrics[-1]
    test = read_object(folder / EVALUATION, RunsComparison)
    if test["gain"]["value"] is None:
        raise InputError(f"{folder}: no image of the comparison with the base has a score.")
    return {
        **job.key,
        **job.named,
        "version": metrics[0].get("version", "unknown"),
        "iterations": last["iteration"],
        "training_seconds": last["seconds"],
        "ledger": {key: value for key, value in last.items() if key.startswith("ledger/")},
        "curve": curve_of(metrics),
        **attention_of(metrics),
        "test": test,
    }


def curve_of(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of a run, and what it had taken until each."""
    return [
        {
            key: value
            for key, value in line.items()
            if key in CURVE or key.startswith(("eval/", "drift/"))
        }
        for line in metrics
        if "eval/score" in line
    ]


def attention_of(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every iteration that measured attention, what chose and whether it was right to."""
    measured = [line for line in metrics if line.get("attention")]
    if not measured:
        return {}
    correlations = [line["attention/rank_correlation"] for line in measured]
    explored = [line["attention"]["explored"] for line in measured]
    return {"attention": {"rank_correlation": correlations, "explored": explored}}
