"""The embedded network: a small MM-DiT that predicts the velocity of 32x32 images from a caption.

Joint text-image attention with separate weights per modality (Esser et al., 2024, "Scaling
rectified flow transformers"), AdaLN-zero modulation (Peebles & Xie, 2023), QK normalisation.
A convolution at full resolution goes before the patches and joins what comes back from them: the
transformer decides what stands where, the convolutions draw it sharply.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entroflow.policies.attention import attention

RESOLUTION = 32
PATCH = 4
CHANNELS = 3
FINE = 32
"""Channels of the convolutions at full resolution."""
SPAN = 9
"""Words that a word sees at once: itself and four on either side, as far as "left" from the second
shape in "a red circle left of a blue square"."""


class Modulation(nn.Module):
    """AdaLN-zero: `parts` vectors of the token width, from the conditioning vector."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """[B, width] -> `parts` tensors [B, 1, width]."""
        parts: Tensor = self.linear(condition)[:, None]
        return parts.chunk(self.parts, dim=-1)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then scale and shift [B, 1, width]."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


def normalise(x: Tensor, scale: Tensor) -> Tensor:
    """Layer norm over the last axis, without offset: the QK norm of ViT-22B."""
    return F.layer_norm(x, scale.shape, scale.to(x.dtype), eps=1e-6)


class ModalityStream(nn.Module):
    """The weights of one modality (text or image) within a block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.scale_q = nn.Parameter(torch.ones(width // heads))
        self.scale_k = nn.Parameter(torch.ones(width // heads))
        self.out = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def project(
        self, tokens: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the stream's tokens, each [B, heads, L, head width]."""
        B, L, _ = tokens.shape
        q, k, v = self.qkv(modulate(tokens, shift, scale)).view(B, L, 3, self.heads, -1).unbind(2)
        q, k = normalise(q, self.scale_q), normalise(k, self.scale_k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def absorb(self, tokens: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The residual updates after attention: its output, then the MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = parts
        tokens = torch.addcmul(tokens, gate, self.out(attended))
        # Squared ReLU (So et al., 2021).
        wide = F.relu(self.widen(modulate(tokens, mlp_shift, mlp_scale))).square()
        return torch.addcmul(tokens, mlp_gate, self.narrow(wide))


class LastTextStream(nn.Module):
    """The text of the last block: it is read by the image, and nobody reads what it becomes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(width, 2)
        self.kv = nn.Linear(width, 2 * width)
        self.scale_k = nn.Parameter(torch.ones(width // heads))

    def project(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of the text, each [B, heads, L, head width]."""
        B, L, _ = tokens.shape
        k, v = self.kv(modulate(tokens, shift, scale)).view(B, L, 2, self.heads, -1).unbind(2)
        return normalise(k, self.scale_k).transpose(1, 2), v.transpose(1, 2)


class Block(nn.Module):
    """One MM-DiT block: both streams attend to the concatenation of both, text first."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.text = ModalityStream(width, heads)
        self.image = ModalityStream(width, heads)

    def forward(self, text: Tensor, image: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """New text [B, L, width] and image [B, N, width] tokens."""
        text_parts = self.text.modulation(condition)
        image_parts = self.image.modulation(condition)
        from_text = self.text.project(text, *text_parts[:2])
        from_image = self.image.project(image, *image_parts[:2])
        pairs = zip(from_text, from_image, strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in pairs)
        cut = text.shape[1]
        attended = attention(q, k, v, layer=self.layer, text=cut)
        attended = attended.transpose(1, 2).flatten(2)
        return (
            self.text.absorb(text, attended[:, :cut], text_parts),
            self.image.absorb(image, attended[:, cut:], image_parts),
        )


class LastBlock(nn.Module):
    """The last block: only the image attends, to both."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.text = LastTextStream(width, heads)
        self.image = ModalityStream(width, heads)

    def forward(self, text: Tensor, image: Tensor, condition: Tensor) -> Tensor:
        """New image [B, N, width] tokens."""
        parts = self.image.modulation(condition)
        text_k, text_v = self.text.project(text, *self.text.modulation(condition))
        q, k, v = self.image.project(image, *parts[:2])
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        attended = attention(q, k, v, layer=self.layer, text=text.shape[1])
        return self.image.absorb(image, attended.transpose(1, 2).flatten(2), parts)


class ShapesNetwork(nn.Module):
    """velocity = network(x, sigma, words).

    Args:
        vocabulary: number of word ids, the empty word included.
        caption_length: number of words per caption, padded with the empty word.
    """

    def __init__(
        self,
        vocabulary: int,
        caption_length: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        side = RESOLUTION // PATCH
        self.width = width
        self.words = nn.Embedding(vocabulary, width)
        self.word_positions = nn.Parameter(0.02 * torch.randn(caption_length, width))
        self.neighbours = nn.Conv1d(width, width, SPAN, padding=SPAN // 2)
        self.pooled_words = nn.Linear(width, width)
        self.sigma = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.fine = nn.Conv2d(CHANNELS, FINE, kernel_size=3, padding=1)
        self.stem = nn.Conv2d(FINE, width, kernel_size=2 * PATCH, stride=PATCH, padding=PATCH // 2)
        self.register_buffer("positions", sincos_positions(side, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, layer) for layer in range(depth - 1))
        self.last_block = LastBlock(width, heads, depth - 1)
        self.last_modulation = Modulation(width, 2)
        self.unstem = nn.ConvTranspose2d(
            width, FINE, kernel_size=2 * PATCH, stride=PATCH, padding=PATCH // 2
        )
        self.join = nn.Conv2d(2 * FINE, FINE, kernel_size=3, padding=1)
        self.last = nn.Conv2d(FINE, CHANNELS, kernel_size=3, padding=1)
        nn.init.normal_(self.words.weight, std=0.02)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        """Velocity noise - data.

        Args:
            x: [B, 3, 32, 32] state.
            sigma: [B] in [0, 1].
            words: [B, caption_length] word ids.

        Returns:
            [B, 3, 32, 32].
        """
        text, image, condition, fine = self.understand(x, sigma, words)
        side = RESOLUTION // PATCH
        image = self.last_block(text, image, condition)
        image = modulate(image, *self.last_modulation(condition))
        coarse = self.unstem(image.transpose(1, 2).unflatten(2, (side, side)))
        velocity: Tensor = self.last(F.silu(self.join(torch.cat([coarse, fine], dim=1))))
        return velocity

    def understand(
        self, x: Tensor, sigma: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All but the last block: what image and text make of each other.

        Args:
            x, sigma, words: see `forward`.

        Returns:
            Text tokens [B, caption_length, width], image tokens [B, 64, width], the conditioning
            vector [B, width], and the features [B, FINE, 32, 32] at full resolution.
        """
        embedded = self.words(words)
        # Which object of a pair stands left depends on the relation and on the side of it that the
        # word is on: an exclusive or for a word that knows its own place only, linear in the words
        # around.
        normed = F.layer_norm(embedded, embedded.shape[-1:])
        text = embedded + self.word_positions + self.neighbours(normed.mT).mT
        pooled = self.pooled_words(text.mean(dim=1))
        condition = F.silu(self.sigma(sigma_features(sigma, self.width)) + pooled)
        fine = self.fine(x.contiguous(memory_format=torch.channels_last))
        grid = self.stem(F.silu(fine))
        image = grid.flatten(2).transpose(1, 2) + self.positions.to(grid.dtype)
        for block in self.blocks:
            text, image = block(text, image, condition)
        return text, image, condition, fine


def sincos_positions(side: int, width: int) -> Tensor:
    """[side * side, width] fixed two-dimensional sine-cosine positions."""
    frequencies = torch.exp(-math.log(100.0) * torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None, :].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def sigma_features(sigma: Tensor, width: int) -> Tensor:
    """[B, width] sine-cosine features of sigma, periods from 1/160 to 6.3 on [0, 1]."""
    frequencies = torch.exp(
        math.log(1000.0) * torch.linspace(0, 1, width // 2, device=sigma.device)
    )
    angles = sigma.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
