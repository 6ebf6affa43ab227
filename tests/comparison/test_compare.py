"""Comparisons: arms and budgets, runs that stop and go on, and the table."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.stats

from entroflow.cli import main as cli
from entroflow.cli.show import comparison_table, print_table
from entroflow.comparison import runner as compare
from entroflow.comparison.jobs import Arm, Terms, planned
from entroflow.comparison.results import stored_results
from entroflow.comparison.table import Row, best_by_validation, rows, smallest_difference
from entroflow.errors import InputError
from entroflow.recipe.load import load_recipe
from entroflow.runs.folder import RunFolder

TINY = (
    "prompts.per_iteration=2", "allocation.group_size=2", "sampling.steps=3",
    "exploration.type=window", "exploration.size=1", "exploration.move=fixed",
    "exploration.last_start=null", "evaluation.images=1",
    "evaluation.test_images=1", "evaluation.steps=1",
)  # fmt: skip
PER_ITERATION = 4 * 3 + 4 * 3
"""Weighted evaluations of the tiny recipe: 4 rollouts of 3 steps, 4 transitions back and forth."""


class Silent:
    """Notes what it is told."""

    def __init__(self):
        self.begun, self.finished = [], []

    def begin(self, jobs):
        self.begun.append(list(jobs))

    def done(self, job, result):
        self.finished.append((job, result is not None))


# --- arms and budgets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("e_grpo", Arm("e_grpo")),
        ("mine.yaml,objective.kl=0.1", Arm("mine.yaml", ("objective.kl=0.1",))),
        (
            "e_grpo,exploration.starts=[0, 1, 2],exploration.merge=[1,1,2],run.seed=3",
            Arm(
                "e_grpo",
                ("exploration.starts=[0, 1, 2]", "exploration.merge=[1,1,2]", "run.seed=3"),
            ),
        ),
    ],
)
def test_an_arm_is_a_recipe_with_changes_behind_commas(text, arm):
    assert Arm.parse(text) == arm
    assert arm.name == text


def test_the_end_of_a_comparison_is_that_of_every_run():
    for end, kept in (
        ({"budget": "1k"}, {"budget": 1000}),
        ({"updates": 9}, {"updates": 9}),
        ({"minutes": 0.5}, {"minutes": 0.5}),
    ):
        (job,) = planned([Arm("flow_grpo_fast")], [0], Terms(end, TINY))
        assert load_recipe("flow_grpo_fast", job.overrides).run.ends == kept


@pytest.mark.parametrize(
    ("arm", "shared", "end", "said"),
    [
        ("quickstart", (), {"budget": 5}, "quickstart: one iteration costs [0-9]+ wei"),
        ("quickstart", (), {"budget": "300g"}, "quickstart: .*budget: must be a number like"),
        ("quickstart", (), {"updates": 0}, "quickstart: .*updates: input should be greater"),
        ("quickstart,run.iterations=3", (), {"updates": 4}, "run.iterations=3: .* same for all"),
        ("quickstart", ("run.seed=3",), {"updates": 4}, "run.seed=3: .* the same for all"),
        ("e_grpo,exploration.tau=5", ("sampling.steps=3", "exploration.type=merged_steps"),
         {"updates": 4}, "e_grpo,exploration.tau=5: exploration.tau is 5"),
        ("quickstart,objective.kl=0.02", (), {"updates": 4}, "kl=0.02: it is the same recipe"),
    ],
)  # fmt: skip
def test_what_can_not_be_compared_is_refused_with_the_name_of_the_arm(arm, shared, end, said):
    with pytest.raises(InputError, match=said):
        planned([Arm("quickstart"), Arm.parse(arm)], [0], Terms(end, [*shared] or TINY))


def test_every_arm_is_planned_with_every_seed_and_none_twice():
    arms = [Arm("flow_grpo_fast"), Arm("flow_grpo_fast", ("objective.kl=0.1",))]
    jobs = planned(arms, [0, 1, 2], Terms({"updates": 4}, TINY))
    assert [(job.arm, job.seed) for job in jobs] == [(a, s) for a in arms for s in (0, 1, 2)]
    assert len({job.recipe_hash for job in jobs}) == 2
    with pytest.raises(InputError, match="flow_grpo_fast: it is the same recipe as flow_grpo_fast"):
        planned([arms[0], arms[0]], [0], Terms({"updates": 4}, TINY))


def test_an_evaluation_without_test_prompts_is_refused():
    own = Arm("flow_grpo_fast", ("evaluation.type=tiny_run.Shift",))
    with pytest.raises(InputError, match="its evaluation has no test prompts to compare on"):
        planned([own], [0], Terms({"updates": 4}, [o for o in TINY if "evaluation" not in o]))


def test_parts_in_modules_of_one_name_can_not_be_compared(tmp_path, monkeypatch):
    """The message says what to do: to compare is to load both."""
    monkeypatch.chdir(tmp_path)
    names = {"a": "one", "b": "another"}
    for folder, name in names.items():
        (tmp_path / folder).mkdir()
        code = f"def {name}(images, prompts, metadata):\n    return images.mean(dim=(1, 2, 3))\n"
        (tmp_path / folder / "twin_rewards.py").write_text(code)
        (tmp_path / folder / "r.yaml").write_text(f"reward: {{type: twin_rewards.{name}}}\n")
    arms = [Arm(f"{folder}/r.yaml") for folder in names]
    shared = ["evaluation.images=2", "evaluation.steps=2"]
    said = r"^b/r\.yaml: .*two modules are called 'twin_rewards', .*a/twin_rewards\.py and .*b/twin"
    with pytest.raises(InputError, match=said) as one:
        planned(arms, [0], Terms({"updates": 4}, shared))
    assert "one process can load only one of them; rename one, and the type" in str(one.value)
    sys.modules.pop("twin_rewards")


def test_runs_of_a_recipe_file_lie_in_the_folder_of_results(tmp_path):
    path = tmp_path / "some" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("run: {iterations: 3}")
    (job,) = planned([Arm(str(path))], [5], Terms({"updates": 4}, TINY))
    assert job.folder(tmp_path / "out").parent == tmp_path / "out" / "runs"
    assert job.folder(tmp_path / "out").name.startswith("mine-")


# --- runs -----------------------------------------------------------------------------------------


def test_results_are_made_once_and_kept_by_recipe_and_seed(tmp_path, monkeypatch):
    """A second comparison runs what is new; a third tries rates, one of them the recipe's own."""
    progress, end = Silent(), {"budget": 2 * PER_ITERATION}
    arm = Arm("flow_grpo_fast")

    def compared(seeds, **options):
        return compare.compare(
            [arm], seeds, Terms(end, TINY), tmp_path, at_once=2, progress=progress, **options
        )

    results, failed = compared([0])
    assert failed == []
    (result,) = results
    spent = result["ledger"]["ledger/weighted_evaluations"]
    assert abs(spent - 2 * PER_ITERATION) <= spent / result["iterations"] / 2
    (job,) = progress.begun[0]
    folder = RunFolder.open(job.folder(tmp_path))
    assert result["test"] == json.loads((folder.path / "evaluation.json").read_text())
    assert result["recipe_hash"] == load_recipe("flow_grpo_fast", job.overrides).hash

    made, run = [], compare._Children.run

    def counted(self, command, **options):
        made.append(command)
        run(self, command, **options)

    monkeypatch.setattr(compare._Children, "run", counted)
    again, _ = compared([0, 1])
    assert len(made) == 1
    assert again[0] == result
    assert [r["seed"] for r in again] == [0, 1]
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 2

    tuned, _ = compared([0, 1], learning_rates=["1e-4", "3e-4"])
    (chosen,) = {tuple(r["arm"]["overrides"]) for r in tuned}
    assert chosen in {("optimizer.learning_rate=1e-4",), ("optimizer.learning_rate=3e-4",)}
    assert len(made) == 2 + ("3e-4" in chosen[0])


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def reward(images, *_): raise ValueError('never')\n")
    command = [
        "entroflow", "compare", "flow_grpo_fast,reward.type=broken.reward", "flow_grpo_fast", *TINY,
        "--budget", str(PER_ITERATION), "--seeds", "1", "--out", "out",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert "1 runs failed; their output is in" in said.err
    assert "flow_grpo_fast  seed 0  score" in said.out
    assert "reward.type=broken.reward  seed 0  failed" in said.out
    (log,) = (word.rstrip(".") for word in said.err.split() if ".log" in word)
    assert "every reward of iteration 1 failed" in (tmp_path / log).read_text()


@pytest.mark.slow
def test_a_comparison_that_is_stopped_goes_on(tmp_path):
    """The run finishes its iteration and is saved; the result is that of a run in one go."""
    command = [
        sys.executable, "-m", "entroflow.cli.main", "compare", "flow_grpo_fast", *TINY,
        "--budget", str(60 * PER_ITERATION), "--seeds", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("out/runs/*/metrics.jsonl"))) or (
        found[0].read_text().count("\n") < 3
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    folder = RunFolder.open(found[0].parent)
    done = folder.metrics()[-1]["iteration"]
    assert done < 60
    assert int(folder.latest().name) == done
    time.sleep(0.5)
    assert folder.metrics()[-1]["iteration"] == done
    subprocess.run(command, check=True, capture_output=True)
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    whole, _ = compare.compare(
        [Arm("flow_grpo_fast")], [0], Terms({"budget": 60 * PER_ITERATION}, TINY),
        tmp_path / "whole", at_once=1, progress=Silent(),
    )  # fmt: skip
    assert result["test"]["models"] == whole[0]["test"]["models"]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    arms, end = [Arm("flow_grpo_fast")], {"budget": PER_ITERATION}
    (job,) = planned(arms, [0], Terms(end, TINY))
    (job.folder(tmp_path) / "checkpoints").mkdir(parents=True)
    (job.folder(tmp_path) / "recipe.yaml").write_text("half a rec")
    _, failed = compare.compare(arms, [0], Terms(end, TINY), tmp_path, progress=Silent())
    assert failed == []


@pytest.mark.slow
def test_a_result_that_can_not_be_read_is_a_run_that_failed(tmp_path):
    """And stops no other."""
    arms, end = [Arm("flow_grpo_fast")], {"budget": PER_ITERATION}
    first = planned(arms, [0, 1], Terms(end, TINY))[0]
    first.folder(tmp_path).mkdir(parents=True)
    (first.folder(tmp_path) / "evaluation.json").write_text("{}")
    results, failed = compare.compare(arms, [0, 1], Terms(end, TINY), tmp_path, progress=Silent())
    assert [job.seed for job in failed] == [0]
    assert [result["seed"] for result in results] == [1]
    assert "is not a run folder" in first.folder(tmp_path).with_suffix(".log").read_text()


@pytest.mark.parametrize("content", ["{}", '{"results": 3}', '{"results": [{}]}', "[", "3"])
def test_results_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError, match=r"results\.json (is torn|holds no)"):
        stored_results(tmp_path)
    assert (tmp_path / "results.json").read_text() == content


# --- the table ------------------------------------------------------------------------------------


def result_of(name, seed, strict, base=0.4, texture=2.0, validation=0.5, version="1.0"):
    def model(score, own):
        return {
            "scores": {"overall": {"value": score}},
            "monitors": {"texture": own, "diversity": 0.2},
        }

    return {
        "arm": {"recipe": name, "overrides": []}, "seed": seed, "iterations": 7, "version": version,
        "training_seconds": 60.0 * (seed + 1), "ledger": {"ledger/weighted_evaluations": 1000.0},
        "curve": [{"eval/score": 0.9}, {"eval/score": validation}],
        "test": {
            "measure": {"name": "strict score"},
            "models": {"base": model(base, 0.001), "tuned": model(strict, texture * 0.001)},
            "gain": {"value": strict - base},
        },
    }  # fmt: skip


RESULTS = [
    *(result_of("one", seed, strict) for seed, strict in enumerate((0.5, 0.6, 0.7))),
    *(result_of("two", seed, strict, texture=3.0) for seed, strict in enumerate((0.8, 0.82, 0.9))),
]


def test_a_row_holds_means_and_the_spread_over_seeds():
    best, other = rows(RESULTS)
    assert (best.name, other.name) == ("two", "one")
    assert other.score == pytest.approx(0.6)
    assert other.spread == pytest.approx(0.1)
    assert best.spread == pytest.approx(np.std([0.8, 0.82, 0.9], ddof=1))
    assert other.gain == pytest.approx(0.2)
    assert best.monitors == pytest.approx({"texture": 3.0, "diversity": 1.0})
    assert math.isnan(best.ratio("sharpness"))
    assert (other.minutes, other.seeds, other.iterations) == (2.0, 3, 7)


def test_the_smallest_difference_is_that_of_a_t_test():
    """In 20,000 drawn comparisons a true difference of that size is found in 80%, within 2%."""
    table = rows(RESULTS)
    pooled = (0.1**2 + table[0].spread ** 2) / 2
    t = scipy.stats.t(4)
    wanted = (t.ppf(0.975) + t.ppf(0.8)) * math.sqrt(2 * pooled / 3)
    assert smallest_difference(table) == pytest.approx(wanted, rel=1e-12)
    noise = np.random.default_rng(0).normal(size=(2, 20_000, 30))
    arm = Row("", 30, 1, 1, "score", 0.5, 1.0, 0, {}, 1, frozenset())
    apart = smallest_difference([arm, arm])
    tests = scipy.stats.ttest_ind(noise[0] + apart, noise[1], axis=1)
    assert (tests.pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.02)


def test_the_table_names_its_recipes_in_80_columns(capsys):
    name = "flow_grpo_fast,optimizer.learning_rate=4e-4"
    long = [result_of(name, seed, 0.701 + seed / 100, texture=12.34) for seed in range(3)]
    spent = {"ledger": {"ledger/weighted_evaluations": 301_000.0}, "training_seconds": 754.0}
    long = [{**result, **spent, "iterations": 123} for result in long]
    print_table(comparison_table(rows([*long, *RESULTS])))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said
    assert "flow_grpo_fast" in said
    assert "123" in said
    assert "301k" in said
    assert "0.711 ±0.010" in said
    assert "×12.34" in said
    assert "12.6" in said
    assert "differences below" in said
    assert "0.600 ±0.100" in said
    assert "+0.200" in said


def test_a_table_of_several_versions_says_so():
    later = [result_of("two", seed, 0.7, version="1.1") for seed in range(3)]
    assert "versions" not in comparison_table(rows(RESULTS)).caption
    caption = comparison_table(rows([*RESULTS[:3], *later])).caption
    assert caption.endswith("several versions of the package: 1.0, 1.1")


def test_one_seed_shows_no_difference():
    table = rows([result_of("one", 0, 0.5), result_of("two", 0, 0.6)])
    assert math.isnan(smallest_difference(table))
    assert "one seed shows no differences" in comparison_table(table).caption


def test_a_rate_is_given_once(tmp_path):
    with pytest.raises(InputError, match="--learning-rates chooses it"):
        compare.compare(
            [Arm("quickstart")], [0], Terms({"updates": 1}, ["optimizer.learning_rate=1e-3"]),
            tmp_path, learning_rates=["1e-4"], progress=Silent(),
        )  # fmt: skip


def test_results_of_an_older_version_are_refused(tmp_path):
    old = {**result_of("one", 0, 0.5), "recipe_hash": "", "base": ""}
    del old["test"]["measure"]
    (tmp_path / "results.json").write_text(json.dumps({"results": [old]}))
    with pytest.raises(InputError, match="is of an older version; give another --out"):
        stored_results(tmp_path)


def test_the_rate_is_chosen_by_the_last_validation_score():
    better = result_of("one", 0, strict=0.1, validation=0.7)
    failed = result_of("one", 0, strict=0.9, validation=None)
    assert best_by_validation([failed, better]) is better
    assert best_by_validation([result_of("one", 0, strict=0.9, validation=0.6), better]) is better
