"""The report of small run folders made by hand."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from entroflow.cli import main as cli
from entroflow.credit.trace import Trajectories
from entroflow.evaluation.base import Evaluated
from entroflow.recipe.load import build_recipe
from entroflow.report.page import write_report
from entroflow.runs.files import METRICS
from entroflow.runs.folder import EVALUATION, RunError, RunFolder
from entroflow.writing import write_text

TITLE = "<script>alert('title')</script> & co"
MEASURE = {
    "name": "strict score",
    "reading": "A strictly right image.",
    "share": True,
    "over": "images",
}
CAPTIONS = ["a red circle", "two <b>blue</b> squares", "a ring above a cross"]
LAST, EVERY = 12, 2
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """What a test asks of a page: its tags, its text, and the figures in it."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.figures, self.styles = [], [], [], []
        self._inside = ""
        self.feed(html)
        self.count = Counter(tag for tag, _ in self.tags)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs).get("type"))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == ("script", "application/json"):
            self.figures.append(json.loads(data))
        elif self._inside == ("style", None):
            self.styles.append(data)
        elif self._inside != ("script", None):
            self.texts.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def with_class(self, name):
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def metrics_line(iteration, **changed):
    line = {"iteration": iteration, "seconds": 40.0 * iteration}
    for name, per_iteration in {
        "network_evaluations": 2_368,
        "weighted_evaluations": 100_000,
        "reward_calls": 192,
        "decodes": 192,
        "optimizer_steps": 1,
    }.items():
        line[f"ledger/{name}"] = per_iteration * iteration
    if iteration:
        line |= {
            "reward/mean": 0.5 + 0.02 * iteration,
            "reward/std": 0.2 - 0.01 * iteration,
            "reward/failed": 0,
            "reward/tied_groups": iteration % 2,
            "policy/loss": 0.001,
            "policy/ratio_max_deviation": 0.0,
            "policy/clip_fraction": 0.01 * iteration,
            "policy/kl": 1e-8 * iteration,
            "policy/gradient_norm": 1.0 + 0.1 * iteration,
            "policy/skipped": 0,
            "policy/transitions": 144,
            "by_step": {
                "loss": {"0": 0.1, "1": -0.01 * iteration},
                "ratio": {"0": 1.0, "1": 1.0 + 1e-9},
                "clipped": {"0": 0.0, "1": 0.01 * iteration},
                "advantage_size": {"0": 0.8, "1": 0.8},
            },
        }
    if iteration % EVERY == 0:
        strict = 0.5 + 0.03 * iteration
        line |= {
            "eval/score": strict,
            "eval/score_low": strict - 0.05,
            "eval/score_high": strict + 0.05,
            "eval/score/colors": strict,
            "eval/reward": float("nan"),
            "eval/diversity": 0.2 - 0.01 * iteration,
            "eval/texture": 0.005 * (1 + iteration / 10),
            "eval/contrast": 0.5,
            "drift/diversity": -0.1 * iteration,
            "drift/texture": 0.2 * iteration,
            "drift/contrast": 0.0,
        }
    if iteration == 0:
        line["measure"] = MEASURE
    return line | changed


def evaluated(right):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(CAPTIONS), 3, 8, 8, generator=generator)
    return Evaluated(
        scores={}, reward=0.0, monitors={}, images=images, captions=CAPTIONS,
        passed=[i < right for i in range(len(CAPTIONS))],
    )  # fmt: skip


# Two rollouts of three steps: one turns with step 1, the other would have, and has no last image.
KNOWN = {
    "trajectories": [
        {
            "caption": CAPTIONS[1], "steps": [0, 1, 2], "rewards": [0.5, 0.25, 0.75, 0.8125],
            "earned": [-0.25, 0.5625, 0.0625], "turns": [False, True, False],
            "dropped": [False, False, False],
        },
        {
            "caption": CAPTIONS[1], "steps": [0, 1, 2], "rewards": [0.5, 0.0, 1.0, None],
            "earned": [None, None, None], "turns": [False] * 3, "dropped": [False] * 3,
        },
    ],
    "prompts": CAPTIONS,
    "map": {
        "prompt": [1, 0, 1], "steps": [[0, 1, 2]] * 3, "turns": [[0, 2, 0], [-2, 0, 1], [0, 0, 0]],
    },
}  # fmt: skip


def trajectories():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Trajectories(images, KNOWN)


def with_credit(folder):
    """A run whose credit looks into the trajectories."""
    lines = folder.metrics()
    write_text(folder.path / METRICS, "")
    for line in lines:
        if line["iteration"]:
            line |= {
                "credit/turning_points": 0.25, "credit/dropped": 0.1 * line["iteration"],
                "credit/disagreement": 0.5,
            }  # fmt: skip
            line["by_step"] |= {
                "turning_points": {"0": 0.1, "1": 0.01 * line["iteration"]},
                "increment": {"0": 0.25, "1": None},
            }
        folder.append_metrics(line)
    for iteration in (1, 4, LAST):
        folder.save_trajectories(iteration, trajectories())
    return folder


def score(strict, low, high):
    return {"value": strict, "low": low, "high": high, "images": 96}


SUMMARY = {
    "measure": MEASURE,
    "split": "test",
    "steps": 10,
    "seed": 1,
    "guidance": 1.0,
    "best_guidance": 1.5,
    "guidance_tried": [{"guidance": scale, **score(0.5, 0.4, 0.6)} for scale in (1.0, 1.5, 2.0)],
    "models": {
        "base": {
            "passes": 1,
            "scores": {"colors": score(0.6, 0.5, 0.7), "overall": score(0.53, 0.49, 0.57)},
            "monitors": {"texture": 0.002, "diversity": 0.25, "contrast": None},
        },
        "base_guided": {
            "passes": 2,
            "scores": {"colors": score(0.7, 0.6, 0.8), "overall": score(0.61, 0.57, 0.65)},
            "monitors": {"texture": 0.001, "diversity": 0.2, "contrast": 0.5},
        },
        "tuned": {
            "passes": 1,
            "scores": {"colors": score(0.9, 0.82, 0.95), "overall": score(0.86, 0.83, 0.89)},
            "monitors": {"texture": 0.007, "diversity": 0.3, "contrast": 0.6},
        },
    },
    "gain": {"value": 0.33, "low": 0.28, "high": 0.38},
    "cost": {"network_evaluations": 23_456, "seconds": {"compare": 50.0}},
}


def recipe(**sections):
    return build_recipe(
        {
            "title": TITLE,
            "paper": "2505.05470",
            "objective": {"clip_total": 2.0},
            "run": {"iterations": LAST, "seed": 7},
            **sections,
        },
        "tiny",
    )


@pytest.fixture
def make_run(tmp_path):
    """A run folder up to an iteration, compared with its base or not."""

    def make(last=LAST, compared=True, **sections):
        folder = RunFolder.create(tmp_path / f"run {last}", recipe(**sections).to_yaml())
        for iteration in range(last + 1):
            folder.append_metrics(metrics_line(iteration))
            if iteration % EVERY == 0:
                folder.save_examples(f"{iteration:08d}", evaluated(right=iteration // 6))
        spent = {"score": 20.0, "rollout": 120.0, "update": 80.0}
        state = {
            "iteration": last,
            "ledger": {"seconds": spent},
            "evaluation_ledger": {"seconds": {"evaluate": 50.0}},
            "seconds": 40.0 * last, "reference": "", "components": {},
        }  # fmt: skip
        folder.save_checkpoint(last, {}, state, keep=1)
        if compared:
            write_text(folder.path / EVALUATION, json.dumps(SUMMARY))
            for right, name in enumerate(SUMMARY["models"]):
                folder.save_examples(f"test_{name}", evaluated(right))
        return folder

    return make


def read(folder):
    path = write_report(folder)
    assert path == folder.path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(make_run):
    page = read(make_run())
    loaded = ("src", "srcset", "href", "xlink:href", "data", "poster", "action")
    addresses = [attrs[name] for _, attrs in page.tags for name in loaded if name in attrs]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not page.count["iframe"] + page.count["object"]
    assert "url(" not in "".join(page.styles)
    assert "@import" not in "".join(page.styles)
    policy = next(a["content"] for a in page.named("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_the_headline_and_the_cost_in_numbers(make_run):
    page = read(make_run())
    assert "Strict score on test prompts base 0.53 [0.49, 0.57]" in page.text
    assert "tuned 0.86 [0.83, 0.89]" in page.text
    assert "gain +0.33 [+0.28, +0.38]" in page.text
    assert "A clear gain" in page.text
    guided = "With guidance 1.5 the base itself reaches 0.61 [0.57, 0.65]"
    assert f"{guided} (2 network passes per step; tuned: 1)" in page.text
    # 12 iterations of 2,368 and 100,000 evaluations and of 40 s.
    for amount in ("28.4k", "1.2M", "2,304", "8 min 0 s", "12 of 12"):
        assert amount in page.text
    # Rollouts took 120 s, of which 20 s were scoring; 300 s in all.
    sampling, updating = "sampling 1 min 40 s 33%", "updating 1 min 20 s 27%"
    others = "scoring 20 s 7%", "evaluating 50 s 17%", "comparing 50 s 17%"
    for stage in (sampling, updating, *others):
        assert stage in page.text


def test_the_hash_is_that_of_the_recipe(make_run):
    page = read(make_run())
    assert recipe().hash in page.text
    assert "seed 7" in page.text


def test_what_users_write_is_escaped(make_run):
    folder = make_run()
    page = read(folder)
    raw = (folder.path / "report.html").read_text(encoding="utf-8")
    for written in (TITLE, CAPTIONS[1]):
        assert written in page.text
        assert written not in raw
    # The figures, and three of its own: settings, plotly, and the code that draws.
    assert page.count["script"] == len(page.figures) + 3


def test_one_image_per_example_and_column(make_run):
    page = read(make_run())
    # Of the evaluations 0, 2, ..., 12 five are shown, then the three models.
    assert len(page.named("img")) == len(CAPTIONS) * (5 + 3)
    for heading in ("iteration 0 0 of 3 right", "iteration 6 1 of 3 right", "tuned 2 of 3 right"):
        assert heading in page.text
    assert len(page.with_class("example")) == len(page.with_class("mark"))
    last = [attrs["alt"] for attrs in page.named("img") if "iteration 12" in attrs["alt"]]
    assert last == [
        "“a red circle”, iteration 12: right",
        "“two <b>blue</b> squares”, iteration 12: right",
        "“a ring above a cross”, iteration 12: wrong",
    ]


def test_the_figures_are_valid_and_hold_the_numbers(make_run):
    page = read(make_run())
    figures = [go.Figure(figure) for figure in page.figures]
    assert len(figures) == len(page.with_class("plot"))
    by_name = {trace.name: trace for figure in figures for trace in figure.data if trace.name}
    strict = by_name["strict score, with 95% interval"]
    assert strict.x == tuple(range(0, LAST + 1, EVERY))
    assert strict.y[0] == pytest.approx(0.5)
    assert strict.y[-1] == pytest.approx(0.86)
    tuned = by_name["tuned"]
    assert tuned.x == ("overall", "colors")
    assert tuned.error_y.array[0] == pytest.approx(0.03)
    assert by_name["diversity within a prompt"].y[-1] == pytest.approx(-1.2)
    # A KL per dimension is small in a large model, but no rounding.
    assert by_name["KL to the reference"].y[-1] == pytest.approx(1.2e-7)
    heat_maps = [f.data[0] for f in figures if f.data[0].type == "heatmap"]
    assert [len(heat_map.x) for heat_map in heat_maps] == [LAST, LAST]  # clipped, loss


def test_what_never_changes_is_said_not_drawn(make_run):
    page = read(make_run())
    findings = page.text
    assert "anything near the clip range is a fault. 0 at every iteration." in findings
    assert "0 up to rounding at every step and iteration." in findings  # ratio - 1
    assert "0.800 at every step and iteration." in findings  # advantage


def test_alarms_are_shown_where_the_latest_evaluation_has_them(make_run):
    folder = make_run(last=LAST - EVERY)
    assert not read(folder).with_class("warning")[1:], "that of a browser without scripts"
    words = "texture is +2.4 standard deviations from the base's"
    folder.append_metrics(metrics_line(LAST, hacking={"texture": words}))
    page = read(folder)
    assert f"Warning. The reward rises, but {words}." in page.text
    assert len(page.with_class("warning")) == 2
    folder.append_metrics(metrics_line(LAST + EVERY, hacking={"texture": words}))
    assert f"but {words}, since iteration {LAST}." in read(folder).text
    folder.append_metrics(metrics_line(LAST + 2 * EVERY))
    text = read(folder).text
    assert f"At iteration {LAST + EVERY} the reward had risen, but {words}, since iteration" in text


def test_how_far_images_have_moved_is_drawn_with_its_band(make_run):
    """The farthest first and in colour, then the others in gray."""
    page = read(make_run(monitors={"band": 2.5}))
    (figure,) = [f for f in page.figures if f["data"][0].get("name") == "background texture"]
    shown = [trace["name"] for trace in figure["data"]]
    assert shown == ["background texture", "diversity within a prompt", "contrast"]
    assert figure["data"][1]["y"] == pytest.approx([-0.1 * n for n in range(0, LAST + 1, EVERY)])
    levels = sorted(shape["y0"] for shape in figure["layout"]["shapes"])
    assert levels == [-2.5, 0, 2.5]


def test_monitors_and_win_rates_have_panels(make_run):
    rewards = {"taste": {"type": "jpeg_size"}}
    folder = make_run(monitors={"rewards": rewards})
    write_text(folder.path / METRICS, "")
    for n in (0, 2, 4):
        more = {"eval/win_rate": 0.5 + 0.1 * n, "eval/taste": -1 - 0.1 * n}
        folder.append_metrics(metrics_line(n, **more))
    page = read(folder)
    assert "Win rate over the base How often" in page.text
    assert "Monitor: taste A reward that nothing trains on" in page.text
    drawn = {trace.get("name"): trace["y"] for f in page.figures for trace in f["data"]}
    assert drawn["Win rate over the base"] == pytest.approx([0.5, 0.7, 0.9])
    assert drawn["Monitor: taste"] == pytest.approx([-1, -1.2, -1.4])
    assert "win rate 0" not in page.text, "it is no monitor"


def test_a_run_at_its_start(make_run):
    page = read(make_run(last=0, compared=False))
    assert "Strict score on validation prompts iteration 0 0.50 [0.45, 0.55]" in page.text
    assert "0 of 12 iterations, not complete" in page.text
    assert not page.figures
    assert "Under the hood" not in page.text
    assert "Score by skill" not in page.text
    assert len(page.named("img")) == len(CAPTIONS)


def test_an_interrupted_run_shows_validation_scores(make_run):
    folder = make_run(last=7, compared=False)
    page = read(folder)
    assert "iteration 0 0.50 [0.45, 0.55] → iteration 6 0.68 [0.63, 0.73]" in page.text
    assert "test prompts are evaluated when the run is complete" in page.text
    assert f"entroflow train --resume '{folder.path}'" in page.text
    assert "Score by skill" not in page.text


def test_a_run_that_goes_on_says_that_its_comparison_is_old(make_run):
    assert "The run has gone on" not in read(make_run()).text
    assert "The run has gone on" in read(make_run(last=7)).text


def test_a_run_without_evaluation_or_checkpoint_is_still_shown(tmp_path):
    folder = RunFolder.create(tmp_path / "run", recipe().to_yaml())
    assert "There is nothing to plot yet" in read(folder).text
    for iteration in (1, 2):
        folder.append_metrics({"iteration": iteration, "reward/mean": 0.1 * iteration})
    page = read(folder)
    assert len(page.figures) == 1
    for absent in ("Strict score on", "Time by stage", "Examples", "Under the hood"):
        assert absent not in page.text


def test_no_gain_is_called_no_gain(make_run):
    folder = make_run()
    summary = SUMMARY | {
        "gain": {"value": -0.01, "low": -0.03, "high": 0.01},
        "best_guidance": 1.0,
    }
    write_text(folder.path / EVALUATION, json.dumps(summary))
    page = read(folder)
    assert "gain −0.01 [−0.03, +0.01]" in page.text
    assert "No clear difference" in page.text
    assert "Guidance 1 suits the base best on validation prompts (tried: 1, 1.5, 2)." in page.text
    assert len(page.named("img")) == len(CAPTIONS) * (5 + 2)


def by_reward(value, low, high, tried=(3.5,)):
    """The summary of an evaluation by reward: one score of each model, on any scale."""
    model = {
        "passes": 1,
        "scores": {"overall": score(value, low, high)},
        "monitors": {"detail": 0.1},
    }
    return {
        "measure": {"name": "reward", "reading": "The mean reward.", "over": "prompts and noise"},
        "split": "test", "steps": 28, "guidance": 3.5, "best_guidance": 3.5,
        "guidance_tried": [{"guidance": scale, **score(value, low, high)} for scale in tried],
        "models": dict.fromkeys(("base", "base_guided", "tuned"), model),
        "gain": {"value": 0.021, "low": 0.012, "high": 0.03},
        "cost": SUMMARY["cost"],
    }  # fmt: skip


def test_scores_on_another_scale_are_shown_as_exactly_as_they_are_known(make_run):
    folder = make_run()
    write_text(folder.path / EVALUATION, json.dumps(by_reward(-15.298, -15.313, -15.281)))
    lines = [line | {"measure": by_reward(0, 0, 0)["measure"]} for line in folder.metrics()]
    write_text(folder.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = read(folder)
    assert "Reward on test prompts base −15.30 [−15.31, −15.28]" in page.text
    assert "gain +0.021 [+0.012, +0.030]" in page.text
    assert "Intervals are over prompts and noise of this one run" in page.text
    assert "The mean reward. Brackets hold 95% intervals." in page.text
    assert "The score is the reward itself, on other prompts" in page.text
    assert "Bars are" not in page.text
    assert "guidance scale" not in page.text


def test_scores_that_are_not_known_are_dashes(make_run):
    """Where every reward of the comparison failed; the figures stay whole."""
    folder = make_run()
    summary = by_reward(None, None, None)
    summary["gain"] = dict.fromkeys(summary["gain"])
    write_text(folder.path / EVALUATION, json.dumps(summary))
    page = read(folder)
    assert "base – [–, –]" in page.text
    assert "Too few prompts could be scored under both" in page.text
    several = SUMMARY["models"]["base"]["scores"] | {"counting": score(None, None, None)}
    models = {**SUMMARY["models"], "base": {**SUMMARY["models"]["base"], "scores": several}}
    write_text(folder.path / EVALUATION, json.dumps({**SUMMARY, "models": models}))
    page = read(folder)
    assert "NaN" not in page.text
    (base,) = (
        trace
        for figure in page.figures
        for trace in figure["data"]
        if trace.get("type") == "bar" and trace["name"] == "base"
    )
    assert base["y"][base["x"].index("counting")] is None


def test_an_evaluation_of_an_older_version_is_named(make_run):
    folder = make_run()
    old = {key: value for key, value in SUMMARY.items() if key != "measure"}
    write_text(folder.path / EVALUATION, json.dumps(old))
    with pytest.raises(RunError, match="is of an older version; remove it"):
        write_report(folder)


def test_prompts_and_guidance_are_those_of_the_recipe_and_the_comparison(make_run):
    """Nothing is called validation, test or costly by habit."""
    folder = make_run()
    text = read(folder).text
    for said in (
        "Score on validation prompts Always on the same validation prompts and noise",
        "Statistics of the images for validation prompts",
        "A row is one of the validation prompts",
        "Score by skill on test prompts",
        "captions that neither training nor any choice has seen",
        "Guidance 1.5 suits the base best on validation prompts (tried: 1, 1.5, 2).",
        "(2 network passes per step; tuned: 1)",
    ):
        assert said in text
    models = {name: model | {"passes": 2} for name, model in SUMMARY["models"].items()}
    summary = SUMMARY | {"split": "train", "guidance": 4.5, "models": models}
    write_text(folder.path / EVALUATION, json.dumps(summary))
    text = read(folder).text
    assert "Strict score on train prompts base 0.53" in text
    assert "96 images per model, 10 steps without noise, guidance 4.5, the same start" in text
    assert "(2 network passes per step; tuned: 2)" in text
    assert "has seen" not in text


@pytest.mark.parametrize(
    ("sections", "prompts"),
    [
        ({"evaluation": {"split": "test"}}, "test prompts"),
        ({"evaluation": {"type": f"{__name__}.OwnEvaluation"}}, "held-out prompts"),
    ],
)
def test_evaluations_on_other_prompts_are_named(make_run, sections, prompts):
    folder = make_run(**sections)
    text = read(folder).text
    assert f"Score on {prompts} Always on the same {prompts} and noise" in text
    assert f"Statistics of the images for {prompts}" in text
    assert "has seen" not in text
    (folder.path / EVALUATION).unlink()
    assert f"Strict score on {prompts} iteration 0 0.50" in read(folder).text


class OwnEvaluation:
    """An evaluation without settings."""

    def run(self, policy, **options): ...


def test_captions_are_seen_if_the_training_draws_from_their_split(make_run):
    assert "has seen" not in read(make_run(prompts={"split": "test"})).text


def test_base_and_tuned_are_compared_in_what_the_reward_can_not_see(make_run):
    """Beside the evaluations of the run; what was not measured is left out."""
    page = read(make_run(compared=True))
    (table,) = re.findall(
        r"On test prompts monitor base tuned ratio (.*?) Under the hood", page.text
    )
    assert "background texture 0.00200 0.00700 × 3.50" in table
    assert "diversity within a prompt 0.250 0.300 × 1.20" in table
    assert "contrast" not in table


PLAN = {
    "grid": [1.0, 0.75, 0.5, 0.25, 0.0],
    "steps": [
        {"start": 1, "end": 3, "sigma": 0.75, "sigma_next": 0.25, "std": 0.5, "entropy": 0.5,
         "rows": 8, "trained": 8},
    ],
    "rows": [
        {"role": "anchor", "points": [0, 1, 2, 3, 4], "stochastic": [], "trained": [], "count": 1},
        {"role": "rollout", "points": [1, 3, 4], "stochastic": [0, 1], "trained": [0], "count": 8},
    ],
}  # fmt: skip


def test_the_plan_is_drawn_row_by_row_with_the_entropy_of_its_steps(make_run):
    folder = make_run()
    write_text(folder.path / METRICS, "")
    for iteration in range(3):
        folder.append_metrics(metrics_line(iteration, **({"plan": PLAN} if not iteration else {})))
    page = read(folder)
    assert "The plan of an iteration" in page.text
    (rows,) = [f for f in page.figures if f["data"][0].get("name") == "ODE"]
    drawn = {trace["name"]: (trace["x"], trace["y"]) for trace in rows["data"]}
    assert drawn["ODE"] == ([0, 1, None, 1, 2, None, 2, 3, None, 3, 4, None], [0, 0, None] * 4)
    assert drawn["random, trained"] == ([1, 3, None], [1, 1, None])
    assert drawn["random"] == ([3, 4, None], [1, 1, None])
    assert rows["layout"]["yaxis"]["ticktext"] == ["anchor", "8 ×"]
    (bars,) = [f for f in page.figures if f["data"][0].get("x") == ["1–3"]]
    assert bars["data"][0]["y"] == pytest.approx([math.exp(0.5)])
    heat_maps = [f for f in page.figures if f["data"][0].get("type") == "heatmap"]
    assert heat_maps
    assert {tuple(f["data"][0]["y"]) for f in heat_maps} == {("0 · 1.00", "1 · 0.75")}
    assert "The plan of an iteration" not in read(make_run(last=6)).text


def test_the_comparison_is_among_the_costs(make_run):
    page = read(make_run(compared=True))
    assert "evaluations for the comparison with the base 23.5k" in page.text
    assert "and of the comparison with the base; the longest" in page.text
    assert "comparison with the base" not in read(make_run(last=6, compared=False)).text


def test_monitors_of_ones_own_are_shown(make_run):
    """Single numbers without a deviation, so there is no telling how far they have moved."""
    folder = make_run()
    write_text(folder.path / METRICS, "")
    for iteration in (0, 2, 4):
        line = metrics_line(iteration, **{"eval/word_errors": 0.1 * (iteration + 1)})
        for name in ("diversity", "texture", "contrast"):
            del line[f"eval/{name}"], line[f"drift/{name}"]
        folder.append_metrics(line)
    page = read(folder)
    assert "word errors 0.100 0.500 × 5.00" in page.text
    assert "shows here first." in page.text
    assert "How far the images have moved" not in page.text


def test_what_was_not_measured_is_left_out(make_run):
    """An iteration of zero-variance groups has no update; then nothing was ever measured."""
    unmeasured = dict.fromkeys(
        ("policy/loss", "policy/ratio_max_deviation", "policy/clip_fraction", "policy/kl",
         "policy/gradient_norm", "reward/mean", "reward/std", "eval/contrast"), None,
    )  # fmt: skip
    folder = make_run()
    for by_step in ({}, {"loss": None}, {"loss": {"0": None}}):
        folder.append_metrics(metrics_line(LAST, **unmeasured, by_step=by_step))
    assert "KL to the reference" in read(folder).text
    write_text(folder.path / METRICS, "")
    for iteration, by_step in enumerate(({}, {"loss": None}, {"loss": {"0": None}})):
        folder.append_metrics(metrics_line(iteration, **unmeasured, by_step=by_step))
    page = read(folder)
    assert "Zero-variance groups" in page.text
    for absent in ("KL to the reference", "Clip fraction", "Ratio before", "By denoising step"):
        assert absent not in page.text


# --- who gets the credit --------------------------------------------------------------------------


def test_a_credit_that_looks_at_the_end_alone_has_no_section(make_run):
    page = read(make_run())
    assert not page.with_class("strip")
    assert "Which steps turned" not in page.text


def test_trajectories_are_shown_with_what_they_earned(make_run):
    """Those of the last iteration and of the first: images, rewards, increments, turning points."""
    page = read(with_credit(make_run()))
    assert "At iteration 12" in page.text
    assert "At iteration 1 " in page.text
    assert "At iteration 4" not in page.text
    assert len(page.with_class("strip")) == 2 * 2
    points = [a["alt"] for a in page.named("img") if a["alt"].startswith("image ")]
    assert len(points) == 2 * 8
    assert points[:4] == [
        f"image {k} of “{CAPTIONS[1]}”, reward {reward}"
        for k, reward in enumerate(("0.50", "0.25", "0.75", "0.81"))
    ]
    assert points[7].endswith("reward failed")
    assert "0.50 0 → −0.25 0.25 1 ▲ +0.5 +0.56 0.75 2 → +0.062 0.81" in page.text
    assert "1 → +1 1.0 2 → – failed" in page.text
    assert len(page.with_class("rise")) == 2


def test_a_strip_shows_the_images_of_its_rollout(make_run):
    """Pixel by pixel as they were saved."""
    page = read(with_credit(make_run()))
    sources = [a["src"] for a in page.named("img") if a["alt"].startswith("image ")]
    for source, image in zip(sources, trajectories().images.flatten(0, 1), strict=False):
        opened = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        found = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
        assert torch.equal(found, image)


def test_the_map_is_sorted_by_prompt(make_run):
    page = read(with_credit(make_run()))
    maps = [go.Figure(f) for f in page.figures if "customdata" in f["data"][0]]
    found = [f.data[0] for f in maps if f.data[0].type == "heatmap"]
    assert len(found) == 2
    # Rows are steps; the rollout of the first prompt is the second of the batch.
    assert [list(row) for row in found[0].z] == [[-2, 0, 0], [0, 2, 0], [1, 0, 0]]
    assert found[0].customdata[0][0] == f"a loss<br>{CAPTIONS[0]}"
    assert found[0].customdata[2][0] == f"a gain, dropped<br>{CAPTIONS[0]}"
    names = {trace.get("name") for figure in page.figures for trace in figure["data"]}
    assert {"turning points", "dropped"} <= names
    assert "0.500 at every iteration." in page.text


def test_without_turning_points_it_says_what_steps_added(make_run):
    folder = with_credit(make_run())
    lines = folder.metrics()
    write_text(folder.path / METRICS, "")
    for line in lines:
        none = {"credit/turning_points": 0.0, "credit/dropped": 0.0}
        folder.append_metrics(line | (none if line["iteration"] else {}))
    page = read(folder)
    assert "What each step added" in page.text
    assert (
        "turning points"
        not in page.text.partition("What each step added")[2]
        .partition("Under the hood")[0]
        .partition("Where the rollouts")[0]
    )
    assert "Plain and consistent" not in page.text


# --- rewards that compare, and mixtures -----------------------------------------------------------


def with_judge(folder, mixed):
    name = "preference" if mixed else "reward"
    lines = folder.metrics()
    write_text(folder.path / METRICS, "")
    for line in lines:
        i = line["iteration"]
        if i:
            line |= {
                f"judge/{name}/discriminability": 0.6 - 0.01 * i, f"judge/{name}/spread": 0.3,
                f"judge/{name}/first": 0.55, f"judge/{name}/ties": 0.01 * i,
                f"judge/{name}/failed": None, f"judge/{name}/questions": 56.0,
                f"judge/{name}/intransitive": 0.0,
            }  # fmt: skip
        if i and mixed:
            line |= {"reward/preference/mean": 0.5, "reward/shapes/mean": 0.01 * i}
        folder.append_metrics(line)
    return folder


def test_a_judge_is_shown_with_what_it_can_tell_apart(make_run):
    page = read(with_judge(make_run(), mixed=False))
    assert "How far to trust the judge" in page.text
    assert "The rewards of the mixture" not in page.text
    by_name = {trace["name"]: trace for f in page.figures for trace in f["data"] if "name" in trace}
    assert by_name["discriminability"]["y"][-1] == pytest.approx(0.48)
    assert by_name["ties"]["y"][0] == pytest.approx(0.01)
    assert "a quarter for random answers. 0 at every iteration." in page.text
    assert "0.550 at every iteration." in page.text
    assert "Time per group" not in page.text
    assert "How far to trust" not in read(make_run(last=7)).text


def test_the_rewards_of_a_mixture_have_a_panel_each(make_run):
    page = read(with_judge(make_run(), mixed=True))
    assert "The rewards of the mixture" in page.text
    assert "How far to trust the judge" in page.text
    means = [t["y"] for f in page.figures for t in f["data"] if t.get("name") == "shapes"]
    assert len(means) == 1
    assert means[0][-1] == pytest.approx(0.12)
    assert "in the units of the reward. 0.500 at every iteration." in page.text


# --- torn files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "recipe.yaml",
        "evaluation.json",
        "examples/00000012.json",
        "examples/00000012.png",
        "trajectories/00000012.json",
        "trajectories/00000012.png",
    ],
)
@pytest.mark.parametrize("length", [0, 20, 200])
def test_a_torn_file_is_one_clear_line(make_run, monkeypatch, capsys, name, length):
    folder = with_credit(make_run())
    torn = folder.path / name
    assert torn.stat().st_size > 200 or name.startswith("examples")
    torn.write_bytes(torn.read_bytes()[: min(length, torn.stat().st_size - 20)])
    monkeypatch.setattr(sys, "argv", ["entroflow", "report", str(folder.path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith(f"error: {torn} ")
    assert "torn" in error
    assert error.count("\n") == 1
    assert len(error) < 400


def test_a_recipe_cut_between_two_lines_is_torn(make_run):
    folder = make_run()
    path = folder.path / "recipe.yaml"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[: whole.index("\nrun:") + 1], encoding="utf-8")
    with pytest.raises(RunError, match="is torn"):
        write_report(folder)


def test_files_of_another_content_are_refused(make_run):
    folder = make_run()
    write_text(folder.path / EVALUATION, "[]")
    with pytest.raises(RunError, match="holds no JSON object"):
        write_report(folder)


def test_large_images_are_reduced(tmp_path):
    folder = RunFolder.create(tmp_path / "run", recipe().to_yaml())
    folder.append_metrics({"iteration": 0})
    large = Evaluated({}, 0.0, {}, torch.rand(1, 3, 512, 512), ["a sky"], [])
    folder.save_examples("00000000", large)
    page = read(folder)
    assert "Images are reduced" in page.text
    assert len(page.named("img")[0]["src"]) < 60_000
    assert not page.with_class("mark")


# --- in a browser ---------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")

# A window can't be narrower than 500 pixels, but a frame can.
FRAME = """<!DOCTYPE html>
<iframe id="frame" src="{source}" style="width: {width}px; height: 800px; border: 0"></iframe>
<script>
function measure() {{
  const page = document.getElementById("frame").contentDocument, root = page.documentElement;
  const shown = (element) => page.defaultView.getComputedStyle(element).overflowX === "visible";
  const name = (e) => e.tagName.toLowerCase() + "." + [...e.classList].join(".");
  const wide = [];
  (function visit(element) {{
    if (element.getBoundingClientRect().right > root.clientWidth + 1) wide.push(name(element));
    // What scrolls or is cut inside its own box does not widen the page.
    if (shown(element)) [...element.children].forEach(visit);
  }})(page.body);
  const plots = [...page.querySelectorAll(".plot .main-svg:first-child")];
  const widths = plots.map((plot) => plot.getBoundingClientRect().width);
  return {{ page: root.scrollWidth, window: root.clientWidth, wide, plots: widths }};
}}
window.onload = () => setTimeout(() => {{
  const result = document.createElement("script");
  result.type = "application/json";
  result.textContent = JSON.stringify(measure());
  document.body.append(result);
}}, 3000);
</script>
"""


def browsed(path, profile):
    """A page as the browser leaves it, and what it wrote to the console."""
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={profile}",
            "--allow-file-access-from-files", "--hide-scrollbars", "--virtual-time-budget=8000",
            "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return Page(done.stdout), done.stderr


def measured(report, width, tmp_path):
    """Width of a page in a frame, what sticks out of it, and the widths of its figures."""
    frame = tmp_path / f"frame {width}.html"
    frame.write_text(FRAME.format(source=report.as_uri(), width=width), encoding="utf-8")
    page, said = browsed(frame, tmp_path / "profile")
    assert "CONSOLE" not in said
    (result,) = page.figures
    return result


@in_a_browser
def test_a_browser_draws_every_figure(make_run, tmp_path):
    folder = with_credit(make_run())
    figures = len(read(folder).figures)
    page, said = browsed(folder.path / "report.html", tmp_path / "profile")
    assert len(page.with_class("js-plotly-plot")) == figures
    assert len(page.with_class("svg-container")) == figures
    assert len(page.with_class("main-svg")) >= figures
    assert "CONSOLE" not in said
    assert (folder.path / METRICS).exists()


@in_a_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_page(make_run, tmp_path, width):
    """On a phone and on a desk: the page does not scroll sideways, and figures have room."""
    folder = with_credit(make_run())
    figures = len(read(folder).figures)
    found = measured(folder.path / "report.html", width, tmp_path)
    assert found["window"] == width
    assert found["wide"] == []
    assert found["page"] == width
    assert len(found["plots"]) == figures
    assert all(250 < plot <= width for plot in found["plots"])


@in_a_browser
def test_the_browser_sees_what_sticks_out(make_run, tmp_path):
    """The measure itself: a box of 600 pixels is too wide for a phone, unless it scrolls."""
    read(folder := make_run())
    report = folder.path / "report.html"
    html = report.read_text(encoding="utf-8")
    box = '<div class="box" style="width: 600px">box</div>'
    for added, wide, page in (
        (box, ["div.box"], 616),
        (f'<div class="scroll">{box}</div>', [], 390),
    ):
        report.write_text(html.replace("<main>", f"<main>{added}"), encoding="utf-8")
        found = measured(report, 390, tmp_path)
        assert found["wide"] == wide
        assert found["page"] == page
