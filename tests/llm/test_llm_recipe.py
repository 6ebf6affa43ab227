"""Recipes of language models from strangers, and settings that no recipe makes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from entroflow.cli import main as cli
from entroflow.errors import RecipeError, UntrustedError
from entroflow.llm import recipe as recipes
from entroflow.llm import run as runs
from entroflow.llm.recipe import Task
from entroflow.recipe import imports as users_code
from entroflow.recipe.imports import users_function


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A stranger's recipe beside its reward, and the file that says the reward was imported."""
    place, here, ran = tmp_path / "stranger", tmp_path / "here", tmp_path / "ran"
    place.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    before = list(sys.path)
    (place / "evil_reward.py").write_text(
        f"open({str(ran)!r}, 'w')\ndef right(completions, **_): return [1.0] * len(completions)\n"
    )
    recipe = place / "mine.yaml"
    recipe.write_text("task: {type: dataset, path: nowhere, reward: evil_reward.right}\n")
    yield recipe, ran
    sys.modules.pop("evil_reward", None)
    sys.path[:] = before
    users_code.search_beside(None)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (arguments) -> (exit code, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["entroflow", "llm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().err

    return run


def run_folder(recipe):
    """As it may be passed on."""
    folder = recipe.parent / "run"
    (folder / "checkpoints" / "00000001").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipes.load(recipe).to_yaml() + "...\n")
    return folder


def test_no_command_imports_a_reward_of_strangers(stranger, command, monkeypatch):
    """And none loads a model before it says so."""
    recipe, ran = stranger
    folder = run_folder(recipe)
    monkeypatch.setattr(runs, "load_model", lambda *_: pytest.fail("a model is loaded"))
    for arguments in (["train", recipe], ["train", "--resume", folder], ["evaluate", folder]):
        code, said = command(*arguments)
        assert code == 2
        assert "evil_reward.right is code in" in said
        assert "--trust" in said
    assert command("recipes", recipe)[0] == 0
    assert not ran.exists()
    assert "evil_reward" not in sys.modules


def test_it_is_imported_when_it_is_trusted_also_from_the_run(stranger, monkeypatch):
    """Which knows where its recipe lay."""
    recipe, ran = stranger
    folder = run_folder(recipe)
    loaded = recipes.load(folder / "recipe.yaml", trust=True)
    assert loaded.found_in == recipe.parent
    loaded.refuse_strangers()
    assert not ran.exists()
    users_function(loaded.task.reward, "task.reward")
    assert ran.exists()
    with pytest.raises(UntrustedError):
        recipes.load(recipe, [f"task.path={Path.cwd()}"]).refuse_strangers()


def test_a_reward_of_the_package_needs_no_trust(stranger):
    recipe, _ = stranger
    own = recipes.load(recipe, ["task.reward=trl.rewards.accuracy_reward"])
    own.refuse_strangers()
    assert "found_in" not in recipes.load("countdown").to_yaml()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("os.system", "os.system is of Python itself"),
        ("builtins.exec", "of Python itself"),
        ("tiny_run.Brightness", "is a class; name a function"),
        ("tiny_run.HERE", "can't be called"),
        ("tiny_run.no", "has no 'no'"),
    ],
)
def test_what_is_no_reward_is_refused(path, said):
    with pytest.raises(RecipeError, match=said):
        users_function(path, "task.reward")
    assert Task(type="dataset", path="x", reward=path).reward == path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.trust_remote_code=true", "it may run code"),
        ("trainer.model_init_kwargs={trust_remote_code: true}", "it may run code"),
        ("trainer.resume_from_checkpoint=x", "it may run code"),
        ("trainer.push_to_hub=true", "publishes nothing"),
        ("trainer.hub_model_id=x", "publishes nothing"),
        ("trainer.log_completions_hub_repo=x", "publishes nothing"),
        ("trainer.report_to=all", "set by the other sections"),
        ("trainer.num_iterations=true", "must be of type int, not True"),
        ("trainer.learning_rate=false", "must be of type float, not False"),
        ("trainer.use_cpu=1", "must be of type bool, not 1"),
        ("trainer.beta=&b [*b]", "inside of what it is an alias of"),
        ("task.problems=" + "9" * 5000, "task.problems"),
        ("run.seed=2026-01-01", "not '2026-01-01'"),
    ],
)
def test_settings_that_no_recipe_makes(override, said):
    with pytest.raises(RecipeError, match=said) as refused:
        recipes.load("countdown", [override])
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: []", "task must hold keys and values"),
        ("trainer: 5", "trainer must hold keys and values"),
        ("title: {a: 1}", "title must be a text"),
        ("name: ../x", "is a path"),
        ("found_in: [1]", "found_in must be a folder"),
        ("trainer: {&a b: [*a, *a]}", "unknown key 'b'"),
        ("run: {updates: !!int x}", "is not valid YAML"),
    ],
)
def test_a_recipe_is_bounded_as_that_of_images_is(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        recipes.load(path)
