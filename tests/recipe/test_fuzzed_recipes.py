"""Nearly right recipes: each is read, or refused in one line, whatever was done to it."""

from __future__ import annotations

import copy
import random
import resource
import time
from io import StringIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from entroflow.errors import RecipeError
from entroflow.recipe import load as image_recipes

VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**30, -(2**63), 0.0, -0.0, 1e-320,
    1e308, float("inf"), float("-inf"), float("nan"), "", " ", "null", "1", "1e-4", "yes", "[/]",
    "[bold]x",
    "../../x", "/", "/dev/zero", "~", "a\nb", "x" * 3000, "\u202e", "\U0001f600", "{images}", "%s",
    "shapes", "every_step", "mixture", "pairwise", "openai", "dataset", "jsonl", "text",
    "os.system", "sys.exit", "antigravity.fly", "subprocess.Popen", "torch.save", "torch.nn.Linear",
    "entroflow.cli.main.main", "entroflow.rewards.shapes.ShapesReward", "tiny_run.brightness",
    "tiny_run.Brightness", "tiny_run.Shift", "no.such", "a..b", ".a", "a.", "..", "[0]",
    [], [None], [0.9], [0.9, 0.95], [[[]]], ["a", 1, {}], {}, {"type": "shapes"}, {"": None},
    {"type": {"type": "x"}}, {"a": {"b": {"c": [1, 2, {"d": None}]}}}, {"rewards": {}},
    {"rewards": {"a": {"type": "shapes"}, "[/]": {"type": "jpeg_size"}}},
)  # fmt: skip
"""What a key may get for its value."""
TOKENS = (
    "&a ", "*a", "<<: *a", "<<: ", "!!int ", "!!bool ", "!!float ", "!!binary ", "!!timestamp ",
    "!!set ", "!!omap ", "!!python/name:os.system ", "!x ", "%YAML 1.1\n---\n", "%YAML 9.9\n",
    "---\n", "...\n", "? ", ": ", "- ", "[", "]", "{", "}", "|\n", ">-\n", "\t", "\r", "\x00",
    "\x1b[31m", "\ufeff", "\u2028", "\x85", "\ud800", '"', "'", "#", "@", "`", "= ", "2026-99-99",
    "2026-01-01", "0x" + "f" * 400, "9" * 5000, "1e999", ".inf", ".nan", "{a: " * 60, "\\",
    '"\\ud800"',
    '"\\0"', '"\\e[2J"', "&a [*a]", "[&b [x,x,x,x,x,x,x,x,x],*b,*b]", "1_0", "0o8", "08", "1:30:00",
)  # fmt: skip
"""What may stand anywhere in a text."""


def places(value, path=()):
    """The paths to all values that lie in lists and mappings."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def holder(mapping, path):
    for key in path[:-1]:
        mapping = mapping[key]
    return mapping


def with_values_changed(mapping, source):
    """A copy in which something stands where it does not belong, or is missing."""
    mapping = copy.deepcopy(mapping)
    for _ in range(source.randint(1, 3)):
        paths = list(places(mapping))
        if not paths:
            return mapping
        path = source.choice(paths)
        inside, key = holder(mapping, path), path[-1]
        other = source.choice(paths)
        match source.randrange(7):
            case 0:
                del inside[key]
            case 1:
                inside[key] = [inside[key]]
            case 2:
                inside[key] = copy.deepcopy(holder(mapping, other)[other[-1]])
            case 3 if isinstance(inside, dict):
                inside[str(other[-1])] = inside.pop(key)
            case 4 if isinstance(inside, dict):
                inside[source.choice(["type", "name", "found_in", "x" * 500, "a/b", "[/]"])] = (
                    source.choice(VALUES)
                )
            case _:
                inside[key] = source.choice(VALUES)
    return mapping


def with_text_changed(text, source):
    """A text of which some is lost, doubled, or in its place another."""
    for _ in range(source.randint(1, 3)):
        start = source.randint(0, len(text))
        end = min(len(text), start + source.choice([0, 0, 1, 3, 20]))
        token = source.choice([*TOKENS, "", text[start : start + 60], "\n", "  "])
        text = text[:start] + token + text[end:]
    return text


def as_text(mapping):
    out = StringIO()
    YAML().dump(mapping, out)
    return out.getvalue()


def overrides_of(mapping, source):
    """Changes as on the command line, of keys that are there."""
    sections = [path for path in places(mapping) if len(path) > 1]
    chosen = [source.choice(sections) for _ in range(source.choice([0, 0, 1, 2]))]
    values = [*TOKENS, *(str(value) for value in VALUES)]
    return [f"{'.'.join(map(str, path))}={source.choice(values)}" for path in chosen]


def check(load, text, overrides, folder):
    """Read a text with overrides; it is read, and reads back as itself, or refused in one line."""
    path = folder / "mine.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    start, recipe, refused = time.monotonic(), None, ""
    try:
        recipe = load(path, overrides)
    except RecipeError as error:
        refused = str(error)
    assert time.monotonic() - start < 30
    assert refused.isprintable()
    assert len(refused) < 5000
    if recipe is None:
        return False
    again = folder / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load(again, ()).hash == recipe.hash
    assert load(again, ()).to_yaml() == recipe.to_yaml()
    return True


def fuzzed(load, texts, cases, folder):
    """Check so many changed recipes; the number of those that were read all the same."""
    parsed = [YAML(typ="safe").load(text) for text in texts]
    read = 0

    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(seed=st.integers(0, 2**64))
    def one(seed):
        nonlocal read
        source = random.Random(seed)
        number = source.randrange(len(texts))
        if source.random() < 0.5:
            text = as_text(with_values_changed(parsed[number], source))
        else:
            text = with_text_changed(texts[number], source)
        read += check(load, text, overrides_of(parsed[number], source), folder)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one()
    # In kB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    return read


@pytest.mark.slow
def test_a_changed_image_recipe_is_read_or_refused(tmp_path):
    shipped = image_recipes.shipped_recipes()
    texts = [path.read_text(encoding="utf-8") for path in shipped.values()]
    texts += [image_recipes.load_recipe(name).to_yaml() for name in list(shipped)[::3]]
    assert fuzzed(image_recipes.load_recipe, texts, cases=2000, folder=tmp_path) > 5


@pytest.mark.slow
def test_a_changed_recipe_of_a_language_model_is_read_or_refused(tmp_path):
    pytest.importorskip("trl")
    from entroflow.llm import recipe as llm_recipes

    shipped = llm_recipes.LAYOUT.recipes
    texts = [path.read_text(encoding="utf-8") for path in shipped.values()]
    texts += [llm_recipes.load(name).to_yaml() for name in shipped]
    assert fuzzed(llm_recipes.load, texts, cases=500, folder=tmp_path) > 5
