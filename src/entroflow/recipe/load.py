"""The recipe: the only input of a run. One YAML file, one typed component per section.

Sections whose component can be chosen have a key `type`: the name of a shipped component, or the
dotted path of a user's own class or function (`my_module.my_reward`). All other keys are the fields
of that component. Unknown keys and names are errors; nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entroflow.errors import InputError, RecipeError, quoted
from entroflow.places import Places
from entroflow.recipe.build import Source, section_of
from entroflow.recipe.identity import hash_of
from entroflow.recipe.imports import home_of
from entroflow.recipe.messages import hint
from entroflow.recipe.read import FOUND_IN, Written, dotted_paths, read
from entroflow.recipe.registry import IMAGES, Layout
from entroflow.recipe.text import TEXTS, as_yaml, name_of_recipe, texts_of
from entroflow.settings import Attention, Monitors, Optimizer, Run, Sampling, Scoring

if TYPE_CHECKING:
    # Imported late where they run: a recipe can be listed and refused without loading torch.
    from entroflow.allocation.base import Allocation
    from entroflow.credit.base import Credit
    from entroflow.evaluation.base import Evaluation
    from entroflow.exploration.base import Exploration
    from entroflow.objectives.base import Objective
    from entroflow.policies.base import PolicyConfig
    from entroflow.prompts import PromptSource
    from entroflow.rewards.combined import Rewards
    from entroflow.sampling.kernels import Kernel


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: one component per section, and the plain mapping they were built from."""

    name: str
    title: str
    paper: str
    notes: str
    policy: PolicyConfig
    prompts: PromptSource
    allocation: Allocation
    sampling: Sampling
    attention: Attention
    exploration: Exploration
    kernel: Kernel
    reward: Rewards
    scoring: Scoring
    credit: Credit
    objective: Objective
    optimizer: Optimizer
    evaluation: Evaluation
    monitors: Monitors
    run: Run
    resolved: Mapping[str, Any]
    found_in: Path | None = None

    @property
    def hash(self) -> str:
        """A short hash of all settings but the seed and how often to evaluate and save.

        Keys that have their default are left out: a new key changes no recipe that does without.
        Of a path its last name counts: where files lie is no setting, and what they hold is
        digested elsewhere (`entroflow.runs.inputs`).
        """
        return hash_of(self.resolved)

    def to_yaml(self) -> str:
        """The recipe with every key written out; `load_recipe` reads it back."""
        return recipe_yaml(self.name, self.found_in, self.resolved)


def recipe_yaml(name: str, home: Path | None, resolved: Mapping[str, Any]) -> str:
    """A recipe of either kind as a text that reads back as it is.

    Args:
        home: the folder of the user's own code, if it names any.
        resolved: its texts and sections.
    """
    return as_yaml({"name": name, **({FOUND_IN: str(home)} if home else {}), **resolved})


def shipped_recipes(policy: str | None = None) -> dict[str, Path]:
    """Name -> file of the recipes in the package.

    Args:
        policy: only those for policies of this type, as `shapes`.
    """
    shipped = IMAGES.recipes
    if policy is None:
        return shipped
    return {name: path for name, path in shipped.items() if chosen_type(name, "policy") == policy}


def load_recipe(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    *,
    trust: bool = False,
) -> Recipe:
    """Read a recipe: a shipped name or a file, then `section.key=value` overrides in order.

    Args:
        name_or_path: of the recipe.
        overrides: changes to it; their paths are looked for in the current folder first.
        given: see `build_recipe`.
        trust: import what it names also from a folder that is not below the current one, and let
            a recipe of such a folder send API keys.

    Raises:
        RecipeError: unknown recipe, section, key or type; a value of the wrong type or out of
            range; an override of a section that is given; a file that is missing or no YAML.
        UntrustedError: a part is code beside the recipe, elsewhere than below the current folder;
            or such a recipe has an API key sent to another machine.
    """
    for override in overrides:
        section = override.partition(".")[0]
        if given and section in given:
            raise RecipeError(f"{override}: {section} is given as an object; set its fields there.")
    return recipe_of(read(name_or_path, overrides, IMAGES), given, trust=trust)


def recipe_of(
    written: Written, given: Mapping[str, Any] | None = None, *, trust: bool = False
) -> Recipe:
    """The recipe that was read; see `load_recipe`."""
    written.search(trust)
    if not trust:
        written.refuse_sent_keys([each for each in IMAGES.sections if each not in (given or {})])
    return _with_home(written, Source(written.places), given or {})


def described(name_or_path: str | Path) -> str:
    """A recipe as YAML, with every key of the package's own parts written out.

    Parts of the user's stand as they are in the recipe: none is imported.

    Raises:
        RecipeError: see `load_recipe`.
    """
    written = read(name_or_path, (), IMAGES)
    return _with_home(written, Source(written.places, is_built=False), {}).to_yaml()


def _with_home(written: Written, source: Source, given: Mapping[str, Any]) -> Recipe:
    """The recipe, which knows the folder of the user's parts if it has any."""
    recipe = _recipe(written.mapping, written.name, source, given)
    own = any(dotted_paths(recipe.resolved))
    return replace(recipe, found_in=written.home) if own else recipe


def load_component(name_or_path: str | Path, section: str, *, trust: bool = False) -> Any:
    """One component of a recipe; the others are neither imported nor built.

    Raises:
        RecipeError: see `load_recipe`.
    """
    return component_in(read(name_or_path, (), IMAGES), section, trust=trust)


def component_in(written: Written, section: str, *, trust: bool = False) -> Any:
    """One component of a recipe that was read; see `load_component`."""
    written.search(trust)
    if not trust:
        written.refuse_sent_keys([section])
    where, source = f"{written.name}: {section}", Source(written.places)
    component, _ = section_of(written.layout, section, written.mapping.get(section), where, source)
    return _prepared(section, component, written.name)


def chosen_type(name_or_path: str | Path, section: str) -> str:
    """What a recipe chooses for a section, without importing or building it."""
    return read(name_or_path, (), IMAGES).type_in(section)


def build_recipe(
    mapping: Mapping[str, Any],
    name: str = "recipe",
    given: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Recipe:
    """Build a recipe from a plain mapping.

    Args:
        folder: where files that it names are looked for first; then in the current folder.
        given: section -> a ready object of the caller's instead of what the mapping says.

    Raises:
        RecipeError: see `load_recipe`.
    """
    return _recipe(mapping, name, Source(Places(folder)), given or {})


def _recipe(
    mapping: Mapping[str, Any], name: str, source: Source, given: Mapping[str, Any]
) -> Recipe:
    name, parts, resolved = assembled(mapping, name, IMAGES, source, given)
    if source.is_built:
        parts = {section: _prepared(section, part, name) for section, part in parts.items()}
    _refuse_doubled(name, parts["monitors"], parts["evaluation"])
    return Recipe(name=name, **parts, resolved=resolved)


def assembled(
    mapping: Mapping[str, Any],
    name: str,
    layout: Layout,
    source: Source,
    given: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What a recipe of either kind consists of.

    Args:
        name: of the recipe, if it does not name itself.
        given: see `build_recipe`.

    Returns:
        Its name; its texts and the component of every section; and those as plain data, with
        defaults written out, but without empty texts.

    Raises:
        RecipeError: see `load_recipe`.
    """
    mapping, given = dict(mapping), given or {}
    name = name_of_recipe(mapping, name)
    names = [*layout.sections, *TEXTS]
    for key in mapping:
        if key not in names:
            raise RecipeError(f"{name}: unknown section {quoted(key)}{hint(key, names)}")
    texts = texts_of(mapping, name)
    parts: dict[str, Any] = dict(texts)
    resolved: dict[str, Any] = {key: value for key, value in texts.items() if value}
    for section in layout.sections:
        if section in given:
            parts[section], resolved[section] = given[section], {"type": home_of(given[section])}
            continue
        parts[section], resolved[section] = section_of(
            layout, section, mapping.get(section), f"{name}: {section}", source.within(section)
        )
    return name, parts, resolved


def _prepared(section: str, component: Any, recipe: str) -> Any:
    """The component of a section, of which rewards of any kind have become `Rewards` or parts."""
    if section not in ("reward", "monitors"):
        return component
    from entroflow.rewards.combined import as_rewards
    from entroflow.rewards.parts import as_parts

    try:
        if section == "reward":
            return as_rewards(component)
        rewards = as_parts(component.rewards, "monitors.rewards")
    except InputError as error:
        raise RecipeError(f"{recipe}: {error}") from None
    return component.model_copy(update={"rewards": rewards})


def _refuse_doubled(recipe: str, monitors: Monitors, evaluation: Any) -> None:
    """Refuse monitors that have the name of one that the evaluation has itself."""
    for name in monitors.rewards:
        # An evaluation of the user's may not say what it measures; see `watching.watched`.
        if name in getattr(evaluation, "monitor_names", ()):
            raise RecipeError(
                f"{recipe}: monitors.rewards.{name}: the evaluation has one of this name; choose "
                "another."
            )
