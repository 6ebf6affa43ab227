"""How updates move the entropy of a softmax over tokens (Entropy dynamics, 2602.03392).

Of one position with logits z, p = softmax(z) and H = -sum_i p_i log p_i:

    S_k = p_k (H + log p_k) = -dH / dz_k         raising logit k by eps changes H by -eps S_k
    S_bar = sum_i p_i S_i                         the mean of S under p, never below 0
    dH = -alpha (S_k - S_bar)                     of a policy-gradient step alpha (e_k - p) on z

to first order (theorems 3.2 and 3.3). So rewarding a token lowers the entropy if p_k > e^-H and
raises it if not; under the policy itself S_k - S_bar is 0 on average, whatever p is (corollary
3.4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 8192
"""Tokens of the vocabulary at a time."""


@dataclass(frozen=True)
class TokenStatistics:
    """Of sampled tokens, each [...] in float32 or better.

    Attributes:
        log_prob: log p of the token.
        entropy: H in nats.
        discriminator: S of the token.
        baseline: S_bar.
    """

    log_prob: Tensor
    entropy: Tensor
    discriminator: Tensor
    baseline: Tensor

    @property
    def centred(self) -> Tensor:
        """S - S_bar: what a unit step towards the token takes from the entropy."""
        return self.discriminator - self.baseline


def token_statistics(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> TokenStatistics:
    """All four in one pass over the vocabulary, exact.

    Never holds more than `chunk` logits of a position in float32: of every chunk the largest logit
    m and the sums of e^d, e^d d, e^2d and e^2d d with d = x - m say all, and two such sets make
    one.

    Args:
        logits: [..., V], before the temperature; -inf for a token that can't be sampled.
        tokens: [...] the sampled ones.
        temperature: what they were sampled with.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature:g}.")
    precise = torch.promote_types(logits.dtype, torch.float32)
    largest = logits.new_full(logits.shape[:-1], -torch.inf, dtype=precise)
    one, moment, two, moment_two = (torch.zeros_like(largest) for _ in range(4))
    for start in range(0, logits.shape[-1], chunk):
        x = logits[..., start : start + chunk].to(precise) / temperature
        now = torch.maximum(largest, x.amax(dim=-1))
        level = now.masked_fill(now == -torch.inf, 0.0)
        moved = torch.where(one > 0, largest - level, 0.0)
        weight = moved.exp()
        moment = weight * (moment + moved * one)
        moment_two = weight.square() * (moment_two + moved * two)
        one, two = weight * one, weight.square() * two
        d = x - level[..., None]
        shares = d.exp()
        # A share of 0 adds nothing, though its d is -inf.
        d = torch.where(shares > 0, d, 0.0)
        one = one + shares.sum(dim=-1)
        two = two + shares.square().sum(dim=-1)
        moment = moment + (shares * d).sum(dim=-1)
        moment_two = moment_two + (shares.square() * d).sum(dim=-1)
        largest = now
    mean = moment / one
    own = logits.gather(-1, tokens[..., None])[..., 0].to(precise) / temperature - largest
    log_prob = own - one.log()
    return TokenStatistics(
        log_prob=log_prob,
        entropy=one.log() - mean,
        discriminator=log_prob.exp() * torch.where(own > -torch.inf, own - mean, 0.0),
        baseline=(moment_two - two * mean) / one.square(),
    )


def entropy_change(
    statistics: TokenStatistics, step: Tensor | float, temperature: float = 1.0
) -> Tensor:
    """[...] first-order change of H by steps on the logits that raise a token's log-probability.

    Of z -> z + (step / T) (e_k - p), along the gradient of log p_k: -step / T^2 (S - S_bar).

    Args:
        step: [...] learning rate times importance ratio, advantage and loss weight.
    """
    return -step / temperature**2 * statistics.centred
