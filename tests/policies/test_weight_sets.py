"""Named copies of the trainable weights."""

from __future__ import annotations

import pytest
import torch

from entroflow.errors import InputError
from entroflow.policies.base import WeightSets


def sets(scale=2.0, dtype=torch.float32):
    """Weights as a network may have them: a matrix, a transposed view and a scalar."""
    return WeightSets(
        {
            "matrix": torch.arange(6.0).reshape(2, 3).to(dtype),
            "transposed": torch.arange(6.0).reshape(2, 3).T.to(dtype),
            "scale": torch.tensor(scale, dtype=dtype),
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_digest_tells_values_apart_and_nothing_else(dtype):
    weights = sets(dtype=dtype)
    weights.keep("reference")
    assert weights.digest("live") == weights.digest("reference") == sets(dtype=dtype).digest("live")
    assert sets(scale=2.5, dtype=dtype).digest("live") != weights.digest("live")
    weights.live["matrix"][1, 2] += 1
    assert weights.digest("live") != weights.digest("reference")


def test_a_set_is_active_inside_the_block_only():
    weights = sets()
    weights.keep("reference")
    weights.live["scale"].fill_(5.0)
    parameter = weights.live["scale"]
    with weights("reference"):
        assert parameter.item() == 2.0
        with weights("reference"):
            assert parameter.item() == 2.0
        with pytest.raises(RuntimeError, match="'reference' are active"), weights("live"):
            pass
    assert parameter.item() == 5.0
    with pytest.raises(KeyError), weights("reference"):
        raise KeyError
    assert parameter.item() == 5.0


def test_weights_of_another_model_are_refused():
    with pytest.raises(InputError, match="the loaded weights do not fit this policy: extra differ"):
        sets().load({**sets().live, "extra": torch.zeros(1)})
    with pytest.raises(InputError, match="scale differ"):
        sets().keep("ema", {**sets().live, "scale": torch.zeros(1)})
