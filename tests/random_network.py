"""The embedded model with random weights: for tests that ask how, not how well, it draws."""

from __future__ import annotations

import torch
from torch import Tensor

from entroflow.policies.shapes.network import ShapesNetwork
from entroflow.policies.shapes.tokenizer import CAPTION_LENGTH, VOCABULARY


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights of which none is zero, so that everything has an influence."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ShapesNetwork(VOCABULARY, CAPTION_LENGTH)
        weights = {}
        for name, parameter in network.named_parameters():
            scale = 0.3 / max(parameter[0].numel(), 1) ** 0.5 if parameter.dim() > 1 else 0.1
            weights[name] = parameter.detach() + scale * torch.randn_like(parameter)
    return weights
