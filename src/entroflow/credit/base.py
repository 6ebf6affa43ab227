"""Credit answers: which transition earns how much?"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from entroflow.credit.trace import Trace
from entroflow.rewards.base import Scores
from entroflow.sampling.plan import Plan


class Credit(Protocol):
    """Turns rewards into one advantage per step."""

    def complete(self, plan: Plan) -> Plan:
        """The plan with the completions this credit needs to see scored."""
        ...

    def advantages(self, plan: Plan, scores: Scores) -> Tensor:
        """[B, S] advantage of every step; NaN where the reward it hangs on failed."""
        ...


@runtime_checkable
class StepCredit(Credit, Protocol):
    """A credit that sees a reward for every step, and can say what it saw."""

    def trace(self, plan: Plan, scores: Scores) -> Trace:
        """What it saw of the rollouts of a plan that has its completions."""
        ...
