"""The documentation: what is generated is up to date, and the code in it runs.

A block of a page is marked behind its language:
    python run           runs by itself
    python file=NAME     a module that is saved beside a recipe; the YAML block after it chooses it
    yaml recipe          a whole recipe
Unmarked Python blocks must compile.
"""

import importlib
import json
import math
import os
import re
import runpy
import shlex
import statistics
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from ruamel.yaml import YAML

import entroflow
from entroflow.cli import main as cli
from entroflow.llm import recipe as llm_recipe
from entroflow.recipe.load import build_recipe, load_recipe
from entroflow.shapes import grammar

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TINY = (
    "run.iterations=2", "prompts.per_iteration=2", "allocation.group_size=4", "sampling.steps=3",
    "exploration.size=1", "evaluation.images=2", "evaluation.steps=1",
    "evaluation.test_images=1",
)  # fmt: skip


def blocks_of(page):
    """The fenced blocks of a page that name a language."""
    text = page.read_text(encoding="utf-8")
    return [
        SimpleNamespace(
            language=match[1],
            mark=match[2].strip(),
            code=match[3],
            where=f"{page.name}:{text[: match.start()].count(chr(10)) + 1}",
        )
        for match in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PARTS = {
    module.mark.removeprefix("file="): (module, section)
    for module, section in pairwise(BLOCKS)
    if module.mark.startswith("file=")
}


def by_place(blocks):
    return pytest.mark.parametrize("block", blocks, ids=lambda block: block.where)


def yaml(text):
    return YAML(typ="safe", pure=True).load(text)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, in which modules can be found; nothing found there stays known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# --- pages ----------------------------------------------------------------------------------------


def test_the_recipe_reference_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs" / "build_recipe_reference.py"))
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == script["reference"](), "run python docs/build_recipe_reference.py"


def test_every_key_of_a_recipe_is_described():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    keys = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(keys) > 40
    assert not [line for line in keys if re.search(r"\|\s*\|", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(BLOCK, "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in anchors, target


def test_splits_of_the_shapes_world_have_the_sizes_that_are_written():
    page = (ROOT / "docs" / "shapes-world.md").read_text(encoding="utf-8")
    for skill in grammar.SKILLS:
        counts = [sum(map(len, grammar.split_forms(split)[skill])) for split in grammar.SPLITS]
        assert f"| `{skill}` | " + " | ".join(f"{n:,}" for n in counts) + " |" in page


def test_constants_of_the_shapes_world_have_the_values_that_are_written():
    page = (ROOT / "docs" / "shapes-world.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+(?:\.\w+)+)` \| ([\d.,]+)", page, re.MULTILINE)
    assert len(rows) > 5
    for path, value in rows:
        module, _, names = path.partition(".")
        found = importlib.import_module(
            f"entroflow.{'policies.' if module == 'pretrain' else ''}shapes.{module}"
        )
        for name in names.split("."):
            found = getattr(found, name)
        assert float(value.replace(",", "")) == found, path


# --- numbers --------------------------------------------------------------------------------------


def claims(name):
    return json.loads((ROOT / "docs" / "claims" / f"{name}.json").read_text(encoding="utf-8"))


def between(page, mark):
    """What stands between the marks of a table."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.partition(f"<!-- {mark} -->\n")[2].partition("\n<!-- end -->")[0]


def test_the_tables_of_methods_are_those_of_the_raw_results():
    script = runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))
    tables = script["tables"](claims("methods")["results"])
    marks = ("rates", "methods", "starts", "merging", "credit", "credit_rates", "credit_updates")
    for name in marks:
        assert between("methods.md", name) == tables.get(name, "Not measured yet."), name


@pytest.mark.parametrize(("benchmark", "page", "mark", "of", "choice", "arms"), [
    ("preferences", "rewards.md", "preferences", "pref_grpo", "compared", 4),
    ("aegpo", "attention.md", "aegpo", "aegpo", "best", 5),
    ("entropy", "language-models.md", "entropy", "entropy", "compared", 8),
])  # fmt: skip
def test_the_table_of_three_seeds_is_that_of_the_raw_results(
    monkeypatch, benchmark, page, mark, of, choice, arms
):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks" / f"{benchmark}.py"))
    chosen = script[choice](claims(of)["results"])
    assert len(chosen) == arms * 3
    assert between(page, mark) == script["table"](chosen)


def test_the_discriminator_is_centred_in_every_run():
    """As language-models.md says: within two standard errors, updates being independent."""
    for result in claims("entropy")["results"]:
        key = "discriminator/centred"
        values = [line[key] for line in result["curve"] if key in line]
        assert len(values) == 200
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert abs(statistics.mean(values)) < 2 * error, (result["arm"], result["seed"])


def test_what_measuring_attention_costs_is_that_of_the_raw_results():
    found = claims("attention")["ratios"]
    page = " ".join((ROOT / "docs" / "attention.md").read_text(encoding="utf-8").split())
    default, every = (found[name]["rollouts"]["median"] for name in ("default", "every layer"))
    assert (
        f"take {default:.3f} times as long with the default settings, {every:.3f} times with all "
        "four layers" in page
    )
    assert default < 1.05


def test_the_table_of_memory_is_that_of_the_raw_results():
    pytest.importorskip("diffusers")
    script = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
    assert between("real-models.md", "memory") == script["table"](claims("memory")["results"])


def test_the_table_of_the_readme_is_that_of_the_raw_results():
    """Runs of the recipe as it is: three seeds and the control."""
    rows = re.findall(
        r"^\| (\d|rewards shuffled) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M
    )
    assert [name for name, _ in rows] == ["0", "1", "2", "rewards shuffled"]
    runs = [run for run in claims("quickstart") if len(run["overrides"]) == 1 + run["control"]]
    for name, cells in rows:
        control = not name.isdigit()
        (run,) = (
            r
            for r in runs
            if r["control"] == control and r["seed"] == (0 if control else int(name))
        )
        models, gain = run["test"]["models"], run["test"]["gain"]
        score = {model: models[model]["scores"]["overall"]["value"] for model in models}
        monitors = [
            models["tuned"]["monitors"][m] / models["base"]["monitors"][m]
            for m in ("texture", "diversity")
        ]
        wanted = [
            f"{score['base']:.2f}", f"{score['tuned']:.2f}",
            f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]",
            *(f"{ratio:.1f} ×" for ratio in monitors), f"{score['base_guided']:.2f}",
        ]  # fmt: skip
        assert [cell.strip() for cell in cells.split("|")] == wanted, name


def test_the_cost_of_completions_is_that_of_the_raw_results():
    found = claims("completions")
    page = " ".join((ROOT / "docs" / "credit.md").read_text(encoding="utf-8").split())
    evaluations, time = found["weighted_evaluations_ratio"], found["time_ratio"]
    assert (
        f"takes {evaluations:.2f} times the weighted evaluations of one of `flow_grpo`, and "
        f"{time:.2f} times as long without scoring and decoding" in page
    )
    turning = found["medians"]["tp_grpo"]
    share = turning["scoring"] / turning["seconds"]
    assert f"Scoring ten images a rollout instead of one added {share:.0%}." in page
    assert found["time_over_evaluations"] < 1.15


# --- blocks ---------------------------------------------------------------------------------------


@by_place([block for block in BLOCKS if block.language == "python"])
def test_python_compiles(block):
    assert block.mark in ("", "run") or block.mark.startswith("file="), block.mark
    compile(block.code, block.where, "exec")


@by_place([block for block in BLOCKS if block.mark == "run"])
def test_marked_python_runs(block, elsewhere):
    exec(compile(block.code, block.where, "exec"), {"__name__": "block"})


@by_place([block for block in BLOCKS if block.language == "yaml"])
def test_yaml_is_a_recipe_or_sections_of_one(block, tmp_path):
    mapping = yaml(block.code)
    if block.mark == "recipe":
        build_recipe(mapping)
    elif block.where.startswith("language-models.md"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block.code, encoding="utf-8")
        llm_recipe.load(path)
    else:
        assert mapping.keys() <= load_recipe("quickstart").resolved.keys()


COMMANDS = [
    pytest.param(words[1:], id=f"{block.where} {line}")
    for block in BLOCKS
    if block.language == "sh"
    for line in block.code.splitlines()
    if (words := shlex.split(line.partition(">")[0], comments=True))[:1] == ["entroflow"]
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_take_what_they_are_given(words):
    """Options as the command line parses them, and overrides as the recipe does."""
    command, path = typer.main.get_command(cli.app), []
    while hasattr(command, "commands"):
        name, *words = words
        path.append(name)
        command = command.commands[name]
    given = command.make_context(name, words).params
    if path[-1] in ("train", "doctor"):
        of_llm = path[0] == "llm"
        overrides = [word for word in given["arguments"] or () if "=" in word]
        recipes = [word for word in given["arguments"] or () if "=" not in word]
        otherwise = "countdown" if of_llm else "quickstart"
        name = recipes[0] if recipes and not recipes[0].endswith(".yaml") else otherwise
        (llm_recipe.load if of_llm else load_recipe)(name, overrides)


def test_every_command_is_shown():
    shown = {words[0] for words in (param.values[0] for param in COMMANDS)}
    assert shown == set(typer.main.get_command(cli.app).commands)


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_ones_own_trains(name, elsewhere, capsys, caplog):
    module, section = PARTS[name]
    (elsewhere / name).write_text(module.code)
    # Of eight images none may be strictly right; partial credit always leaves something to learn.
    graded = {"reward": {"type": "shapes", "value": "graded"}}
    recipe = {**yaml(load_recipe("quickstart").to_yaml()), **graded, **yaml(section.code)}
    with (elsewhere / "mine.yaml").open("w") as file:
        YAML().dump(recipe, file)
    run = entroflow.train("mine.yaml", TINY, run="run", stop_after=1)
    kept = load_recipe(run.path / "recipe.yaml").resolved
    for key, fields in yaml(section.code).items():
        assert fields.items() <= kept[key].items()
    last = run.metrics()[-1]
    assert last["iteration"] == 1
    assert last["reward/failed"] == 0
    assert last["policy/gradient_norm"] > 0
    assert "torn" not in capsys.readouterr().err + caplog.text
    if "objective" not in yaml(section.code):
        assert last["policy/ratio_max_deviation"] < 1e-6
        assert last["policy/kl"] < 1e-6


def test_every_part_that_is_explained_is_tested():
    sections = [next(iter(yaml(section.code))) for _, section in PARTS.values()]
    assert sorted(sections) == sorted(
        [
            "reward",
            "reward",
            "exploration",
            "credit",
            "objective",
            "kernel",
            "policy",
            "prompts",
        ]
    )


def test_the_example_of_an_own_reward_runs(elsewhere, monkeypatch, capsys):
    example = ROOT / "examples" / "own_reward.py"
    monkeypatch.setattr(sys, "argv", [str(example), *TINY])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert len(re.findall(r"^iteration +\d+  blue [+-]0\.\d{4}$", said, re.MULTILINE)) == 2
    assert len(os.listdir("runs")) == 1


def test_the_changelog_begins_with_the_version_of_the_package():
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if "## " in line)
    assert first.removeprefix("## ").split()[0] == entroflow.__version__


def test_the_version_is_written_in_one_place():
    """From where the package's metadata are made, too."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    source = (ROOT / settings["tool"]["hatch"]["version"]["path"]).read_text()
    assert f'__version__ = "{entroflow.__version__}"\n' in source
