"""Which checkpoint of a run is the best.

`best.json` names it. Where that is missing, names what is not there, or is of another run, the
metrics tell.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entroflow.contents import RunError, read_object, read_text
from entroflow.errors import InputError
from entroflow.recipe.kinds import RECIPE
from entroflow.recipe.text import parse_yaml
from entroflow.runs.files import METRICS, Best
from entroflow.writing import to_json, write_text

if TYPE_CHECKING:
    from entroflow.runs.folder import RunFolder

log = logging.getLogger(__name__)

BEST = "best.json"


def mark(run: RunFolder, best: Mapping[str, Any]) -> None:
    """Write `best.json`: `iteration` and `score` of the best checkpoint, and `by` which it is."""
    write_text(run.checkpoints / BEST, to_json(best) + "\n")


def best_checkpoint(run: RunFolder) -> Path | None:
    """The best checkpoint by evaluation; None if no evaluation has told.

    Where `best.json` can't be gone by, the metrics tell; that is warned of, also where they can't.
    """
    try:
        marked = _best(run, _fault(run, compare=True))
    except InputError as error:
        log.warning("%s", str(error))
        return None
    return None if marked is None else run.checkpoint(marked["iteration"])


def marked_checkpoint(run: RunFolder) -> Path | None:
    """The same, without a comparison of `best.json` with the metrics, which are long.

    Raises:
        InputError: `best.json` can't be gone by, and the metrics can't tell.
    """
    marked = _best(run, _fault(run))
    return None if marked is None else run.checkpoint(marked["iteration"])


def best_score(run: RunFolder, by: str) -> float:
    """The score of the best checkpoint; -inf if there is none, or it is the best by another.

    Raises:
        InputError: see `marked_checkpoint`.
    """
    marked = _best(run, _fault(run))
    return marked["score"] if marked and marked["by"] == by else -math.inf


def choose_by(run: RunFolder, by: str) -> None:
    """Name the best checkpoint by an evaluation, where it was chosen by another.

    Raises:
        InputError: see `marked_checkpoint`.
    """
    marked = _best(run, _fault(run))
    if marked is None or marked["by"] == by:
        return
    if best := best_of(run.metrics(), by, _iterations(run)):
        log.warning(
            "the best checkpoint is chosen by eval/%s from now on: %08d, and no longer %08d by "
            "eval/%s.", by, best["iteration"], marked["iteration"], marked["by"],
        )  # fmt: skip
        mark(run, best)


def mend(run: RunFolder) -> None:
    """Write `best.json` anew where it can't be gone by.

    Raises:
        InputError: the metrics can't tell, either.
    """
    fault = _fault(run, compare=True)
    if fault is not None and (marked := _best(run, fault)):
        mark(run, marked)


def best_of(
    lines: Sequence[Mapping[str, Any]], by: str, checkpoints: Sequence[int]
) -> dict[str, Any] | None:
    """`iteration`, `score` and `by` of the best checkpoint by the metrics, the first of equals.

    Args:
        by: which of `eval/...`; a line that was selected by another one says so itself.
        checkpoints: iterations of those that are there.
    """
    scores = {
        line["iteration"]: score
        for line in lines
        if line["iteration"] in checkpoints and (score := _selection_score(line, by)) is not None
    }
    if not scores:
        return None
    best = max(scores, key=lambda iteration: scores[iteration])
    return {"iteration": best, "score": scores[best], "by": by}


def _selection_score(line: Mapping[str, Any], by: str) -> float | None:
    """What a checkpoint was compared with others by."""
    # A reward that only compares images may leave that to the score.
    key = "score" if by == "reward" and line.get("selected_by") == "score" else by
    score = line.get(f"eval/{key}")
    return None if score is None else float(score)


def _iterations(run: RunFolder) -> list[int]:
    return [int(checkpoint.name) for checkpoint in run.all_checkpoints()]


def _best(run: RunFolder, fault: str | None) -> dict[str, Any] | None:
    """`iteration`, `score` and `by` of the best checkpoint.

    Args:
        fault: see `_fault`.
    """
    path = run.checkpoints / BEST
    if fault is None:
        marked = read_object(path, Best)
        return {key: marked.get(key, "reward") for key in Best.model_fields}
    lines, there = run.metrics(), _iterations(run)
    monitors = parse_yaml(read_text(run.path / RECIPE), RECIPE).get("monitors")
    by = monitors.get("best") if isinstance(monitors, Mapping) else None
    best = best_of(lines, by or "reward", there)
    if best is not None:
        log.warning(
            "%s So checkpoint %08d is the best, by eval/%s in %s.",
            fault or f"{path} is missing.", best["iteration"], best["by"], METRICS,
        )  # fmt: skip
    elif there and (fault or not lines):
        gap = run.gap(lines)
        raise RunError(
            f"{fault or f'{path} is missing.'} Which checkpoint is the best can't be told by "
            f"{METRICS}{f', which {gap}' if gap else ''}."
        )
    return best


def _fault(run: RunFolder, compare: bool = False) -> str | None:
    """Why `best.json` can't be gone by; nothing to say where it is missing, None if it can.

    Args:
        compare: also with the metrics, which are long.
    """
    path = run.checkpoints / BEST
    if not path.exists():
        return ""
    try:
        marked = read_object(path, Best, remedy=".")
    except RunError as error:
        return str(error)
    iteration = marked["iteration"]
    if not run.checkpoint(iteration).is_dir():
        return f"{path} names checkpoint {iteration}, which is not there."
    if compare and _is_of_another_run(run, marked):
        return f"{path} is of another run: {METRICS} has no such score at {iteration}."
    return None


def _is_of_another_run(run: RunFolder, marked: Mapping[str, Any]) -> bool:
    """Whether the metrics contradict `best.json`; they don't where they can't be read."""
    try:
        lines = run.metrics()
    except RunError:
        return False
    by = marked.get("by", "reward")
    of = [line for line in lines if line["iteration"] == marked["iteration"]]
    return any(_selection_score(line, by) != marked["score"] for line in of)
