"""Clip_B and Clip_V in TRL's trainer: plain GRPO where nothing is left out (B-8, B-10)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import tiny_llm
from entroflow.errors import InputError
from entroflow.llm.clips import clip_b, clip_v
from entroflow.llm.grpo import EntropyGRPOConfig, EntropyGRPOTrainer
from entroflow.llm.token_entropy import token_statistics

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def plain(folder, **changed):
    return GRPOTrainer(
        tiny_llm.model(), tiny_llm.reward, args=GRPOConfig(**tiny_llm.settings(folder, **changed)),
        train_dataset=tiny_llm.prompts(), processing_class=tiny_llm.tokenizer(),
    )  # fmt: skip


def ours(folder, **changed):
    arguments = EntropyGRPOConfig(**tiny_llm.settings(folder, **changed))
    return EntropyGRPOTrainer(
        tiny_llm.model(), tiny_llm.reward, args=arguments,
        train_dataset=tiny_llm.prompts(), processing_class=tiny_llm.tokenizer(),
    )  # fmt: skip


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


def kept_batches(trainer, monkeypatch):
    """What the trainer prepares for its updates, and the policy at that time."""
    found, own = [], GRPOTrainer._generate_and_score_completions

    def prepared(self, inputs):
        batch = own(self, inputs)
        found.append((dict(batch), tiny_llm.model()))
        found[-1][1].load_state_dict(self.model.state_dict())
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", prepared)
    return found


def statistics(policy, batch, temperature=1.0):
    """Of a batch at once, without TRL: the network on prompt and completion, dense logits."""
    both = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        logits = policy(input_ids=both, attention_mask=seen).logits
    width = batch["completion_ids"].shape[1]
    return token_statistics(logits[:, -width - 1 : -1], batch["completion_ids"], temperature)


# --- nothing left out is plain GRPO ---------------------------------------------------------------


HOSTS = {
    "plain": {},
    "two epochs, KL": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
    "cispo": {"loss_type": "cispo", "temperature": 0.7, "gradient_accumulation_steps": 2},
    "bonus": {"loss_type": "bnpo", "entropy_coef": 0.01, "top_entropy_quantile": 0.5},
    "two updates a generation": {"steps_per_generation": 2, "mask_truncated_completions": True},
    "two generations an update": {
        "loss_type": "dr_grpo", "steps_per_generation": 1, "gradient_accumulation_steps": 2,
    },
}  # fmt: skip
INFINITE = {
    "none": {"entropy_clip": "none"},
    "b": {"entropy_clip": "b"},
    "v, two sides": {"entropy_clip": "v", "entropy_clip_sides": "two"},
    "b, shrink": {"entropy_clip": "b", "entropy_clip_denominator": "shrink"},
    "v, unmeasured": {"entropy_clip": "v", "entropy_change": False},
}
QUICK = {
    ("plain", "none"), ("two epochs, KL", "b, shrink"), ("cispo", "v, two sides"),
    ("two updates a generation", "b, shrink"),
}  # fmt: skip


@pytest.mark.parametrize(("host", "changes"), [
    pytest.param(host, changes, marks=[] if (host, changes) in QUICK else pytest.mark.slow)
    for host in HOSTS for changes in INFINITE
])  # fmt: skip
def test_with_infinite_thresholds_it_is_trls_own_to_the_bit(tmp_path, host, changes):
    host, changes = HOSTS[host], {"entropy_clip_mu": math.inf, **INFINITE[changes]}
    first = plain(tmp_path / "plain", **host)
    first.train()
    second = ours(tmp_path / "ours", **host, **changes)
    second.train()
    start, before, after = tiny_llm.model().state_dict(), weights(first), weights(second)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], start[name]) for name in before)
    assert logged(first, "loss") == logged(second, "loss")
    assert logged(first, "grad_norm") == logged(second, "grad_norm")


@pytest.mark.parametrize("clip", ["b", "v"])
def test_with_one_ratio_for_a_completion_it_is_trls_own_but_for_rounding(tmp_path, clip):
    """Its gradient is summed over tokens in another order."""
    host = {"importance_sampling_level": "sequence"}
    first = plain(tmp_path / "plain", **host)
    first.train()
    second = ours(
        tmp_path / "ours", **host, entropy_clip=clip, entropy_clip_mu=math.inf,
        entropy_clip_denominator="shrink",
    )  # fmt: skip
    second.train()
    assert logged(first, "grad_norm") == pytest.approx(logged(second, "grad_norm"), rel=1e-4)


# --- what is left out -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["b", "v"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_tokens_left_out_are_those_of_the_definition(tmp_path, monkeypatch, clip, temperature):
    trainer = ours(
        tmp_path, entropy_clip=clip, entropy_clip_mu=0.5, entropy_clip_most=0.5,
        temperature=temperature,
    )  # fmt: skip
    kept = kept_batches(trainer, monkeypatch)
    used, own = [], GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda s, m, i: (used.append(i), own(s, m, i))[1]
    )
    trainer.train()
    assert len(kept) == len(used) == 3
    shares = []
    for (batch, policy), inputs in zip(kept, used, strict=True):
        tokens = statistics(policy, batch, temperature)
        valid, A = batch["completion_mask"].bool(), batch["advantages"][:, None]
        if clip == "b":
            found = clip_b(tokens, A, valid, mu=0.5)
        else:
            found = clip_v(tokens, A, valid, mu=0.5, most=0.5)
        expected = A * found.keep
        # Batches are shuffled between preparation and use.
        assert sorted(inputs["advantages"].tolist()) == sorted(expected.tolist())
        dropped = ~found.keep & valid
        shares.append((dropped.sum() / valid.sum()).item())
        assert dropped.any()
        # Clip_V counts what earned nothing as penalised; it has no gradient in any case.
        assert (A.expand(valid.shape)[dropped] <= 0).all()
    assert logged(trainer, "entropy_clip/share") == pytest.approx(shares, abs=1e-6)
    assert all(0 < share < 1 for share in logged(trainer, "entropy_clip/penalised"))


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("denominator", ["keep", "shrink"])
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
def test_the_loss_by_hand(tmp_path, monkeypatch, beta, denominator, loss_type):
    """At ratio 1 a token's is -A keep + beta KL; by `keep` it counts, by `shrink` not at all."""
    trainer = ours(
        tmp_path, entropy_clip="b", entropy_clip_mu=0.3, beta=beta, loss_type=loss_type,
        entropy_clip_denominator=denominator, max_steps=2,
    )  # fmt: skip
    kept = kept_batches(trainer, monkeypatch)
    trainer.train()
    (batch, policy) = kept[1]
    tokens = statistics(policy, batch)
    valid, A = batch["completion_mask"].bool(), batch["advantages"][:, None]
    keep = clip_b(tokens, A, valid, mu=0.3).keep
    assert (~keep).any()
    per_token = (-A * keep).expand(valid.shape)
    if beta:
        away = batch["ref_per_token_logps"] - tokens.log_prob
        per_token = per_token + beta * (away.exp() - away - 1)
    counted = (valid & keep if denominator == "shrink" else valid).float()
    if loss_type == "grpo":
        expected = ((per_token * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()
    else:
        expected = (per_token * counted).sum() / counted.sum()
    assert logged(trainer, "loss")[1] == pytest.approx(expected.item(), abs=2e-5)


@pytest.mark.parametrize(
    "host", [{}, {"loss_type": "cispo", "importance_sampling_level": "sequence"}], ids=str
)
def test_a_token_that_is_left_out_moves_no_logit_of_its_own(tmp_path, monkeypatch, host):
    """The others do, and KL still does where the token counts."""
    for beta in (0.0, 0.2):
        trainer = ours(
            tmp_path / str(beta), entropy_clip="b", entropy_clip_mu=0.3, beta=beta, **host
        )
        trainer.train()
        inputs = trainer._buffered_inputs[0]
        caught = []
        own = trainer._get_per_token_logps_and_entropies

        def spied(*given, own=own, caught=caught, **named):
            logps, entropies, rest = own(*given, **named)
            logps.retain_grad()
            caught.append(logps)
            return logps, entropies, rest

        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", spied)
        GRPOTrainer._compute_loss(trainer, trainer.model, inputs).backward()
        gradient, valid = caught[0].grad, inputs["completion_mask"].bool()
        dropped = (inputs["advantages"] == 0) & valid
        assert dropped.any()
        assert (gradient[valid & ~dropped] != 0).all()
        assert (gradient[dropped] != 0).any() == bool(beta)


def test_where_all_is_left_out_only_the_kl_is_left(tmp_path):
    """B-10: then the weights are those of TRL's trainer whose rewards are all alike."""
    host = {"beta": 0.2, "loss_type": "dapo"}
    first = GRPOTrainer(
        tiny_llm.model(), lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**tiny_llm.settings(tmp_path / "plain", **host)),
        train_dataset=tiny_llm.prompts(), processing_class=tiny_llm.tokenizer(),
    )  # fmt: skip
    second = ours(
        tmp_path / "ours", entropy_clip="b", entropy_clip_sides="two", entropy_clip_mu=0.0, **host
    )  # fmt: skip
    for trainer in (first, second):
        # Away from the reference, or there is no KL to lower.
        torch.manual_seed(5)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        start = weights(trainer)
        trainer.train()
    assert logged(second, "entropy_clip/share") == pytest.approx([1.0] * 3)
    assert logged(first, "kl") == logged(second, "kl")
    assert all(kl > 0.1 for kl in logged(second, "kl"))
    before, after = weights(first), weights(second)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(start[name], after[name]) for name in start)


@pytest.mark.parametrize("denominator", ["keep", "shrink"])
def test_what_a_tool_wrote_is_none_of_the_policys(tmp_path, monkeypatch, denominator):
    """It is in no statistic, is not left out, and stays out of the loss as before."""
    own = GRPOTrainer._generate_and_score_completions

    def with_a_tool(self, inputs):
        batch = own(self, inputs)
        batch["tool_mask"] = (torch.arange(batch["completion_ids"].shape[1]) % 3 != 1).long()
        batch["tool_mask"] = batch["tool_mask"].expand_as(batch["completion_mask"]).clone()
        return batch

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_a_tool)
    trainer = ours(
        tmp_path, entropy_clip="b", entropy_clip_mu=0.3, entropy_clip_denominator=denominator,
    )  # fmt: skip
    kept = kept_batches(trainer, monkeypatch)
    used, loss = [], GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda s, m, i: (used.append(i), loss(s, m, i))[1]
    )
    trainer.train()
    shares = []
    for (batch, policy), inputs in zip(kept, used, strict=True):
        valid = (batch["completion_mask"] * batch["tool_mask"]).bool()
        found = clip_b(statistics(policy, batch), batch["advantages"][:, None], valid, mu=0.3)
        shares.append((~found.keep & valid).sum().item() / valid.sum().item())
        counted = valid & found.keep if denominator == "shrink" else valid
        in_loss = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        assert sorted(in_loss.sum(dim=1).tolist()) == sorted(counted.sum(dim=1).tolist())
    assert logged(trainer, "entropy_clip/share") == pytest.approx(shares, abs=1e-6)
    assert all(0 < share < 1 for share in shares)


# --- what is measured -----------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "updates"), [
    ({}, 1), ({"num_iterations": 2}, 2), ({"steps_per_generation": 2}, 2),
])  # fmt: skip
def test_the_change_of_entropy_is_that_of_the_same_tokens(tmp_path, monkeypatch, changes, updates):
    """Measured when all updates of the batch are done; predicted by -A (S - S_bar), on average."""
    trainer = ours(tmp_path, entropy_clip="b", max_steps=4, **changes)
    kept = kept_batches(trainer, monkeypatch)
    policies = []

    class After(TrainerCallback):
        def on_step_end(self, *_, **__):
            policies.append(tiny_llm.model())
            policies[-1].load_state_dict(trainer.model.state_dict())

    trainer.add_callback(After())
    trainer.train()
    predicted, measured = [], []
    for number, (batch, before) in enumerate(kept):
        after = policies[(number + 1) * updates - 1]
        valid, A = batch["completion_mask"].bool(), batch["advantages"][:, None]
        tokens = statistics(before, batch)
        keep = clip_b(tokens, A, valid).keep
        change = -A * keep * (tokens.discriminator - tokens.baseline)
        predicted.append(change[valid].mean().item())
        now = statistics(after, batch).entropy
        measured.append((now - tokens.entropy)[valid].mean().item())
    assert len(kept) == 4 // updates
    assert logged(trainer, "entropy_change/predicted") == pytest.approx(predicted, abs=1e-6)
    assert logged(trainer, "entropy_change/measured") == pytest.approx(measured, abs=1e-5)
    assert any(abs(m) > 1e-3 for m in measured)


@pytest.mark.parametrize("denominator", ["keep", "shrink"])
def test_weights_that_stay_move_no_entropy(tmp_path, denominator):
    """Whatever is left out: both times it is the mean over all tokens of the policy."""
    trainer = ours(
        tmp_path, entropy_clip="b", entropy_clip_mu=0.5, learning_rate=0.0,
        entropy_clip_denominator=denominator,
    )  # fmt: skip
    trainer.train()
    assert all(share > 0 for share in logged(trainer, "entropy_clip/share"))
    assert logged(trainer, "entropy_change/measured") == pytest.approx([0.0] * 3, abs=1e-7)


def test_settings_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(InputError, match="must be an EntropyGRPOConfig, not GRPOConfig"):
        EntropyGRPOTrainer(
            tiny_llm.model(), tiny_llm.reward, GRPOConfig(**tiny_llm.settings(tmp_path))
        )


# --- two processes --------------------------------------------------------------------------------

TWO = """
import json, sys, torch
from accelerate import Accelerator
from entroflow.llm.token_entropy import TokenStatistics
from entroflow.llm.clips import clip_b, clip_v
from entroflow.llm.grpo import OfAccelerator

accelerator = Accelerator(cpu=True)
me = accelerator.process_index
torch.manual_seed(0)
columns, A = torch.randn(4, 6, 5), torch.randn(6, 1)
valid = torch.arange(5) < torch.randint(1, 6, (6, 1))
rows = slice(0, 2) if me == 0 else slice(2, 6)
mine = TokenStatistics(*(x[rows] for x in columns))
found = {}
cases = {"b": (clip_b, {}), "v": (clip_v, {"most": 0.2}), "all": (clip_v, {"most": 1.0})}
for name, (clip, more) in cases.items():
    whole = clip(TokenStatistics(*columns), A, valid, mu=0.3, **more)
    part = clip(mine, A[rows], valid[rows], mu=0.3, processes=OfAccelerator(accelerator), **more)
    found[name] = [
        part.keep.tolist() == whole.keep[rows].tolist(), bool((~whole.keep).any()),
        abs(part.spread.mean - whole.spread.mean) < 1e-12,
        abs(part.spread.std - whole.spread.std) < 1e-12,
    ]
open(f"{sys.argv[1]}/{me}.json", "w").write(json.dumps([accelerator.num_processes, found]))
"""


@pytest.mark.slow
def test_two_processes_of_accelerate_leave_out_what_one_does(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO, encoding="utf-8")
    source = Path(sys.modules["entroflow"].__file__).parents[1]
    launched = subprocess.run(
        # Once more where a port was taken between its choice and its use.
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
         "--max-restarts=1", str(script), str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, **OFFLINE, "PYTHONPATH": str(source)},
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    for number in range(2):
        processes, found = json.loads((tmp_path / f"{number}.json").read_text())
        assert processes == 2
        assert all(all(checks) for checks in found.values())


# --- wrong settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "said"), [
    ({"entropy_clip": "b", "loss_type": "luspo"}, "luspo takes one advantage"),
    ({"entropy_clip": "b", "entropy_clip_mu": -1.0}, "must be at least 0"),
    ({"entropy_clip": "b", "entropy_clip_mu": math.nan}, "must be at least 0"),
    ({"entropy_clip": "v", "entropy_clip_most": 0.0}, "must be a share"),
    ({"entropy_clip": "b", "importance_sampling_level": "sequence"}, "one ratio for a whole"),
    ({"loss_type": "foo"}, "loss_type is 'foo'"),
    ({"entropy_change": "maybe"}, "entropy_change is 'maybe'"),
    ({"entropy_clip": "c"}, "entropy_clip is 'c'"),
    ({"entropy_clip": "b", "entropy_clip_sides": "three"}, "entropy_clip_sides is 'three'"),
    ({"entropy_clip": "b", "entropy_clip_denominator": "halve"}, "entropy_clip_denominator is"),
])  # fmt: skip
def test_what_can_not_be_is_refused(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        ours(tmp_path, **changes)


def test_sampling_from_another_distribution_is_warned_of(tmp_path, caplog):
    ours(tmp_path, top_p=0.9)
    assert "sample from another distribution" in caplog.text
    caplog.clear()
    ours(tmp_path, repetition_penalty=1.1)
    assert "sample from another distribution" in caplog.text
    caplog.clear()
    ours(tmp_path, top_p=0.9, entropy_change=False)
    assert not caplog.records
