"""The doctor: what it finds on tiny pipelines, and that it finds what is wrong."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from entroflow.checks.doctor import Verdict, examine
from entroflow.cli import main as cli
from entroflow.recipe.load import load_recipe, shipped_recipes

pytest.importorskip("diffusers")

from entroflow.policies.diffusers.sd3 import SD3Policy

CHECKS = [
    "recipe", "memory", "model", "prompts", "plan", "parity", "reward", "batches", "disk",
    "on-policy", "cost",
]  # fmt: skip
TINY = ("policy.resolution=32", "policy.tokens=24", "policy.precision=fp32")


@pytest.fixture
def examined(folders):
    """Examines a recipe on a stand-in; gives findings by check."""

    def run(name, *changes, devices=1):
        kind = "flux" if name.startswith("flux") else "sd3"
        changed = [f"policy.model={folders[kind]}", *TINY, *changes]
        return {found.check: found for found in examine(load_recipe(name, changed), devices)}

    return run


def verdicts(findings):
    return {check: found.verdict for check, found in findings.items()}


def own_rewards(name, clip, url):
    """What a recipe's user sets: where the judge is, and a folder for the CLIP model."""
    return {
        "flux_pref_grpo": [f"reward.judge.url={url}", f"monitors.rewards.clip.model={clip}"],
        "flux_pref_grpo_published": [
            f"reward.rewards.preference.judge.url={url}", f"reward.rewards.clip.model={clip}"
        ],
    }.get(name, [])  # fmt: skip


REAL = [*shipped_recipes("sd3"), *shipped_recipes("flux")]


@pytest.mark.parametrize("name", REAL)
def test_the_recipes_of_real_models_pass_on_stand_ins(examined, name, clip_folder, judge_server):
    findings = examined(name, *own_rewards(name, clip_folder, judge_server.url))
    assert list(findings) == CHECKS
    wrong = {c: f.said for c, f in findings.items() if f.verdict is not Verdict.OK}
    if "clip" in str(own_rewards(name, "clip", "")):
        # A CLIP model of random weights may or may not like noise better; all else must be well.
        wrong = {c: said for c, said in wrong.items() if not said.endswith("earn more than noise")}
    assert wrong == {}
    assert "and KL 0.0e+00 before a step" in findings["on-policy"].said
    assert "of their size from those of the pipeline's own call" in findings["parity"].said


@pytest.mark.parametrize("name", ["sd35_flow_grpo", "flux_flow_grpo"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rank", [8, "null"])
def test_half_precision_passes_too(examined, name, precision, rank):
    """With a LoRA, and with the whole transformer in float32 beside encoders in half precision."""
    changes = [f"policy.precision={precision}", f"policy.lora_rank={rank}", "sampling.steps=4"]
    findings = examined(name, *changes)
    assert findings["parity"].verdict is findings["on-policy"].verdict is Verdict.OK


def test_the_same_methods_for_both_models():
    methods = {
        "flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "e_grpo", "tp_grpo",
        "tp_grpo_published",
    }  # fmt: skip
    both = {f"{model}_{method}" for model in ("sd35", "flux") for method in methods}
    assert set(REAL) == both | {"flux_aegpo", "flux_pref_grpo", "flux_pref_grpo_published"}


FAST = ("sampling.steps=4", "exploration.size=2", "exploration.last_start=0", "evaluation.steps=1")


def test_a_wrong_sampler_fails_parity(examined, monkeypatch):
    """A velocity of one per cent more."""
    right = SD3Policy._predict
    monkeypatch.setattr(SD3Policy, "_predict", lambda *a: 1.01 * right(*a))
    findings = examined("sd35_flow_grpo_fast", *FAST)
    assert findings["parity"].verdict is Verdict.FAILED
    assert "0.0001 is allowed in torch.float32" in findings["parity"].said


def test_training_that_differs_from_sampling_fails(examined, monkeypatch):
    """The network adds noise where gradients are on."""
    right = SD3Policy._predict

    def noisy(*arguments):
        found = right(*arguments)
        if not torch.is_grad_enabled():
            return found
        # The same whatever was drawn before: the verdict depends on how large it is.
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        return found + 1e-2 * noise.to(found)

    monkeypatch.setattr(SD3Policy, "_predict", noisy)
    findings = examined("sd35_flow_grpo_fast", *FAST)
    assert findings["parity"].verdict is Verdict.OK
    assert findings["on-policy"].verdict is Verdict.FAILED
    assert "rollout and training must agree" in findings["on-policy"].said


def broken(images, prompts, metadata):
    """A reward that is down."""
    raise ConnectionError("no judge at 127.0.0.1")


def crashing(images, prompts, metadata):
    """A reward with a bug."""
    return [0.0]


@pytest.mark.parametrize(
    ("reward", "said"),
    [("broken", r"2 of 2 images have none \(2 error\)"), ("crashing", "one number per image")],
)
def test_a_reward_that_fails_is_found_before_the_run(examined, reward, said):
    findings = examined("sd35_flow_grpo_fast", *FAST, f"reward.type={__name__}.{reward}")
    assert findings["reward"].verdict is Verdict.FAILED
    assert re.search(said, findings["reward"].said)
    assert verdicts(findings)["on-policy"] is Verdict.OK


def test_without_a_model_nothing_else_is_tried(tmp_path):
    recipe = load_recipe("sd35_flow_grpo", [f"policy.model={tmp_path}"])
    findings = list(examine(recipe))
    assert [found.check for found in findings] == CHECKS
    found = {f.check: f for f in findings}
    assert found["recipe"].verdict is Verdict.OK
    assert found["memory"].verdict is found["model"].verdict is Verdict.FAILED
    assert {f.verdict for f in findings[3:]} == {Verdict.SKIPPED}
    assert {f.said for f in findings[3:]} == {"needs the model"}


def test_a_plan_that_the_kernel_can_not_follow_is_found(examined):
    """CPS has no step to almost no noise; the model and its prompts are in order."""
    findings = examined("sd35_flow_grpo_fast", *FAST, "exploration.last_start=1")
    assert verdicts(findings)["prompts"] is Verdict.OK
    assert findings["plan"].verdict is findings["on-policy"].verdict is Verdict.FAILED
    assert "no stochastic step from sigma" in findings["plan"].said


def test_without_prompts_what_needs_none_is_still_tried(examined, tmp_path):
    findings = examined("sd35_flow_grpo_fast", *FAST, f"prompts.path={tmp_path / 'none.txt'}")
    assert findings["prompts"].verdict is Verdict.FAILED
    assert findings["batches"].said == findings["cost"].said == "needs the plan"
    assert findings["disk"].verdict is Verdict.OK


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        # 2 updates for 6 x 4 rollouts of 2 states: 24 states each.
        (("optimizer.micro_batch=7",), 1, "the last pass holds 3: optimizer.micro_batch=6 fills"),
        (("optimizer.micro_batch=4",), 1, "sampling.batch_size 8 is not optimizer.micro_batch 4"),
        ((), 4, "6 groups do not divide by 4 devices"),
    ],
)
def test_batches_that_do_not_divide_are_named(examined, changes, devices, said):
    shape = ("prompts.per_iteration=6", "allocation.group_size=4", *FAST)
    findings = examined("sd35_flow_grpo_fast", *shape, *changes, devices=devices)
    assert findings["batches"].verdict is Verdict.WARNING
    assert said in findings["batches"].said
    assert "updates: 2, of 24 states" in findings["batches"].said


def test_too_little_memory_fails_and_says_what_helps(examined, monkeypatch):
    plenty = examined("sd35_flow_grpo_fast", *FAST)["memory"]
    assert plenty.verdict is Verdict.OK
    most = float(re.search(r"computed: ([\d.]+) MiB at most", plenty.said)[1]) * 2**20
    for there, verdict in ((0.5 * most, Verdict.FAILED), (1.05 * most, Verdict.WARNING)):
        monkeypatch.setattr(
            "entroflow.checks.doctor._memory_there", lambda _, t=there: (int(t), "it")
        )
        found = examined("sd35_flow_grpo_fast", *FAST)["memory"]
        assert found.verdict is verdict
        assert "policy.gradient_checkpointing=true" in found.said


def test_a_full_disk_is_seen(examined, monkeypatch):
    """Of a LoRA of rank 32 on 15 projections of 64 x 64, four copies in each of four checkpoints.

    Two blocks with 8 projections each, but the last has none out of its text stream.
    """
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    found = examined("sd35_flow_grpo_fast", *FAST)["disk"]
    assert found.verdict is Verdict.FAILED
    needed = 15 * 32 * (64 + 64) * 4 * 4 * 4
    assert found.said.startswith(f"{needed / 2**20:.3g} MiB for 4 checkpoints; 0.977 KiB are free")


def test_the_embedded_model_passes_too():
    changes = ["sampling.steps=4", "exploration.size=2", "exploration.last_start=1"]
    findings = {f.check: f for f in examine(load_recipe("flow_grpo_fast", changes))}
    assert findings["memory"].verdict is findings["parity"].verdict is Verdict.SKIPPED
    others = {c: f.verdict for c, f in findings.items() if c not in ("memory", "parity")}
    assert set(others.values()) == {Verdict.OK}


def test_the_command_says_everything_and_fails_with_2(monkeypatch, capsys, tmp_path):
    arguments = ["entroflow", "doctor", "sd35_flow_grpo", f"policy.model={tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    for check in CHECKS:
        assert re.search(rf"(ok|failed|skipped) +{check}", said.out)
    assert "error: not ready to run: memory, model." in said.err


def test_one_recipe_is_examined(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["entroflow", "doctor", "quickstart", "flow_grpo"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "name one recipe" in capsys.readouterr().err


def test_without_the_extra_a_stand_in_says_its_name(monkeypatch, capsys, tmp_path):
    monkeypatch.delitem(sys.modules, "entroflow.policies.diffusers.stand_ins")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(sys, "argv", ["entroflow", "stand-in", "sd3", "--out", str(tmp_path / "x")])
    cli_ends(2)
    assert "pip install 'entroflow[diffusers]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_stand_in_is_written_where_nothing_is(monkeypatch, capsys, tmp_path):
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(
        sys, "argv", ["entroflow", "stand-in", "flux", "--out", str(tmp_path / "x")]
    )
    cli_ends(0)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "x")).__name__ == "FluxPipeline"
    assert not list(tmp_path.glob(".*"))
    cli_ends(2)
    assert "exists already" in capsys.readouterr().err


def cli_ends(code):
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
