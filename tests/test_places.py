"""Where what a recipe names lies: made absolute when it is read, whatever the current folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from entroflow.cli.main import main
from entroflow.component import Component
from entroflow.data_sets import load_data_set, read_data_set
from entroflow.errors import InputError
from entroflow.llm import recipe as llm_recipes
from entroflow.places import PathOrName, Places, with_override, without_folders
from entroflow.recipe.identity import identity_of
from entroflow.recipe.load import build_recipe, load_recipe
from entroflow.recipe.registry import SHIPPED

DATA = PathOrName(("json",), in_folders=True)
MODEL = PathOrName()


@pytest.fixture
def laid_out(tmp_path, monkeypatch):
    """A folder of a recipe, a current folder and a home, with files in them."""
    for name in ("recipe/models/sd", "recipe/json", "here/models", "home/data", "here/owner"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("recipe/both.txt", "here/both.txt", "here/only.txt", "home/data/mine.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize(("given", "wanted"), [
    ("both.txt", "recipe/both.txt"),
    ("only.txt", "here/only.txt"),
    ("none.txt", "here/none.txt"),
    ("~/data/mine.jsonl", "home/data/mine.jsonl"),
    ("~/new", "home/new"),
    ("~nobody-at-all/new", "here/~nobody-at-all/new"),
])  # fmt: skip
def test_a_path_is_beside_the_recipe_or_in_the_current_folder(laid_out, given, wanted):
    assert Places(laid_out / "recipe").path(Path(given)) == laid_out / wanted
    assert Places(laid_out / "recipe").path(laid_out / "x") == laid_out / "x"


@pytest.mark.parametrize("of", [DATA, MODEL])
@pytest.mark.parametrize(("given", "wanted"), [
    ("models/sd", "recipe/models/sd"),
    ("owner", "here/owner"),
    ("~/data", "home/data"),
    ("~/gone", "home/gone"),
    ("./gone", "here/gone"),
    ("../gone", "gone"),
    ("./models/../gone", "here/gone"),
    ("a/b/c", "here/a/b/c"),
    ("gone.csv", "here/gone.csv"),
])  # fmt: skip
def test_what_can_be_a_path_alone_becomes_one(laid_out, given, wanted, of):
    assert Places(laid_out / "recipe").path_or_name(given, of) == str(laid_out / wanted)


@pytest.mark.parametrize("of", [DATA, MODEL])
@pytest.mark.parametrize("given", ["user/name", "bare", "org/Model-3.5_x", "hf://datasets/a/b"])
def test_names_stay(laid_out, given, of):
    assert Places(laid_out / "recipe").path_or_name(given, of) == given


def test_a_word_of_a_component_is_no_path_and_a_folder_makes_one(laid_out):
    places = Places(laid_out / "recipe")
    assert places.path_or_name("json", DATA) == "json"
    assert places.path_or_name("json", MODEL) == str(laid_out / "recipe/json")
    assert places.path_or_name("models/gone", DATA) == str(laid_out / "here/models/gone")
    assert places.path_or_name("models/gone", MODEL) == "models/gone"


def test_what_an_override_names_is_in_the_current_folder_first(laid_out):
    places = Places(laid_out / "recipe", overridden=True)
    assert places.path(Path("both.txt")) == laid_out / "here/both.txt"
    assert places.path_or_name("models", MODEL) == str(laid_out / "here/models")
    assert places.path_or_name("models/sd", MODEL) == str(laid_out / "recipe/models/sd")
    assert places.pattern("bo*.txt") == str(laid_out / "here/bo*.txt")
    assert places.path(Path("none.txt")) == laid_out / "here/none.txt"


def test_overrides_are_known_by_key():
    keys = with_override({}, ["reward", "files", "a"])
    places = Places(None, keys).within("reward").within("files")
    assert places.within("a").overridden is True
    assert places.within("b").overridden is False
    assert Places(None, with_override(keys, ["reward"])).within("reward").overridden is True
    assert with_override(True, ["deeper"]) is True


def test_a_path_is_plain_and_links_stay(laid_out):
    """`..` behind a link leads out of the folder that the link leads to."""
    places = Places(laid_out / "recipe")
    (laid_out / "far/data").mkdir(parents=True)
    (laid_out / "far/x.txt").write_text("far")
    (laid_out / "recipe/link").symlink_to(laid_out / "far/data")
    assert places.path(Path("models/../both.txt")) == laid_out / "recipe/both.txt"
    assert places.path(Path("../here/./only.txt")) == laid_out / "here/only.txt"
    assert places.path(Path("link")) == laid_out / "recipe/link"
    assert places.path(Path("link/../x.txt")).read_text() == "far"


class Named(Component):
    one: Path
    several: tuple[Path, ...] = ()
    by_name: dict[str, list[Path]] = {}  # noqa: RUF012
    text: str = "both.txt"


def test_paths_in_lists_and_mappings_are_found(laid_out):
    named = Named(
        one=Path("both.txt"), several=(Path("only.txt"),), by_name={"x": [Path("~/new")]}
    ).placed(Places(laid_out / "recipe"))
    assert named == Named(
        one=laid_out / "recipe/both.txt", several=(laid_out / "here/only.txt",),
        by_name={"x": [laid_out / "home/new"]},
    )  # fmt: skip


def test_of_a_mapping_only_what_an_override_set_is_looked_for_here(laid_out):
    named = Named(one=Path("both.txt"), by_name={"x": [Path("both.txt")], "y": [Path("both.txt")]})
    placed = named.placed(Places(laid_out / "recipe", {"by_name": {"y": True}}))
    assert placed.one == laid_out / "recipe/both.txt"
    assert placed.by_name == {
        "x": [laid_out / "recipe/both.txt"], "y": [laid_out / "here/both.txt"],
    }  # fmt: skip


def test_paths_of_overrides_are_those_of_a_shell(laid_out):
    """Those of the file lie beside it, as before."""
    file = laid_out / "recipe" / "mine.yaml"
    file.write_text(
        "prompts: {type: text, path: both.txt}\n"
        "evaluation: {type: reward, path: both.txt}\n"
        "monitors: {rewards: {a: {type: clip, model: models}, b: {type: clip, model: models}}}\n"
    )
    recipe = load_recipe(file, ["prompts.path=./both.txt", "monitors.rewards.b.model=models"])
    assert recipe.prompts.path == laid_out / "here/both.txt"
    assert recipe.evaluation.path == laid_out / "recipe/both.txt"
    assert recipe.monitors.rewards["a"].reward.model == str(laid_out / "recipe/models")
    assert recipe.monitors.rewards["b"].reward.model == str(laid_out / "here/models")
    data = ["prompts.type=dataset", "prompts.name=json", "prompts.data_files=[both.txt]"]
    assert load_recipe(file, data).prompts.data_files == (str(laid_out / "here/both.txt"),)


def test_the_hash_does_not_depend_on_the_spelling_or_place_of_files(laid_out, monkeypatch):
    for project in ("one", "other/place"):
        folder = laid_out / project
        (folder / "data").mkdir(parents=True)
        (folder / "recipes").mkdir()
        (folder / "data" / "x.txt").write_text("a ring")
        (folder / "recipes" / "mine.yaml").write_text("prompts: {type: text, path: ../data/x.txt}")
    (laid_out / "one" / "data" / "y.txt").write_text("a ring")
    one, other = (laid_out / name / "recipes/mine.yaml" for name in ("one", "other/place"))
    first = load_recipe(one)
    assert first.prompts.path == laid_out / "one/data/x.txt"
    monkeypatch.chdir(laid_out / "one")
    spelt = load_recipe(one, ["prompts.path=./recipes/../data/x.txt"])
    assert spelt.resolved == first.resolved
    moved = load_recipe(other)
    assert moved.prompts.path != first.prompts.path
    assert moved.hash == first.hash
    assert identity_of(moved.resolved) == identity_of(first.resolved)
    renamed = load_recipe(one, ["prompts.path=data/y.txt"])
    assert renamed.hash != first.hash
    assert identity_of(renamed.resolved) != identity_of(first.resolved)


def test_the_hash_of_a_shipped_recipe_has_its_prompts_within_the_package(monkeypatch):
    recipe = load_recipe("flux_flow_grpo")
    text = json.dumps(without_folders(recipe.resolved["prompts"], SHIPPED))
    assert '"/prompts/animals.txt"' in text


def test_a_recipe_holds_absolute_paths_and_hub_names(laid_out):
    content = {
        "policy": {"type": "sd3", "model": "models/sd", "cache": "~/embeddings"},
        "prompts": {"type": "dataset", "name": "json", "data_files": ["both.txt", "on*.txt"]},
        "evaluation": {"type": "reward", "path": "both.txt"},
    }
    recipe = build_recipe(content, folder=laid_out / "recipe")
    assert recipe.policy.model == str(laid_out / "recipe/models/sd")
    assert recipe.policy.cache == laid_out / "home/embeddings"
    assert recipe.prompts.data_files == (
        str(laid_out / "recipe/both.txt"), str(laid_out / "here/on*.txt"),
    )  # fmt: skip
    assert recipe.evaluation.path == laid_out / "recipe/both.txt"
    assert recipe.resolved["policy"]["model"] == recipe.policy.model
    assert recipe.resolved["prompts"]["data_files"] == [*recipe.prompts.data_files]
    kept = build_recipe({"policy": {"type": "sd3", "model": "org/model"}})
    assert kept.policy.model == "org/model"
    hub = {"type": "dataset", "name": "org/data", "data_files": ["only.txt"]}
    assert build_recipe({"prompts": hub}).prompts.data_files == ("only.txt",)


def test_a_recipe_is_read_again_from_another_folder(laid_out, monkeypatch):
    written = laid_out / "recipe" / "mine.yaml"
    written.write_text("prompts: {type: text, path: both.txt}\n")
    first = load_recipe(written)
    copy = laid_out / "copy.yaml"
    copy.write_text(first.to_yaml())
    monkeypatch.chdir(laid_out / "home")
    assert load_recipe(copy).prompts.path == laid_out / "recipe/both.txt"
    assert load_recipe(copy).hash == first.hash


def test_a_recipe_of_a_language_model_does_the_same(laid_out):
    pytest.importorskip("trl")
    written = laid_out / "recipe" / "mine.yaml"
    written.write_text("task: {type: dataset, path: both.txt}\nmodel: {path: models/sd}\n")
    recipe = llm_recipes.load(written)
    assert recipe.task.path == str(laid_out / "recipe/both.txt")
    assert recipe.model.path == str(laid_out / "recipe/models/sd")
    assert llm_recipes.load(written, ["task.path=org/data", "model.path=embedded"]).task.path == (
        "org/data"
    )
    assert llm_recipes.load(written, ["task.path=both.txt"]).task.path == (
        str(laid_out / "here/both.txt")
    )
    (laid_out / "copy").mkdir()
    for name in ("mine.yaml", "both.txt"):
        shutil.copy(laid_out / "recipe" / name, laid_out / "copy")
    shutil.copytree(laid_out / "recipe/models", laid_out / "copy/models")
    copy = llm_recipes.load(laid_out / "copy/mine.yaml")
    assert (copy.hash, copy.identity) == (recipe.hash, recipe.identity)
    assert copy.task.path == str(laid_out / "copy/both.txt")
    (laid_out / "here" / "embedded").mkdir()
    assert llm_recipes.load("countdown").model.path == "embedded"


# --- data sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["problems", "/no/such/folder", "a/b/c", "pandas"])
def test_what_is_no_name_on_a_hub_is_not_looked_for_there(tmp_path, monkeypatch, name):
    """`datasets` would take a data set of the same name from its cache, whosever that is."""
    datasets = pytest.importorskip("datasets")

    def asked(*_, **__):
        raise AssertionError("datasets was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", asked)
    with pytest.raises(InputError, match="there is no data set"):
        load_data_set(name, None, "train")


def test_another_folder_of_the_same_name_is_never_read(tmp_path, monkeypatch):
    """Nor what one held before, though its file has kept its date and size."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "one" / "problems"
    folder.mkdir(parents=True)
    file = folder / "train.jsonl"
    file.write_text('{"prompt": "first"}\n')
    date = file.stat().st_mtime_ns
    assert datasets.load_dataset(str(folder), split="train")["prompt"][:] == ["first"]
    file.write_text('{"prompt": "other"}\n')
    os.utime(file, ns=(date, date))
    (record,) = read_data_set(str(folder), None, "train", "prompt")
    assert record.content == {"prompt": "other"}
    assert load_data_set(str(folder), None, "train")["prompt"][:] == ["other"]
    monkeypatch.chdir(tmp_path)
    assert datasets.load_dataset("problems", split="train")["prompt"][:] == ["first"]
    with pytest.raises(InputError, match="there is no data set 'problems'"):
        load_data_set("problems", None, "train")
    datasets.enable_progress_bars()


def test_a_home_behind_an_equals_sign_is_found(laid_out, monkeypatch, capsys):
    """A shell leaves `~` as it is there; a folder of that name would be made."""
    monkeypatch.setattr("sys.argv", ["entroflow", "train", "--resume=~/none"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"{laid_out}/home/none is not a run folder" in capsys.readouterr().err
