"""Short hashes of recipes: of all settings, and of what a resumed run may not change."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from entroflow.places import without_folders
from entroflow.recipe.build import holds_several
from entroflow.recipe.imports import imported
from entroflow.recipe.kinds import LANGUAGE_MODELS, SECTIONS_OF_ONE, Kind
from entroflow.recipe.registry import COMPONENTS, LATER_SECTIONS, PLAIN, SECTIONS, SHIPPED
from entroflow.settings import ENDS

log = logging.getLogger(__name__)


def short_hash(content: Any, shipped: Path) -> str:
    """Of plain data. Of a path its last name counts: where files lie is no setting.

    Args:
        shipped: folder of files of the package, which keep their path within it.
    """
    text = json.dumps(without_folders(content, shipped), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def hash_of(resolved: Mapping[str, Any]) -> str:
    """Of all settings of a recipe for an image generator; see `Recipe.hash`."""
    content = {section: _changed(section, resolved[section]) for section in SECTIONS}
    for later in LATER_SECTIONS:
        if all(value == {} for value in content[later].values()):
            del content[later]
    run = resolved["run"]
    ends = {key: run[key] for key in ENDS if run.get(key) is not None}
    content["run"] = {"iterations": run["iterations"], **ends}
    return short_hash(content, SHIPPED)


def identity_of(resolved: Mapping[str, Any]) -> str:
    """Of all in a recipe that a resumed run may not change."""
    fixed = [section for section in SECTIONS if section not in ("run", "monitors")]
    return _identity(resolved, fixed, SHIPPED)


def language_model_identity(resolved: Mapping[str, Any]) -> str:
    """The same of a recipe for a language model."""
    fixed = [*SECTIONS_OF_ONE[Kind.LANGUAGE_MODEL], "evaluation"]
    return _identity(resolved, fixed, LANGUAGE_MODELS)


def _identity(resolved: Mapping[str, Any], sections: Sequence[str], shipped: Path) -> str:
    kept = {section: resolved.get(section) for section in sections}
    return short_hash([kept, (resolved.get("run") or {}).get("seed")], shipped)


def warn_of_another_recipe(
    state: Mapping[str, Any], resolved: Mapping[str, Any], checkpoint: Path
) -> None:
    """Warn where a recipe is not the one that a checkpoint was made by.

    Args:
        state: of the checkpoint; those of older versions don't say.
    """
    now = identity_of(resolved)
    if state.get("recipe", now) != now:
        log.warning("the recipe was changed since %s was made by it.", checkpoint)


def _changed(section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The type of a resolved section, and the keys whose value is not the default."""
    component: Any = PLAIN.get(section)
    if component is None and (path := COMPONENTS[section].get(fields.get("type", ""))):
        component = imported(path, section)
    # Of a component of the user's, which a report does not import, every key counts.
    if component is None:
        return dict(fields)
    nested = component.parts
    defaults = component.model_construct().model_dump(mode="json", exclude={*nested})
    chosen = {
        key: value
        for key, value in fields.items()
        if key not in nested and (key == "type" or key not in defaults or defaults[key] != value)
    }
    for key, kind in nested.items():
        if holds_several(component, key):
            named = fields.get(key) or {}
            chosen[key] = {name: _changed(kind, part) for name, part in named.items()}
        else:
            chosen[key] = _changed(kind, fields[key])
    return chosen
