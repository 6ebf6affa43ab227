"""The recipe: the only input of a run. One YAML file, one typed component per section.

Sections whose component can be chosen have a key `type`: the name of a shipped component, or the
dotted path of a user's own class or function (`my_module.my_reward`). All other keys are the fields
of that component. Unknown keys and names are errors; nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, cast, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from entroflow.component import Component
from entroflow.errors import InputError

if TYPE_CHECKING:
    # Imported late where they run: a recipe can be listed and refused without loading torch.
    from entroflow.allocation.base import Allocation
    from entroflow.credit.base import Credit
    from entroflow.evaluation.base import Evaluation
    from entroflow.exploration.base import Exploration
    from entroflow.objectives.base import Objective
    from entroflow.policies.base import PolicyConfig
    from entroflow.prompts import PromptSource
    from entroflow.rewards.base import Reward
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
    "allocation": {"uniform": "entroflow.allocation.uniform.Uniform"},
    "exploration": {
        "every_step": "entroflow.exploration.every_step.EveryStep",
        "random_fraction": "entroflow.exploration.random_fraction.RandomFraction",
        "window": "entroflow.exploration.window.Window",
        "merged_steps": "entroflow.exploration.merged_steps.MergedSteps",
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
        "jpeg_size": "entroflow.rewards.jpeg_size.JPEGSize",
    },
    "credit": {
        "terminal": "entroflow.credit.terminal.Terminal",
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
"""Section -> type -> where the component lives; imported only when a recipe names it."""

PROTOCOLS = {
    "policy": "entroflow.policies.base.PolicyConfig",
    "prompts": "entroflow.prompts.PromptSource",
    "allocation": "entroflow.allocation.base.Allocation",
    "exploration": "entroflow.exploration.base.Exploration",
    "kernel": "entroflow.sampling.kernels.Kernel",
    "reward": "entroflow.rewards.base.Reward",
    "credit": "entroflow.credit.base.Credit",
    "objective": "entroflow.objectives.base.Objective",
    "evaluation": "entroflow.evaluation.base.Evaluation",
}
"""Section -> what its components must have."""

ComponentT = TypeVar("ComponentT", bound=Component)
Decay = Annotated[float, Field(ge=0, lt=1)]


def amount(value: object) -> object:
    """The whole number that `300k`, `1.5M` or `3e5` stands for; what is no text, as it is."""
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKM]?)", value.strip())
        if not found:
            raise ValueError("must be a number like 300000, 300k or 1.5M")
        value = float(found[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6}[found[2]]
    return int(value) if isinstance(value, float) and value.is_integer() else value


Amount = Annotated[int, BeforeValidator(amount)]


class Sampling(Component):
    """How rollouts are sampled."""

    steps: int = Field(10, ge=2, description="steps of the base grid")
    guidance: float = Field(1.0, ge=0, description="guidance scale; 1 is none")
    batch_size: int = Field(
        64,
        ge=1,
        description="most images in one network call, not counting the second pass of guidance",
    )
    state_dtype: Literal["float64", "float32", "bfloat16"] = Field(
        "float32", description="storage type of states; the carried state is rounded to it"
    )


class Optimizer(Component):
    """AdamW over the trainable weights, and their moving average."""

    learning_rate: float = Field(1e-4, gt=0, description="step size of AdamW, at its highest")
    warm_up: int = Field(0, ge=0, description="iterations of linear warm-up")
    cool_down_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "share of the run, at its end, in which the rate falls linearly; a run that is resumed "
            "for more iterations goes on at a higher rate"
        ),
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="decays of AdamW's first and second moment, each in [0, 1)"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of AdamW")
    max_grad_norm: float = Field(
        1.0, gt=0, description="bound on the gradient norm, of log-probabilities not divided by D"
    )
    micro_batch: int = Field(64, ge=1, description="most states in one forward and backward pass")
    ema: float = Field(
        0.9, ge=0, lt=1, description="decay of the moving average, per iteration; 0 follows at once"
    )

    def rate_at(self, iteration: int, share: float) -> float:
        """The learning rate of one iteration (from 0) with a share of the run, in [0, 1), done."""
        up = (iteration + 1) / self.warm_up if self.warm_up else 1.0
        down = (1 - share) / self.cool_down_share if self.cool_down_share else 1.0
        return self.learning_rate * min(1.0, up, down)


ENDS = {
    "iterations": "iterations",
    "budget": "weighted evaluations",
    "updates": "updates",
    "minutes": "minutes",
}
"""Keys of `run` that end it, and their units."""


class Run(Component):
    """How long, how often, and with which seed.

    The run ends after `iterations`, or with the iteration that comes nearest to `budget`, `updates`
    or `minutes`, whichever is first.
    """

    iterations: int | None = Field(
        100,
        ge=0,
        description="iterations of the whole run; 0 only evaluates, null leaves the end to the "
        "three keys below",
    )
    budget: Amount | None = Field(
        None,
        ge=1,
        description="weighted network evaluations (a forward and backward pass counts three), as "
        "300000 or 300k",
    )
    updates: int | None = Field(None, ge=1, description="optimizer steps")
    minutes: float | None = Field(
        None, gt=0, description="training time, without evaluations and checkpoints"
    )
    # One more, for the test prompts, must still fit the 64 bits of a noise address.
    seed: int = Field(0, ge=0, lt=2**63 - 1, description="run seed, part of every noise address")
    evaluate_every: int = Field(10, ge=1, description="iterations between evaluations")
    checkpoint_every: int = Field(20, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the latest checkpoints stay")

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if not self.ends:
            raise ValueError("give iterations, budget, updates or minutes, or several of them")
        return self

    @property
    def ends(self) -> dict[str, float]:
        """What ends the run, by the keys that are set; whichever comes first does."""
        return {key: value for key in ENDS if (value := getattr(self, key)) is not None}

    def share_done(self, spent: Mapping[str, float]) -> float:
        """How much of the run lies behind: in [0, 1], and 1 only at its end.

        Args:
            spent: `iterations` so far, and the `budget`, `updates` and `minutes` they took.
        """
        done = 0.0
        for key, end in self.ends.items():
            left, of_one = end - spent[key], spent[key] / max(spent["iterations"], 1)
            # Half an iteration more would be past the end: no other comes nearer to it.
            done = max(done, 1.0 if 2 * left <= of_one else spent[key] / end)
        return done

    @property
    def test_seed(self) -> int:
        """Seed of the comparison on test prompts: other noise than the run's evaluations saw."""
        return self.seed + 1


PLAIN: dict[str, type[Component]] = {"sampling": Sampling, "optimizer": Optimizer, "run": Run}
SECTIONS = (
    "policy", "prompts", "allocation", "sampling", "exploration", "kernel",
    "reward", "credit", "objective", "optimizer", "evaluation", "run",
)  # fmt: skip
TEXTS = ("title", "paper", "notes")
FOUND_IN = "found_in"
"""Key of a run's recipe: the folder of the recipe file, where components of the user's may lie."""


class RecipeError(InputError):
    """A recipe is wrong; the message says what, where, and how to mend it, in one line."""


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
    exploration: Exploration
    kernel: Kernel
    reward: Reward
    credit: Credit
    objective: Objective
    optimizer: Optimizer
    evaluation: Evaluation
    run: Run
    resolved: Mapping[str, Any]
    found_in: Path | None = None

    @property
    def hash(self) -> str:
        """A short hash of all settings but the seed and how often to evaluate and save.

        Keys that have their default are left out: a new key changes no recipe that does without.
        """
        content = {section: _set(section, self.resolved[section]) for section in SECTIONS}
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


def _set(section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The type of a resolved section, and the keys whose value is not the default."""
    known: Any = PLAIN.get(section)
    if known is None and (path := COMPONENTS[section].get(fields.get("type", ""))):
        known = _imported(path, section)
    # Of a component of the user's, which a report does not import, every key counts.
    defaults = {} if known is None else known.model_construct().model_dump(mode="json")
    return {
        key: value
        for key, value in fields.items()
        if key == "type" or key not in defaults or defaults[key] != value
    }


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
        mapping = _parse_yaml(path.read_text(encoding="utf-8"), name)
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
    mapping = _parse_yaml(text, name)
    folder = _home_folder(mapping, folder)
    # A type goes before its fields, wherever it stands.
    for override in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".type")):
        _apply_override(mapping, override)
    _search_beside(folder)
    recipe = build_recipe(mapping, name, given, folder)
    own = any("." in recipe.resolved[section].get("type", "") for section in SECTIONS)
    return replace(recipe, found_in=folder) if own else recipe


def _home_folder(mapping: dict[str, Any], folder: Path | None) -> Path | None:
    """Where the recipe lay first: what a run wrote down, or else the file's own folder."""
    written = mapping.pop(FOUND_IN, None)
    return Path(written) if isinstance(written, str) else folder


def _search_beside(folder: Path | None) -> None:
    """A user's components live beside the recipe that names them, or in the current folder.

    Both come last, so that a file of the user's takes the place of no installed module; those of
    recipes that were loaded before make room.
    """
    while _searched:
        with suppress(ValueError):
            sys.path.remove(_searched.pop())
    for place in (folder, Path.cwd()):
        if place is not None and str(place) not in sys.path:
            sys.path.append(str(place))
            _searched.append(str(place))


_searched: list[str] = []
"""What `_search_beside` has added to `sys.path`."""


def _refuse_shadowed(module_name: str, folder: Path | None, where: str) -> None:
    """A module beside the recipe must be the one that was imported under its name."""
    top = module_name.partition(".")[0]
    for place in (folder, Path.cwd()):
        if place is None:
            continue
        beside = [place / f"{top}.py", place / top / "__init__.py"]
        if any(path.is_file() for path in beside):
            found = getattr(sys.modules[top], "__file__", None)
            if found is None or Path(found).resolve() not in [p.resolve() for p in beside]:
                raise RecipeError(
                    f"{where}: {top!r} is the module {found or 'of Python itself'}, not "
                    f"the one in {place}; rename that one, or use a new process."
                )
            return


def _home(part: Any) -> str:
    """The dotted path of the class or function an object comes from."""
    named = part.function if hasattr(part, "function") else type(part)
    return f"{named.__module__}.{getattr(named, '__qualname__', type(part).__name__)}"


def load_component(name_or_path: str | Path, section: str) -> Any:
    """One component of a recipe; the others are neither imported nor built.

    Raises:
        RecipeError: see `load_recipe`.
    """
    name, text, folder = _find(str(name_or_path))
    mapping = _parse_yaml(text, name)
    folder = _home_folder(mapping, folder)
    _search_beside(folder)
    return _build(section, dict(mapping.get(section) or {}), name, folder)[0]


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
    fields = _parse_yaml(text, name).get(section) or {}
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
            raise RecipeError(f"{name}: unknown section {key!r}{_hint(key, [*SECTIONS, *TEXTS])}")
    texts = {key: "" if mapping.get(key) is None else str(mapping[key]) for key in TEXTS}
    parts: dict[str, Any] = dict(texts)
    resolved: dict[str, Any] = {key: value for key, value in texts.items() if value}
    for section in SECTIONS:
        if given and section in given:
            parts[section], resolved[section] = given[section], {"type": _home(given[section])}
            continue
        fields = {} if mapping.get(section) is None else mapping[section]
        if not isinstance(fields, Mapping):
            raise RecipeError(f"{name}: {section} must hold keys and values, not {fields!r}.")
        parts[section], resolved[section] = _build(section, dict(fields), name, folder)
    return Recipe(name=name, **parts, resolved=resolved)


def _find(name: str) -> tuple[str, str, Path | None]:
    shipped = shipped_recipes()
    if name in shipped:
        return name, shipped[name].read_text(encoding="utf-8"), None
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        try:
            return path.stem, path.read_text(encoding="utf-8"), path.resolve().parent
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe file {path}.") from None
        except (UnicodeDecodeError, IsADirectoryError):
            raise RecipeError(f"{path} is not a YAML file.") from None
    raise RecipeError(f"there is no recipe {name!r}{_hint(name, list(shipped))}")


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{where} is not valid YAML: {reason}") from None
    if parsed is None:
        return {}
    if not isinstance(parsed, dict):
        raise RecipeError(f"{where} must be a mapping of sections, not a {type(parsed).__name__}.")
    return parsed


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"an override is section.key=value, not {override!r}.")
    if keys[0] not in SECTIONS:
        raise RecipeError(f"{override}: unknown section {keys[0]!r}{_hint(keys[0], SECTIONS)}")
    if len(keys) == 1:
        raise RecipeError(f"{override}: name a key inside {keys[0]}, as in {keys[0]}.key=value.")
    target = mapping
    for key in keys[:-1]:
        inner = target.get(key) or {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{override}: {key} holds {inner!r}, not keys.")
        target[key] = dict(inner)
        target = target[key]
    try:
        parsed = YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        parsed = value
    default = next(iter(COMPONENTS.get(keys[0], {"": ""})))
    if keys[1:] == ["type"] and target.get("type", default) != parsed:
        # Fields of the old type mean nothing to the new one.
        target.clear()
    target[keys[-1]] = parsed


def _build(
    section: str, fields: dict[str, Any], name: str, folder: Path | None
) -> tuple[Any, dict[str, Any]]:
    """The component of a section, and its fields with defaults written out."""
    if section in PLAIN:
        return _validated(PLAIN[section], fields, f"{name}: {section}", folder)
    known = COMPONENTS[section]
    kind = fields.pop("type", next(iter(known)))
    if not isinstance(kind, str):
        raise RecipeError(f"{name}: {section}.type must be a name, not {kind!r}.")
    if kind in known:
        chosen = _imported(known[kind], f"{name}: {section}.type")
        return _validated(chosen, {"type": kind, **fields}, f"{name}: {section}", folder)
    if "." not in kind:
        raise RecipeError(
            f"{name}: {section}.type: unknown type {kind!r}{_hint(kind, list(known))}"
        )
    return _users(section, kind, fields, name, folder)


def _users(
    section: str, kind: str, fields: dict[str, Any], name: str, folder: Path | None
) -> tuple[Any, dict[str, Any]]:
    """A component of the user's, by dotted path."""
    where = f"{name}: {section}"
    chosen = _imported(kind, f"{where}.type")
    _refuse_shadowed(kind.rpartition(".")[0], folder, f"{where}.type")
    component, resolved = _made(section, kind, chosen, fields, where, folder)
    protocol = _imported(PROTOCOLS[section], where)
    needed = {**vars(protocol), **protocol.__annotations__}
    missing = [key for key in needed if key[0] != "_" and not hasattr(component, key)]
    if missing:
        raise RecipeError(
            f"{where}.type: {kind} is not for {section}: it has no {', '.join(missing)} (an object "
            "that was passed from Python can be used from Python only)."
        )
    return component, resolved


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
        raise RecipeError(f"{where}: {kind} {_raised(error)}.") from error


def _imported(path: str, where: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    try:
        if not module_name or module_name.startswith("."):
            raise ModuleNotFoundError("no module is named", name=module_name)
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module_name}.".startswith(f"{absent}."):
            raise RecipeError(
                f"{where}: can't import {module_name!r} ({error}); it must be installed, or lie "
                "beside the recipe or in the current folder."
            ) from None
        if absent is not None and module_name.startswith("entroflow.policies.diffusers."):
            raise RecipeError(
                f"{where}: it needs the extra: pip install 'entroflow[diffusers]' ({error})."
            ) from None
        raise RecipeError(f"{where}: the import of {module_name!r} {_raised(error)}.") from error
    if not hasattr(module, attribute):
        public = [entry for entry in vars(module) if not entry.startswith("_")]
        found = f"{module_name} ({getattr(module, '__file__', 'built in')})"
        raise RecipeError(f"{where}: {found} has no {attribute!r}{_hint(attribute, public)}")
    return getattr(module, attribute)


def _raised(error: Exception) -> str:
    """What someone else's code raised, and in which line, as the end of a sentence."""
    if isinstance(error, SyntaxError):
        return f"raised {type(error).__name__}: {error}"
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = [*places, str(Path(__file__).parent), "<frozen"]
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(tuple(installed))]
    frame = (users or frames)[-1]
    at = f"{frame.filename}, line {frame.lineno}"
    return f"raised {type(error).__name__}: {error} ({at})"


def _validated(
    chosen: type[BaseModel], fields: dict[str, Any], where: str, folder: Path | None = None
) -> tuple[BaseModel, dict[str, Any]]:
    if chosen.model_config.get("extra", "ignore") == "ignore":
        # pydantic would drop them in silence.
        names = sorted(chosen.model_fields)
        aliases = {field.alias for field in chosen.model_fields.values()}
        for key in fields:
            if key not in names and key not in aliases:
                raise RecipeError(f"{where}: unknown key {key!r}{_hint(key, names)}")
    try:
        # JSON rules: lists may become tuples and strings paths, but "8" is no number.
        component = chosen.model_validate_json(json.dumps(fields, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(_explained(error, chosen, where)) from None
    found = {key: _located(path, folder) for key, path in component if isinstance(path, Path)}
    component = component.model_copy(update=found)
    resolved = component.model_dump(mode="json")
    return component, dict(sorted(resolved.items(), key=lambda item: item[0] != "type"))


def _located(path: Path, folder: Path | None) -> Path:
    """A file that a recipe names: beside the recipe, or in the current folder, or shipped."""
    places = [place / path for place in (folder, Path.cwd(), SHIPPED) if place is not None]
    return next((place for place in places if os.path.exists(place)), Path.cwd() / path)


def _explained(error: ValidationError, chosen: type[BaseModel], where: str) -> str:
    errors = error.errors()
    first = errors[0]
    several = [e for e in errors if e["loc"][:1] == first["loc"][:1] and _of_one_form(e, chosen)]
    if several:
        first = _of_all_forms(several)
        errors = [first, *(e for e in errors if e["loc"][:1] != first["loc"][:1])]
    key = ".".join(str(part) for part in first["loc"])
    more = f" ({len(errors) - 1} more like this)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        names = [field for field in chosen.model_fields if field != "type"]
        return f"{where}: unknown key {key!r}{_hint(key, names)}{more}"
    if first["type"] == "missing":
        return f"{where}: key {key!r} is missing{more}."
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{where}: {message}{more}."
    message = message[0].lower() + message[1:]
    return f"{where}.{key}: {message}, not {first['input']!r}{more}."


def _of_one_form(error: ErrorDetails, chosen: type[BaseModel]) -> bool:
    """Whether an error is about one of several forms that a key may have, as pydantic reports."""
    path = error["loc"]
    field = chosen.model_fields.get(str(path[0])) if len(path) > 1 else None
    forms = get_args(field.annotation) if field and not isinstance(path[1], int) else ()
    return len([form for form in forms if form is not type(None)]) > 1


def _of_all_forms(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """One error for a key that has none of its forms: inside of a list where that is what it is."""
    deepest = max(errors, key=lambda error: len(error["loc"]))
    # The second part of the path is pydantic's name of a form.
    path = (*deepest["loc"][:1], *deepest["loc"][2:])
    if len(path) > 1:
        return {**deepest, "loc": path}
    forms = [
        error["msg"].partition(", unable")[0].removeprefix("Input should be ") for error in errors
    ]
    said = "Input should be " + ", or ".join(dict.fromkeys(forms))
    return {**deepest, "loc": path, "msg": said.replace("array", "list").replace("tuple", "list")}


def _hint(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(str(word), known, n=1, cutoff=0.5)
    listed = f" (known: {', '.join(known)})." if len(known) <= 16 else "."
    return f"; did you mean {near[0]!r}?{listed if not near else ''}" if near else f"{listed}"
