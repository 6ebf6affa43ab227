"""Text embeddings on disk belong to the content that made them, not to a name."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import pytest
import torch
from safetensors.torch import load_file

from entroflow.errors import InputError

pytest.importorskip("diffusers")

from diffusers import FluxPipeline, StableDiffusion3Pipeline

from entroflow.policies.diffusers.embeddings import EmbeddingCache, origin_of
from entroflow.policies.diffusers.flux import FluxConfig
from entroflow.policies.diffusers.sd3 import SD3Config

PIPELINES = {"sd3": StableDiffusion3Pipeline, "flux": FluxPipeline}
TEXTS = ["a red circle", "two dogs"]
ENCODERS = [
    (kind, name)
    for kind, names in {
        "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"),
        "flux": ("text_encoder", "text_encoder_2"),
    }.items()
    for name in names
]  # fmt: skip


@pytest.fixture(scope="module")
def origins(folders):
    """Of the pipelines in the folders."""
    return {
        kind: origin_of(chosen.from_pretrained(folders[kind]), "fp32", 24)
        for kind, chosen in PIPELINES.items()
    }


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_same_content_elsewhere_has_the_same_origin(folders, origins, tmp_path, kind):
    """Saved, moved, loaded, and used: calls leave traces in tokenizers."""
    moved = shutil.copytree(folders[kind], tmp_path / "moved")
    pipeline = PIPELINES[kind].from_pretrained(moved)
    assert origin_of(pipeline, "fp32", 24) == origins[kind]
    pipeline.encode_prompt(*[TEXTS] * (3 if kind == "sd3" else 2), max_sequence_length=20)
    assert origin_of(pipeline, "fp32", 24) == origins[kind]
    assert origin_of(pipeline, "fp32", 25) != origins[kind]


@pytest.mark.parametrize(("kind", "name"), ENCODERS)
def test_one_value_of_any_weight_makes_another_origin(folders, origins, kind, name):
    pipeline = PIPELINES[kind].from_pretrained(folders[kind])
    parameters = list(getattr(pipeline, name).parameters())
    found = {origins[kind]}
    for parameter in (parameters[0], parameters[-1]):
        with torch.no_grad():
            parameter.view(-1)[1] += 1e-3
        found.add(origin_of(pipeline, "fp32", 24))
    assert len(found) == 3


@pytest.mark.parametrize(("kind", "name"), ENCODERS)
def test_another_configuration_of_the_same_weights_makes_another_origin(
    folders, origins, kind, name
):
    pipeline = PIPELINES[kind].from_pretrained(folders[kind])
    config = getattr(pipeline, name).config
    key = "layer_norm_epsilon" if hasattr(config, "layer_norm_epsilon") else "layer_norm_eps"
    setattr(config, key, 1e-3)
    assert origin_of(pipeline, "fp32", 24) != origins[kind]


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("what", ["vocabulary", "length"])
def test_another_tokenizer_makes_another_origin(folders, origins, tmp_path, kind, folder, what):
    moved = shutil.copytree(folders[kind], tmp_path / "moved")
    file = moved / folder / ("tokenizer.json" if what == "vocabulary" else "tokenizer_config.json")
    content = json.loads(file.read_text())
    if what == "length":
        content["model_max_length"] = 50
    else:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            one, other = sorted(vocabulary)[10:12]
            vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        else:
            vocabulary[20], vocabulary[21] = vocabulary[21], vocabulary[20]
    file.write_text(json.dumps(content))
    assert origin_of(PIPELINES[kind].from_pretrained(moved), "fp32", 24) != origins[kind]


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_model_replaced_under_its_name_gets_its_own_embeddings(folders, tmp_path, kind):
    config = {"sd3": SD3Config, "flux": FluxConfig}[kind]
    settings = {"resolution": 32, "tokens": 24, "precision": "fp32"}
    place = shutil.copytree(folders[kind], tmp_path / "model")
    first = config(model=str(place), cache=tmp_path / "kept", **settings).build().encode(TEXTS)
    pipeline = PIPELINES[kind].from_pretrained(place)
    with torch.no_grad():
        pipeline.text_encoder_2.get_input_embeddings().weight.mul_(1.5)
    shutil.rmtree(place)
    pipeline.save_pretrained(place)
    with_cache = config(model=str(place), cache=tmp_path / "kept", **settings).build()
    without = config(model=str(place), **settings).build().encode(TEXTS).tensors
    found = with_cache.encode(TEXTS).tensors
    assert all(torch.equal(found[name], without[name]) for name in without)
    assert any(not torch.equal(found[name], first.tensors[name]) for name in without)


# --- files ----------------------------------------------------------------------------------------

KEPT = {"embedded": torch.arange(12.0, dtype=torch.bfloat16).view(3, 4), "pooled": torch.ones(2)}


def cut(content):
    return content[:-5]


def flipped(content):
    return content[:-3] + bytes([content[-3] ^ 4]) + content[-2:]


def stripped(content):
    """As an older version wrote it, without a digest."""
    from safetensors.torch import load, save

    return save(load(content))


@pytest.mark.parametrize("damage", [cut, flipped, stripped, lambda _: b"", lambda _: b"{}" * 9])
def test_a_damaged_file_is_computed_again(tmp_path, caplog, damage):
    cache = EmbeddingCache(tmp_path, "a model")
    assert cache.read("a dog") is None
    cache.write("a dog", KEPT)
    (file,) = tmp_path.iterdir()
    found = cache.read("a dog")
    assert found.keys() == KEPT.keys()
    assert all(torch.equal(found[name], KEPT[name]) for name in KEPT)
    assert not caplog.records
    file.write_bytes(damage(file.read_bytes()))
    assert cache.read("a dog") is None
    assert [record.getMessage().split(" is damaged")[0] for record in caplog.records] == [str(file)]
    cache.write("a dog", KEPT)
    assert cache.read("a dog") is not None
    assert EmbeddingCache(tmp_path, "another").read("a dog") is None
    assert cache.read("a dog ") is None


def test_a_damaged_file_is_mended_by_the_policy(folders, tmp_path):
    settings = {"model": str(folders["sd3"]), "resolution": 32, "tokens": 24, "precision": "fp32"}
    wanted = SD3Config(**settings, cache=tmp_path).build().encode(TEXTS).tensors
    for file in tmp_path.iterdir():
        file.write_bytes(flipped(file.read_bytes()))
    found = SD3Config(**settings, cache=tmp_path).build().encode(TEXTS).tensors
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(load_file(file) for file in tmp_path.iterdir())


def _write_often(folder):
    cache = EmbeddingCache(folder, "a model")
    for number in range(30):
        cache.write(str(number % 3), KEPT)
        found = cache.read(str(number % 3))
        assert found is not None
        assert torch.equal(found["pooled"], KEPT["pooled"])


def test_processes_share_a_folder(tmp_path, caplog):
    workers = [
        multiprocessing.get_context("fork").Process(target=_write_often, args=(tmp_path,))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_can_not_be_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"policy\.cache: .*file can't be made"):
        EmbeddingCache(tmp_path / "file", "a model")
