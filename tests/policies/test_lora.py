"""A LoRA from a user's file through the policy to the export, on tiny pipelines."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import entroflow
from entroflow.checkpoints import write_checkpoint
from entroflow.checks.doctor import Verdict, examine
from entroflow.cli import main as cli
from entroflow.errors import InputError
from entroflow.recipe.load import load_recipe
from entroflow.runs.open import open_policy
from entroflow.training.checkpoint import load, state_of, tensors_of
from entroflow.training.trainer import Trainer

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from entroflow.policies.diffusers.flux import FluxConfig
from entroflow.policies.diffusers.sd3 import SD3Config

CONFIGS = {"sd3": SD3Config, "flux": FluxConfig}
TINY = {"resolution": 32, "tokens": 24, "precision": "fp32"}
MODULES = {  # rank, alpha
    "transformer_blocks.0.attn.to_q": (4, 8.0), "transformer_blocks.0.attn.to_v": (4, 8.0),
    "transformer_blocks.0.attn.add_k_proj": (2, 7.0), "transformer_blocks.0.ff.net.2": (4, None),
    "proj_out": (3, 1.5),
    # FLUX has a module whose name ends like another's.
    "single_transformer_blocks.0.proj_out": (4, 6.0),
}  # fmt: skip


@pytest.fixture
def users_lora(folders, tmp_path):
    """A file of kohya's with mixed ranks and alphas; gives its folder and the changes by module."""

    def write(kind):
        from entroflow.policies.diffusers.stand_ins import STAND_INS

        transformer = STAND_INS[kind]().transformer
        generator = torch.Generator().manual_seed(4)
        tensors, changes = {}, {}
        present = {name for name, _ in transformer.named_modules()}
        for name, (rank, alpha) in MODULES.items():
            if name not in present:
                continue
            layer, stem = transformer.get_submodule(name), f"lora_unet_{name.replace('.', '_')}"
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = 0.1 * torch.randn(layer.out_features, rank, generator=generator)
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            changes[name] = (1 if alpha is None else alpha / rank) * up @ down
        folder = tmp_path / "mine"
        folder.mkdir()
        save_file(tensors, folder / "some-epoch-3.safetensors")
        return folder, changes

    return write


def built(folders, kind, **settings):
    return CONFIGS[kind](model=str(folders[kind]), **TINY | settings).build()


def velocity(policy, weights="live"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *policy.latent_shape, generator=generator)
    with torch.no_grad(), policy.weights(weights):
        return policy.velocity(x, torch.tensor([0.7]), policy.encode(["a dog"]), 1.0)


def assert_draws_the_same(folders, kind, lora, trained):
    """Loaded by diffusers: beside the weights, and fused into them."""
    pipeline = DiffusionPipeline.from_pretrained(folders[kind])
    pipeline.load_lora_weights(lora)
    settings = CONFIGS[kind](model=str(folders[kind]), **TINY, lora_rank=None)
    with pytest.raises(InputError, match="transformer has a LoRA already, which would be lost"):
        settings.over(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(velocity(settings.over(pipeline)), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_users_lora_is_what_it_says_and_so_is_the_export(folders, users_lora, tmp_path, kind):
    """Against weights changed by hand; then trained, and loaded by diffusers."""
    lora, changes = users_lora(kind)
    policy = built(folders, kind, lora_start=lora)
    by_hand = built(folders, kind, lora_rank=None)
    plain = velocity(by_hand)
    with torch.no_grad():
        for name, change in changes.items():
            by_hand.pipeline.transformer.get_submodule(name).weight += change
    wanted = velocity(by_hand)
    assert (wanted - plain).abs().max() > 1e-2
    torch.testing.assert_close(velocity(policy), wanted, rtol=0, atol=1e-5)
    assert {name.split(".lora_")[0] for name in policy.weights.live} == changes.keys()

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.weights.live.values():
            parameter += 0.05 * torch.randn_like(parameter)
    trained = velocity(policy)
    policy.export(tmp_path / "out", merged=False)
    assert_draws_the_same(folders, kind, tmp_path / "out", trained)
    again = built(folders, kind, lora_start=tmp_path / "out")
    torch.testing.assert_close(velocity(again), trained, rtol=0, atol=1e-5)
    strength_is_one(tmp_path / "out", policy)

    policy.export(tmp_path / "merged", merged=True)
    merged = CONFIGS[kind](model=str(tmp_path / "merged"), **TINY, lora_rank=None).build()
    torch.testing.assert_close(velocity(merged), trained, rtol=0, atol=1e-5)


def strength_is_one(folder, policy):
    """For who knows tensors alone, and for who reads the metadata."""
    with safe_open(folder / "pytorch_lora_weights.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    modules = {
        name: module for name, module in policy.pipeline.transformer.named_modules()
        if hasattr(module, "get_delta_weight")
    }  # fmt: skip
    assert len(tensors) == 2 * len(modules) > 0
    for name, module in modules.items():
        down, up = (tensors[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        change = module.get_delta_weight("default").detach()
        torch.testing.assert_close(up @ down, change, rtol=1e-5, atol=1e-6)
    assert settings["transformer.lora_alpha"] == settings["transformer.r"]
    assert settings["transformer.alpha_pattern"] == settings["transformer.rank_pattern"]


@pytest.mark.parametrize(("rank", "alpha"), [(4, 32), (8, 3)])
def test_a_new_lora_is_exported_with_strength_one(folders, tmp_path, rank, alpha):
    policy = built(folders, "sd3", lora_rank=rank, lora_alpha=alpha)
    with torch.no_grad():
        for parameter in policy.weights.live.values():
            parameter += 0.1
    policy.export(tmp_path, merged=False)
    strength_is_one(tmp_path, policy)


RUN = (
    "policy.resolution=32", "policy.tokens=24", "policy.precision=fp32", "prompts.per_iteration=1",
    "allocation.group_size=4", "sampling.steps=3", "sampling.batch_size=4",
    "optimizer.micro_batch=4", "objective.minibatches=1", "evaluation.images=1",
    "evaluation.test_images=1", "evaluation.steps=1", "evaluation.guidance_tried=[1.0]",
    "run.iterations=1", "optimizer.learning_rate=0.01",
)  # fmt: skip
NAMES = {"sd3": "sd35_flow_grpo", "flux": "flux_flow_grpo"}


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_run_from_a_users_lora_goes_on_and_is_exported(folders, users_lora, tmp_path, kind):
    """Train, resume, open, export: the checkpoint's weights with the strength of the file."""
    lora, _ = users_lora(kind)
    overrides = [*RUN, f"policy.model={folders[kind]}", f"policy.lora_start={lora}"]
    run = entroflow.train(NAMES[kind], overrides, run=tmp_path / "run").path
    entroflow.resume(run, ["run.iterations=2"])
    opened = open_policy(run).policy
    start, trained = velocity(opened, "reference"), velocity(opened, "ema")
    torch.testing.assert_close(start, velocity(built(folders, kind, lora_start=lora)))
    assert_draws_the_same(folders, kind, entroflow.export(run, tmp_path / "out"), trained)


def test_a_run_is_not_resumed_with_another_strength(folders, users_lora, tmp_path):
    """The same A and B, but another alpha in the file."""
    lora, _ = users_lora("sd3")
    overrides = [*RUN, f"policy.model={folders['sd3']}", f"policy.lora_start={lora}"]
    recipe = load_recipe(NAMES["sd3"], [*overrides, "policy.reference=base"])
    trainer = Trainer(recipe)
    write_checkpoint(tmp_path / "00000000", tensors_of(trainer), state_of(trainer))
    file = lora / "some-epoch-3.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["lora_unet_proj_out.alpha"] += 1
    save_file(tensors, file)
    with pytest.raises(InputError, match="other base weights"):
        load(Trainer(recipe), tmp_path / "00000000")
    with pytest.raises(InputError, match="a checkpoint without its alpha; take what entroflow ex"):
        built(folders, "sd3", lora_start=tmp_path / "00000000" / "live.safetensors")


@pytest.mark.parametrize("part", ["text_encoder_2", "vae", "transformer"])
def test_a_run_is_not_resumed_on_another_part_of_the_model(folders, tmp_path, part):
    policies = [built(folders, "sd3") for _ in range(2)]
    digests = []
    for policy, change in zip(policies, (0.0, 1.0), strict=True):
        parameter = list(getattr(policy.pipeline, part).parameters())[-1]
        with torch.no_grad():
            parameter += change
        policy.weights.keep_reference()
        digests.append(policy.weights.digest("reference"))
    assert digests[0] != digests[1]


# --- the KL to the model without it ---------------------------------------------------------------


def examined(folders, *changes):
    recipe = load_recipe(NAMES["sd3"], [*RUN, f"policy.model={folders['sd3']}", *changes])
    return {found.check: found for found in examine(recipe)}


def test_the_kl_to_the_model_without_the_lora_is_no_fault(folders, users_lora, caplog):
    """It is what it is: so much that a fault of that size would be reported."""
    lora, _ = users_lora("sd3")
    start = f"policy.lora_start={lora}"
    findings = examined(folders, start, "policy.reference=base")
    found = findings["on-policy"]
    assert found.verdict is Verdict.OK
    assert "the KL is to a reference that the policy does not start from" in found.said
    recipe = load_recipe(
        NAMES["sd3"], [*RUN, f"policy.model={folders['sd3']}", start, "policy.reference=base"]
    )
    trainer = Trainer(recipe)
    limit = 0.1 * recipe.objective.clip(trainer.dimensions)
    assert trainer.step()["policy/kl"] > 10 * limit
    assert not caplog.records


def test_a_reference_that_computes_otherwise_is_still_found(folders, users_lora, caplog):
    """The same weights, but noise where the reference's are active."""
    lora, _ = users_lora("sd3")
    recipe = load_recipe(
        NAMES["sd3"], [*RUN, f"policy.model={folders['sd3']}", f"policy.lora_start={lora}"]
    )
    trainer = Trainer(recipe)
    right = trainer.policy.velocity
    trainer.policy.velocity = lambda *given: (
        right(*given) + 0.5 * (trainer.policy.weights._active == "reference")
    )
    with caplog.at_level(logging.WARNING):
        trainer.step()
    assert ["KL to the reference" in record.getMessage() for record in caplog.records] == [True]


# --- wrong files, from the command line -----------------------------------------------------------


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_lora_for_nothing_of_the_model_ends_in_one_line(
    folders, tmp_path, monkeypatch, capsys, command
):
    """Names that once gave a run of zero trained weights."""
    file = tmp_path / "x.safetensors"
    save_file({"unet.mid.lora_A.weight": torch.ones(2, 4)}, file)
    arguments = [*RUN, f"policy.model={folders['sd3']}", f"policy.lora_start={file}"]
    monkeypatch.setattr("sys.argv", ["entroflow", command, NAMES["sd3"], *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    said = " ".join((printed.out + printed.err).split())
    assert "unet.mid.lora_A.weight" in said
    assert "layers that this SD3Transformer2DModel lacks" in said


def test_memory_counts_the_users_lora(folders, users_lora):
    lora, _ = users_lora("sd3")
    settings = CONFIGS["sd3"](model=str(folders["sd3"]), **TINY, lora_start=lora)
    live = settings.build().weights.live
    kept = settings.memory(guidance=1.0, batch_size=1, micro_batch=1).kept
    trained = sum(tensor.numel() for tensor in live.values())
    assert kept["gradients, AdamW, moving average, reference"] == 5 * 4 * trained
