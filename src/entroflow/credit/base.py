"""Credit answers: which transition earns how much?"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from entroflow.rewards.base import Scores
from entroflow.sampling.plan import Plan
from entroflow.sampling.rollouts import Rollouts


class Credit(Protocol):
    """Turns rewards into one advantage per step."""

    def complete(self, plan: Plan) -> Plan:
        """The plan with the completions this credit needs to see scored."""
        ...

    def advantages(self, rollouts: Rollouts, scores: Scores) -> Tensor:
        """[B, S] advantage of every step; NaN where the reward it hangs on failed."""
        ...
