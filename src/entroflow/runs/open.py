"""The policy of a run and the parts of its recipe, as sampling, evaluation and export need them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entroflow.checkpoints import check_reference, read_run_state, read_tensors
from entroflow.policies.base import Policy
from entroflow.recipe.identity import warn_of_another_recipe
from entroflow.recipe.kinds import RECIPE, Kind
from entroflow.recipe.load import component_in
from entroflow.recipe.read import Written, read
from entroflow.recipe.registry import IMAGES
from entroflow.runs.folder import RunFolder
from entroflow.runs.inputs import Inputs


@dataclass(frozen=True)
class Opened:
    """The policy of a run.

    Attributes:
        policy: under `weights("reference")` the base, under `weights("ema")` the tuned weights.
        models: `base`, and `tuned` if there is a run.
        recipe: what it was made by.
        iteration: of the checkpoint that the tuned weights come from.
        inputs: what that was trained with; none where it is not written down.
        trust: see `load_recipe`.
    """

    policy: Policy
    models: tuple[str, ...]
    recipe: Written
    iteration: int | None = None
    inputs: Inputs = field(default_factory=dict)
    trust: bool = False

    def part(self, section: str) -> Any:
        """A part of what it was made by; see `load_component`."""
        return component_in(self.recipe, section, trust=self.trust)


def open_policy(run: Path | None, weights: str = "ema", *, trust: bool = False) -> Opened:
    """The policy of a run, or the embedded base model.

    Args:
        weights: `ema` or `live`, of the best checkpoint if one is marked, else of the latest.
        trust: see `load_recipe`.

    Raises:
        InputError: no run folder, no whole checkpoint in it, or other base weights than it had.
    """
    policy: Policy
    if run is None:
        recipe = read("quickstart", (), IMAGES)
        policy = component_in(recipe, "policy").build()
        policy.weights.keep_reference()
        return Opened(policy, ("base",), recipe)
    folder = RunFolder.open(run, Kind.IMAGES)
    checkpoint = folder.best() or folder.latest()
    recipe = read(folder.path / RECIPE, (), IMAGES)
    policy = component_in(recipe, "policy", trust=trust).build()
    policy.weights.keep_reference()
    state = read_run_state(checkpoint)
    warn_of_another_recipe(state, recipe.mapping, checkpoint)
    check_reference(state, policy.weights.digest("reference"), checkpoint)
    policy.weights.keep("ema", read_tensors(checkpoint / f"{weights}.safetensors"))
    return Opened(
        policy, ("base", "tuned"), recipe, state["iteration"], state.get("inputs") or {}, trust
    )
