"""Recipes: what is shipped, what the loader refuses, and a user's own components."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from entroflow.errors import RecipeError
from entroflow.recipe.imports import imported
from entroflow.recipe.load import build_recipe, load_component, load_recipe, shipped_recipes
from entroflow.recipe.read import titles
from entroflow.recipe.registry import COMPONENTS, IMAGES, PLAIN, SECTIONS
from entroflow.rewards.base import FunctionReward
from tiny_run import only

SHIPPED = sorted(shipped_recipes())
REQUIRED = {
    ("policy", "sd3"): {"model": "a-model"},
    ("reward", "openai"): {"model": "a-model"},
    ("policy", "flux"): {"model": "a-model"},
    ("prompts", "text"): {"path": "prompts.txt"},
    ("prompts", "jsonl"): {"path": "prompts.jsonl"},
    ("prompts", "dataset"): {"name": "json"},
    ("evaluation", "reward"): {"path": "held_out.txt"},
    ("reward", "pairwise"): {"judge": {"type": "tiny_run.ByBrightness"}},
    ("reward", "mixture"): {"rewards": {"one": {"type": "shapes"}, "two": {"type": "jpeg_size"}}},
}

CHANGES = {
    "policy": {"weights": "other.safetensors", "precision": "fp32", "shift": 3.0},
    "prompts": {"per_iteration": 9, "split": "validation", "skills": ["colors"]},
    "allocation": {"group_size": 25},
    "sampling": {"steps": 9, "guidance": 2.0, "batch_size": 65, "state_dtype": "bfloat16"},
    "attention": {
        "measure": True, "keys": "text", "layer_stride": 2, "queries": 8, "normalised": False,
        "states": 2, "shift": "relative", "curve_ema": 0.5, "seed": 1,
    },
    "exploration": {
        "start": 1, "size": 2, "move": "decay", "last_start": 4, "every": 26, "stride": 2,
        "decay_rate": 0.2, "decay_from": 12, "share_noise": True,
    },
    "kernel": {"noise_level": 0.9},
    "reward": {"value": "strict"},
    "monitors": {
        "rewards": {"size": {"type": "jpeg_size"}}, "best": "score", "on_hacking": "stop",
        "band": 3.0,
    },
    "scoring": {"on_failure": "raise", "most_masked": 0.1},
    "credit": {"scale": "none", "ddof": 1, "epsilon": 0.0, "advantage_clip": 4.0},
    "objective": {
        "clip_total": 2.5, "kl": 0.1, "kl_weight": "step_length", "minibatches": 2, "epochs": 2,
        "weight": "variance", "loss_weighting": "prompt",
    },
    "optimizer": {
        "learning_rate": 2e-4, "warm_up": 1, "cool_down_share": 0.5, "betas": [0.9, 0.95],
        "weight_decay": 0.1,
        "max_grad_norm": 2.0, "micro_batch": 65, "ema": 0.5,
    },
    "evaluation": {
        "split": "test", "steps": 11, "guidance": 2.0, "images": 49,
        "prompts_per_skill": 17, "test_images": 97, "guidance_tried": [1.0, 3.0],
    },
    "run": {"iterations": 101},
}  # fmt: skip
"""Another value than the default for every setting but the seed and how often to evaluate."""

BASE = {"exploration": {"type": "window"}, "objective": {"clip_total": 2.0}}

TYPES = {
    "prompts": {"type": "text", "path": "prompts.txt"},
    "exploration": {"type": "every_step"},
    "kernel": {"type": "ode"},
    "credit": {"type": "shuffled"},
}


def written(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def reread(recipe, folder):
    """The recipe as written out and loaded again."""
    return load_recipe(written(folder, recipe.to_yaml(), "again.yaml"))


def assert_same(one, other):
    assert other.resolved == one.resolved
    assert other.hash == one.hash
    assert other.name == one.name
    for section in SECTIONS:
        assert type(getattr(other, section)) is type(getattr(one, section))


def component_of(recipe, section):
    return only(recipe) if section == "reward" else getattr(recipe, section)


def changed(**sections):
    """The recipe of `BASE` with some keys changed; another `type` starts from nothing."""
    mapping = dict(BASE)
    for section, fields in sections.items():
        kept = mapping.get(section, {}) if isinstance(fields, dict) and "type" not in fields else {}
        mapping[section] = {**kept, **fields} if isinstance(fields, dict) else fields
    return build_recipe(mapping)


# --- what is shipped ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_reads_back_as_it_is(name, tmp_path):
    recipe = load_recipe(name)
    assert_same(recipe, reread(recipe, tmp_path))
    assert_same(recipe, load_recipe(shipped_recipes()[name]))
    assert reread(recipe, tmp_path).to_yaml() == recipe.to_yaml()


def assert_arrived(resolved, stated, folder):
    for key, value in stated.items():
        arrived = resolved[key]
        if isinstance(value, dict):
            assert_arrived(arrived, value, folder)
            continue
        if key == "path":
            assert Path(arrived).is_file()
            arrived = str(Path(arrived).relative_to(folder))
        assert arrived == value, key


@pytest.mark.parametrize("name", SHIPPED)
def test_every_key_of_a_shipped_file_arrives(name):
    """Nothing is dropped or converted; and every other key is written out with its default."""
    recipe = load_recipe(name)
    stated = YAML(typ="safe").load(shipped_recipes()[name].read_text())
    for section, fields in stated.items():
        if section in SECTIONS:
            assert_arrived(recipe.resolved[section], fields, shipped_recipes()[name].parent)
        else:
            assert recipe.resolved[section] == getattr(recipe, section) == fields
    for section in SECTIONS:
        written = recipe.resolved[section]
        kind = PLAIN.get(section) or imported(COMPONENTS[section][written["type"]], section)
        assert set(written) == set(kind.model_fields)


def test_titles_name_every_shipped_recipe():
    shown = titles(IMAGES)
    assert list(shown) == SHIPPED
    assert all(title for title, _ in shown.values())
    assert "2505.05470" in shown["flow_grpo"][1]


@pytest.mark.parametrize(
    ("section", "kind"), [(s, kind) for s in SECTIONS for kind in COMPONENTS.get(s, ())]
)
def test_every_listed_type_can_be_chosen(section, kind, tmp_path):
    fields = {"type": kind, **REQUIRED.get((section, kind), {})}
    recipe = build_recipe({section: fields})
    if (section, kind) != ("reward", "mixture"):
        chosen = type(component_of(recipe, section))
        assert f"{chosen.__module__}.{chosen.__name__}" == COMPONENTS[section][kind]
    assert recipe.resolved[section]["type"] == kind
    assert_same(recipe, reread(recipe, tmp_path))


def test_components_and_recipes_are_frozen():
    recipe = load_recipe("quickstart")
    for section in SECTIONS:
        component = component_of(recipe, section)
        field = next(iter(type(component).model_fields))
        with pytest.raises(ValueError, match="frozen"):
            setattr(component, field, getattr(component, field))
    with pytest.raises(AttributeError):
        recipe.title = "another"
    with pytest.raises(AttributeError):
        recipe.reward.weights = {}


# --- reading back anything ------------------------------------------------------------------------

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
written_text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]) | st.just("\n"))


@settings(
    max_examples=50, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    title=written_text,
    rate=positive,
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    seed=st.integers(0, 2**62),
    path=written_text.filter(bool),
)
def test_any_value_reads_back_bit_for_bit(tmp_path, title, rate, betas, seed, path):
    """Also titles like `null` or `1e-4`, paths like `yes`, and the smallest floats."""
    recipe = build_recipe(
        {
            "title": title,
            "optimizer": {"learning_rate": rate, "betas": list(betas)},
            "run": {"seed": seed},
            "prompts": {"type": "text", "path": path},
        }
    )
    assert recipe.optimizer.learning_rate == rate
    assert recipe.optimizer.betas == betas
    assert recipe.title == title
    again = reread(recipe, tmp_path)
    assert again.resolved == recipe.resolved
    assert again.hash == recipe.hash
    assert again.prompts.path == recipe.prompts.path


# --- the hash -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key"), [(s, key) for s, fields in CHANGES.items() for key in fields]
)
def test_hash_changes_with_a_setting(section, key):
    value = CHANGES[section][key]
    assert changed().resolved[section][key] != value
    assert changed(**{section: {key: value}}).hash != changed().hash


def test_every_setting_has_been_considered():
    """A new field must be added to the table above."""
    resolved = changed().resolved
    for section in set(SECTIONS) - {"run"}:
        assert set(resolved[section]) - {"type", "clip_range"} == set(CHANGES[section]), section


@pytest.mark.parametrize("section", TYPES)
def test_hash_changes_with_a_type(section):
    assert changed(**{section: TYPES[section]}).hash != changed().hash


def test_hashes_of_different_recipes_differ():
    recipes = [changed()] + [load_recipe(name) for name in SHIPPED]
    for section, fields in CHANGES.items():
        recipes += [changed(**{section: {key: value}}) for key, value in fields.items()]
    assert len({recipe.hash for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize(
    "change",
    [
        {"title": "another"}, {"paper": "another"}, {"notes": "another"}, {"name": "another"},
        {"run": {"seed": 7}}, {"run": {"evaluate_every": 3}}, {"run": {"checkpoint_every": 3}},
        {"run": {"keep_checkpoints": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_hash_ignores_the_seed_and_how_often_to_evaluate_and_save(change):
    assert changed(**change).hash == changed().hash


def test_hash_covers_types_and_what_is_not_the_default():
    """So a key that a later version adds leaves the hash of a recipe without it as it is."""
    sections = [section for section in SECTIONS if section in COMPONENTS]
    content = {section: {"type": next(iter(COMPONENTS[section]))} for section in sections}
    content |= {"sampling": {"steps": 9}, "optimizer": {}, "run": {"iterations": 7}}
    content["objective"]["clip_total"] = 2.0
    text = json.dumps(content, sort_keys=True).encode()
    recipe = build_recipe(
        {"sampling": {"steps": 9}, "run": {"iterations": 7}, "objective": {"clip_total": 2.0}}
    )
    assert recipe.hash == hashlib.blake2b(text, digest_size=6).hexdigest()


def test_hash_ignores_the_order_of_keys_and_defaults_written_out():
    recipe = load_recipe("quickstart")
    turned = {
        section: dict(reversed(fields.items())) if isinstance(fields, dict) else fields
        for section, fields in reversed(recipe.resolved.items())
    }
    assert build_recipe(turned).hash == recipe.hash


# --- what the loader refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run: {seed: 1, seed: 2}", 'duplicate key "seed"'),
        ("run: {seed: 1}\nrun: {seed: 2}", 'duplicate key "run"'),
        ("- run\n- policy", "must be a mapping of sections, not a list"),
        ("quickstart", "must be a mapping of sections, not a str"),
        ("run: [1, 2]", "run must hold keys and values"),
        ("run: 5", "run must hold keys and values"),
        ("run: {seed: 1", "is not valid YAML"),
        ("run: !!python/object:os.system {}", "is not valid YAML"),
        ("optimiser: {}", "unknown section 'optimiser'; did you mean 'optimizer'?"),
        ("1: {}", "unknown section '1'"),
        ("run: {1: 2}", "run: unknown key '1'"),
        ("run: {sed: 1}", "run: unknown key 'sed'; did you mean 'seed'?"),
        ("run: {sed: 1, iteration: 2}", "(1 more like this)"),
        ("run: {seed: -1}", "run.seed: input should be greater than or equal to 0, not -1"),
        ("run: {seed: '1'}", "run.seed: input should be a valid integer, not '1'"),
        ("run: {seed: 1.0}", "run.seed"),
        ("run: {seed: true}", "run.seed"),
        ("run: {seed: }", "run.seed"),
        ("allocation: {group_size: 4611686018427387904}", "group_size: input should be at most 2"),
        ("sampling: {steps: 2147483648}", "sampling.steps: input should be at most 2147483647"),
        ("sampling: {state_dtype: float16}", "sampling.state_dtype"),
        ("sampling: {steps: 1}", "sampling.steps"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate"),
        ("optimizer: {max_grad_norm: .inf}", "optimizer.max_grad_norm"),
        ("optimizer: {learning_rate: 0}", "optimizer.learning_rate"),
        ("optimizer: {betas: [0.9]}", "betas"),
        ("optimizer: {betas: [0.9, 0.95, 0.99]}", "optimizer.betas"),
        ("optimizer: {ema: 1}", "optimizer.ema"),
        ("kernel: {type: [flow_sde]}", "kernel.type must be a name"),
        ("kernel: {type: flow}", "kernel.type: unknown type 'flow'; did you mean 'flow_sde'?"),
        ("kernel: {type: ode, noise_level: 1}", "kernel: unknown key 'noise_level'"),
        ("prompts: {type: text}", "prompts: key 'path' is missing"),
        ("prompts: {skills: []}", "prompts.skills"),
        ("prompts: {skills: [circle]}", "unknown skills ['circle']; known: single_object"),
        ("objective: {clip_range: 1, clip_total: 1}", "give clip_range or clip_total, not both"),
    ],
)
def test_a_wrong_recipe_is_refused_with_one_line_that_says_where(tmp_path, text, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe(written(tmp_path, text))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("mine")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no recipe 'quikstart'; did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match=r"no recipe file .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="is not a YAML file"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(RecipeError, match="is not a YAML file"):
        load_recipe(tmp_path / "binary.yaml")


def test_everything_has_a_default(tmp_path):
    """Also sections that are named and left empty."""
    named = "".join(f"{section}:\n" for section in SECTIONS)
    for text in ("", named):
        assert load_recipe(written(tmp_path, text)).resolved == build_recipe({}).resolved
    assert build_recipe({}).resolved["objective"]["clip_total"] == 6.6
    alone = build_recipe({"objective": {"clip_range": 0.1}})
    assert alone.resolved["objective"]["clip_total"] is None


def test_a_file_goes_by_its_name_and_the_mapping_is_left_alone(tmp_path):
    assert load_recipe(written(tmp_path, "run: {seed: 1}")).name == "mine"
    mapping = {"run": {"seed": 3}, "kernel": {"type": "ode"}}
    build_recipe(mapping)
    assert mapping == {"run": {"seed": 3}, "kernel": {"type": "ode"}}


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=3", 3.0),
        ("optimizer.betas=[0.9, 0.95]", (0.9, 0.95)),
        ("prompts.skills=[colors, counting]", ("colors", "counting")),
        ("policy.precision=fp32", "fp32"),
        ("run.iterations=7", 7),
        ("policy.weights=null", None),
        ("policy.weights=", None),
    ],
)
def test_an_override_is_read_as_yaml(override, value):
    recipe = load_recipe("quickstart", [override])
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(recipe, section), key) == value
    plain = load_recipe("quickstart")
    assert {s for s in SECTIONS if recipe.resolved[s] != plain.resolved[s]} <= {section}


def test_the_last_override_wins_and_others_stay():
    recipe = load_recipe("quickstart", ["run.seed=1", "run.iterations=5", "run.seed=2"])
    assert (recipe.run.seed, recipe.run.iterations) == (2, 5)
    assert recipe.run.evaluate_every == load_recipe("quickstart").run.evaluate_every


def test_a_file_lies_beside_the_recipe_or_in_the_current_folder(tmp_path, monkeypatch):
    """What was found first is written down, so that the run resumes from anywhere."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    mine = written(home, "prompts: {type: text, path: prompts.txt}")
    monkeypatch.chdir(elsewhere)
    assert load_recipe(mine).prompts.path == elsewhere / "prompts.txt"
    (elsewhere / "prompts.txt").write_text("a ring")
    assert load_recipe(mine).prompts.path == elsewhere / "prompts.txt"
    (home / "prompts.txt").write_text("a circle")
    recipe = load_recipe(mine)
    assert recipe.prompts.path == home / "prompts.txt"
    assert [prompt.text for prompt in load_component(mine, "prompts").load()] == ["a circle"]
    again = written(elsewhere, recipe.to_yaml(), "run.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(again).prompts.path == home / "prompts.txt"
    assert load_recipe(again).hash == recipe.hash
    absolute = f"prompts.path={elsewhere / 'prompts.txt'}"
    assert load_recipe(mine, [absolute]).prompts.path == elsewhere / "prompts.txt"


def test_an_override_reaches_into_nested_keys(own_parts, tmp_path):
    source = (
        "class Nested:\n"
        "    def __init__(self, inner): self.inner = inner\n"
        "    def score(self, images, prompts): ...\n"
    )
    own_parts(source, "nested_parts")
    text = "reward: {type: nested_parts.Nested, inner: {a: 1, b: 2}}"
    recipe = load_recipe(
        written(tmp_path, text), ["reward.inner.b=[3, 4]", "reward.inner.c.d=1e-3"]
    )
    assert only(recipe).inner == {"a": 1, "b": [3, 4], "c": {"d": 1e-3}}


def test_a_value_may_hold_an_equals_sign_or_be_no_yaml():
    overrides = ["prompts.type=text", "prompts.path=a=b.txt"]
    assert load_recipe("quickstart", overrides).prompts.path == Path.cwd() / "a=b.txt"
    overrides = ["prompts.type=text", "prompts.path=@[odd"]
    assert load_recipe("quickstart", overrides).prompts.path == Path.cwd() / "@[odd"


def test_another_type_starts_from_its_own_defaults():
    """`size` and `start` of a window mean nothing to `every_step`; and back again."""
    recipe = load_recipe("quickstart", ["exploration.type=every_step"])
    assert recipe.resolved["exploration"] == {"type": "every_step", "share_noise": False}
    overrides = [
        "exploration.type=every_step", "exploration.type=window",
        "exploration.start=2",
    ]  # fmt: skip
    recipe = load_recipe("quickstart", overrides)
    assert (recipe.exploration.start, recipe.exploration.size) == (2, 3)
    assert recipe.exploration.move == "fixed"


def test_the_same_type_again_keeps_its_fields():
    recipe = load_recipe("flow_grpo", ["credit.type=terminal"])
    assert recipe.resolved == load_recipe("flow_grpo").resolved


@pytest.mark.parametrize(
    "override",
    [
        "run", "run=5", "run.=5", ".seed=5", "=", "run.seed", "runs.seed=1", "title=mine",
        "run.seed.more=1", "run.seed=fast", "run.seed=1.0", "run.sed=1", "optimizer.betas.0=1",
        "run.iterations=", "kernel.type=ode_", "kernel.type=[ode]",
    ],
)  # fmt: skip
def test_a_wrong_override_is_refused_in_one_line(override):
    with pytest.raises(RecipeError) as refused:
        load_recipe("quickstart", [override])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) > 20


# --- components of one's own ----------------------------------------------------------------------

PARTS = '''
from pydantic import BaseModel
from entroflow.component import Component
from entroflow.rewards.shapes import ShapesReward

NUMBER = 5

class Typed(Component):
    """As the shipped components are."""
    scale: float = 2.0
    names: tuple[str, ...] = ("a", "b")
    def score(self, images, prompts): ...

class Loose(BaseModel):
    """Ignores what it does not know, as pydantic does by default."""
    scale: float = 2.0
    def score(self, images, prompts): ...

class Named(Component):
    type: str = "named"
    scale: float = 2.0
    def score(self, images, prompts): ...

class Child(ShapesReward):
    """A shipped component, slightly changed."""

class Plain:
    """Has what the protocols of all sections ask for."""
    minibatches = epochs = 1
    sampled_with, needs, compares, keeps, needs_stochastic_steps = "live", (), (), (), False

    def __init__(self, scale, offset=0):
        if scale == "bad":
            raise RuntimeError("no such scale")
        self.scale, self.offset = scale, offset

    def build(self): ...
    batch = sizes = plan = std = mean = score = complete = advantages = run = build
    examples = terms = clip = diagnostics = faults = build

def function(images, prompts, metadata):
    return [0.0] * len(images)
'''


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """Write a module beside the recipe, in the current folder: (source, name).

    It is forgotten after the test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    names = []

    def write(source, name):
        names.append(name)
        (tmp_path / f"{name}.py").write_text(source)

    yield write
    for name in names:
        sys.modules.pop(name, None)


numbers = itertools.count()


@pytest.fixture
def parts(own_parts):
    """Name of a module with `PARTS` beside the recipe; each test has another name."""
    name = f"own_parts_{next(numbers)}"
    own_parts(PARTS, name)
    return name


def own(tmp_path, fields, section="reward", **options):
    return load_recipe(written(tmp_path, f"{section}: {fields}"), **options)


def test_a_typed_class_beside_the_recipe(tmp_path, parts):
    recipe = own(tmp_path, f"{{type: {parts}.Typed, names: [c]}}")
    assert type(only(recipe)).__name__ == "Typed"
    assert (only(recipe).scale, only(recipe).names) == (2.0, ("c",))
    expected = {"type": f"{parts}.Typed", "scale": 2.0, "names": ["c"]}
    assert recipe.resolved["reward"] == expected
    assert_same(recipe, reread(recipe, tmp_path))
    other = own(tmp_path, f"{{type: {parts}.Typed, names: [d]}}")
    assert other.hash != recipe.hash


def test_a_plain_class_beside_the_recipe(tmp_path, parts):
    recipe = own(tmp_path, f"{{type: {parts}.Plain, scale: [1, 2]}}")
    assert (only(recipe).scale, only(recipe).offset) == ([1, 2], 0)
    assert recipe.resolved["reward"] == {"type": f"{parts}.Plain", "scale": [1, 2]}
    assert_same(recipe, reread(recipe, tmp_path))


def test_a_function_beside_the_recipe_is_a_reward(tmp_path, parts):
    recipe = own(tmp_path, f"{{type: {parts}.function}}")
    assert isinstance(only(recipe), FunctionReward)
    assert only(recipe).function is sys.modules[parts].function
    assert_same(recipe, reread(recipe, tmp_path))


@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in PLAIN])
def test_any_chosen_section_takes_a_component_of_ones_own(tmp_path, parts, section):
    recipe = load_recipe(written(tmp_path, f"{section}: {{type: {parts}.Plain, scale: 1}}"))
    assert component_of(recipe, section).scale == 1
    assert_same(recipe, reread(recipe, tmp_path))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("{{type: {0}.Typed, scal: 1}}", "reward: unknown key 'scal'; did you mean 'scale'?"),
        ("{{type: {0}.Typed, scale: big}}", "reward.scale: input should be a valid number"),
        ("{{type: {0}.Plain, scale: 1, ofset: 1}}", "unexpected keyword argument 'ofset'"),
        ("{{type: {0}.Plain}}", "missing a required argument: 'scale'"),
        ("{{type: {0}.Plain, scale: 1, 5: 1}}", "reward: "),
        ("{{type: {0}.function, scale: 1}}", "a function takes no keys, but ['scale']"),
        ("{{type: {0}.Plian}}", "has no 'Plian'; did you mean 'Plain'?"),
        ("{{type: {0}.NUMBER}}", "NUMBER is neither a class nor a function"),
        ("{{type: {0}.Plain, scale: bad}}", "Plain raised RuntimeError: no such scale ("),
        ("{{type: collections.Counter}}", "collections.Counter is not for reward: it has no score"),
        ("{{type: no_such_module.Reward}}", "can't import 'no_such_module'"),
        ("{{type: '{0}.'}}", "has no ''"),
    ],
)
def test_a_wrong_component_of_ones_own_is_refused(tmp_path, parts, fields, said):
    with pytest.raises(RecipeError) as refused:
        own(tmp_path, fields.format(parts))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def score(:", r"raised SyntaxError: .*\(own_module.py, line 1\)"),
        ("\nx = 1 / 0", r"raised ZeroDivisionError: division by zero \(.*own_module.py, line 2\)"),
        ("from json import jason", "raised ImportError: cannot import name 'jason'"),
        ("\nLIMIT = int('abc')", r"raised ValueError: .*\(.*own_module.py, line 2\)"),
        (
            "\n\nimport no_such_dependency",
            r"the import of 'own_module' raised ModuleNotFoundError: .*own_module.py, line 3\)",
        ),
        ("import json\njson.loads('{')", r"raised JSONDecodeError: .*own_module.py, line 2\)"),
    ],
)
def test_a_module_that_can_not_be_imported_is_refused_with_its_reason(
    tmp_path, own_parts, source, said
):
    own_parts(source, "own_module")
    with pytest.raises(RecipeError, match=said) as refused:
        own(tmp_path, "{type: own_module.score}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in PLAIN])
def test_what_is_not_for_a_section_is_refused(tmp_path, section):
    """What its protocol asks for is missing, and would be missed only while training."""
    with pytest.raises(RecipeError, match=f"Counter is not for {section}: it has no "):
        own(tmp_path, "{type: collections.Counter}", section)


def test_the_users_modules_come_last_and_those_beside_the_recipe_first(
    tmp_path, own_parts, monkeypatch
):
    """A file of the user's must not take the place of an installed module, nor the current folder
    that of the recipe's.
    """
    own_parts("def score(images, *_): return 'beside'", "own_module")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "own_module.py").write_text("def score(images, *_): return 'elsewhere'")
    monkeypatch.chdir(elsewhere)
    before = list(sys.path)
    # What was loaded before changes nothing.
    load_recipe("quickstart")
    recipe = own(tmp_path, "{type: own_module.score}", trust=True)
    assert only(recipe).function(None) == "beside"
    assert sys.path[-2:] == [str(tmp_path), str(elsewhere)]
    assert sys.path[:-2] == [place for place in before if place in sys.path[:-2]]


def test_a_module_beside_the_recipe_is_not_mistaken_for_another_of_its_name(
    tmp_path, own_parts, monkeypatch
):
    """Installed, of Python itself, or imported before from the folder of another recipe."""
    for name in ("queue", "sys", "scipy"):
        (tmp_path / f"{name}.py").write_text("def score(images, *_): ...")
        with pytest.raises(RecipeError, match=f"{name}'? .*(not the one in|has no 'score')"):
            own(tmp_path, f"{{type: {name}.score}}")
    own_parts("def score(images, *_): ...", "own_module")
    own(tmp_path, "{type: own_module.score}")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("score", "another"):
        (other / "own_module.py").write_text(f"def {name}(images, *_): ...")
        with pytest.raises(RecipeError, match=r"called 'own_module', .* and .*other") as one:
            own(other, f"{{type: own_module.{name}}}")
        assert "one process can load only one of them; rename one" in str(one.value)


def test_a_function_is_no_component_of_another_section(tmp_path, parts):
    with pytest.raises(RecipeError, match="not for credit: it has no complete, advantages"):
        own(tmp_path, f"{{type: {parts}.function}}", "credit")


# --- nothing is dropped in silence ----------------------------------------------------------------


@pytest.mark.parametrize("value", ["[]", "0", "false", "''"])
def test_a_section_that_is_no_mapping_is_refused(tmp_path, value):
    with pytest.raises(RecipeError, match="run must hold keys and values"):
        load_recipe(written(tmp_path, f"run: {value}"))


def test_an_unknown_key_of_a_class_that_ignores_it_is_refused(tmp_path, parts):
    with pytest.raises(RecipeError, match="scal"):
        own(tmp_path, f"{{type: {parts}.Loose, scal: 1}}")


@pytest.mark.parametrize("name", ["Named", "Child"])
def test_a_class_with_a_field_called_type_reads_back_as_itself(tmp_path, parts, name):
    """`Child` inherits the `type` of a shipped reward, which must not be loaded in its place."""
    recipe = own(tmp_path, f"{{type: {parts}.{name}}}")
    assert_same(recipe, reread(recipe, tmp_path))


def test_naming_the_type_that_a_file_leaves_out_keeps_its_fields(tmp_path):
    text = "credit: {scale: global}"
    recipe = load_recipe(written(tmp_path, text), ["credit.type=terminal"])
    assert recipe.credit.scale == "global"


def test_an_override_before_its_type_counts():
    recipe = load_recipe("flow_grpo", ["exploration.size=2", "exploration.type=window"])
    assert recipe.exploration.size == 2


def test_an_empty_title_is_no_title(tmp_path):
    recipe = load_recipe(written(tmp_path, "title:"))
    assert recipe.title == ""


def test_a_dotted_path_without_a_module_is_refused():
    with pytest.raises(RecipeError, match=r"reward\.type: can't import"):
        build_recipe({"reward": {"type": ".reward"}})


@pytest.mark.parametrize("budget", ["1e30", "10000000000000000M", "9223372036854775808"])
def test_a_budget_that_a_recipe_can_not_hold_is_refused(budget):
    """A recipe is written into the run's folder, and must be readable there."""
    with pytest.raises(RecipeError, match=r"budget.* at most 9223372036854775807|64 bits"):
        load_recipe("quickstart", [f"run.budget={budget}"])


def test_a_large_budget_is_read_back_as_it_is(tmp_path):
    recipe = load_recipe("quickstart", ["run.budget=9e18"])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml").run.budget == 9 * 10**18


def test_a_seed_too_large_for_the_noise_is_refused():
    with pytest.raises(RecipeError, match=r"run\.seed"):
        build_recipe({"run": {"seed": 2**63}})


def test_betas_outside_of_0_and_1_are_refused():
    with pytest.raises(RecipeError, match=r"optimizer\.betas"):
        build_recipe({"optimizer": {"betas": [0.9, 1.0]}})


def test_a_component_in_the_current_folder_is_found(tmp_path, parts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart", [f"reward.type={parts}.function"])
    assert isinstance(only(recipe), FunctionReward)


def test_objects_of_the_caller_take_the_place_of_sections(tmp_path):
    """They are named by where they come from, and what the file says there is not even built."""

    class Own:
        def score(self, images, prompts): ...

    mapping = {"reward": {"type": "no_such_module.Reward"}, "run": {"seed": 5}}
    own = Own()
    recipe = build_recipe(mapping, given={"reward": own})
    assert only(recipe) is own
    assert recipe.run.seed == 5
    assert recipe.resolved["reward"]["type"].startswith(f"{__name__}.")
    function = test_titles_name_every_shipped_recipe
    recipe = build_recipe(mapping, given={"reward": function})
    home = {"type": f"{__name__}.test_titles_name_every_shipped_recipe"}
    assert recipe.resolved["reward"] == home
    with pytest.raises(RecipeError, match="no_such_module"):
        build_recipe(mapping)


def test_a_class_that_does_not_say_what_it_takes_is_refused(tmp_path, own_parts):
    """As those written in C."""
    own_parts("class Odd:\n    __signature__ = 5\n    def score(self, *_): ...\n", "odd_part")
    with pytest.raises(RecipeError, match=r"odd_part\.Odd does not say which keys it takes"):
        own(tmp_path, "{type: odd_part.Odd, scale: 1}")


def test_an_override_of_a_given_object_is_refused():
    """It could only be ignored."""
    with pytest.raises(RecipeError, match=r"reward\.value=strict: reward is given as an object"):
        load_recipe("quickstart", ["reward.value=strict"], {"reward": object()})


def test_one_component_needs_nothing_of_the_others(tmp_path):
    text = "reward: {type: no_such_module.Reward}\npolicy: {shift: 3, precision: fp32}"
    policy = load_component(written(tmp_path, text), "policy")
    assert (policy.shift, policy.precision) == (3.0, "fp32")
    assert load_component("flow_grpo", "credit") == load_recipe("flow_grpo").credit
    with pytest.raises(RecipeError, match=r"policy\.shift"):
        load_component(written(tmp_path, "policy: {shift: -1}"), "policy")
