"""Write docs/recipes.md from the components themselves: python docs/build_recipe_reference.py."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML

from entroflow.recipe.load import load_recipe, shipped_recipes
from entroflow.recipe.registry import COMPONENTS, PLAIN, SECTIONS
from entroflow.recipe.text import TEXTS

PAGE = Path(__file__).with_name("recipes.md")
WIDTH = 100

QUESTIONS = {
    "policy": "Which model is trained?",
    "prompts": "Which prompts does an iteration train on?",
    "allocation": "How many rollouts does each prompt get?",
    "exploration": "Which steps are random, from which states, over which sigma interval?",
    "kernel": "From which Gaussian is the next state drawn?",
    "reward": "How good is each image?",
    "judge": "Which of two images of a prompt is better? A part of `reward: {type: pairwise}`.",
    "credit": "Which transition earns how much?",
    "objective": "Which gradient follows?",
    "evaluation": "How good are the weights, on prompts that training never sees?",
}

INSIDE = {"judge": "reward"}
"""Kind of part that is no section -> the section it stands in."""

INTRODUCTION = """\
# Recipes

<!-- Written by docs/build_recipe_reference.py from the components. Edit those, then run it. -->

A recipe is the only input of a run: one YAML file of UTF-8, at most 1 MB large, with one entry per
section. A section names a
component by its `type` and sets the keys of that component. What is left out has the default shown
below. This is a whole recipe:

```yaml recipe
reward: {type: shapes, value: strict}
objective: {type: clipped, clip_total: 2.0}
run: {iterations: 50}
```

Nothing is dropped in silence. An unknown section, key or type is an error that names the nearest
known one, and so is a value of the wrong type or out of range (`"8"` is a string, not a number).

```sh
entroflow recipes                  # list the shipped recipes
entroflow recipes quickstart       # print one with every key written out
entroflow train mine.yaml          # train by a file
```

Every run folder holds its recipe with all keys written out, as `recipe.yaml`; `load_recipe` reads
it back. The recipe's hash covers all sections, but of `run` only where it ends: runs that differ in
the seed share it. It covers the dotted path of a part of your own, not the code behind it.

## Overrides

`section.key=value` changes one key, on the command line or from Python:

```sh
entroflow train quickstart optimizer.learning_rate=3e-5 run.seed=1
entroflow train flow_grpo exploration.type=window exploration.size=4
entroflow train quickstart objective.clip_total=null objective.clip_range=1e-4
```

```python run
import entroflow

recipe = entroflow.load_recipe("quickstart", ["optimizer.learning_rate=3e-5", "run.seed=1"])
assert recipe.optimizer.learning_rate == 3e-5
```

- Overrides apply to what the file says, before defaults are filled in; of two for one key the last
  counts.
- The value is YAML: `null`, `true`, `1e-4`, `[0.9, 0.95]`. Quote it where the shell would split it.
- A new `type` clears what the file says of the other keys of its section. Types are set first,
  wherever they stand, so keys of the new type can be set beside it.
- `entroflow train --resume RUN` takes overrides of `run`, but not of `run.seed`, of `monitors`, and
  of [paths](#paths-and-names) to what was moved: any other key would make it another run.

## Dotted paths

Where a section has types, `type` may also be the dotted path of a class or function of your own, as
in `reward: {type: my_rewards.blue}`. The module must be importable: it lies beside the recipe file,
in the current folder, or is installed. What becomes of it depends on what the path names:

- a pydantic model (derive it from `entroflow.component.Component`): the keys are its fields, with
  their defaults, types and ranges, as for the shipped components below. A field `type` keeps its
  default, for that key holds the path;
- any other class: called with the keys, which must fit its signature; their values are not checked;
- an object that has the methods of the section: used as it is, and takes no keys;
- in the section `reward`, a function or whatever else can be called with images, prompts and
  metadata: used as the reward itself, and takes no keys.

A class is called only if it has the methods of the section, and a function is not called to make a
component; modules of Python itself are not even imported. Still a recipe that names a module runs
the code in it. **Read a recipe, and the modules beside it, before you run a stranger's.** What lies
beside a recipe elsewhere than below the current folder is imported only with `--trust` (from
Python: `trust=True`), or after you are asked: see [Security](security.md). `entroflow recipes FILE`
imports nothing of yours.

`sampling`, `scoring`, `attention`, `optimizer`, `monitors` and `run` have no types.
[Extending](extending.md) shows a working part of your own for each of the other sections that
need one.

## Paths and names

Paths are made absolute when a recipe is read: `~` is the home, `..` is resolved and symbolic links
are not. A relative path in a recipe file is looked for beside that file, then in the current
folder; one in an override in the current folder, as the shell that you type it in does, then beside
the recipe. What is in neither is taken to be in the current folder. The run's recipe holds the path
that was found, so the run resumes from anywhere.

Some keys take a path or the name of something on a hub (`policy.model`, `model` of the reward
`clip`, `name` of the prompts `dataset`; of language models `model.path` and `task.path`). What is
there is a path; so is what begins with `.`, `/` or `~`, holds more than one `/`, or ends in
`.jsonl`, `.csv` or another suffix of [prompts](#prompts). A data set is never looked for under a
bare word: its name on a hub has the form `user/name`, and not even that where there is a folder
`user`. Local data are read anew every time, not from the cache of `datasets`.

A name is not its content. Every checkpoint holds digests of the prompts (texts, metadata and
order), the held-out prompts, and the templates and weights that rewards read from files;
`--resume` refuses a run in which one of them has changed, and `compare` makes its results anew.

The hash of a recipe has of each path the last name only. So it stays the same however a path is
spelt, and wherever a project is moved or copied to; two files of one name in two folders have one
hash, and are told apart by their digests.

What was moved since a run began is named when it is resumed, and recipe.yaml holds its new place
from then on:

```sh
entroflow train --resume runs/mine policy.weights=new/model.safetensors
entroflow llm train --resume runs/qwen model.path=new/model
```

This holds for all keys that take a path, as `prompts.path`, `evaluation.path`, `policy.lora_start`
or `task.path` of language models. Other content is refused; of files that no digest tells (the
model of the reward `clip`, a path of a part of your own that is not in its `read_from`) you are
warned, and `compare` keeps results by where they lie.
"""


def reference() -> str:
    """The page."""
    parts = [INTRODUCTION, _shipped(), "## Sections\n", _contents()]
    for section in _kinds():
        if section in PLAIN:
            parts.append(f"## {section}\n\n{_component(PLAIN[section])}")
            continue
        parts.append(f"## {section}\n\n{QUESTIONS[section]}\n")
        for position, (name, path) in enumerate(COMPONENTS[section].items()):
            default = " (default)" if position == 0 else ""
            parts.append(f"### type: {name}{default}\n")
            parts.append(_component(_imported(path)))
    parts.append(_texts())
    return "\n".join(parts)


def _kinds() -> list[str]:
    """The sections, and after its section each kind of part that stands inside of one."""
    kinds = list(SECTIONS)
    for kind in COMPONENTS:
        if kind not in kinds:
            kinds.insert(kinds.index(INSIDE[kind]) + 1, kind)
    return kinds


def _shipped() -> str:
    lines = ["## Shipped recipes\n"]
    for name in shipped_recipes():
        recipe = load_recipe(name)
        paper = f" [{recipe.paper}]" if recipe.paper else ""
        text = f"- `{name}`: {recipe.title}{paper}. {recipe.notes}".strip()
        lines.append(_wrapped(text, subsequent_indent="  "))
    return "\n".join(lines) + "\n"


def _contents() -> str:
    return _wrapped(" · ".join(f"[{section}](#{section})" for section in _kinds())) + "\n"


def _texts() -> str:
    names = ", ".join(f"`{text}`" for text in TEXTS)
    return (
        "## Texts\n\n"
        + _wrapped(
            f"{names} and `name` may stand beside the sections. They are for people: they change "
            "no number, are no part of the hash, and have no overrides. The name is that of the "
            "file if none is given; a run without a folder of its own goes to `runs/NAME-TIME`."
        )
        + "\n"
    )


def _component(component: type[BaseModel]) -> str:
    """The docstring of a component, and a table of its keys."""
    paragraphs = (inspect.getdoc(component) or "").split("\n\n")
    text = "\n\n".join(_paragraph(part) for part in paragraphs)
    schema = component.model_json_schema()
    required = schema.get("required", [])
    table = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for key, found in schema["properties"].items():
        if key == "type":
            continue
        nested = getattr(component, "parts", {}).get(key)
        default = "required" if key in required else _code(found.get("default", {}))
        default = "–" if nested else default
        values = f"keys of a [{nested}](#{nested})" if nested else _values(found)
        cells = (f"`{key}`", default, values, found.get("description", ""))
        table.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if len(table) == 2:
        return f"{text}\n\nNo keys.\n"
    return f"{text}\n\n" + "\n".join(table) + "\n"


def _paragraph(text: str) -> str:
    """A paragraph in lines of `WIDTH`; entries of a list begin on lines of their own."""
    first, *entries = re.split(r"^- ", text, flags=re.MULTILINE)
    lines = [_wrapped("- " + " ".join(entry.split()), subsequent_indent="  ") for entry in entries]
    return "\n".join(([_wrapped(" ".join(first.split()))] if first else []) + lines)


def _values(schema: dict[str, Any]) -> str:
    """The type and range of a key, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(_code(value) for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return _list_values(schema)
    if "additionalProperties" in schema:
        each = schema["additionalProperties"]
        return f"names, each with {'any value' if each is True else f'a {_values(each)}'}"
    if schema["type"] == "null":
        return "`null`"
    kind = "path" if schema.get("format") == "path" else schema["type"]
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema]
    return " ".join([kind, ", ".join(limits)]).strip()


def _list_values(schema: dict[str, Any]) -> str:
    if "prefixItems" in schema:
        each = _values(schema["prefixItems"][0])
        return f"list of {len(schema['prefixItems'])}, each: {each}"
    least = f", at least {schema['minItems']}" if schema.get("minItems") else ""
    kind, _, limits = _values(schema["items"]).partition(" ")
    return " ".join(filter(None, (f"list of {kind}s", limits))) + least


def _code(value: object) -> str:
    """A value as a recipe would spell it."""
    plain = isinstance(value, str) and YAML(typ="safe", pure=True).load(value) == value
    if isinstance(value, list):
        return "`[" + ", ".join(_code(entry).strip("`") for entry in value) + "]`"
    return f"`{value}`" if plain else f"`{json.dumps(value)}`"


def _wrapped(text: str, subsequent_indent: str = "") -> str:
    """Text in lines of `WIDTH`; none begins with an operator, which Markdown would take for a list.

    Formulas keep their spaces by standing as one word while lines are broken.
    """
    glued = re.sub(r" ([-+=*/<>]) ", "\0\\1\0", text)
    lines = textwrap.fill(
        glued,
        WIDTH,
        subsequent_indent=subsequent_indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace("\0", " ")


def _imported(path: str) -> type[BaseModel]:
    module, _, name = path.rpartition(".")
    component: type[BaseModel] = getattr(import_module(module), name)
    return component


def main() -> None:
    """Write the page, or with --check only say whether it is up to date."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit("usage: python docs/build_recipe_reference.py [--check]")
    page = reference()
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE.name} is out of date; run python docs/build_recipe_reference.py")


if __name__ == "__main__":
    main()
