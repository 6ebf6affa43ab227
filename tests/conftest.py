"""Settings of all tests."""

import os

import pytest

# Before torch is imported: two OpenMP threads beside another process spin instead of working.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Where tiny pipelines are saved, by the kind of policy that they serve."""
    stand_ins = pytest.importorskip("entroflow.policies.diffusers.stand_ins")
    made = {}
    for kind, stand_in in stand_ins.STAND_INS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        stand_in().save_pretrained(made[kind])
    return made
