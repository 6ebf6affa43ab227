"""`entroflow llm` from the recipe to the report, on the model in the package."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from safetensors.torch import load_file

import tiny_llm
from entroflow.cli.main import main
from entroflow.errors import InputError, RecipeError
from entroflow.llm import recipe as recipes
from entroflow.llm.embedded import BASE, Sampling, answers
from entroflow.llm.pretrain import Reading, judged, read
from entroflow.llm.problems import judge, problems_of, solved
from entroflow.llm.recipe import Task
from entroflow.llm.run import evaluate, load_model, train

DOCS = Path(__file__).parents[2] / "docs"
SMALL = (
    "run.updates=3", "evaluation.every=2", "evaluation.problems=6", "evaluation.each=4",
    "trainer.per_device_train_batch_size=64", "task.problems=40",
)  # fmt: skip


def run_of(folder, *changes):
    return train(recipes.load("countdown", [*SMALL, *changes]), folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run with Clip_B that leaves much out."""
    return run_of(tmp_path_factory.mktemp("llm") / "run", "clip.type=b", "clip.mu=0.3")


def entroflow(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["entroflow", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, *capsys.readouterr()


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_all_there_is_to_know(done):
    lines = done.metrics()
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert [("eval/avg@4" in line) for line in lines] == [True, False, True, True]
    for line in lines[1:]:
        assert 0 <= line["entropy_clip/share"] <= line["entropy_clip/penalised"] < 1
        assert line["entropy"] > 0
        assert {"entropy_change/predicted", "entropy_change/measured"} <= line.keys()
        assert {"discriminator/centred", "reward", "grad_norm", "seconds"} <= line.keys()
    assert any(line["entropy_clip/share"] > 0 for line in lines[1:])
    for line in (lines[0], lines[2]):
        assert line["eval/pass@1"] == line["eval/avg@4"]
        assert line["eval/pass@1"] <= line["eval/pass@2"] <= line["eval/pass@4"]
    assert list(done.tensorboard.glob("events*"))
    found = json.loads((done.path / "evaluation.json").read_text())
    assert (found["iteration"], found["problems"], found["each"]) == (3, 6, 4)
    assert [len(row["tuned"]) for row in found["answers"]] == [4] * 6


def test_the_model_it_saves_is_the_one_it_judged(done):
    model, tokenizer = load_model(str(done.path))
    assert (done.latest() / "model.safetensors").is_file()
    base = load_file(BASE / "model.safetensors")
    now = model.state_dict()
    assert any(not torch.equal(value, now[name]) for name, value in base.items())
    problems = problems_of(Task(), tokenizer)
    again = judge(model, tokenizer, problems.test[:6], solved, Sampling(each=4, most_words=18))
    found = json.loads((done.path / "evaluation.json").read_text())
    assert [[said for said, _ in row["tuned"]] for row in found["answers"]] == again.said
    assert found["tuned"]["avg@4"][0] == pytest.approx(again.right.double().mean().item())
    # No pickle: safetensors and JSON alone.
    assert not [p for p in done.path.rglob("*") if p.suffix in (".bin", ".pt", ".pth")]


def test_the_report_shows_it(done, monkeypatch, capsys):
    page = (done.path / "report.html").read_text(encoding="utf-8")
    titles = (
        "Clip_B", "How often it is right", "Tokens left out", "Mean of S − S̄", "Pass@k",
        "Did entropy go where it should?", "Base and tuned model on 6 test problems",
    )  # fmt: skip
    for said in titles:
        assert said in page, said
    (done.path / "report.html").unlink()
    code, out, _ = entroflow(monkeypatch, capsys, "report", str(done.path))
    assert code == 0
    assert out.strip() == str(done.path / "report.html")
    assert (done.path / "report.html").read_text(encoding="utf-8") == page


def test_the_same_seed_is_the_same_run(tmp_path):
    first, second = (run_of(tmp_path / name, "run.updates=2") for name in "ab")
    one, other = (load_file(run.latest() / "model.safetensors") for run in (first, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert recipes.load(first.path / "recipe.yaml") == recipes.load(second.path / "recipe.yaml")


# --- the model in the package ---------------------------------------------------------------------


def test_it_plays_well_enough_to_learn_and_badly_enough_to_have_room():
    found = evaluate("embedded", problems=40, each=8, temperature=1.0, seed=0)
    assert 0.1 < found["avg@8"][0] < 0.6
    assert found["pass@8"][0] > found["avg@8"][0] + 0.15


def test_the_model_card_has_the_numbers_of_the_claims():
    found = json.loads((DOCS / "claims" / "countdown.json").read_text(encoding="utf-8"))
    card = (BASE.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    for measure in ("avg@16", "pass@16"):
        value, low, high = found[measure]
        assert f"{value:.1%} [{low:.1%}, {high:.1%}]" in card, measure
    settings = Reading()
    assert found["settings"] == dataclasses.asdict(settings)
    assert f"{settings.steps:,} steps of {settings.batch} puzzles" in card


@pytest.mark.slow
def test_the_shipped_weights_are_as_good_as_the_claims_say():
    """Sampled anew: another machine may round otherwise, so within the interval."""
    found = json.loads((DOCS / "claims" / "countdown.json").read_text(encoding="utf-8"))
    again = judged(*load_model("embedded"), Reading())
    for measure in ("avg@16", "pass@16"):
        _, low, high = found[measure]
        assert low < again[measure][0] < high, measure


def test_a_model_is_made_from_nothing(tmp_path, monkeypatch, capsys):
    """By the command that made the shipped one; what is there is not overwritten."""
    folder = tmp_path / "made"
    settings = Reading(steps=60, batch=16, warm_up=5, held_out=4, each=2)
    losses = [loss for _, loss in read(settings, folder)]
    assert losses[-1] < 0.7 * losses[0]
    model, tokenizer = load_model(str(folder))
    assert model.num_parameters() == load_model("embedded")[0].num_parameters()
    assert tokenizer.get_vocab() == load_model("embedded")[1].get_vocab()
    code, _, error = entroflow(monkeypatch, capsys, "llm", "pretrain", "--folder", str(folder))
    assert code == 2
    assert "exists already" in error


# --- data of one's own ----------------------------------------------------------------------------


def long_answers(completions, solution, **_):
    """Right is an answer with as many words as the solution says."""
    return [
        float(len(text.split()) == int(n)) for text, n in zip(completions, solution, strict=True)
    ]


def test_a_dataset_from_disk(tmp_path):
    rows = [{"question": "1 2 3 4 -> 10 :", "words": str(n)} for n in range(60)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    task = Task(
        type="dataset", path=str(tmp_path / "data"), prompt="question", answer="words",
        reward=f"{__name__}.long_answers", held_out=10, problems=30,
    )  # fmt: skip
    _, tokenizer = load_model("embedded")
    found = problems_of(task, tokenizer)
    parts = [
        found.train["solution"],
        *([row["solution"] for row in p] for p in (found.validation, found.test)),
    ]
    assert [len(part) for part in parts] == [30, 10, 10]
    assert len({*parts[0], *parts[1], *parts[2]}) == 50, "no problem is in two parts"
    assert found.reward(completions=["a b", "a"], solution=["2", "2"]) == [1.0, 0.0]
    with pytest.raises(InputError, match="no column 'asked'"):
        problems_of(task.model_copy(update={"prompt": "asked"}), tokenizer)
    with pytest.raises(InputError, match="too few to hold out 40"):
        problems_of(task.model_copy(update={"held_out": 40}), tokenizer)
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="can't be loaded"):
        problems_of(task, tokenizer)


@pytest.mark.parametrize(("asked", "said"), [
    (None, "row 7 is None, but must be a text"),
    ([{"role": "user", "content": "a"}], "the model's tokenizer has no chat template"),
])  # fmt: skip
def test_prompts_that_can_not_be_asked(tmp_path, asked, said):
    usual = "1 2 3 4 -> 10 :" if asked is None else asked
    rows = [{"prompt": asked if n == 7 else usual, "solution": "1"} for n in range(60)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    task = Task(
        type="dataset", path=str(tmp_path / "data"), reward=f"{__name__}.failing", held_out=10
    )
    with pytest.raises(InputError, match=said):
        problems_of(task, load_model("embedded")[1])


def early(completions, solution, prompts, **_):
    """Right is an answer whose first letter is in the first half of the bytes; of chats alone."""
    assert all(chat[-1]["role"] == "user" for chat in prompts)
    texts = [message["content"] for (message,) in completions]
    return [float(text[:1] < "A") for text in texts]


def test_the_published_setting_trains_a_tiny_qwen2(tmp_path):
    """Its recipe with the sizes of a laptop: chats from a data set, two batches accumulated."""
    tiny_llm.save_qwen2(tmp_path / "qwen2")
    rows = [{"prompt": f"What is {n} + {n}?", "solution": str(2 * n)} for n in range(60)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    recipe = recipes.load("qwen_dapo", [
        f"model.path={tmp_path / 'qwen2'}", f"task.path={tmp_path / 'data'}", "task.held_out=8",
        f"task.reward={__name__}.early", "run.updates=2", "evaluation.problems=4",
        "evaluation.each=4", "trainer.per_device_train_batch_size=32", "trainer.bf16=false",
        "trainer.gradient_accumulation_steps=2", "trainer.max_completion_length=6",
        "trainer.use_cpu=true", "clip.mu=0.3", "trainer.learning_rate=1e-2",
    ])  # fmt: skip
    run = train(recipe, tmp_path / "run")
    lines = run.metrics()
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(0 < line["entropy_clip/share"] < 1 for line in lines[1:])
    before = load_file(tmp_path / "qwen2" / "model.safetensors")
    after = load_file(run.latest() / "model.safetensors")
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    found = evaluate(str(run.path), problems=4, each=4, temperature=0.7, seed=0)
    whole = json.loads((run.path / "evaluation.json").read_text())
    assert found["avg@4"] == pytest.approx(whole["tuned"]["avg@4"])
    assert "What is" in (run.path / "report.html").read_text(encoding="utf-8")


def test_settings_that_a_model_brings_do_not_change_what_is_sampled(tmp_path):
    """transformers takes what is not said from them: here, that no token comes twice."""
    tiny_llm.save_qwen2(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
    own = model.generation_config

    def said():
        found = answers(model, tokenizer, ["a", "b"], Sampling(each=8, most_words=40, seed=3))
        return [answer for mine in found for answer in mine]

    first = said()
    assert model.generation_config is own
    own.no_repeat_ngram_size = 0
    assert said() == first
    assert any(len({*answer}) < len(answer) for answer in first)


def failing(completions, solution, **_):
    raise KeyError("no such word")


def too_few(completions, solution, **_):
    return [0.0]


def nothing(completions, solution, **_):
    return None


@pytest.mark.parametrize(("name", "said"), [
    ("failing", "failed: KeyError: 'no such word'"),
    ("too_few", "must return one number per completion: 3 completions, but a result of shape"),
    ("nothing", "must return one number per completion, not None"),
])  # fmt: skip
def test_a_reward_that_fails_is_said_in_one_line(tmp_path, name, said):
    rows = [{"prompt": f"{n} 2 3 4 -> 10 :", "solution": "1"} for n in range(60)]
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    task = Task(
        type="dataset", path=str(tmp_path / "data"), reward=f"{__name__}.{name}", held_out=10
    )
    _, tokenizer = load_model("embedded")
    found = problems_of(task, tokenizer)
    with pytest.raises(InputError, match=f"task.reward: .*{name} {said}"):
        found.reward(completions=["a", "b", "c"], prompts=["p"] * 3, solution=["1"] * 3)


# --- recipes and wrong input ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*recipes.LAYOUT.recipes])
def test_shipped_recipes_can_be_read_and_written(name, tmp_path):
    recipe = recipes.load(name)
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert recipes.load(path) == recipe


def test_the_hash_is_of_what_is_trained(tmp_path, monkeypatch):
    """Not of the seed or of how it is judged, but of the weights in the package."""
    own = recipes.load("countdown").hash
    for same in ("run.seed=3", "evaluation.each=4"):
        assert recipes.load("countdown", [same]).hash == own
    for other in ("clip.type=b", "run.updates=3", "trainer.beta=0.1", "model.lora_rank=4"):
        assert recipes.load("countdown", [other]).hash != own, other
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"others")
    monkeypatch.setattr(recipes, "EMBEDDED_WEIGHTS", weights)
    assert recipes.load("countdown").hash != own


def test_the_published_setting_is_what_is_known_of_it():
    recipe = recipes.load("qwen_dapo")
    t = recipe.trainer
    assert recipe.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert (recipe.clip.type, recipe.clip.mu, recipe.clip.denominator) == ("b", None, "shrink")
    # 64 prompts with 16 answers each, on eight processes.
    assert t["per_device_train_batch_size"] * t["gradient_accumulation_steps"] * 8 == 64 * 16
    assert (t["num_generations"], t["temperature"], t["beta"]) == (16, 1.0, 0.0)
    assert recipe.task.held_out == 500


@pytest.mark.parametrize(("overrides", "said"), [
    (["clip.typ=b"], "unknown key 'typ'; did you mean 'type'"),
    (["clips.type=b"], "unknown section 'clips'; did you mean 'clip'"),
    (["clip.type=c"], "clip.type: "),
    (["clip.mu=-1"], "clip.mu: "),
    (["task.type=dataset"], "path names the data"),
    (["trainer.learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    (["trainer.learning_rate=abc"], "trainer.learning_rate: must be of type float"),
    (["trainer.use_cpu=3"], "trainer.use_cpu: must be of type bool"),
    (["trainer.save_strategy=steps"], "save_strategy is set by the other sections"),
    (["trainer.max_steps=5"], "trainer.max_steps is set by the other sections"),
    (["run.updates=0"], "run.updates: "),
    (["run=3"], "name a key inside run"),
])  # fmt: skip
def test_wrong_recipes_are_refused(overrides, said):
    with pytest.raises(RecipeError, match=said.replace(".", r"\.").replace("'", "'")):
        recipes.load("countdown", overrides)


@pytest.mark.parametrize(("arguments", "said"), [
    (["train", "countdwn"], "there is no recipe 'countdwn'; did you mean 'countdown'"),
    (["train", "model.path=nowhere/at/all", *SMALL], "no language model can be loaded"),
    (["train", *SMALL, "trainer.num_generations=7"], "trainer: "),
    (["train", *SMALL, "trainer.loss_type=foo"], "loss_type is 'foo'"),
    (["train", *SMALL, "trainer.sync_ref_model=true"], "trainer: "),
    (["train", *SMALL, "task.type=dataset", "task.path=no/such/data"], "can't be loaded"),
    (["train", *SMALL, "task.problems=4"], "there are 4 problems to train on, but 8 are answered"),
    (["train", *SMALL, "evaluation.problems=1000"], "problems is 1000, but 400 are held out"),
    (["train", *SMALL, "trainer.temperature=0.0"], "temperature is 0.0, but must be above 0"),
    (["train", *SMALL, "trainer.top_k=-5"], "top_k is -5, but must be at least 0"),
    (["train", *SMALL, "trainer.importance_sampling_level=foo"], "importance_sampling_level is"),
    (["train", *SMALL, "trainer.per_device_train_batch_size=0"], "trainer: "),
    (["train", *SMALL, "trainer.steps_per_generation=0"], "trainer: "),
    (["train", "--resume", "nowhere/at/all"], "is not a run folder"),
    (["train", "countdown", "--resume", "x"], "leave RECIPE, --run and --clip out"),
    (["evaluate", "--problems", "100000"], "there are 400 test problems"),
    (["evaluate", "nowhere/at/all"], "which is no folder here"),
])  # fmt: skip
def test_wrong_input_is_one_line(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, error = entroflow(monkeypatch, capsys, "llm", *arguments)
    assert code == 2
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("recipe.yaml"))


def test_recipes_are_listed_and_printed(monkeypatch, capsys):
    code, out, _ = entroflow(monkeypatch, capsys, "llm", "recipes")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} == {*recipes.LAYOUT.recipes}
    code, out, _ = entroflow(monkeypatch, capsys, "llm", "recipes", "countdown")
    assert code == 0
    assert "learning_rate" in out


def test_without_the_extra_the_rest_works_and_this_says_what_is_missing(tmp_path):
    """In a process in which TRL and what it brings can't be imported."""
    script = """
import sys
for name in ("trl", "transformers", "tokenizers", "datasets", "accelerate", "peft"):
    sys.modules[name] = None
import entroflow
from entroflow.cli.main import main
sys.argv = ["entroflow", *sys.argv[1:]]
main()
"""
    path = tmp_path / "without.py"
    path.write_text(script, encoding="utf-8")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(path), *arguments], capture_output=True, text=True, check=False,
            cwd=tmp_path, timeout=120,
        )  # fmt: skip

    assert run("recipes").returncode == 0
    assert run("llm", "--help").returncode == 0
    assert "countdown" in run("llm", "recipes").stdout
    for command in (("train",), ("recipes", "countdown"), ("evaluate",), ("pretrain",)):
        found = run("llm", *command)
        assert found.returncode == 2, command
        assert "pip install 'entroflow[llm]'" in found.stderr
        assert "Traceback" not in found.stderr
