"""entroflow: post-train flow-matching image generators with reinforcement learning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entroflow.version import __version__

if TYPE_CHECKING:
    from entroflow.recipe.load import build_recipe, load_recipe, shipped_recipes
    from entroflow.runs.evaluate import evaluate
    from entroflow.runs.export import export
    from entroflow.training.launch import resume, train

__all__ = [
    "__version__", "build_recipe", "evaluate", "export", "load_recipe", "resume",
    "shipped_recipes", "train",
]  # fmt: skip

_HOMES = {
    "train": "entroflow.training.launch",
    "resume": "entroflow.training.launch",
    "evaluate": "entroflow.runs.evaluate",
    "export": "entroflow.runs.export",
    "build_recipe": "entroflow.recipe.load",
    "load_recipe": "entroflow.recipe.load",
    "shipped_recipes": "entroflow.recipe.load",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `entroflow --help` must not wait for it.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'entroflow' has no attribute {name!r}")
