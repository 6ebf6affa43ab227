"""What a stranger's recipe or run folder may not do: import and call what it likes."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import typer

import entroflow
from entroflow.cli import main as cli
from entroflow.cli import trust
from entroflow.comparison import runner as compare
from entroflow.comparison.jobs import Arm, Job
from entroflow.errors import InputError, RecipeError, UntrustedError
from entroflow.recipe import imports as users_code
from entroflow.recipe.load import described, load_component, load_recipe
from entroflow.recipe.read import read
from entroflow.recipe.registry import IMAGES
from entroflow.runs.evaluate import _part
from entroflow.runs.open import Opened
from tiny_run import only

PLACES = {
    "policy": "policy: {{type: {0}}}",
    "prompts": "prompts: {{type: {0}}}",
    "allocation": "allocation: {{type: {0}}}",
    "exploration": "exploration: {{type: {0}}}",
    "kernel": "kernel: {{type: {0}}}",
    "reward": "reward: {{type: {0}}}",
    "credit": "credit: {{type: {0}}}",
    "objective": "objective: {{type: {0}}}",
    "evaluation": "evaluation: {{type: {0}}}",
    "monitor": "monitors: {{rewards: {{x: {{type: {0}}}}}}}",
    "judge": "reward: {{type: pairwise, judge: {{type: {0}}}}}",
    "in a mixture": "reward: {{type: mixture, rewards: {{a: {{type: shapes}}, b: {{type: {0}}}}}}}",
    "in a monitor": "monitors: {{rewards: {{x: {{type: pairwise, judge: {{type: {0}}}}}}}}}",
}  # fmt: skip
"""Wherever a recipe may name code."""
numbers = itertools.count()


@pytest.fixture
def forgotten():
    """What is imported is forgotten after the test, and `sys.path` is as it was."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("evil_", "mine_")):
            del sys.modules[name]
    sys.path[:] = path
    users_code.search_beside(None)


@pytest.fixture
def stranger(tmp_path, monkeypatch, forgotten):
    """A stranger's folder: (module, file that says it was imported); one works elsewhere."""
    place = tmp_path / "stranger"
    here = tmp_path / "here"
    for folder in (place, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    name, ran = f"evil_{next(numbers)}", tmp_path / "ran"
    (place / f"{name}.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "def score(images, prompts, metadata): return [0.5] * len(images)\n"
        "class Policy:\n    def build(self): ...\n"
    )
    return place, name, ran


def written(folder, text, name="mine.yaml"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# --- what lies beside a stranger's recipe ---------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_folder_elsewhere_is_not_imported(stranger, place):
    folder, module, ran = stranger
    recipe = written(folder, PLACES[place].format(f"{module}.score"))
    with pytest.raises(UntrustedError, match=rf"{module}\.score is code in {folder}.*--trust"):
        load_recipe(recipe)
    assert not ran.exists()
    assert str(folder) not in sys.path


def test_it_is_imported_when_it_is_trusted(stranger):
    folder, module, ran = stranger
    recipe = load_recipe(written(folder, f"reward: {{type: {module}.score}}"), trust=True)
    assert only(recipe).function is sys.modules[module].score
    assert ran.exists()
    assert recipe.found_in == folder


def test_an_override_can_not_name_it_either(stranger):
    folder, module, ran = stranger
    with pytest.raises(UntrustedError):
        load_recipe(written(folder, ""), [f"reward.type={module}.score"])
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["package", "package without __init__", "compiled"])
def test_it_may_be_a_package(stranger, kind):
    folder, module, ran = stranger
    (folder / f"{module}.py").rename(folder / "kept")
    inside = folder / module / "inside.py"
    inside.parent.mkdir()
    if kind == "compiled":
        inside.parent.rmdir()
        import importlib.machinery

        (folder / f"{module}{importlib.machinery.EXTENSION_SUFFIXES[-1]}").write_bytes(b"")
    else:
        (folder / "kept").rename(inside)
    if kind == "package":
        (folder / module / "__init__.py").write_text("")
    with pytest.raises(UntrustedError):
        load_recipe(written(folder, f"reward: {{type: {module}.inside.score}}"))
    assert not ran.exists()


def test_below_the_current_folder_nothing_is_asked(stranger, monkeypatch):
    folder, module, ran = stranger
    monkeypatch.chdir(folder.parent)
    load_recipe(written(folder, f"reward: {{type: {module}.score}}"))
    assert ran.exists()


@pytest.mark.parametrize("what", ["home", "root"])
def test_what_lies_below_the_home_folder_or_the_root_is_not_the_working_tree(
    stranger, monkeypatch, what
):
    folder, module, _ = stranger
    if what == "home":
        monkeypatch.setenv("HOME", str(folder.parent))
        monkeypatch.chdir(folder.parent)
    else:
        monkeypatch.chdir("/")
    with pytest.raises(UntrustedError):
        load_recipe(written(folder, f"reward: {{type: {module}.score}}"))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    load_recipe(folder / "mine.yaml")


def test_a_link_into_the_working_tree_changes_nothing(stranger):
    folder, module, ran = stranger
    recipe = written(folder, f"reward: {{type: {module}.score}}")
    Path("linked").symlink_to(folder)
    Path("linked.yaml").symlink_to(recipe)
    for link in ("linked/mine.yaml", "linked.yaml"):
        with pytest.raises(UntrustedError):
            load_recipe(link)
    text = f"found_in: {Path.cwd() / 'linked'}\nreward: {{type: {module}.score}}"
    with pytest.raises(UntrustedError):
        load_recipe(written(Path.cwd(), text))
    assert not ran.exists()


def test_a_recipe_in_the_working_tree_can_not_point_elsewhere(stranger):
    """As one that came with a run folder: `found_in` is what the recipe says of itself."""
    folder, module, ran = stranger
    text = f"found_in: {folder}\nreward: {{type: {module}.score}}"
    recipe = written(Path.cwd() / "runs" / "theirs", text, "recipe.yaml")
    with pytest.raises(UntrustedError):
        load_recipe(recipe)
    assert not ran.exists()
    for odd in ("5", "[a]", "{a: b}"):
        with pytest.raises(RecipeError, match="found_in must be a folder"):
            load_recipe(written(folder, f"found_in: {odd}"))


def test_what_is_installed_needs_no_trust(stranger):
    folder, _, _ = stranger
    recipe = load_recipe(written(folder, "reward: {type: tiny_run.Brightness}"))
    assert type(only(recipe)).__name__ == "Brightness"


def test_of_two_modules_of_one_name_neither_is_taken_for_the_other(stranger):
    folder, module, ran = stranger
    written(Path.cwd(), "def score(images, prompts, metadata): ...", f"{module}.py")
    with pytest.raises(RecipeError, match="two modules are called"):
        load_recipe(written(folder, f"reward: {{type: {module}.score}}"))
    assert not ran.exists()


def test_the_folder_of_the_last_recipe_is_not_searched_for_the_next(stranger):
    """What was trusted once is trusted once."""
    folder, module, ran = stranger
    load_recipe(written(folder, f"reward: {{type: {module}.score}}"), trust=True)
    ran.unlink()
    with pytest.raises(UntrustedError):
        load_recipe(folder / "mine.yaml")
    del sys.modules[module]
    with pytest.raises(RecipeError):
        load_recipe("quickstart", [f"reward.type={module}.score"])
    with pytest.raises(UntrustedError):
        load_recipe(folder / "mine.yaml")
    assert not ran.exists()


def test_a_recipe_is_printed_without_its_parts(stranger):
    """Every key of the package's own parts is there, and of the others what the recipe says."""
    folder, module, ran = stranger
    monitor = f"monitors: {{rewards: {{x: {{type: {module}.s}}}}}}"
    text = f"reward: {{type: {module}.score, a: 1}}\n{monitor}"
    printed = described(written(folder, text))
    assert not ran.exists()
    assert f"type: {module}.score\n  a: 1" in printed
    assert f"type: {module}.s\n" in printed
    assert "micro_batch: 64" in printed
    assert described("quickstart") == load_recipe("quickstart").to_yaml()


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (arguments) -> (exit code, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["entroflow", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().err

    return run


def run_folder(place, module):
    """As it may be passed on: a whole folder, whose recipe names code."""
    recipe = load_recipe("quickstart").to_yaml()
    named = recipe.replace("policy:\n  type: shapes", f"policy:\n  type: {module}.Policy", 1)
    assert f"{module}.Policy" in named
    run = place / "run"
    written(run, f"found_in: {place}\n{named}...\n", "recipe.yaml")
    (run / "checkpoints" / "00000001").mkdir(parents=True)
    line = {"iteration": 0, "measure": {}, "plan": {}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run


COMMANDS = {
    "train": ["train", "RECIPE", "--run", "new"],
    "doctor": ["doctor", "RECIPE"],
    "reward test": ["reward", "test", "RECIPE"],
    "reward floors": ["reward", "floors", "RECIPE"],
    "compare": ["compare", "RECIPE"],
    "resume": ["train", "--resume", "RUN"],
    "sample": ["sample", "a circle", "--run", "RUN"],
    "evaluate": ["evaluate", "RUN"],
    "export": ["export", "RUN"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_code_of_strangers(stranger, command, monkeypatch, name):
    """Neither where nobody could be asked, nor where the answer is no."""
    folder, module, ran = stranger
    recipe = written(folder, f"reward: {{type: {module}.score}}")
    names = {"RECIPE": recipe, "RUN": run_folder(folder, module)}
    arguments = [names.get(argument, argument) for argument in COMMANDS[name]]
    code, said = command(*arguments)
    assert code == 2
    assert "--trust" in said
    assert said.count("\n") == 1
    assert not ran.exists()
    questions = []
    monkeypatch.setattr(trust, "_is_terminal", lambda: True)
    monkeypatch.setattr(typer, "confirm", lambda text, **_: questions.append(text) or False)
    assert command(*arguments)[0] == 2
    assert len(questions) == 1
    assert module in questions[0]
    assert not ran.exists()
    assert not Path("new").exists()


def test_whoever_says_yes_is_taken_at_their_word(stranger, command, monkeypatch):
    """Asked once; the folder is imported from, and the run then lacks what a policy must have."""
    folder, module, ran = stranger
    monkeypatch.setattr(trust, "_is_terminal", lambda: True)
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: True)
    code, said = command("export", run_folder(folder, module))
    assert ran.exists()
    assert code != 2 or "--trust" not in said
    ran.unlink()
    del sys.modules[module]
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: pytest.fail("nothing is to be asked"))
    command("export", "--trust", folder / "run")
    assert ran.exists()


@pytest.mark.parametrize("arguments", [["recipes", "RECIPE"], ["report", "RUN"]])
def test_what_only_reads_needs_no_trust(stranger, command, capsys, arguments):
    folder, module, ran = stranger
    recipe = written(folder, f"reward: {{type: {module}.score}}")
    names = {"RECIPE": recipe, "RUN": run_folder(folder, module)}
    _, said = command(*(names.get(argument, argument) for argument in arguments))
    assert "--trust" not in said
    assert not ran.exists()


def test_the_runs_of_a_comparison_are_trusted_as_it_is(stranger, monkeypatch):
    asked = []

    def run(_self, command, **_):
        asked.append(command)

    monkeypatch.setattr(compare._Children, "run", run)
    job = Job(Arm("quickstart"), (), "hash", 0, "base")
    for trusted in (False, True):
        compare._run(job, Path("out"), compare._Children(), trusted)
    assert ["--trust" in command for command in asked] == [False, True]


def test_an_evaluation_does_not_go_on_without_a_reward_that_is_not_trusted(stranger):
    folder, module, ran = stranger
    recipe = written(folder, f"reward: {{type: {module}.score}}")
    with pytest.raises(UntrustedError):
        _part(Opened(None, (), read(recipe, (), IMAGES)), "reward")
    assert not ran.exists()
    assert _part(Opened(None, (), read(recipe, (), IMAGES), trust=True), "reward") is not None


def test_nobody_is_asked_where_several_processes_run(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert trust._is_terminal()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not trust._is_terminal()


# --- API keys that would be sent ------------------------------------------------------------------

SERVED = "type: openai, model: m"
SENDERS = {
    "reward": "reward: {{{0}}}",
    "judge": "reward: {{type: pairwise, judge: {{{0}}}}}",
    "in a mixture": "reward: {{type: mixture, rewards: {{a: {{type: shapes}}, b: {{{0}}}}}}}",
    "monitor": "monitors: {{rewards: {{x: {{{0}}}}}}}",
}
"""Wherever a recipe may name a server."""


@pytest.mark.parametrize("place", SENDERS)
@pytest.mark.parametrize("variable", [None, "AWS_SECRET"])
def test_a_recipe_elsewhere_sends_no_key_to_another_machine(stranger, place, variable):
    folder, _, _ = stranger
    named = f", key_variable: {variable}" if variable else ""
    text = SENDERS[place].format(f"{SERVED}, url: 'https://theirs.example/v1'{named}")
    recipe = written(folder, text)
    said = rf"in {variable or 'OPENAI_API_KEY'} would be sent to theirs\.example, .*--trust"
    with pytest.raises(UntrustedError, match=said):
        load_recipe(recipe)
    load_recipe(recipe, trust=True)
    # What lies in the working tree is the user's own, and what is only shown sends nothing.
    load_recipe(written(Path.cwd(), text))
    assert "theirs.example" in described(recipe)
    # No part that is sent a key is among these.
    load_component(recipe, "policy")


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("http://localhost:8080/v1", True),
        ("https://127.0.0.1/v1", True),
        ("HTTP://[::1]:9/v1?a=b", True),
        ("http://localhost.theirs.example/v1", False),
        ("http://127.0.0.1.theirs.example", False),
        ("http://127.0.0.1:80@theirs.example", False),
        ("http://localhost\\@theirs.example", False),
        ("http://theirs.example/@127.0.0.1", False),
        ("http://theirs.example#@localhost/", False),
        ("http://[::1", False),
        ("//localhost", False),
    ],
)
def test_a_server_on_this_machine_needs_no_trust(stranger, url, is_here):
    folder, _, _ = stranger
    recipe = written(folder, f"reward: {{{SERVED}, url: '{url}'}}")
    if is_here:
        assert only(load_recipe(recipe)).url == url
    else:
        with pytest.raises(UntrustedError):
            load_recipe(recipe)


@pytest.mark.parametrize(
    "changes",
    [
        ["reward.url=https://mine.example/v1"],
        ["reward.key_variable=MY_KEY"],
        ["reward.type=shapes"],
    ],
)
def test_what_the_user_names_is_their_own(stranger, changes):
    folder, _, _ = stranger
    text = f"reward: {{{SERVED}, url: 'https://theirs.example/v1', key_variable: THEIRS}}"
    load_recipe(written(folder, text), changes)
    with pytest.raises(UntrustedError):
        load_recipe(folder / "mine.yaml", ["reward.model=other", "reward.template=null"])


def test_a_whole_part_that_the_user_names_is_their_own(stranger):
    folder, _, _ = stranger
    judge = f"{{{SERVED}, url: 'https://mine.example/v1'}}"
    recipe = written(folder, "reward: {type: pairwise, judge: {type: shapes_preference}}")
    load_recipe(recipe, [f"reward.judge={judge}"])


def test_a_run_folder_elsewhere_needs_trust_for_its_server(stranger):
    """Whatever it says of where it came from."""
    folder, _, _ = stranger
    text = f"found_in: {Path.cwd()}\nreward: {{{SERVED}, url: 'https://theirs.example/v1'}}"
    recipe = written(folder / "run", text, "recipe.yaml")
    with pytest.raises(UntrustedError):
        load_recipe(recipe)
    with pytest.raises(UntrustedError):
        _part(Opened(None, (), read(recipe, (), IMAGES)), "reward")
    rewards = _part(Opened(None, (), read(recipe, (), IMAGES), trust=True), "reward")
    assert rewards.parts["reward"].reward.model == "m"


def test_a_variable_that_is_no_name_is_not_shown(stranger):
    """It may be the key itself."""
    folder, _, _ = stranger
    text = f"reward: {{{SERVED}, url: 'https://theirs.example/v1', key_variable: sk-123456}}"
    with pytest.raises(UntrustedError) as refused:
        load_recipe(written(folder, text))
    assert "sk-1" not in str(refused.value)


@pytest.mark.parametrize("name", ["train", "doctor", "reward test", "compare"])
def test_no_command_sends_a_key_for_strangers(stranger, command, monkeypatch, name):
    folder, _, _ = stranger
    recipe = written(folder, f"reward: {{{SERVED}, url: 'https://theirs.example/v1'}}")
    arguments = [recipe if each == "RECIPE" else each for each in COMMANDS[name]]
    code, said = command(*arguments)
    assert (code, said.count("\n")) == (2, 1)
    assert "OPENAI_API_KEY would be sent to theirs.example" in said
    questions = []
    monkeypatch.setattr(trust, "_is_terminal", lambda: True)
    monkeypatch.setattr(typer, "confirm", lambda text, **_: questions.append(text) or False)
    assert command(*arguments)[0] == 2
    assert "theirs.example" in questions[0]
    assert not Path("new").exists()


# --- nothing is called that is not for its section ------------------------------------------------

OWN = '''
import functools, sys
MARK = {mark!r}

def mark(*_, **__):
    open(MARK, "w")

class Marks:
    """No part of any section."""
    def __init__(self, **_): mark()

class MarksInNew:
    def __new__(cls, **_): mark()

class Meta(type):
    def __call__(cls, *_, **__): mark()

class ByMeta(metaclass=Meta):
    """Calling it runs the metaclass."""

class Callable(Marks):
    def __call__(self, images, prompts, metadata): ...

def factory(**_):
    mark()
    return Marks()

partial = functools.partial(factory, a=1)
static = staticmethod(factory)
'''


@pytest.fixture
def own(tmp_path, monkeypatch, forgotten):
    """A module in the current folder: its name, and the file that says something was called."""
    monkeypatch.chdir(tmp_path)
    name, mark = f"mine_{next(numbers)}", tmp_path / "called"
    written(tmp_path, OWN.replace("{mark!r}", repr(str(mark))), f"{name}.py")
    return name, mark


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "what", ["Marks", "MarksInNew", "ByMeta", "Callable", "factory", "partial", "static"]
)
def test_what_lacks_the_methods_of_a_section_is_not_called(tmp_path, own, place, what):
    module, mark = own
    text = PLACES[place].format(f"{module}.{what}, a: 1")
    with pytest.raises(RecipeError) as refused:
        load_recipe(written(tmp_path, text))
    assert not mark.exists()
    assert str(refused.value).startswith("mine: ")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "path",
    [
        "os.system", "os.popen", "subprocess.Popen", "subprocess.run", "sys.exit", "builtins.exec",
        "builtins.eval", "shutil.rmtree", "pathlib.Path", "posix.system", "antigravity.fly",
        "this.s", "idlelib.idle.x", "multiprocessing.Process", "threading.Thread", "code.interact",
        "runpy.run_path", "importlib.import_module", "webbrowser.open", "turtle.Turtle",
    ],
)  # fmt: skip
def test_python_itself_holds_no_part_of_a_recipe(tmp_path, monkeypatch, place, path):
    monkeypatch.chdir(tmp_path)
    there = path.rpartition(".")[0] in sys.modules
    text = PLACES[place].format(f"{path}, command: 'touch called', args: [touch, called]")
    with pytest.raises(RecipeError, match=r"has no \w+.* \(it is of Python itself\)"):
        load_recipe(written(tmp_path, text))
    assert sorted(os.listdir()) == ["mine.yaml"]
    assert (path.rpartition(".")[0] in sys.modules) == there


@pytest.mark.parametrize(
    "error",
    ["SystemExit(0)", "SystemExit()", "GeneratorExit()", "Quits('enough')", "MemoryError()"],
)
@pytest.mark.parametrize("where", ["import", "constructor", "attribute"])
def test_code_that_ends_the_program_is_refused(tmp_path, own, error, where):
    """However it does that, it is no success."""
    source = f"class Quits(BaseException): ...\ndef end(*_, **__):\n    raise {error}\n"
    source += {
        "import": "end()\n",
        "constructor": "class Reward:\n    __init__ = end\n    def score(self, *_): ...\n",
        "attribute": "__getattr__ = end\n",
    }[where]
    module = f"mine_{next(numbers)}"
    written(tmp_path, source, f"{module}.py")
    kind = error.partition("(")[0]
    with pytest.raises(RecipeError, match=rf"raised {kind}: .*{module}\.py, line 3"):
        load_recipe(written(tmp_path, f"reward: {{type: {module}.Reward}}"))


def test_ctrl_c_in_code_of_the_users_is_one(tmp_path, own):
    module = f"mine_{next(numbers)}"
    written(tmp_path, "raise KeyboardInterrupt\n", f"{module}.py")
    with pytest.raises(KeyboardInterrupt):
        load_recipe(written(tmp_path, f"reward: {{type: {module}.Reward}}"))


def test_a_policy_that_ends_the_program_is_a_failure(tmp_path, own, command):
    """Also when it is built, where no recipe is read any more."""
    module = f"mine_{next(numbers)}"
    source = "import sys\nclass Policy:\n    def build(self):\n        sys.exit(0)\n"
    written(tmp_path, source, f"{module}.py")
    recipe = written(tmp_path, f"policy: {{type: {module}.Policy}}")
    code, said = command("train", recipe, "--run", "run")
    assert code == 2
    assert f"raised SystemExit: 0 ({tmp_path / module}.py, line 4)" in said


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("build = None", None),
        ("build: object\n    def __init__(self): self.build = print", None),
        ("def __init__(self): self.build = print", "it has no build"),
    ],
)
def test_a_class_has_its_methods_before_it_is_called(tmp_path, own, body, said):
    """Or says that its instances will have them."""
    module = f"mine_{next(numbers)}"
    written(tmp_path, f"class Policy:\n    {body}\n", f"{module}.py")
    recipe = written(tmp_path, f"policy: {{type: {module}.Policy}}")
    if said is None:
        assert hasattr(load_component(recipe, "policy"), "build")
    else:
        with pytest.raises(RecipeError, match=said):
            load_component(recipe, "policy")


# --- what can be called ---------------------------------------------------------------------------

CALLABLES = """
import functools, operator, torch

def scaled(images, prompts, metadata, scale=1.0):
    return (scale * images.mean(dim=(1, 2, 3))).tolist()

class Scorer:
    def __init__(self, scale=1.0): self.scale = scale
    def __call__(self, images, prompts, metadata):
        return scaled(images, prompts, metadata, self.scale)
    def method(self, images, prompts, metadata):
        return self(images, prompts, metadata)
    @functools.lru_cache
    def remembered(self, images, prompts, metadata):
        return self(images, prompts, metadata)

class Whole:
    def score(self, images, prompts): ...

class Network(torch.nn.Module):
    def forward(self, images, prompts, metadata):
        return images.mean(dim=(1, 2, 3))

plain = scaled
by_name = functools.partial(scaled, scale=1.0)
twice = functools.partial(functools.partial(scaled), scale=1.0)
cached = functools.cache(scaled)
part_of_cached = functools.partial(functools.cache(scaled), scale=1.0)
twice_cached = functools.cache(functools.lru_cache(scaled))
instance = Scorer()
bound = Scorer().method
bound_cached = Scorer().remembered
arrow = lambda images, *_: images.mean(dim=(1, 2, 3)).tolist()
network = Network()
any_keys = lambda *values, **keys: scaled(*values)
whole = Whole()

two = lambda images, prompts: []
none = lambda: []
more = lambda images, prompts, metadata, threshold: []
only_by_key = lambda images, prompts, *, metadata: []
missing = functools.partial(more)
filled = functools.partial(scaled, images=1)
"""


@pytest.fixture
def callables(tmp_path, monkeypatch, forgotten):
    monkeypatch.chdir(tmp_path)
    name = f"mine_{next(numbers)}"
    written(tmp_path, CALLABLES, f"{name}.py")
    return name


@pytest.mark.parametrize(
    "name",
    [
        "plain", "by_name", "twice", "cached", "part_of_cached", "twice_cached", "instance",
        "bound", "bound_cached", "arrow", "network", "any_keys",
    ],
)  # fmt: skip
def test_whatever_can_be_called_is_a_reward(callables, name):
    """By its dotted path and from Python alike; none of them is called to find out."""
    import torch

    from entroflow.prompts import Prompt
    from entroflow.rewards.combined import as_rewards
    from entroflow.rewards.scoring import score_images

    recipe = load_recipe("quickstart", [f"reward.type={callables}.{name}"])
    images = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    for reward in (recipe.reward, as_rewards(getattr(sys.modules[callables], name))):
        scores = score_images(reward.parts["reward"], images, Prompt("a", {"x": [1]}))
        assert scores.values.tolist() == [0.25, 0.75]
    assert recipe.resolved["reward"] == {"type": f"{callables}.{name}"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("two", r"too many positional arguments \(it is called with images, prompts, metadata\)"),
        ("none", "too many positional arguments"),
        ("more", "missing a required argument: 'threshold'"),
        ("missing", "missing a required argument: 'threshold'"),
        ("only_by_key", "too many positional arguments"),
        ("filled", "too many positional arguments"),
        ("Scorer", r"instances can be called \(it has __call__\); name an instance.*Scorer\(\)"),
        ("Network", r"instances can be called \(it has __call__\)"),
    ],
)
def test_what_can_not_be_called_with_images_is_refused(callables, name, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", [f"reward.type={callables}.{name}"])


def test_an_object_with_a_score_is_a_reward_and_takes_no_keys(callables):
    recipe = load_recipe("quickstart", [f"reward.type={callables}.whole"])
    assert only(recipe) is sys.modules[callables].whole
    for name, what in (("whole", "an object"), ("instance", "a function")):
        with pytest.raises(RecipeError, match=f"{what} takes no keys, but .'scale'. are given"):
            load_recipe("quickstart", [f"reward.type={callables}.{name}", "reward.scale=1"])


def test_from_python_a_class_is_refused_too():
    class Scorer:
        def score(self, images, prompts): ...

    with pytest.raises(InputError, match="Scorer is a class; give an instance"):
        entroflow.train("quickstart", reward=Scorer)


def test_a_partial_is_known_by_its_function():
    from tiny_run import ByBrightness, brightness

    part = functools.partial(functools.partial(brightness), metadata=None)
    assert users_code.home_of(part) == "tiny_run.brightness"
    assert users_code.home_of(ByBrightness()) == "tiny_run.ByBrightness"


@pytest.mark.parametrize("closed", ["stdin", "stderr"])
def test_a_stream_that_is_closed_is_no_terminal(monkeypatch, closed):
    from entroflow.cli.trust import is_trusted

    monkeypatch.setattr(sys, closed, None)
    assert not is_trusted(False, lambda: None)
