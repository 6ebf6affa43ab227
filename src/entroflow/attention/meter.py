"""What a run measures of attention, what it remembers of it, and what it says about it."""

from __future__ import annotations

import torch
from torch import Tensor

from entroflow.attention.curve import EntropyCurve
from entroflow.attention.probe import (
    attention_shift,
    entropy_by_step,
    probe_of,
    probed_velocity,
)
from entroflow.ledger import Ledger
from entroflow.noise import Address, Stream
from entroflow.policies.base import Condition, Policy
from entroflow.prompts import Prompt
from entroflow.sampling.kernels import ODE
from entroflow.sampling.plan import fresh_rows
from entroflow.sampling.rollouts import Rollouts
from entroflow.sampling.solver import sample
from entroflow.settings import Attention


class AttentionMeter:
    """Measures where a part of the recipe needs it, or the section `attention` asks for it.

    Attributes:
        curve: Entropy(t), over the iterations so far.
    """

    def __init__(self, settings: Attention, allocation: object, exploration: object) -> None:
        self.settings = settings
        self._of_allocation = bool(getattr(allocation, "needs_attention", False))
        self._of_exploration = bool(getattr(exploration, "needs_attention", False))
        self.curve = EntropyCurve(settings.curve_ema)

    def in_round(self, number: int) -> Attention | None:
        """What is measured in a round, from 0: nothing after the first."""
        on = self.settings.measure or self._of_allocation or self._of_exploration
        return self.settings if on and number == 0 else None

    def try_out(
        self, policy: Policy, prompts: list[Prompt], sigma: Tensor, guidance: float
    ) -> None:
        """Measure one state, if any is to be.

        Not counted: a run that is resumed asks again, and spends the same.

        Raises:
            InputError: the policy shows no attention, or it can't be looked at.
        """
        settings = self.in_round(0)
        if settings is None:
            return
        cond = policy.encode([prompts[0].text])
        x = torch.zeros(1, *policy.latent_shape)
        with torch.no_grad():
            probed_velocity(policy, x, sigma, cond, guidance, torch.ones(1).bool(), settings)

    def entropy_for_plans(
        self,
        policy: Policy,
        prompts: list[Prompt],
        base_grid: Tensor,
        *,
        seed: int,
        guidance: float,
        batch_size: int,
        ledger: Ledger,
    ) -> Tensor | None:
        """[T] what an exploration plans by, if it does; at first by the ODE of the reference."""
        if not self._of_exploration:
            return None
        if self.curve.values is None:
            P, T = len(prompts), len(base_grid) - 1
            plan = fresh_rows(
                prompts, torch.ones(P, dtype=torch.long), torch.zeros(P, dtype=torch.long),
                base_grid, torch.zeros(T, dtype=base_grid.dtype), scored=False,
            )  # fmt: skip
            rollouts = Rollouts.empty(plan, policy.latent_shape)
            cond = policy.encode(plan.texts)
            with ledger.timed("attention"), policy.weights("reference"):
                for _ in sample(
                    policy, ODE(), rollouts, cond, address=Address(seed), guidance=guidance,
                    batch_size=batch_size, initial=Stream.PROBE, probe=probe_of(self.settings),
                    ledger=ledger,
                ):  # fmt: skip
                    pass
            self.curve.follow(entropy_by_step(rollouts))
        return self.curve.values

    def shift(
        self,
        policy: Policy,
        rollouts: Rollouts,
        cond: Condition,
        *,
        guidance: float,
        batch_size: int,
        ledger: Ledger,
    ) -> Tensor:
        """[P] how far attention has moved; see `attention_shift`.

        Passes of the reference that serve the report alone are counted apart.
        """
        counted = ledger if self._of_allocation else Ledger()
        with ledger.timed("attention"):
            found = attention_shift(
                policy, rollouts, cond, self.settings,
                guidance=guidance, batch_size=batch_size, ledger=counted,
            )  # fmt: skip
        if counted is not ledger:
            ledger.check_evaluations += counted.network_evaluations
        return found

    def passes(self, prompts: int, steps: int) -> int:
        """States at which an iteration evaluates the reference to allocate."""
        return prompts * min(self.settings.states, steps) if self._of_allocation else 0
