"""The comparison with the base again, for a run that is on disk, or for the base alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from entroflow.errors import InputError, RecipeError, UntrustedError
from entroflow.evaluation.base import HeldOutEvaluation
from entroflow.evaluation.base_and_tuned import compare_with_base
from entroflow.recipe.build import changed
from entroflow.runs.inputs import held_out_of
from entroflow.runs.open import Opened, open_policy

log = logging.getLogger(__name__)


def evaluate(
    run: Path | str | None = None,
    *,
    split: str = "test",
    steps: int | None = None,
    guidance: float | None = None,
    images: int | None = None,
    seed: int | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Score by skill, with 95% intervals: base, base at its best guidance scale, and tuned.

    Args:
        run: the run folder; its best checkpoint is judged. None: the embedded base model alone.
        split: `validation` or `test`.
        steps, guidance, images, seed: None: as in the comparison at the end of the run.
        trust: import what the run names also from a folder that is not below the current one.

    Returns:
        The same summary as the `evaluation.json` of a finished run; `iteration` is that of the
        checkpoint, None for the base model.

    Raises:
        InputError: another split; no run folder, or no whole checkpoint in it; its evaluation can't
            be repeated; a setting that is out of range.
    """
    if split not in ("validation", "test"):
        raise InputError(f"split is validation or test, not {split!r}.")
    folder = None if run is None else Path(run)
    opened = open_policy(folder, trust=trust)
    evaluation = opened.part("evaluation")
    if not isinstance(evaluation, HeldOutEvaluation):
        raise InputError(
            f"the evaluation of {run or opened.recipe.name} can't be repeated on other prompts: "
            f"{type(evaluation).__name__} does not derive from HeldOutEvaluation."
        )
    for key, now in held_out_of(evaluation).items():
        if key in opened.inputs and opened.inputs[key]["digest"] != now["digest"]:
            log.warning("%s: %s holds other prompts than when the run began.", key, now["of"])
    given = {"split": split, "steps": steps, "guidance": guidance, "images": images}
    settings = {key: value for key, value in given.items() if value is not None}
    run_settings = opened.part("run")
    if seed is not None:
        changed(run_settings, {"seed": seed}, "run")
    monitors = _part(opened, "monitors")
    summary, _ = compare_with_base(
        opened.policy,
        changed(evaluation.on_test_prompts(), settings, "evaluation"),
        seed=run_settings.test_seed if seed is None else seed,
        batch_size=opened.part("sampling").batch_size,
        reward=_part(opened, "reward"),
        monitors={} if monitors is None else monitors.rewards,
        with_tuned="tuned" in opened.models,
    )
    return {"iteration": opened.iteration, **summary}


def _part(opened: Opened, section: str) -> Any:
    """A section of a recipe; none where it names an object that is gone."""
    try:
        return opened.part(section)
    except UntrustedError:
        raise
    except RecipeError as error:
        log.warning("images are judged without the %s of the run: %s", section, str(error))
        return None
