"""The panels of an image model's run: what its metrics say over iterations and over steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from entroflow.evaluation.base import Measure
from entroflow.report import figures
from entroflow.report.figures import BLUE, GRAY, ORANGE, Metrics, figure_of, plan_of, rule
from entroflow.report.panels import NOTHING, Drawing, Panel, by_step, lines

MOST_ROWS = 32
"""Kinds of rows of a plan that are drawn."""
UNMONITORED = ("score", "score_low", "score_high", "reward", "win_rate")
"""What an evaluation measures besides its monitors."""
NAMES = {
    "texture": "background texture", "diversity": "diversity within a prompt",
    "black": "black pixels", "white": "white pixels", "saturated": "saturated pixels",
    "colors": "entropy of the colours",
}  # fmt: skip
"""Names of monitors that need more words than their metric has."""


def score_and_reward(measure: Measure, prompts: str) -> list[Panel]:
    """Of a measure on prompts, as in "validation prompts"."""
    share = {"range": [-0.02, 1.02]} if measure.share else {}
    return [
        Panel(f"Score on {prompts}",
              f"Always on the same {prompts} and noise, sampled with the averaged weights (EMA).",
              {"eval/score": f"{measure.name}, with 95% interval"}, lines,
              {"band": True, "curve": True, "height": 340, "axis": share}, wide=True),
        Panel("Reward",
              "What the training raises: the mean over an iteration's rollouts. Prompts change "
              f"from iteration to iteration, so single points scatter; images of {prompts} are "
              "sampled without step noise.",
              {"reward/mean": "training", "eval/reward": prompts}, lines,
              {"smooth": True, "axis": {}}),
        Panel("Standard deviation of the reward within a group",
              "That among the images of one group, averaged over groups. This contrast is all the "
              "training learns from: at 0 it has nothing left to learn.", "reward/std", lines),
    ]  # fmt: skip


def keys_of(metrics: Metrics, prefix: str) -> list[str]:
    """Metrics that begin so, in the order in which they were written."""
    keys = dict.fromkeys(key for entry in metrics for key in entry)
    return [key for key in keys if key.startswith(prefix)]


def monitor_name(key: str) -> str:
    """The name of a metric `eval/...` or `drift/...` for people."""
    name = key.partition("/")[2]
    return NAMES.get(name, name.replace("_", " "))


def monitored(metrics: Metrics) -> list[str]:
    """The metric of every monitor."""
    return [key for key in keys_of(metrics, "eval/") if key.split("/")[1] not in UNMONITORED]


def held_out_rewards(metrics: Metrics, monitors: Sequence[str]) -> list[Panel]:
    """Rewards over held-out images that nothing trains on, and win rates over the base."""
    rate = "eval/win_rate"
    rates = [
        Panel("Win rate over the base" + key.removeprefix(rate).replace("/", ", "),
              "How often a held-out image is better than the base's of the same noise, by the "
              "judge that is trained on. It begins at 0.5.", key, lines)
        for key in keys_of(metrics, rate)
    ]  # fmt: skip
    reading = "A reward that nothing trains on: it should not fall while the others rise."
    return rates + [
        Panel(f"Monitor: {name.replace('_', ' ')}", reading, f"eval/{name}", lines)
        for name in monitors
    ]


def drifts(metrics: Metrics, band: float, prompts: str) -> Panel:
    """How far statistics have moved; the band as dashed lines, the farthest in colour."""
    keys = keys_of(metrics, "drift/")
    keys.sort(key=lambda key: -max(map(abs, figures.series(metrics, key)[1]), default=0.0))
    options = {
        "curve": True, "height": 340, "axis": {"title": {"text": "sd of the base's images"}},
        "colors": [*figures.COLORS[:4], *[GRAY] * len(keys)],
        "levels": [rule(GRAY, "dash", y=-band), rule(GRAY, "dash", y=band), rule(GRAY, "dot", y=0)],
    }  # fmt: skip
    return Panel(
        "How far the images have moved from the base’s",
        f"Statistics of the images for {prompts}, in standard deviations (sd). One outside of the "
        "dashed lines while the reward rises is a reason to look at them.",
        {key: monitor_name(key) for key in keys}, lines, options, wide=True,
    )  # fmt: skip


JUDGE = (
    ("What the judge can tell apart", {"discriminability": "discriminability"},
     "Where the standard deviation of the win rates lies between a judge that answers at random "
     "(0) and a strict ranking (1). Near 0 it sees no difference, whatever the deviation is."),
    ("Standard deviation of the win rates", {"spread": "standard deviation"},
     "Within a group. Random answers have one, too: 0.20 for 8 images, 0.13 for 16."),
    ("Points of what is shown first", {"first": "first"},
     "0.5 without preference for a place. If pairs are shown in both orders, a preference makes "
     "ties; if in one, it makes winners."),
    ("Comparisons without a winner",
     {name: name for name in ("ties", "disagreements", "failed", "unparsed", "cut")},
     "Shares of pairs that are ties, or whose two answers contradict each other; of questions "
     "that failed in any way, or got an answer that can't be read or was cut off."),
    ("Circles", {"intransitive": "circles"},
     "Of three images that were all compared, how often each beats the next in a circle: 0 for "
     "a consistent judge, a quarter for random answers."),
)  # fmt: skip
"""Title, diagnostics with their names, and how to read them."""


def judges(metrics: Metrics) -> list[Panel]:
    """How far judges of pairs are to be trusted."""
    names = _parts(metrics, "judge/")
    return [
        Panel(f"{title} ({name.replace('_', ' ')})" if len(names) > 1 else title, reading,
              {f"judge/{name}/{key}": label for key, label in keys.items()}, lines)
        for name in names
        for title, keys, reading in JUDGE
    ]  # fmt: skip


def mixture(metrics: Metrics) -> list[Panel]:
    """Each reward of a mixture."""
    reading = "Mean over an iteration's rollouts, in the units of the reward."
    names = [name for name in _parts(metrics, "reward/") if name != "failed"]
    return [Panel(n.replace("_", " "), reading, f"reward/{n}/mean", lines) for n in names]


def _parts(metrics: Metrics, prefix: str) -> list[str]:
    """NAME of the metrics `prefix/NAME/...`."""
    keys = [key.split("/") for key in keys_of(metrics, prefix)]
    return list(dict.fromkeys(parts[1] for parts in keys if len(parts) == 3))


HOOD = (
    Panel("Ratio before the first step",
          "Largest |ratio − 1| before the first optimizer step, when rollout and training see the "
          "same weights. It should be 0 up to rounding; anything near the clip range is a fault.",
          "policy/ratio_max_deviation", lines),
    Panel("Clip fraction",
          "Share of transitions whose ratio left the clip range. With one optimizer step per "
          "iteration it is 0 by construction; large values say that the steps are too big.",
          "policy/clip_fraction", lines),
    Panel("KL to the reference",
          "How far the policy has moved from the base model, per latent value. If it grows while "
          "the score does not, a larger kl_beta or a smaller learning rate loses nothing.",
          "policy/kl", lines),
    Panel("Zero-variance groups", "Groups whose rewards are all the same: they teach nothing.",
          "reward/tied_groups", lines),
)  # fmt: skip

BY_STEP = (
    Panel("Ratio − 1", "Mean over the update. Blue is above 0, orange below.", "ratio", by_step,
          {"zero": 1.0, "diverging": True}),
    Panel("Clip fraction", "Share of transitions outside the clip range.", "clipped", by_step),
    Panel("Size of the advantage",
          "Mean absolute value: how strong the signal is. Zero-variance groups count as 0.",
          "advantage_size", by_step),
    Panel("Loss", "Mean of the loss term. Blue is above 0, orange below.", "loss", by_step,
          {"diverging": True}),
    Panel("KL to the reference", "Where along the way the policy leaves the base.", "kl", by_step),
    Panel("Weighted KL", "The same times the step length, as in the loss.", "weighted_kl", by_step),
)  # fmt: skip


def failures(metrics: Metrics) -> Panel:
    """How many images could not be scored, and why."""
    names = {key: key.split("/", 2)[2] for key in sorted(keys_of(metrics, "reward/failed/"))}
    title = "Failed rewards by status" if names else "Failed rewards"
    reading = "Images that could not be scored. They are left out, never counted as 0."
    return Panel(title, reading, {"reward/failed": "all", **names}, _failures)


def _failures(metrics: Metrics, panel: Panel) -> Drawing:
    """A status is written down only where there is one."""
    none = {key: 0 for key in panel.names if key != "reward/failed"}
    return lines([{**none, **entry} for entry in metrics if "reward/failed" in entry], panel)


def _rows(metrics: Metrics, panel: Panel) -> Drawing:
    plan = plan_of(metrics)
    kinds = plan["rows"][:MOST_ROWS] if plan["steps"] else []
    styles = {"ODE": (GRAY, 2), "random, trained": (BLUE, 6), "random": (ORANGE, 6)}
    ways: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in styles}
    for y, kind in enumerate(kinds):
        for step, (start, end) in enumerate(pairwise(kind["points"])):
            name = "random, trained" if step in kind["trained"] else "random"
            x, at = ways[name if step in kind["stochastic"] else "ODE"]
            # None ends a line.
            x += [start, end, None]
            at += [y, y, None]
    traces = [
        {"x": x, "y": y, "mode": "lines", "name": name, "hoverinfo": "skip",
         "line": {"color": styles[name][0], "width": styles[name][1]}}
        for name, (x, y) in ways.items() if x
    ]  # fmt: skip
    labels = ["anchor" if kind["role"] == "anchor" else f"{kind['count']} ×" for kind in kinds]
    axis = {"tickvals": list(range(len(kinds))), "ticktext": labels, "showgrid": False,
            "range": [len(kinds) - 0.4, -0.6]}  # fmt: skip
    over = {"title": {"text": "step"}, "showgrid": False}
    figure = figure_of(traces, min(520, 130 + 16 * len(kinds)), xaxis=over, yaxis=axis)
    return (figure, "") if traces else NOTHING


def _entropies(metrics: Metrics, panel: Panel) -> Drawing:
    steps = plan_of(metrics)["steps"]
    trace = {
        "type": "bar", "marker": {"color": BLUE},
        "x": [f"{step['start']}–{step['end']}" for step in steps],
        "y": [math.exp(step["entropy"]) for step in steps],
        "customdata": [
            [step[key] for key in ("sigma", "sigma_next", "std", "entropy")] for step in steps
        ],
        "hovertemplate": "sigma %{customdata[0]:.3f} to %{customdata[1]:.3f}<br>"
                         "std %{customdata[2]:.3f}, %{customdata[3]:.2f} nats<extra></extra>",
    }  # fmt: skip
    over = {"title": {"text": "step (start–end)"}, "type": "category"}
    figure = figure_of([trace], xaxis=over, yaxis={"rangemode": "tozero"})
    return (figure, "") if steps else NOTHING


PLAN = (
    Panel("Which rows are random where",
          "Rows of one prompt, from noise on the left to the image on the right: as many as the "
          "number at the left are alike. Gray follows the ODE, blue is random and trained, orange "
          "random only. The plan of the first iteration.", "plan", _rows),
    Panel("Entropy of each stochastic step",
          "The exponential of the entropy per latent value: how far the images of a group can "
          "come apart at this step.", "plan", _entropies),
)  # fmt: skip
