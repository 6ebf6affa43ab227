"""The command line, as a person uses it, on a tiny budget."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from urllib.error import HTTPError

import pytest
import torch
from PIL import Image

from entroflow.checkpoints import read_tensors, write_digests
from entroflow.cli import main as cli
from entroflow.recipe.load import load_recipe
from entroflow.runs.folder import RunFolder

TINY = (
    "run.iterations=2", "run.evaluate_every=2", "run.checkpoint_every=1",
    "prompts.per_iteration=2", "allocation.group_size=4", "sampling.steps=3", "exploration.size=1",
    "evaluation.images=2", "evaluation.test_images=2", "evaluation.steps=2",
    # The strict rewards of four images are often equal, and then there is nothing to learn.
    "reward.value=graded",
)  # fmt: skip


@pytest.fixture
def entroflow(monkeypatch, capsys):
    """Run the command in this process: (arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["entroflow", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a complete tiny run."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["entroflow", "train", "quickstart", *TINY, "--run", str(path)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    assert not exit_.value.code
    return path


def test_train_leaves_a_whole_run_folder(finished_run):
    names = {entry.name for entry in finished_run.iterdir()}
    assert names >= {
        "recipe.yaml", "metrics.jsonl", "checkpoints", "images", "examples", "tensorboard",
        "evaluation.json", "report.html",
    }  # fmt: skip
    lines = RunFolder.open(finished_run).metrics()
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert {"eval/score", "eval/score_low", "eval/diversity"} <= lines[0].keys()
    assert {
        "iteration", "seconds", "reward/mean", "reward/std", "eval/score", "eval/score_low",
        "eval/diversity", "policy/ratio_max_deviation", "policy/clip_fraction", "policy/kl",
        "ledger/network_evaluations", "ledger/weighted_evaluations", "ledger/reward_calls",
    } <= lines[2].keys()  # fmt: skip
    assert not list(finished_run.rglob("*.part"))
    assert not list(finished_run.rglob("*.pkl")) + list(finished_run.rglob("*.pt"))


def test_ledger_counts_what_the_plan_asks_for(finished_run):
    """Sampling asks for every row and step; the update, for its KL, twice for every transition."""
    rollouts, steps = 2 * 4, 3
    for n, line in enumerate(RunFolder.open(finished_run).metrics()[1:], start=1):
        assert line["policy/transitions"] == rollouts
        assert line["policy/skipped"] == 0
        assert line["ledger/reward_calls"] == line["ledger/decodes"] == n * rollouts
        assert line["ledger/network_evaluations"] == n * rollouts * (steps + 2)
        assert line["ledger/weighted_evaluations"] == n * rollouts * (steps + 1 + 3)


def test_the_comparison_says_what_it_cost(finished_run):
    """Guidance takes two passes where it is neither 0 nor 1; every image is decoded once."""
    summary = json.loads((finished_run / "evaluation.json").read_text())
    made = [
        (found["images"], 1 if found["guidance"] == 1 else 2) for found in summary["guidance_tried"]
    ]
    made += [
        (model["scores"]["overall"]["images"], model["passes"])
        for model in summary["models"].values()
    ]
    assert len(made) >= 3 + 3
    cost = summary["cost"]
    assert cost["network_evaluations"] == sum(2 * images * passes for images, passes in made)
    assert cost["decodes"] == sum(images for images, _ in made)
    assert cost["seconds"]["compare"] > 0


def test_the_plan_is_shown_once_at_the_start_and_again_when_a_run_goes_on(entroflow, tmp_path):
    run = tmp_path / "run"
    parts = [
        entroflow("train", "quickstart", *TINY, "--run", run, "--stop-after", stop_after)[1]
        if stop_after == 0
        else entroflow("train", "--resume", run, "--stop-after", stop_after)[1]
        for stop_after in (0, 1, 2)
    ]
    for said in parts:
        assert said.count("stochastic steps (start-end, exp of the entropy per value)") == 1


def test_an_export_is_what_a_run_starts_from(entroflow, finished_run, tmp_path):
    """The file holds the averaged weights of the best checkpoint, and is never written over."""
    out = tmp_path / "tuned"
    assert entroflow("export", finished_run, "--out", out)[0] == 0
    run = RunFolder.open(finished_run)
    wanted = read_tensors((run.best() or run.latest()) / "ema.safetensors")
    policy = load_recipe("quickstart", [f"policy.weights={out / 'weights.safetensors'}"]).policy
    found = policy.build().weights.live
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert json.loads((out / "entroflow.json").read_text())["weights"] == "ema"
    code, _, err = entroflow("export", finished_run, "--out", out)
    assert code == 2
    assert one_line(err)


def test_train_never_overwrites(entroflow, finished_run):
    code, _, err = entroflow("train", "quickstart", *TINY, "--run", finished_run)
    assert code == 2
    assert one_line(err)
    assert "--resume" in err


def test_sample_writes_a_grid(entroflow, finished_run, tmp_path):
    out = tmp_path / "samples.png"
    code, said, _ = entroflow(
        "sample", "a red circle left of a blue square", "three rings",
        "--run", finished_run, "--count", 2, "--steps", 2, "--out", out,
    )  # fmt: skip
    assert code == 0
    assert "base, tuned (2 iterations)" in said
    with Image.open(out) as picture:
        width, height = picture.size
    assert width > 2 * 32 * 4
    assert height > 4 * 32 * 4


def test_evaluate_prints_the_three_models(entroflow, finished_run):
    code, out, _ = entroflow("evaluate", finished_run, "--images", 1, "--steps", 1, "--json")
    assert code == 0
    summary = json.loads(out)
    assert set(summary["models"]) == {"base", "base_guided", "tuned"}
    assert set(summary["models"]["tuned"]["scores"]) == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr", "overall",
    }  # fmt: skip
    code, out, _ = entroflow("evaluate", "--images", 1, "--steps", 1)
    assert code == 0
    assert "base, guidance" in out
    assert "tuned" not in out


def test_evaluate_makes_the_comparison_of_the_run_again(entroflow, finished_run, tmp_path):
    """With the settings of its recipe, whatever the defaults are; options change them."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    # Without the mark of the best checkpoint the weights are the last, as at the end of the run.
    (run / "checkpoints" / "best.json").unlink()
    code, out, _ = entroflow("evaluate", run, "--json")
    assert code == 0
    kept = json.loads((run / "evaluation.json").read_text())
    assert json.loads(out) == {key: kept[key] for key in kept.keys() - {"recipe_hash", "cost"}}
    code, out, _ = entroflow(
        "evaluate", run, "--json", "--split", "validation", "--steps", 1, "--guidance", 2,
        "--images", 1, "--seed", 7,
    )  # fmt: skip
    assert code == 0
    changed = json.loads(out)
    asked = {"split": "validation", "steps": 1, "guidance": 2, "seed": 7}
    assert {key: changed[key] for key in asked} == asked
    assert changed["models"]["tuned"]["scores"]["overall"]["images"] == 6


def test_sample_draws_as_the_run_evaluates(entroflow, finished_run, tmp_path):
    """In two steps; more options draw something else."""
    pictures = []
    for options in ((), ("--steps", 2, "--guidance", 1), ("--steps", 3)):
        out = tmp_path / f"{len(pictures)}.png"
        asked = ("sample", "a red ring", "--run", finished_run, "--count", 1, "--out", out)
        assert entroflow(*asked, *options)[0] == 0
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_weights_of_another_base_are_refused(entroflow, finished_run, tmp_path):
    """Else the run's base would be shown as one that it was not trained from."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"reference": "0" * 16}))
        write_digests(state.parent)
    for command in (("sample", "a ring", "--run", run), ("evaluate", run)):
        code, _, err = entroflow(*command)
        assert code == 2
        assert one_line(err)
        assert "other base weights" in err


def test_a_run_can_start_from_the_weights_of_another(entroflow, finished_run, tmp_path):
    """They are its base: the first evaluation sees what the last of the other run saw."""
    tuned = finished_run / "checkpoints" / "00000002" / "ema.safetensors"
    code, _, err = entroflow(
        "train", "quickstart", *TINY, f"policy.weights={tuned}", "run.iterations=0",
        "--run", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    (start,) = RunFolder.open(tmp_path / "run").metrics()
    last = RunFolder.open(finished_run).metrics()[-1]
    seen = [key for key in last if key.startswith("eval/")]
    assert {key: start[key] for key in seen} == {key: last[key] for key in seen}


class OwnEvaluation:
    """Has no settings that could be changed."""

    def run(self, policy, **options): ...


def test_evaluate_refuses_an_evaluation_that_it_cannot_repeat(entroflow, finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    recipe = load_recipe(run / "recipe.yaml").resolved
    own = {**recipe, "evaluation": {"type": f"{__name__}.OwnEvaluation"}}
    RunFolder(run).write_recipe(json.dumps(own) + "\n")
    code, _, err = entroflow("evaluate", run)
    assert code == 2
    assert one_line(err)
    assert "can't be repeated on other prompts" in err


def test_report_is_written_anew(entroflow, finished_run):
    (finished_run / "report.html").unlink()
    code, out, _ = entroflow("report", finished_run)
    assert code == 0
    assert (finished_run / "report.html").stat().st_size > 1000
    assert "report.html" in out


@pytest.mark.parametrize(
    "failure",
    [FileNotFoundError(errno.ENOENT, "no such\nfile", "a.txt"), OSError(errno.ENOSPC, "full")],
)
def test_a_failure_of_the_disk_is_one_line(entroflow, monkeypatch, failure):
    def write(folder):
        raise failure

    monkeypatch.setattr("entroflow.runs.folder.RunFolder.open", write)
    code, _, err = entroflow("report", "run")
    assert code == 2
    assert one_line(err)


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("the judge is away"),
        HTTPError("http://127.0.0.1/judge", 503, "the judge is away", None, None),
    ],
)
def test_a_failure_that_is_no_wrong_input_keeps_its_traceback(entroflow, monkeypatch, failure):
    """Of a judge on the network, say: what matters is where it happened."""

    def write(folder):
        raise failure

    monkeypatch.setattr("entroflow.runs.folder.RunFolder.open", write)
    with pytest.raises(OSError, match="the judge is away"):
        entroflow("report", "run")


def test_recipes_are_listed_and_printed(entroflow):
    code, out, _ = entroflow("recipes")
    assert code == 0
    assert "quickstart" in out
    assert "flow_grpo" in out
    code, out, _ = entroflow("recipes", "flow_grpo")
    assert code == 0
    assert "every_step" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train", "quickstrat"), "did you mean 'quickstart'"),
        (("train", "missing.yaml"), "missing.yaml"),
        (("train", "quickstart", "optimiser.learning_rate=1"), "did you mean 'optimizer'"),
        (("train", "quickstart", "optimizer.learning_rat=1"), "did you mean 'learning_rate'"),
        (("train", "quickstart", "optimizer.learning_rate=fast"), "optimizer.learning_rate"),
        (("train", "quickstart", "optimizer.learning_rate=-1"), "greater than 0"),
        (("train", "quickstart", "allocation.group_size=1"), "allocation.group_size"),
        (("train", "quickstart", "allocation.group_size='8'"), "allocation.group_size"),
        (("train", "quickstart", "kernel.type=flow_sd"), "did you mean 'flow_sde'"),
        (("train", "quickstart", "reward.type=no_such_module.reward"), "no_such_module"),
        (("train", "quickstart", "reward.type=torch.nn.Linera"), "did you mean 'Linear'"),
        (("train", "quickstart", "exploration.size=50", "run.iterations=1"), "exploration.size"),
        (("train", "quickstart", "policy.weights=none.safetensors"), "none.safetensors"),
        (("train", "quickstart", "prompts.type=text", "prompts.path=none.txt"), "none.txt"),
        (("train", "quickstart", "learning_rate=1"), "unknown section"),
        (("train", "quickstart", "flow_grpo"), "one recipe at a time"),
        (("train", "quickstart", "run.iterations=true"), "run.iterations"),
        (("train", "--resume", "nowhere"), "nowhere"),
        (("sample", "a purpel circle"), "did you mean 'purple'"),
        (("sample", "circle of life"), "circle of life"),
        (("evaluate", "nowhere"), "nowhere"),
        (("evaluate", "--split", "train"), "split is validation or test"),
        (("report", "nowhere"), "nowhere"),
        (("recipes", "flow_grop"), "did you mean 'flow_grpo'"),
    ],
)
def test_wrong_input_is_one_clear_line(entroflow, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    code, _, err = entroflow(*arguments)
    assert code == 2, err
    assert one_line(err)
    assert named.lower() in err.lower()


def test_torn_files_are_one_clear_line(entroflow, finished_run, tmp_path):
    for name in ("ema.safetensors", "state.json"):
        run = tmp_path / name
        shutil.copytree(finished_run, run)
        for torn in run.glob(f"checkpoints/*/{name}"):
            torn.write_bytes(torn.read_bytes()[:100])
        code, _, err = entroflow("train", "--resume", run, "run.iterations=3")
        assert code == 2, err
        assert one_line(err)
        assert "torn" in err
    recipe = tmp_path / "torn.yaml"
    recipe.write_text("run: {iterations: [")
    code, _, err = entroflow("train", recipe)
    assert code == 2
    assert one_line(err)


def test_unknown_option_exits_with_2(entroflow):
    assert entroflow("train", "--fast")[0] == 2


def test_names_and_texts_are_no_markup_and_no_path(entroflow, tmp_path, monkeypatch):
    """They are shown as they stand, and the run lies where runs lie."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "[bold].yaml"
    recipe.write_text(
        "name: '[/bold]'\ntitle: '[/] :smile: [bold]x</script>'\nnotes: <script>alert(1)</script>\n"
        "exploration: {type: window}\nmonitors: {rewards: {'[red]': {type: jpeg_size}}}\n"
    )
    code, out, err = entroflow("train", recipe, *TINY, "run.iterations=1")
    assert code == 0, err
    assert out.startswith("[/bold] ")
    assert "[/] :smile: [bold]x</script>" in out
    assert "[red] " in out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("__bold_-")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "x&lt;/script&gt;" in page
    recipe.write_text("name: ../../x\nexploration: {type: window}")
    code, _, err = entroflow("train", recipe, *TINY)
    assert code == 2
    assert one_line(err)
    assert "is a path" in err


@pytest.mark.parametrize(
    ("error", "is_said"),
    [
        (MemoryError(), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8e12"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 8 GiB\nof 4"), True),
        (RuntimeError("something else"), False),
    ],
)
def test_a_lack_of_memory_is_one_line(entroflow, monkeypatch, error, is_said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("entroflow.recipe.load.described", fail)
    if not is_said:
        with pytest.raises(RuntimeError):
            entroflow("recipes", "quickstart")
        return
    code, _, err = entroflow("recipes", "quickstart")
    assert code == 2
    assert one_line(err)
    assert "not enough memory" in err


def test_messages_do_not_move_the_cursor(entroflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("train", "\x1b[2J\x1b[31m.yaml"),
        ("train", "quickstart", "run.seed=\x1b[2J"),
        ("reward", "test", "evil.\x1b[2J"),
        ("evaluate", "\x1b[2J"),
        ("llm", "recipes", "\x1b[2J"),
    ):
        code, _, err = entroflow(*arguments)
        assert code == 2
        assert one_line(err)
        assert err.strip().isprintable()


def test_help_is_told_without_torch():
    """Heavy imports are late, so that the help answers at once."""
    program = """
import sys
from entroflow.cli.main import main
sys.argv = ["entroflow", *sys.argv[1:]]
try:
    main()
finally:
    heavy = {"torch", "scipy", "plotly", "entroflow.training.trainer"} & sys.modules.keys()
    print(*sorted(heavy), file=sys.stderr)
"""
    for arguments in (["--help"], ["train", "--help"], ["pretrain", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "Usage: entroflow" in done.stdout
        assert done.stderr == "\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_iteration_saves_and_exits_cleanly(tmp_path, number):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "entroflow.cli.main", "train", "quickstart", *TINY]
    process = subprocess.Popen(
        [*command, "run.iterations=100000", "--run", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline, process.communicate(timeout=5)
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "report" in out
    folder = RunFolder.open(run)
    last = folder.metrics()[-1]["iteration"]
    assert folder.latest().name == f"{last:08d}"
    assert last < 100000


def one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
