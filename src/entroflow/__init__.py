"""entroflow: post-train flow-matching image generators with reinforcement learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entroflow.evaluation.of_a_run import evaluate
    from entroflow.exports import export
    from entroflow.launch import resume, train
    from entroflow.recipe import build_recipe, load_recipe, shipped_recipes

__version__ = "0.1.0"
__all__ = [
    "build_recipe", "evaluate", "export", "load_recipe", "resume", "shipped_recipes", "train",
]  # fmt: skip

_HOMES = {
    "train": "entroflow.launch",
    "resume": "entroflow.launch",
    "evaluate": "entroflow.evaluation.of_a_run",
    "export": "entroflow.exports",
    "build_recipe": "entroflow.recipe",
    "load_recipe": "entroflow.recipe",
    "shipped_recipes": "entroflow.recipe",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `entroflow --help` must not wait for it.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'entroflow' has no attribute {name!r}")
