"""Step-level rewards and turning points (TP-GRPO, 2602.06422).

y_0, ..., y_n are the states before, between and after the n stochastic steps of a rollout, and R_k
is the reward of the image that the ODE makes of y_k; R_n that of the rollout's own image. Step k
earns its increment d_k = R_(k+1) - R_k; at a turning point it earns R_n - R_k, all that followed.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from entroflow.component import Component
from entroflow.credit.normalise import group_advantages
from entroflow.credit.trace import Trace
from entroflow.errors import InputError
from entroflow.rewards.base import Scores
from entroflow.sampling.plan import Plan, Role, with_children

Constraint = Literal["plain", "consistent"]
Balance = Literal["batch", "prompt", "off"]


# --- the mathematics ------------------------------------------------------------------------------


def increments(rewards: Tensor) -> Tensor:
    """d_k = R_(k+1) - R_k: [B, n] of rewards [B, n + 1]."""
    return rewards[:, 1:] - rewards[:, :-1]


def aggregated(rewards: Tensor) -> Tensor:
    """R_n - R_k, the sum of the increments from step k on: [B, n] of rewards [B, n + 1]."""
    return rewards[:, -1:] - rewards[:, :-1]


def turning_points(
    rewards: Tensor, constraint: Constraint, *, first_step: bool = True, dead_band: float = 0.0
) -> Tensor:
    """Where a trajectory turns to where it ends (definitions 4.1 and 5.1).

    Step k > 0 turns if it goes with the whole, sign(d_k) = sign(R_n - R_0), and the step before
    goes against it. `consistent` asks moreover that what is left goes the same way,
    sign(R_n - R_(k+1)) = sign(d_k). Step 0 turns if it goes with the whole, or `consistent` with
    what is left. A difference of 0, or one that is not known, has no sign and goes with nothing.

    Args:
        rewards: [B, n + 1], NaN where one is not known.
        first_step: whether step 0 may turn.
        dead_band: differences up to this have no sign.

    Returns:
        [B, n] bool.
    """

    def sign(difference: Tensor) -> Tensor:
        return torch.where(difference.abs() > dead_band, difference.sign(), 0.0)

    step = sign(increments(rewards))
    with_whole = step * sign(rewards[:, -1:] - rewards[:, :1])
    turns = with_whole > 0
    turns[:, 1:] &= with_whole[:, :-1] < 0
    if constraint == "consistent":
        with_rest = step * sign(rewards[:, -1:] - rewards[:, 1:]) > 0
        turns[:, 1:] &= with_rest[:, 1:]
        # Step and rest together make the whole, so this one condition has the other in it.
        turns[:, 0] = with_rest[:, 0]
    if not first_step:
        turns[:, 0] = False
    return turns


def balanced(turns: Tensor, worth: Tensor) -> Tensor:
    """As many turning points of positive as of negative worth: of the more frequent, the largest.

    Where all have the same sign, all stay (appendix D).

    Args:
        turns: [B, n] bool.
        worth: [B, n] what a turning point would earn.

    Returns:
        [B, n] bool.
    """
    kept = turns.clone()
    rising, falling = turns & (worth > 0), turns & (worth < 0)
    fewer = min(int(rising.sum()), int(falling.sum()))
    if fewer == 0:
        return kept
    for side in (rising, falling):
        index = side.flatten().nonzero()[:, 0]
        order = torch.argsort(worth.flatten()[index].abs(), descending=True, stable=True)
        kept.view(-1)[index[order[fewer:]]] = False
    return kept


# --- the component --------------------------------------------------------------------------------


class TurningPoints(Component):
    """Increments of the reward step by step, and all that followed at turning points.

    Every step is compared with the same step of the rollouts of its group. It costs a completion
    for every stochastic step, and a reward for each.
    """

    type: Literal["turning_points"] = "turning_points"
    constraint: Constraint = Field(
        "consistent", description="which steps turn: plain, or those that the rest agrees with"
    )
    aggregate: bool = Field(
        True, description="whether turning points earn all that followed; else increments alone"
    )
    first_step: bool = Field(True, description="whether the first stochastic step may turn")
    dead_band: float = Field(
        0.0, ge=0, description="differences of rewards up to this have no sign, for noisy rewards"
    )
    balance: Balance = Field(
        "batch",
        description="keep as many turning points of positive as of negative worth: in the whole "
        "batch, for each prompt, or off",
    )
    ddof: Literal[0, 1] = Field(0, description="0: divide the variance by n; 1: by n - 1")
    epsilon: float = Field(1e-4, ge=0, description="added to the standard deviation")
    advantage_clip: float = Field(5.0, gt=0, description="bound on the size of an advantage")

    def complete(self, plan: Plan) -> Plan:
        """The plan with an ODE completion from before every stochastic step of a rollout.

        Completions of one index and group are a group of their own, for rewards that compare.

        Raises:
            InputError: rollouts with fewer than two stochastic steps, or not all with as many.
        """
        row, step = _stochastic(plan)
        number = (plan.std > 0).sum(dim=1)[plan.role == Role.ROLLOUT]
        if not len(number):
            return plan
        fewest, most = int(number.min()), int(number.max())
        if fewest < 2 or fewest != most:
            given = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            remedy = (
                "choose another kernel than ode"
                if most == 0
                else "choose another exploration, or a wider one (merged_steps always gives 1)"
            )
            raise InputError(
                "credit turning_points compares the stochastic steps of a rollout with each other, "
                "so every rollout needs two or more, and as many as the others; the plan "
                f"gives them {given}: {remedy}."
            )
        # Below 0, where no rollout's group is, and the same in every round.
        T = len(plan.base_grid) - 1
        group = -1 - (plan.group[row] * T + _ordinal(plan, row, step))
        return with_children(plan, row, step, role=Role.COMPLETION, group=group)

    def advantages(self, plan: Plan, scores: Scores) -> Tensor:
        """[B, S]; see `Credit.advantages`.

        NaN for a step whose increment is not known, and for all steps of a rollout where R_0 or R_n
        is not.
        """
        table = torch.zeros(plan.std.shape, dtype=torch.float64)
        row, step = _stochastic(plan)
        if not len(row):
            return table
        trace = self.trace(plan, scores)
        own = trace.row[:, -1]
        for k in range(trace.earned.shape[1]):
            mine = _ordinal(plan, row, step) == k
            table[row[mine], step[mine]] = group_advantages(
                trace.earned[:, k], plan.group[own],
                ddof=self.ddof, epsilon=self.epsilon, clip=self.advantage_clip, floor=scores.floor,
            )  # fmt: skip
        return table

    def trace(self, plan: Plan, scores: Scores) -> Trace:
        """What was seen of the rollouts; see `StepCredit.trace`."""
        rows = _images(plan)
        row, step = _stochastic(plan)
        rewards = scores.values[rows]
        return self.traced(
            rows, plan.points[row, step].view(len(rows), -1), rewards, plan.prompt[rows[:, -1]]
        )

    def traced(self, row: Tensor, step: Tensor, rewards: Tensor, prompt: Tensor) -> Trace:
        """Turning points and what they earn, of rewards [R, n + 1]; the rest is handed on.

        Args:
            prompt: [R], for balancing.
        """
        plain, consistent = (
            turning_points(rewards, kind, first_step=self.first_step, dead_band=self.dead_band)
            for kind in ("plain", "consistent")
        )
        found = plain if self.constraint == "plain" else consistent
        found = found & self.aggregate
        worth = aggregated(rewards)
        turns = self._balanced(found, worth, prompt)
        earned = torch.where(turns, worth, increments(rewards))
        # Of a trajectory whose ends are not known nothing is: every sign hangs on them.
        earned = torch.where(worth[:, :1].isnan(), torch.nan, earned)
        return Trace(row, step, rewards, earned, plain, consistent, turns, found & ~turns)

    def _balanced(self, found: Tensor, worth: Tensor, prompt: Tensor) -> Tensor:
        if self.balance == "batch":
            return balanced(found, worth)
        turns = found.clone()
        if self.balance == "prompt":
            for number in prompt.unique():
                mine = prompt == number
                turns[mine] = balanced(found[mine], worth[mine])
        return turns


def _stochastic(plan: Plan) -> tuple[Tensor, Tensor]:
    """Rows and steps [n] of all stochastic steps of rollouts."""
    random = (plan.std > 0) & (plan.role == Role.ROLLOUT)[:, None]
    row, step = random.nonzero(as_tuple=True)
    return row, step


def _images(plan: Plan) -> Tensor:
    """[R, n + 1] rows whose images are those of y_0, ..., y_n of every rollout; last its own."""
    own = (plan.role == Role.ROLLOUT).nonzero()[:, 0]
    n = int((plan.std > 0)[own].sum(dim=1).max())
    place = torch.full((plan.rows,), -1)
    place[own] = torch.arange(len(own))
    rows = own[:, None].repeat(1, n + 1)
    child = (plan.role == Role.COMPLETION).nonzero()[:, 0]
    parent = plan.parent[child]
    rows[place[parent], _ordinal(plan, parent, plan.parent_step[child])] = child
    return rows


def _ordinal(plan: Plan, row: Tensor, step: Tensor) -> Tensor:
    """[n] how many stochastic steps of a row come before a step."""
    before = (plan.std > 0).long().cumsum(dim=1) - (plan.std > 0).long()
    return before[row, step]
