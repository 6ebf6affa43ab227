"""What people prefer, learnt: small networks over features of the embedded base model.

The base model has learnt how captions and images belong together; like CLIP under HPS and
PickScore, it is the frozen ground on which a preference is learnt from few comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from entroflow.checkpoints import read_tensors
from entroflow.policies.shapes.network import ShapesNetwork
from entroflow.policies.shapes.policy import WEIGHTS
from entroflow.policies.shapes.tokenizer import CAPTION_LENGTH, VOCABULARY, tokenize

WIDTH = 128
SIGMA = 0.7
"""Where the base model looks most at the caption: what stands where is settled there."""
AT_ONCE = 64
"""Images in one pass of the base model."""


@cache
def _base() -> ShapesNetwork:
    network = ShapesNetwork(VOCABULARY, CAPTION_LENGTH)
    shipped = {name: tensor.float() for name, tensor in read_tensors(WEIGHTS).items()}
    network.load_state_dict(shipped)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features(images: Tensor, captions: Sequence[str]) -> Tensor:
    """[n, tokens, WIDTH] what the shipped base model makes of images and their captions.

    Args:
        images: [n, 3, 32, 32] in [0, 1].
        captions: n.

    Raises:
        InputError: a caption is outside the grammar of the shapes world.
    """
    words, found = tokenize(captions), []
    for start in range(0, len(images), AT_ONCE):
        batch = images[start : start + AT_ONCE].float()
        # Between image and mean noise: features are a function of the image alone.
        state = (1 - SIGMA) * (2 * batch - 1)
        sigma = torch.full((len(batch),), SIGMA)
        text, image, *_ = _base().understand(state, sigma, words[start : start + AT_ONCE])
        found.append(torch.cat([text, image], dim=1))
    return torch.cat(found)


class Reader(nn.Module):
    """Turns the features of an image into one vector: a transformer layer, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(CAPTION_LENGTH + 64, WIDTH))
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.leave = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, tokens, WIDTH] -> [n, WIDTH]."""
        read: Tensor = self.leave(self.layer(self.enter(tokens) + self.positions).mean(dim=1))
        return read


class Pointwise(nn.Module):
    """A score for each image; the better of two is that with the higher one (Bradley-Terry)."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, read: Tensor) -> Tensor:
        """[n, WIDTH] of images -> [n] scores."""
        scores: Tensor = self.score(read)
        return scores[:, 0]

    def logit(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-odds that the first of two [..., WIDTH] is better: [...]."""
        difference: Tensor = self.score(first) - self.score(second)
        return difference[..., 0]


class Pairwise(nn.Module):
    """Looks at two images at once. Nothing makes it the same in either order, as of a VLM."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()
        self.compare = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def logit(self, first: Tensor, second: Tensor) -> Tensor:
        """Log-odds that the first of two [..., WIDTH] is better: [...]."""
        found: Tensor = self.compare(torch.cat([first, second], dim=-1))
        return found[..., 0]
