"""The report of small run folders made by hand."""

import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest
import torch

from entroflow.checkpoints import write_text
from entroflow.evaluation.base import Evaluated
from entroflow.recipe import build_recipe
from entroflow.report.page import write_report
from entroflow.runs import EVALUATION, METRICS, RunFolder

TITLE = "<script>alert('title')</script> & co"
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
            "eval/score": strict + 0.1,
            "eval/strict": strict,
            "eval/strict_low": strict - 0.05,
            "eval/strict_high": strict + 0.05,
            "eval/strict/colors": strict,
            "eval/reward": float("nan"),
            "eval/diversity": 0.2 - 0.01 * iteration,
            "eval/texture": 0.005 * (1 + iteration / 10),
            "eval/contrast": 0.5,
        }
    return line | changed


def evaluated(right):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(CAPTIONS), 3, 8, 8, generator=generator)
    return Evaluated(
        scores={}, reward=0.0, diversity=0.0, texture=0.0, contrast=0.0,
        images=images, captions=CAPTIONS, passed=[i < right for i in range(len(CAPTIONS))],
    )  # fmt: skip


def score(strict, low, high):
    return {"strict": strict, "low": low, "high": high, "graded": strict, "images": 96}


SUMMARY = {
    "split": "test",
    "steps": 10,
    "seed": 1,
    "best_guidance": 1.5,
    "models": {
        "base": {"scores": {"colors": score(0.6, 0.5, 0.7), "overall": score(0.53, 0.49, 0.57)}},
        "base_guided": {
            "scores": {"colors": score(0.7, 0.6, 0.8), "overall": score(0.61, 0.57, 0.65)}
        },
        "tuned": {"scores": {"colors": score(0.9, 0.82, 0.95), "overall": score(0.86, 0.83, 0.89)}},
    },
    "gain": {"strict": 0.33, "low": 0.28, "high": 0.38},
}


def recipe():
    return build_recipe(
        {
            "title": TITLE,
            "paper": "2505.05470",
            "objective": {"clip_total": 2.0},
            "run": {"iterations": LAST, "seed": 7},
        },
        "tiny",
    )


@pytest.fixture
def make_run(tmp_path):
    """A run folder up to an iteration, compared with its base or not."""

    def make(last=LAST, compared=True):
        folder = RunFolder.create(tmp_path / f"run {last}", recipe().to_yaml())
        for iteration in range(last + 1):
            folder.append_metrics(metrics_line(iteration))
            if iteration % EVERY == 0:
                folder.save_examples(f"{iteration:08d}", evaluated(right=iteration // 6))
        spent = {"score": 20.0, "rollout": 120.0, "update": 80.0}
        state = {
            "iteration": last,
            "ledger": {"seconds": spent},
            "evaluation_ledger": {"seconds": {"evaluate": 50.0}},
        }
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
    assert "0.61 [0.57, 0.65] (scale 1.5, twice the cost per image)" in page.text
    # 12 iterations of 2,368 and 100,000 evaluations and of 40 s.
    for amount in ("28.4k", "1.2M", "2,304", "8 min 0 s", "12 of 12"):
        assert amount in page.text
    # Rollouts took 120 s, of which 20 s were scoring; 250 s in all.
    sampling, updating = "sampling 1 min 40 s 40%", "updating 1 min 20 s 32%"
    for stage in (sampling, "scoring 20 s 8%", updating, "evaluating 50 s 20%"):
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
    strict = by_name["strict, with 95% interval"]
    assert strict.x == tuple(range(0, LAST + 1, EVERY))
    assert strict.y[0] == pytest.approx(0.5)
    assert strict.y[-1] == pytest.approx(0.86)
    tuned = by_name["tuned"]
    assert tuned.x == ("overall", "colors")
    assert tuned.error_y.array[0] == pytest.approx(0.03)
    assert by_name["diversity within a prompt"].y[-1] == pytest.approx(0.4)
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


def test_a_reader_is_warned_of_what_the_reward_cannot_see(make_run):
    folder = make_run()
    assert "Diversity has fallen to 40% of the base" in read(folder).text
    assert "Background texture is" not in read(folder).text
    folder.append_metrics(metrics_line(LAST, **{"eval/texture": 0.02, "eval/diversity": 0.2}))
    page = read(folder)
    assert "Background texture is 4.0 times that of the base" in page.text
    assert len(page.with_class("warning")) == 2  # With the one of a browser without scripts.


def test_a_run_at_its_start(make_run):
    page = read(make_run(last=0, compared=False))
    assert "Strict score on validation prompts iteration 0 0.50 [0.45, 0.55]" in page.text
    assert "0 of 12 , not complete" in page.text
    assert not page.figures
    assert "Under the hood" not in page.text
    assert "Score by skill" not in page.text
    assert len(page.named("img")) == len(CAPTIONS)


def test_an_interrupted_run_shows_validation_scores(make_run):
    folder = make_run(last=7, compared=False)
    page = read(folder)
    assert "iteration 0 0.50 [0.45, 0.55] → iteration 6 0.68 [0.63, 0.73]" in page.text
    assert "test prompts are judged when the run is complete" in page.text
    assert f"entroflow train --resume '{folder.path}'" in page.text
    assert "Score by skill" not in page.text


def test_a_run_that_goes_on_says_that_its_comparison_is_old(make_run):
    assert "The run has gone on" not in read(make_run()).text
    assert "The run has gone on" in read(make_run(last=7)).text


def test_a_run_without_evaluation_or_checkpoint_is_still_shown(tmp_path):
    folder = RunFolder.create(tmp_path / "run", recipe().to_yaml())
    assert "Nothing to draw yet" in read(folder).text
    for iteration in (1, 2):
        folder.append_metrics({"iteration": iteration, "reward/mean": 0.1 * iteration})
    page = read(folder)
    assert len(page.figures) == 1
    for absent in ("Strict score on", "Time by stage", "Examples", "Under the hood"):
        assert absent not in page.text


def test_no_gain_is_called_no_gain(make_run):
    folder = make_run()
    summary = SUMMARY | {"gain": {"strict": -0.01, "low": -0.03, "high": 0.01}, "best_guidance": 1}
    write_text(folder.path / EVALUATION, json.dumps(summary))
    page = read(folder)
    assert "gain −0.01 [−0.03, +0.01]" in page.text
    assert "No clear difference" in page.text
    assert "No guidance scale helped the base" in page.text
    assert len(page.named("img")) == len(CAPTIONS) * (5 + 2)


def test_large_images_are_reduced(tmp_path):
    folder = RunFolder.create(tmp_path / "run", recipe().to_yaml())
    folder.append_metrics({"iteration": 0})
    large = Evaluated({}, 0.0, 0.0, 0.0, 0.0, torch.rand(1, 3, 512, 512), ["a sky"], [])
    folder.save_examples("00000000", large)
    page = read(folder)
    assert "Images are reduced" in page.text
    assert len(page.named("img")[0]["src"]) < 60_000
    assert not page.with_class("mark")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
def test_a_browser_draws_every_figure(make_run, tmp_path):
    folder = make_run()
    figures = len(read(folder).figures)
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=5000", "--dump-dom", (folder.path / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    page = Page(done.stdout)
    assert len(page.with_class("js-plotly-plot")) == figures
    assert len(page.with_class("svg-container")) == figures
    assert len(page.with_class("main-svg")) >= figures
    assert "CONSOLE" not in done.stderr
    assert (folder.path / METRICS).exists()
