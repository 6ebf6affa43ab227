"""The recipe: the only input of a run. One YAML file, one typed component per section.

Sections whose component can be chosen have a key `type`: the name of a shipped component, or the
dotted path of a user's own class or function (`my_module.my_reward`). All other keys are the fields
of that component. Unknown keys and names are errors; nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from entroflow.component import Component, placed
from entroflow.errors import InputError, RecipeError, UntrustedError, quoted
from entroflow.places import Places, with_override, without_folders
from entroflow.recipe.imports import (
    home_of,
    imported,
    is_of_python,
    is_working_tree,
    refuse_shadowed,
    refuse_untrusted,
    search_beside,
    users_errors,
)
from entroflow.recipe.kinds import Kind
from entroflow.recipe.messages import explained, hint
from entroflow.recipe.text import (
    TEXTS,
    as_yaml,
    fields_of,
    holder_of,
    name_of_recipe,
    override_of,
    parse_yaml,
    read_recipe,
    texts_of,
)
from entroflow.rewards.access import sent_keys
from entroflow.settings import ENDS, Attention, Monitors, Optimizer, Run, Sampling, Scoring

log = logging.getLogger(__name__)

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

COMPONENTS: dict[str, dict[str, str]] = {
    "policy": {
        "shapes": "entroflow.policies.shapes.policy.ShapesPolicyConfig",
        "sd3": "entroflow.policies.diffusers.sd3.SD3Config",
        "flux": "entroflow.policies.diffusers.flux.FluxConfig",
    },
    "prompts": {
        "shapes": "entroflow.shapes.prompts.ShapesPrompts",
        "text": "entroflow.prompts.TextPrompts",
        "jsonl": "entroflow.prompts.JSONLPrompts",
        "dataset": "entroflow.prompts.DatasetPrompts",
    },
    "allocation": {
        "uniform": "entroflow.allocation.uniform.Uniform",
        "attention_shift": "entroflow.allocation.attention_shift.AttentionShift",
    },
    "exploration": {
        "every_step": "entroflow.exploration.every_step.EveryStep",
        "random_fraction": "entroflow.exploration.random_fraction.RandomFraction",
        "window": "entroflow.exploration.window.Window",
        "merged_steps": "entroflow.exploration.merged_steps.MergedSteps",
        "attention_peaks": "entroflow.exploration.attention_peaks.AttentionPeaks",
    },
    "kernel": {
        "flow_sde": "entroflow.sampling.kernels.FlowSDE",
        "dance_sde": "entroflow.sampling.kernels.DanceSDE",
        "cps": "entroflow.sampling.kernels.CPS",
        "variance_matched": "entroflow.sampling.kernels.VarianceMatched",
        "ode": "entroflow.sampling.kernels.ODE",
    },
    "reward": {
        "shapes": "entroflow.rewards.shapes.ShapesReward",
        "shapes_preference": "entroflow.rewards.preferences.models.ShapesPreference",
        "clip": "entroflow.rewards.clip.CLIPScore",
        "openai": "entroflow.rewards.served_score.ServedScore",
        "jpeg_size": "entroflow.rewards.jpeg_size.JPEGSize",
        "pairwise": "entroflow.rewards.pairwise.Pairwise",
        "mixture": "entroflow.rewards.mixture.Mixture",
    },
    "judge": {
        "openai": "entroflow.rewards.served_judge.ServedJudge",
        "shapes_preference": "entroflow.rewards.preferences.models.ShapesJudge",
    },
    "credit": {
        "terminal": "entroflow.credit.terminal.Terminal",
        "turning_points": "entroflow.credit.turning_points.TurningPoints",
        "shuffled": "entroflow.credit.shuffled.Shuffled",
    },
    "objective": {
        "clipped": "entroflow.objectives.clipped.Clipped",
        "guard": "entroflow.objectives.guard.Guard",
    },
    "evaluation": {
        "shapes": "entroflow.evaluation.shapes.ShapesEvaluation",
        "reward": "entroflow.evaluation.reward.RewardEvaluation",
    },
}
"""Section (or kind of part inside of one) -> type -> where it lives; imported when it is named."""

PROTOCOLS = {
    "policy": ("entroflow.policies.base.PolicyConfig",),
    "prompts": ("entroflow.prompts.PromptSource",),
    "allocation": ("entroflow.allocation.base.Allocation",),
    "exploration": ("entroflow.exploration.base.Exploration",),
    "kernel": ("entroflow.sampling.kernels.Kernel",),
    "reward": ("entroflow.rewards.base.Reward", "entroflow.rewards.base.GroupReward"),
    "judge": ("entroflow.rewards.pairwise.Judge",),
    "credit": ("entroflow.credit.base.Credit",),
    "objective": ("entroflow.objectives.base.Objective",),
    "evaluation": ("entroflow.evaluation.base.Evaluation",),
}
"""Section -> what its components must have: one of these."""

ComponentT = TypeVar("ComponentT", bound=Component)


PLAIN: dict[str, type[Component]] = {
    "sampling": Sampling,
    "attention": Attention,
    "scoring": Scoring,
    "optimizer": Optimizer,
    "monitors": Monitors,
    "run": Run,
}
SECTIONS = (
    "policy", "prompts", "allocation", "sampling", "attention", "exploration", "kernel",
    "reward", "scoring", "credit", "objective", "optimizer", "evaluation", "monitors", "run",
)  # fmt: skip
LATER_SECTIONS = ("scoring", "monitors", "attention")
"""Sections that runs of older versions lack; their defaults are what those did."""
FOUND_IN = "found_in"
"""Key of a run's recipe: the folder of the recipe file, where components of the user's may lie."""


@dataclass(frozen=True)
class _Source:
    """Where a recipe, or a part of one, comes from.

    Attributes:
        places: where files that it names are looked for.
        is_built: whether the user's own parts are imported and built; else they stay None.
    """

    places: Places = field(default_factory=Places)
    is_built: bool = True

    def within(self, key: str) -> _Source:
        """The same for the part at a key."""
        return replace(self, places=self.places.within(key))


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
        content = {section: _set(section, self.resolved[section]) for section in SECTIONS}
        for later in LATER_SECTIONS:
            if all(value == {} for value in content[later].values()):
                del content[later]
        run = self.resolved["run"]
        ends = {key: run[key] for key in ENDS if run.get(key) is not None}
        content["run"] = {"iterations": run["iterations"], **ends}
        text = json.dumps(without_folders(content, SHIPPED), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every key written out; `load_recipe` reads it back."""
        home = {FOUND_IN: str(self.found_in)} if self.found_in else {}
        return as_yaml({"name": self.name, **home, **self.resolved})


def identity_of(resolved: Mapping[str, Any]) -> str:
    """A short hash of all in a recipe that a resumed run may not change; see `Recipe.hash`."""
    kept = {key: resolved.get(key) for key in SECTIONS if key not in ("run", "monitors")}
    fixed = without_folders(kept, SHIPPED)
    text = json.dumps([fixed, (resolved.get("run") or {}).get("seed")], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


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


def _set(section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The type of a resolved section, and the keys whose value is not the default."""
    known: Any = PLAIN.get(section)
    if known is None and (path := COMPONENTS[section].get(fields.get("type", ""))):
        known = imported(path, section)
    # Of a component of the user's, which a report does not import, every key counts.
    if known is None:
        return dict(fields)
    nested = known.parts
    defaults = known.model_construct().model_dump(mode="json", exclude={*nested})
    chosen = {
        key: value
        for key, value in fields.items()
        if key not in nested and (key == "type" or key not in defaults or defaults[key] != value)
    }
    for key, kind in nested.items():
        if _many(known, key):
            named = fields.get(key) or {}
            chosen[key] = {name: _set(kind, part) for name, part in named.items()}
        else:
            chosen[key] = _set(kind, fields[key])
    return chosen


def _many(component: type[BaseModel], key: str) -> bool:
    """Whether a field for parts holds several, by name."""
    default = component.model_fields[key].get_default(call_default_factory=True)
    return isinstance(default, Mapping)


def _dotted_paths(fields: Any) -> Iterator[str]:
    """The dotted paths by which a part and its parts are named."""
    if isinstance(fields, Mapping):
        kind = fields.get("type")
        if isinstance(kind, str) and "." in kind:
            yield kind
        for value in fields.values():
            yield from _dotted_paths(value)


SHIPPED = Path(str(resources.files("entroflow") / "recipes"))
"""Folder of the shipped recipes and their prompts."""


def shipped_recipes(policy: str | None = None) -> dict[str, Path]:
    """Name -> file of the recipes in the package.

    Args:
        policy: only those for policies of this type, as `shapes`.
    """
    found = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if policy is None:
        return found
    return {name: path for name, path in found.items() if chosen_type(name, "policy") == policy}


def recipe_titles() -> dict[str, str]:
    """Name -> title (and paper) of the shipped recipes."""
    titles = {}
    for name, path in shipped_recipes().items():
        mapping = parse_yaml(path.read_text(encoding="utf-8"), name)
        paper = mapping.get("paper")
        titles[name] = mapping.get("title", "") + (f" [{paper}]" if paper else "")
    return titles


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
    opened = _opened(name_or_path, overrides, trust)
    opened.refuse_sent_keys([section for section in SECTIONS if section not in (given or {})])
    recipe = _assembled(opened.mapping, opened.name, given or {}, _Source(opened.places))
    return _with_home(recipe, opened.places.folder)


def described(name_or_path: str | Path) -> str:
    """A recipe as YAML, with every key of the package's own parts written out.

    Parts of the user's stand as they are in the recipe: none is imported.

    Raises:
        RecipeError: see `load_recipe`.
    """
    opened = _opened(name_or_path, (), False)
    source = _Source(opened.places, is_built=False)
    recipe = _assembled(opened.mapping, opened.name, {}, source)
    return _with_home(recipe, opened.places.folder).to_yaml()


def refuse_strangers(name_or_path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Refuse a recipe for which trust is needed: for code that it names, or an API key it sends.

    Raises:
        RecipeError: see `load_recipe`.
        UntrustedError: it is needed; nothing was imported.
    """
    opened = _opened(name_or_path, overrides, False)
    for path in _dotted_paths(opened.mapping):
        refuse_untrusted(path, opened.name)
    opened.refuse_sent_keys(SECTIONS)


@dataclass(frozen=True)
class _Opened:
    """What a recipe says, with the changes to it.

    Attributes:
        mapping: without `found_in`.
        name: of the recipe, for messages.
        places: where files that it names are looked for, in the folder it lay in first.
        stranger: the folder that its file lies in, if that is neither the user's nor trusted.
    """

    mapping: dict[str, Any]
    name: str
    places: Places
    stranger: Path | None

    def refuse_sent_keys(self, sections: Sequence[str]) -> None:
        """Refuse a stranger's recipe that has an API key of the user's sent to another machine.

        Where the user has named the server or the variable, it is their own will.

        Args:
            sections: that are looked at.

        Raises:
            UntrustedError: it has.
        """
        if self.stranger is None:
            return
        for sent in sent_keys({section: self.mapping.get(section) for section in sections}):
            if not any(self._is_changed(*sent.keys, key) for key in ("url", "key_variable")):
                raise UntrustedError(
                    f"{self.name}: {'.'.join(sent.keys)}: the API key in {sent.variable} would be "
                    f"sent to {sent.host}, by a recipe in {self.stranger}, which is not below the "
                    "current folder; read it, and allow it with --trust (from Python: trust=True)."
                )

    def _is_changed(self, *keys: str) -> bool:
        return reduce(Places.within, keys, self.places).overridden is True


def _opened(name_or_path: str | Path, overrides: Sequence[str], trust: bool) -> _Opened:
    """Read a recipe, and change it."""
    name, mapping, beside = read_recipe(str(name_or_path), shipped_recipes(), Kind.IMAGES)
    overridden: Any = {}
    # A type goes before its fields, wherever it stands.
    for override in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".type")):
        overridden = with_override(overridden, _apply_override(mapping, override))
    folder = _home_folder(mapping, beside or SHIPPED, name)
    search_beside(_of_users(folder), trust)
    # Not the home folder: that is what the file says of itself.
    is_stranger = beside is not None and not trust and not is_working_tree(beside)
    return _Opened(mapping, name, Places(folder, overridden), beside if is_stranger else None)


def _with_home(recipe: Recipe, folder: Path | None) -> Recipe:
    """The recipe, which knows the folder of the user's parts if it has any."""
    own = any(_dotted_paths(recipe.resolved))
    return replace(recipe, found_in=_of_users(folder)) if own else recipe


def _home_folder(mapping: dict[str, Any], folder: Path, name: str) -> Path:
    """Where the recipe lay first: what a run wrote down, or else the file's own folder."""
    written = mapping.pop(FOUND_IN, None)
    if written is None:
        return folder
    if not isinstance(written, str):
        raise RecipeError(f"{name}: {FOUND_IN} must be a folder, not {quoted(written)}.")
    return Path(written)


def _of_users(folder: Path | None) -> Path | None:
    """The folder, if it may hold code of the user's."""
    return None if folder == SHIPPED else folder


def load_component(name_or_path: str | Path, section: str, *, trust: bool = False) -> Any:
    """One component of a recipe; the others are neither imported nor built.

    Raises:
        RecipeError: see `load_recipe`.
    """
    opened = _opened(name_or_path, (), trust)
    opened.refuse_sent_keys([section])
    where = f"{opened.name}: {section}"
    fields = fields_of(opened.mapping.get(section), where)
    component, _ = _build(section, fields, where, _Source(opened.places))
    return _prepared(section, component, opened.name)


def changed(component: ComponentT, fields: Mapping[str, Any], where: str) -> ComponentT:
    """A copy with other values, checked like those of a recipe.

    Args:
        where: what errors call the component.

    Raises:
        RecipeError: an unknown key; a value of the wrong type or out of range.
    """
    fields = {**component.model_dump(mode="json"), **fields}
    return cast(ComponentT, _validated(type(component), fields, where)[0])


def chosen_type(name_or_path: str | Path, section: str) -> str:
    """What a recipe chooses for a section, without importing or building it."""
    name, mapping, _ = read_recipe(str(name_or_path), shipped_recipes(), Kind.IMAGES)
    fields = fields_of(mapping.get(section), f"{name}: {section}")
    return str(fields.get("type", next(iter(COMPONENTS[section]))))


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
    return _assembled(mapping, name, given or {}, _Source(Places(folder)))


def _assembled(
    mapping: Mapping[str, Any], name: str, given: Mapping[str, Any], source: _Source
) -> Recipe:
    """The recipe of a mapping; see `build_recipe`."""
    mapping = dict(mapping)
    name = name_of_recipe(mapping, name)
    for key in mapping:
        if key not in SECTIONS and key not in TEXTS:
            known = [*SECTIONS, *TEXTS]
            raise RecipeError(f"{name}: unknown section {quoted(key)}{hint(key, known)}")
    texts = texts_of(mapping, name)
    parts: dict[str, Any] = dict(texts)
    resolved: dict[str, Any] = {key: value for key, value in texts.items() if value}
    for section in SECTIONS:
        if section in given:
            component, resolved[section] = given[section], {"type": home_of(given[section])}
        else:
            where = f"{name}: {section}"
            component, resolved[section] = _build(
                section, fields_of(mapping.get(section), where), where, source.within(section)
            )
        parts[section] = _prepared(section, component, name) if source.is_built else component
    _refuse_doubled(name, parts["monitors"], parts["evaluation"])
    return Recipe(name=name, **parts, resolved=resolved)


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


def _apply_override(mapping: dict[str, Any], override: str) -> list[str]:
    """Change a mapping; returns the keys of what was set."""
    keys, parsed = override_of(override, SECTIONS)
    target = holder_of(mapping, keys, override)
    default = next(iter(COMPONENTS.get(keys[0], {"": ""})))
    if keys[1:] == ["type"] and target.get("type", default) != parsed:
        # Fields of the old type mean nothing to the new one.
        target.clear()
    target[keys[-1]] = parsed
    return keys


def _build(
    section: str, fields: dict[str, Any], where: str, source: _Source
) -> tuple[Any, dict[str, Any]]:
    """A component of the kind of a section, and its fields with defaults written out.

    Args:
        where: what errors call it.
    """
    if section in PLAIN:
        return _validated(PLAIN[section], fields, where, source)
    known = COMPONENTS[section]
    kind = fields.pop("type", next(iter(known)))
    if not isinstance(kind, str):
        raise RecipeError(f"{where}.type must be a name, not {quoted(kind)}.")
    if kind in known:
        chosen = imported(known[kind], f"{where}.type")
        return _validated(chosen, {"type": kind, **fields}, where, source)
    if "." not in kind:
        raise RecipeError(f"{where}.type: unknown type {quoted(kind)}{hint(kind, list(known))}")
    if not source.is_built:
        return None, {"type": kind, **fields}
    return _users(section, kind, fields, where, source)


def _users(
    section: str, kind: str, fields: dict[str, Any], where: str, source: _Source
) -> tuple[Any, dict[str, Any]]:
    """A component of the user's, by dotted path; nothing is called that is none of this kind."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    refuse_untrusted(kind, f"{where}.type")
    if is_of_python(kind):
        refuse_shadowed(kind, source.places.folder, f"{where}.type")
        raise _unfit(section, kind, where, [*_methods(protocols[0])], "it is of Python itself")
    if kind.partition(".")[0] in sys.modules:
        # Another module of this name may lack what is looked for.
        refuse_shadowed(kind, source.places.folder, f"{where}.type")
    chosen = imported(kind, f"{where}.type")
    refuse_shadowed(kind, source.places.folder, f"{where}.type")
    if not callable(chosen) and all(_lacking(chosen, protocol) for protocol in protocols):
        raise RecipeError(f"{where}.type: {kind} is neither a class nor a function.")
    if not inspect.isclass(chosen):
        return _as_it_is(section, kind, chosen, fields, where), {"type": kind}
    component, resolved = _instance(section, kind, chosen, fields, where, source)
    _refuse_missing(section, kind, component, where)
    return component, resolved


def _refuse_missing(section: str, kind: str, component: Any, where: str) -> None:
    """Refuse an object that lacks something of every protocol of its section."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    lacking = [_missing(component, protocol) for protocol in protocols]
    if all(lacking):
        raise _unfit(section, kind, where, lacking[0])


def _unfit(
    section: str,
    kind: str,
    where: str,
    lacking: Sequence[str],
    why: str = "an object that was passed from Python can be used from Python only",
) -> RecipeError:
    return RecipeError(
        f"{where}.type: {kind} is not for {section}: it has no {', '.join(lacking)} ({why})."
    )


def _methods(protocol: Any) -> list[str]:
    """What has to be there before anything is called; other attributes an `__init__` may set."""
    return [key for key in vars(protocol) if key[0] != "_"]


def _lacking(part: Any, protocol: Any) -> list[str]:
    """The methods of a protocol that an object, or a class and its annotations, do not have."""
    bases = part.__mro__ if inspect.isclass(part) else ()
    annotated = {name for base in bases for name in inspect.get_annotations(base)}
    return [
        name for name in _methods(protocol) if not hasattr(part, name) and name not in annotated
    ]


def _missing(component: Any, protocol: Any) -> list[str]:
    return [
        key
        for key in {**vars(protocol), **protocol.__annotations__}
        if key[0] != "_" and not hasattr(component, key)
    ]


def _instance(
    section: str, kind: str, chosen: type, fields: dict[str, Any], where: str, source: _Source
) -> tuple[Any, dict[str, Any]]:
    """An instance of a class of the user's, if that has the methods of the section."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    lacking = [_lacking(chosen, protocol) for protocol in protocols]
    if all(lacking):
        if section == "reward" and any("__call__" in vars(base) for base in chosen.__mro__):
            raise RecipeError(
                f"{where}.type: {kind} is a class whose instances can be called (it has __call__); "
                f"name an instance, as `mine = {chosen.__name__}()` in its module, or give it a "
                "method score."
            )
        raise _unfit(section, kind, where, lacking[0])
    with users_errors(f"{where}: {kind}"):
        if issubclass(chosen, BaseModel):
            component, resolved = _validated(chosen, fields, where, source)
            return component, {**resolved, "type": kind}
        _refuse_arguments(chosen, (), fields, f"{where}: {kind}")
        return chosen(**fields), {"type": kind, **fields}


def _as_it_is(section: str, kind: str, chosen: Any, fields: Mapping[str, Any], where: str) -> Any:
    """An object of the user's, or in the section of rewards what can be called."""
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    is_function = all(_lacking(chosen, protocol) for protocol in protocols)
    if fields:
        what = "a function" if is_function else "an object"
        raise RecipeError(f"{where}: {what} takes no keys, but {quoted(sorted(fields))} are given.")
    if not is_function:
        _refuse_missing(section, kind, chosen, where)
        return chosen
    if section != "reward":
        why = "a function is none; name a class or an object"
        raise _unfit(section, kind, where, _methods(protocols[0]), why)
    with users_errors(f"{where}: {kind}"):
        _refuse_arguments(chosen, ("images", "prompts", "metadata"), {}, f"{where}: {kind}")
    return chosen


def _refuse_arguments(
    function: Any, positional: Sequence[str], named: Mapping[str, Any], where: str
) -> None:
    """Refuse arguments that do not fit the signature of what is to be called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        if named:
            raise RecipeError(f"{where} does not say which keys it takes.") from None
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        given = f" (it is called with {', '.join(positional)})" if positional else ""
        raise RecipeError(f"{where} {error}{given}.") from None


def _validated(
    chosen: type[BaseModel], fields: dict[str, Any], where: str, source: _Source = _Source()
) -> tuple[BaseModel, dict[str, Any]]:
    if chosen.model_config.get("extra", "ignore") == "ignore":
        # pydantic would drop them in silence.
        names = sorted(chosen.model_fields)
        aliases = {field.alias for field in chosen.model_fields.values()}
        for key in fields:
            if key not in names and key not in aliases:
                raise RecipeError(f"{where}: unknown key {quoted(key)}{hint(key, names)}")
    nested = getattr(chosen, "parts", {})
    built: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for key, section in nested.items():
        build = _named_parts if _many(chosen, key) else _part
        built[key], written[key] = build(
            section, fields.get(key), f"{where}.{key}", source.within(key)
        )
    plain = {key: value for key, value in fields.items() if key not in nested}
    try:
        # JSON rules: lists may become tuples and strings paths, but "8" is no number.
        text = json.dumps(plain, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: its values are no JSON ({error}).") from None
    try:
        component = chosen.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise RecipeError(explained(error, chosen, where)) from None
    if isinstance(component, Component):
        component = component.placed(source.places)
    else:
        component = placed(component, source.places)
    resolved = component.model_dump(mode="json", exclude={*nested})
    component = component.model_copy(update=built)
    if check := getattr(component, "check_parts", None):
        try:
            check()
        except ValueError as error:
            raise RecipeError(f"{where}: {error}.") from None
    return component, dict(sorted({**resolved, **written}.items(), key=lambda kv: kv[0] != "type"))


def _part(section: str, fields: Any, where: str, source: _Source) -> tuple[Any, dict[str, Any]]:
    """A component inside of another one."""
    return _build(section, fields_of(fields, where), where, source)


def _named_parts(
    section: str, named: Any, where: str, source: _Source
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components inside of another one, by name."""
    named = fields_of(named, where, "names, each with keys and values")
    built = {
        n: _part(section, fields, f"{where}.{n}", source.within(n)) for n, fields in named.items()
    }
    return {n: part for n, (part, _) in built.items()}, {n: w for n, (_, w) in built.items()}
