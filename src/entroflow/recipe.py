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
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from entroflow.component import Component
from entroflow.errors import RecipeError
from entroflow.plain_sections import ENDS, Attention, Monitors, Optimizer, Run, Sampling, Scoring
from entroflow.settings_text import holder_of, override_of, parse_yaml
from entroflow.users_code import home_of, imported, raised, refuse_shadowed, search_beside
from entroflow.wrong_keys import explained, hint

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
    from entroflow.rewards.base import AnyReward
    from entroflow.sampling.kernels import Kernel

COMPONENTS: dict[str, dict[str, str]] = {
    "policy": {
        "shapes": "entroflow.policies.shapes.policy.ShapesPolicyConfig",
        "sd3": "entroflow.policies.diffusers.sd3.SD3Config",
        "flux": "entroflow.policies.diffusers.flux.FluxConfig",
    },
    "prompts": {
        "shapes": "entroflow.prompts.ShapesPrompts",
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
TEXTS = ("title", "paper", "notes")
FOUND_IN = "found_in"
"""Key of a run's recipe: the folder of the recipe file, where components of the user's may lie."""


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
    reward: AnyReward
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
        """
        content = {section: _set(section, self.resolved[section]) for section in SECTIONS}
        for later in LATER_SECTIONS:
            if all(value == {} for value in content[later].values()):
                del content[later]
        run = self.resolved["run"]
        ends = {key: run[key] for key in ENDS if run.get(key) is not None}
        content["run"] = {"iterations": run["iterations"], **ends}
        # Where the package lies is no setting.
        text = json.dumps(content, sort_keys=True).replace(str(SHIPPED), "")
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every key written out; `load_recipe` reads it back."""
        from io import StringIO

        writer = YAML()
        writer.width = 100
        out = StringIO()
        home = {FOUND_IN: str(self.found_in)} if self.found_in else {}
        writer.dump({"name": self.name, **home, **self.resolved}, out)
        return out.getvalue()


def identity_of(resolved: Mapping[str, Any]) -> str:
    """A short hash of all in a recipe that a resumed run may not change."""
    fixed = {key: resolved.get(key) for key in SECTIONS if key not in ("run", "monitors")}
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


def _names_own(resolved: Any) -> bool:
    """Whether a part, or a part of one, is named by a dotted path."""
    if not isinstance(resolved, Mapping):
        return False
    kind = resolved.get("type")
    return (isinstance(kind, str) and "." in kind) or any(map(_names_own, resolved.values()))


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
) -> Recipe:
    """Read a recipe: a shipped name or a file, then `section.key=value` overrides in order.

    Args:
        name_or_path: of the recipe.
        overrides: changes to it.
        given: see `build_recipe`.

    Raises:
        RecipeError: unknown recipe, section, key or type; a value of the wrong type or out of
            range; an override of a section that is given; a file that is missing or no YAML.
    """
    for override in overrides:
        section = override.partition(".")[0]
        if given and section in given:
            raise RecipeError(f"{override}: {section} is given as an object; set its fields there.")
    name, text, folder = _find(str(name_or_path))
    mapping = parse_yaml(text, name)
    folder = _home_folder(mapping, folder)
    # A type goes before its fields, wherever it stands.
    for override in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".type")):
        _apply_override(mapping, override)
    search_beside(_of_users(folder))
    recipe = build_recipe(mapping, name, given, folder)
    own = any(_names_own(recipe.resolved[section]) for section in SECTIONS)
    return replace(recipe, found_in=_of_users(folder)) if own else recipe


def _home_folder(mapping: dict[str, Any], folder: Path | None) -> Path | None:
    """Where the recipe lay first: what a run wrote down, or else the file's own folder."""
    written = mapping.pop(FOUND_IN, None)
    return Path(written) if isinstance(written, str) else folder


def _of_users(folder: Path | None) -> Path | None:
    """The folder, if it may hold code of the user's."""
    return None if folder == SHIPPED else folder


def load_component(name_or_path: str | Path, section: str) -> Any:
    """One component of a recipe; the others are neither imported nor built.

    Raises:
        RecipeError: see `load_recipe`.
    """
    name, text, folder = _find(str(name_or_path))
    mapping = parse_yaml(text, name)
    folder = _home_folder(mapping, folder)
    search_beside(_of_users(folder))
    return _build(section, dict(mapping.get(section) or {}), f"{name}: {section}", folder)[0]


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
    name, text, _ = _find(str(name_or_path))
    fields = parse_yaml(text, name).get(section) or {}
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
    mapping = dict(mapping)
    name = str(mapping.pop("name", None) or name)
    for key in mapping:
        if key not in SECTIONS and key not in TEXTS:
            raise RecipeError(f"{name}: unknown section {key!r}{hint(key, [*SECTIONS, *TEXTS])}")
    texts = {key: "" if mapping.get(key) is None else str(mapping[key]) for key in TEXTS}
    parts: dict[str, Any] = dict(texts)
    resolved: dict[str, Any] = {key: value for key, value in texts.items() if value}
    for section in SECTIONS:
        if given and section in given:
            parts[section], resolved[section] = given[section], {"type": home_of(given[section])}
            continue
        fields = {} if mapping.get(section) is None else mapping[section]
        if not isinstance(fields, Mapping):
            raise RecipeError(f"{name}: {section} must hold keys and values, not {fields!r}.")
        parts[section], resolved[section] = _build(
            section, dict(fields), f"{name}: {section}", folder
        )
    return Recipe(name=name, **parts, resolved=resolved)


def _find(name: str) -> tuple[str, str, Path | None]:
    shipped = shipped_recipes()
    if name in shipped:
        return name, shipped[name].read_text(encoding="utf-8"), SHIPPED
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        try:
            return path.stem, path.read_text(encoding="utf-8"), path.resolve().parent
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe file {path}.") from None
        except (UnicodeDecodeError, IsADirectoryError):
            raise RecipeError(f"{path} is not a YAML file.") from None
    raise RecipeError(f"there is no recipe {name!r}{hint(name, list(shipped))}")


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    keys, parsed = override_of(override, SECTIONS)
    target = holder_of(mapping, keys, override)
    default = next(iter(COMPONENTS.get(keys[0], {"": ""})))
    if keys[1:] == ["type"] and target.get("type", default) != parsed:
        # Fields of the old type mean nothing to the new one.
        target.clear()
    target[keys[-1]] = parsed


def _build(
    section: str, fields: dict[str, Any], where: str, folder: Path | None
) -> tuple[Any, dict[str, Any]]:
    """A component of the kind of a section, and its fields with defaults written out.

    Args:
        where: what errors call it.
    """
    if section in PLAIN:
        return _validated(PLAIN[section], fields, where, folder)
    known = COMPONENTS[section]
    kind = fields.pop("type", next(iter(known)))
    if not isinstance(kind, str):
        raise RecipeError(f"{where}.type must be a name, not {kind!r}.")
    if kind in known:
        chosen = imported(known[kind], f"{where}.type")
        return _validated(chosen, {"type": kind, **fields}, where, folder)
    if "." not in kind:
        raise RecipeError(f"{where}.type: unknown type {kind!r}{hint(kind, list(known))}")
    return _users(section, kind, fields, where, folder)


def _users(
    section: str, kind: str, fields: dict[str, Any], where: str, folder: Path | None
) -> tuple[Any, dict[str, Any]]:
    """A component of the user's, by dotted path."""
    chosen = imported(kind, f"{where}.type")
    refuse_shadowed(kind.rpartition(".")[0], folder, f"{where}.type")
    component, resolved = _made(section, kind, chosen, fields, where, folder)
    protocols = [imported(path, where) for path in PROTOCOLS[section]]
    lacking = [_missing(component, protocol) for protocol in protocols]
    if all(lacking):
        raise RecipeError(
            f"{where}.type: {kind} is not for {section}: it has no {', '.join(lacking[0])} (an "
            "object that was passed from Python can be used from Python only)."
        )
    return component, resolved


def _missing(component: Any, protocol: Any) -> list[str]:
    needed = {**vars(protocol), **protocol.__annotations__}
    return [key for key in needed if key[0] != "_" and not hasattr(component, key)]


def _made(
    section: str, kind: str, chosen: Any, fields: dict[str, Any], where: str, folder: Path | None
) -> tuple[Any, dict[str, Any]]:
    if inspect.isclass(chosen) and issubclass(chosen, BaseModel):
        component, resolved = _validated(chosen, fields, where, folder)
        return component, {**resolved, "type": kind}
    if section == "reward" and inspect.isfunction(chosen):
        if fields:
            raise RecipeError(f"{where}: a function takes no keys, but {sorted(fields)} are given.")
        from entroflow.rewards.base import FunctionReward

        return FunctionReward(chosen), {"type": kind}
    if not callable(chosen):
        raise RecipeError(f"{where}.type: {kind} is neither a class nor a function.")
    try:
        inspect.signature(chosen).bind(**fields)
    except TypeError as error:
        raise RecipeError(f"{where}: {kind} {error}.") from None
    except ValueError:
        raise RecipeError(f"{where}.type: {kind} does not say which keys it takes.") from None
    try:
        return chosen(**fields), {"type": kind, **fields}
    except Exception as error:
        raise RecipeError(f"{where}: {kind} {raised(error)}.") from error


def _validated(
    chosen: type[BaseModel], fields: dict[str, Any], where: str, folder: Path | None = None
) -> tuple[BaseModel, dict[str, Any]]:
    if chosen.model_config.get("extra", "ignore") == "ignore":
        # pydantic would drop them in silence.
        names = sorted(chosen.model_fields)
        aliases = {field.alias for field in chosen.model_fields.values()}
        for key in fields:
            if key not in names and key not in aliases:
                raise RecipeError(f"{where}: unknown key {key!r}{hint(key, names)}")
    nested = getattr(chosen, "parts", {})
    built: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for key, section in nested.items():
        build = _named_parts if _many(chosen, key) else _part
        built[key], written[key] = build(section, fields.get(key), f"{where}.{key}", folder)
    plain = {key: value for key, value in fields.items() if key not in nested}
    try:
        # JSON rules: lists may become tuples and strings paths, but "8" is no number.
        component = chosen.model_validate_json(json.dumps(plain, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(explained(error, chosen, where)) from None
    found = {key: _located(path, folder) for key, path in component if isinstance(path, Path)}
    resolved = component.model_copy(update=found).model_dump(mode="json", exclude={*nested})
    component = component.model_copy(update={**found, **built})
    if check := getattr(component, "check_parts", None):
        try:
            check()
        except ValueError as error:
            raise RecipeError(f"{where}: {error}.") from None
    return component, dict(sorted({**resolved, **written}.items(), key=lambda kv: kv[0] != "type"))


def _part(section: str, fields: Any, where: str, folder: Path | None) -> tuple[Any, dict[str, Any]]:
    """A component inside of another one."""
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{where} must hold keys and values, not {fields!r}.")
    return _build(section, dict(fields), where, folder)


def _named_parts(
    section: str, named: Any, where: str, folder: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components inside of another one, by name."""
    named = {} if named is None else named
    if not isinstance(named, Mapping):
        raise RecipeError(f"{where} must hold names, each with keys and values, not {named!r}.")
    built = {n: _part(section, fields, f"{where}.{n}", folder) for n, fields in named.items()}
    return {n: part for n, (part, _) in built.items()}, {n: w for n, (_, w) in built.items()}


def _located(path: Path, folder: Path | None) -> Path:
    """A file that a recipe names: it lies beside the recipe, or else in the current folder."""
    places = [place / path for place in (folder, Path.cwd()) if place is not None]
    return next((place for place in places if os.path.exists(place)), Path.cwd() / path)
