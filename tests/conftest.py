"""Settings of all tests."""

import os
import signal

import pytest

# Before torch is imported: two OpenMP threads beside another process spin instead of working.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# In the background of a shell SIGINT is ignored, and so it would be in all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

from judge_server import JudgeServer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Where tiny pipelines are saved, by the kind of policy that they serve."""
    stand_ins = pytest.importorskip("entroflow.policies.diffusers.stand_ins")
    made = {}
    for kind, stand_in in stand_ins.STAND_INS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        stand_in().save_pretrained(made[kind])
    return made


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model with its processor, as `save_pretrained` leaves it."""
    transformers = pytest.importorskip("transformers")
    from entroflow.policies.diffusers.stand_ins import _clip_config, _clip_tokenizer

    tokenizer = _clip_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "projection_dim": 16}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=_clip_config(tokenizer).to_dict() | small,
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    side = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)
    path = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(path)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.fixture
def judge_server():
    """A server that prefers the brighter image."""
    server = JudgeServer()
    yield server
    server.close()
