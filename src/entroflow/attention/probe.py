"""The attention entropy of a policy's rows, measured while its network runs (AEGPO, 2602.06825)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from entroflow.attention.entropy import attention_entropy, normalised
from entroflow.errors import InputError
from entroflow.ledger import Ledger
from entroflow.noise import Stream, generator
from entroflow.policies.attention import watched_by
from entroflow.policies.base import Condition, Policy
from entroflow.sampling.plan import FRESH, Plan
from entroflow.sampling.rollouts import Rollouts
from entroflow.settings import Attention

ENTROPY, SHIFT = "attention_entropy", "attention_shift"
"""Names of the measurements: of steps, and of prompts."""
TOKENS = -1
"""Where the choice of tokens has its random numbers: a step that no state has."""


@cache
def stratified(tokens: int, count: int, seed: int) -> Tensor:
    """[min(count, tokens)] image tokens: one from each of `count` equal pieces of their order."""
    if count >= tokens:
        return torch.arange(tokens)
    edges = [piece * tokens // count for piece in range(count + 1)]
    source = generator(seed, Stream.PROBE, step=TOKENS)
    return torch.tensor([int(source.integers(low, high)) for low, high in pairwise(edges)])


def probed_velocity(
    policy: Policy,
    x: Tensor,
    sigma: Tensor,
    cond: Condition,
    guidance: float,
    rows: Tensor,
    settings: Attention,
) -> tuple[Tensor, Tensor]:
    """The policy's velocity, unchanged, and the attention entropy of some of its rows.

    Args:
        x, sigma, cond, guidance: see `Policy.velocity`.
        rows: [B] bool, which are measured.
        settings: which attention.

    Returns:
        [B, *latent_shape], and [B]: the mean over layers, heads and image tokens, in [0, 1] (in
        nats where it is not normalised), NaN where nothing was measured.

    Raises:
        InputError: the policy shows no attention, or a layer twice.
    """
    entropy = torch.full((len(x),), torch.nan)
    if not rows.any():
        return policy.velocity(x, sigma, cond, guidance), entropy
    seen = _Seen(settings, rows.nonzero()[:, 0])
    with watched_by(seen):
        velocity = policy.velocity(x, sigma, cond, guidance)
    if not seen.layers:
        raise InputError(
            "attention is to be measured, but the policy shows none; one of your own shows it with "
            "entroflow.policies.attention.show."
        )
    entropy[rows] = torch.stack([*seen.layers.values()]).mean(dim=0)
    return velocity, entropy


def probed_rows(plan: Plan) -> Tensor:
    """[B] bool: one row of every prompt, the first from fresh noise, to measure attention on."""
    probed = torch.zeros(plan.rows, dtype=torch.bool)
    fresh = (plan.parent == FRESH).nonzero()[:, 0]
    first = torch.full((len(plan.prompts),), plan.rows)
    first.scatter_reduce_(0, plan.prompt[fresh], fresh, "amin")
    probed[first[first < plan.rows]] = True
    return probed


@dataclass(frozen=True)
class AttentionProbe:
    """Measures `attention_entropy` at one row of every prompt; see `Probe`."""

    settings: Attention

    def rows(self, plan: Plan) -> Tensor:
        """See `probed_rows`."""
        return probed_rows(plan)

    def __call__(
        self,
        policy: Policy,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        guidance: float,
        rows: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `probed_velocity`."""
        velocity, entropy = probed_velocity(policy, x, sigma, cond, guidance, rows, self.settings)
        return velocity, {ENTROPY: entropy}


def compared_states(plan: Plan, count: int) -> Tensor:
    """[B, S] bool: of every probed row, `count` steps spread evenly over its own."""
    chosen = torch.zeros(plan.std.shape, dtype=torch.bool)
    for row in probed_rows(plan).nonzero()[:, 0].tolist():
        length = int(plan.length[row])
        middles = (torch.arange(min(count, length)) + 0.5) * length / min(count, length)
        chosen[row, middles.long()] = True
    return chosen


@torch.no_grad()
def attention_shift(
    policy: Policy,
    rollouts: Rollouts,
    cond: Condition,
    settings: Attention,
    *,
    guidance: float,
    batch_size: int,
    ledger: Ledger,
) -> Tensor:
    """How far attention entropy has moved from the reference's, of every prompt.

    AEGPO (2602.06825, eq. 5 and 6): mean |E - E_reference| over some states of one rollout, the
    reference's measured at the same states. No divergence: 0 says that these numbers agree.

    Args:
        rollouts: sampled with `settings`, states of `compared_states` kept; that measured them.
        ledger: counts what the reference takes; nothing where its weights are the policy's.

    Returns:
        [P]; NaN of a prompt without a probed row.
    """
    plan = rollouts.plan
    row, step = compared_states(plan, settings.states).nonzero(as_tuple=True)
    ours = rollouts.measurement(ENTROPY)[row, step]
    theirs = ours.clone()
    if len(row) and not policy.weights.equal("live", "reference"):
        # Only conditional rows are looked at: where guidance takes a second pass, there is none.
        guidance = min(guidance, 1.0, key=policy.evaluations)
        sigma, prompt = plan.sigmas[row, step], plan.prompt[row]
        states = rollouts.states[rollouts.state_index[row, step]]
        exact = torch.promote_types(states.dtype, torch.float32)
        with policy.weights("reference"):
            for part in torch.arange(len(row)).split(batch_size):
                _, theirs[part] = probed_velocity(
                    policy, states[part], sigma[part].to(exact), cond.take(prompt[part]), guidance,
                    torch.ones(len(part), dtype=torch.bool), settings,
                )  # fmt: skip
                ledger.forward(len(part) * policy.evaluations(guidance))
    moved = (ours - theirs).abs()
    if settings.shift == "relative":
        moved = moved / theirs.clamp(min=1e-6)
    prompts = range(len(plan.prompts))
    return torch.stack([moved[plan.prompt[row] == prompt].double().mean() for prompt in prompts])


def entropy_by_step(rollouts: Rollouts) -> Tensor:
    """[T] mean attention entropy before every step of the base grid; NaN where none is known."""
    plan, entropy = rollouts.plan, rollouts.measurement(ENTROPY)
    at = plan.points[:, :-1]
    steps = range(len(plan.base_grid) - 1)
    return torch.stack([entropy[at == step].double().nanmean() for step in steps])


@dataclass
class _Seen:
    """What is seen of one network call.

    Attributes:
        layers: by number, of every measured layer the entropy [n] of the measured rows.
    """

    settings: Attention
    rows: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def see(self, layer: int, q: Tensor, k: Tensor, text: slice) -> None:
        """See `Watcher.see`."""
        settings = self.settings
        if layer % settings.layer_stride:
            return
        if layer in self.layers:
            raise InputError(
                f"the policy shows its attention layer {layer} twice for one velocity; mark the "
                "rows that see their prompt, with entroflow.policies.attention.conditional."
            )
        rows, N = self.rows.to(q.device), q.shape[2]
        q, k = q[rows], k[rows]
        if settings.queries < N:
            q = q[:, :, stratified(N, settings.queries, settings.seed).to(q.device)]
        if settings.keys == "text":
            k = k[:, :, text]
        elif settings.keys == "image":
            k = k[:, :, text.stop :] if text.start == 0 else k[:, :, : text.start]
        with torch.autocast(q.device.type, enabled=False):
            entropy = attention_entropy(q, k)
        if settings.normalised:
            entropy = normalised(entropy, k.shape[2])
        self.layers[layer] = entropy.mean(dim=(1, 2)).float().cpu()
