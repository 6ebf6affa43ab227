"""GRPO of TRL with entropy control: everything is TRL's but which tokens an update sees.

    from entroflow.llm.grpo import EntropyGRPOConfig, EntropyGRPOTrainer

    arguments = EntropyGRPOConfig(..., entropy_clip="b")
    EntropyGRPOTrainer(model, reward_funcs, args=arguments, train_dataset=prompts).train()

Once per generation batch, before its first update, the policy says log p, H, S and S_bar of every
token (entropy/tokens.py), the tokens that are left out are chosen over all processes (clips.py),
and their advantage becomes 0. With `entropy_change`, the same tokens are looked at again when the
batch has done its work: did their entropy go where the first order says?
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from entroflow.errors import InputError
from entroflow.llm.clips import MOST, MU_B, MU_V, Clip, Sides, clip_b, clip_v
from entroflow.llm.token_entropy import TokenStatistics, entropy_change, token_statistics

log = logging.getLogger(__name__)


@dataclass
class EntropyGRPOConfig(GRPOConfig):
    """The settings of TRL's GRPO, and five of entropy control."""

    entropy_clip: Literal["none", "b", "v"] = field(
        default="none",
        metadata={"help": "which penalised tokens are left out: none, Clip_B's or Clip_V's"},
    )
    entropy_clip_mu: float | None = field(
        default=None,
        metadata={
            "help": f"threshold in standard deviations; {MU_B} for b and {MU_V} for v if unset"
        },
    )
    entropy_clip_sides: Literal["one", "two"] = field(
        default="one",
        metadata={"help": "one: as released; two: tokens far on either side, whatever they earned"},
    )
    entropy_clip_most: float = field(
        default=MOST, metadata={"help": "of v: largest share of the tokens that is left out"}
    )
    entropy_clip_denominator: Literal["keep", "shrink"] = field(
        default="keep",
        metadata={
            "help": "shrink, as published: tokens left out are no tokens of the batch at all, with "
            "no KL either; keep: they count, and only their advantage is 0"
        },
    )
    entropy_change: bool = field(
        default=True,
        metadata={
            "help": "measure how every batch moves the entropy of its tokens, against the first "
            "order of its policy gradient, all tokens weighted alike and without KL or bonus (two "
            "forward passes more; one of them is the clips' own)"
        },
    )


CHOICES: dict[str, tuple[Any, ...]] = {
    "entropy_clip": ("none", "b", "v"),
    "entropy_clip_sides": ("one", "two"),
    "entropy_clip_denominator": ("keep", "shrink"),
    "entropy_change": (True, False),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
"""What TRL's own settings do not check, or only in the first update."""
LOGITS = 2**29
"""About so many logits are held at once: a row of a long completion alone may have more."""


class EntropyGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with Clip_B or Clip_V (2602.03392); see the module.

    Besides TRL's metrics it logs `token_entropy` over all tokens of the policy (TRL's `entropy` is
    that of the tokens in its loss); `entropy_clip/share` of the tokens and `entropy_clip/penalised`
    of the tokens with a negative advantage, both left out; `entropy_clip/mean` and
    `entropy_clip/std` of what was compared; `discriminator/centred`, the mean of S - S_bar, in
    expectation 0; `entropy_change/predicted`, mean over tokens, of a step of size 1 on the logits,
    and `entropy_change/measured`.

    Raises:
        InputError: an option of TRL that does not go with it, or a threshold out of range.
    """

    args: EntropyGRPOConfig

    def __init__(
        self, model: Any, reward_funcs: Any, args: EntropyGRPOConfig, **of_trl: Any
    ) -> None:
        if not isinstance(args, EntropyGRPOConfig):
            raise InputError(f"args must be an EntropyGRPOConfig, not {type(args).__name__}.")
        # Before a model is loaded, as far as settings alone can say.
        _refuse(args)
        super().__init__(model, reward_funcs, args=args, **of_trl)
        if looks(args) and self._is_vlm:
            raise InputError(
                "entropy control reads the logits of text models only; set entropy_clip='none' and "
                "entropy_change=False for one that sees images."
            )
        self.processes = OfAccelerator(self.accelerator)
        self._batches: list[_Batch] = []
        if self.args.entropy_change:
            self.add_callback(_AfterStep(self._measure_change))

    @property
    def _policy(self) -> torch.nn.Module:
        assert self.model is not None
        return self.model

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, in which tokens that are left out have no advantage."""
        training = self._policy.training
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not training or not looks(self.args):
            return batch
        tokens, valid = self._tokens(batch)
        advantages = batch["advantages"][:, None]
        keep = torch.ones_like(valid)
        if self.args.entropy_clip != "none":
            clip = self._clip(tokens, advantages, valid)
            keep = clip.keep
            batch["advantages"] = advantages * keep
            self._log_clip(clip, advantages, valid)
            if self.args.entropy_clip_denominator == "shrink":
                self._shrink(batch, keep)
        entropy, centred = self._mean(tokens.entropy, valid), self._mean(tokens.centred, valid)
        self._metrics["train"]["token_entropy"].append(entropy)
        self._metrics["train"]["discriminator/centred"].append(centred)
        if self.args.entropy_change:
            change = entropy_change(tokens, advantages * keep, self.temperature)
            self._batches.append(_Batch(batch, valid, entropy, self._mean(change, valid)))
        return batch

    @torch.no_grad()
    def _tokens(self, batch: dict[str, Any]) -> tuple[TokenStatistics, Tensor]:
        """What the policy says of the completions' tokens, and which are its own: [B, T] each."""
        ids, own = batch["completion_ids"], batch["completion_mask"]
        both = torch.cat([batch["prompt_ids"], ids], dim=1)
        seen = torch.cat([batch["prompt_mask"], own], dim=1)
        length, parts = ids.shape[1], []
        config: Any = self._policy.config
        rows_at_once = LOGITS // ((length + 1) * config.get_text_config().vocab_size)
        most = min(max(rows_at_once, 1), self.args.per_device_train_batch_size)
        training = self._policy.training
        self._policy.eval()
        for rows in torch.arange(len(ids)).split(most):
            with self.accelerator.autocast():
                found = self._policy(
                    input_ids=both[rows], attention_mask=seen[rows], logits_to_keep=length + 1
                )
            logits = found.logits[:, -length - 1 : -1]
            parts.append(token_statistics(logits, ids[rows], self.temperature))
        self._policy.train(training)
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        valid = own * batch.get("tool_mask", 1)
        return TokenStatistics(*map(torch.cat, columns)), valid.bool()

    def _clip(self, tokens: TokenStatistics, advantages: Tensor, valid: Tensor) -> Clip:
        settings, mu = self.args, self.args.entropy_clip_mu
        sides: Sides = settings.entropy_clip_sides
        if settings.entropy_clip == "b":
            return clip_b(
                tokens, advantages, valid, mu=MU_B if mu is None else mu, sides=sides,
                processes=self.processes,
            )  # fmt: skip
        return clip_v(
            tokens, advantages, valid, mu=MU_V if mu is None else mu, sides=sides,
            most=settings.entropy_clip_most, processes=self.processes,
        )  # fmt: skip

    def _shrink(self, batch: dict[str, Any], keep: Tensor) -> None:
        """Let tokens that are left out be none of the batch's, as text that a tool wrote."""
        mask = keep * batch.get("tool_mask", torch.ones_like(batch["completion_mask"]))
        batch["tool_mask"] = mask
        left = (batch["completion_mask"] * mask).sum()
        batch["num_items_in_batch"] = self.accelerator.gather(left).sum()

    def _log_clip(self, clip: Clip, advantages: Tensor, valid: Tensor) -> None:
        penalised = valid & (advantages < 0)
        found = {
            "share": self._mean((~clip.keep).double(), valid),
            "penalised": self._mean((~clip.keep).double(), penalised),
            "mean": clip.spread.mean,
            "std": clip.spread.std,
        }
        for name, value in found.items():
            self._metrics["train"][f"entropy_clip/{name}"].append(value)

    def _mean(self, values: Tensor, valid: Tensor) -> float:
        """Over the valid values of all processes; 0 where there are none."""
        totals = torch.stack([values[valid].double().sum(), valid.sum().double()])
        total, count = self.processes.sum(totals).tolist()
        return total / count if count else 0.0

    @property
    def is_between_batches(self) -> bool:
        """Whether the last generation batch has done all its work."""
        return self._step % ((self.args.steps_per_generation or 1) * self.num_iterations) == 0

    def _measure_change(self) -> None:
        """Where batches have done their work: how that moved the entropy of their tokens."""
        if not self.is_between_batches:
            return
        metrics = self._metrics["train"]
        for batch in self._batches:
            tokens, _ = self._tokens(batch.inputs)
            now = self._mean(tokens.entropy, batch.valid)
            metrics["entropy_change/predicted"].append(batch.predicted)
            metrics["entropy_change/measured"].append(now - batch.entropy)
        self._batches = []


def looks(settings: EntropyGRPOConfig) -> bool:
    """Whether the policy's tokens are looked at, to leave some out or to measure."""
    return settings.entropy_clip != "none" or settings.entropy_change


def _refuse(settings: EntropyGRPOConfig) -> None:
    """See `EntropyGRPOTrainer`."""
    for name, known in CHOICES.items():
        if (chosen := getattr(settings, name)) not in known:
            raise InputError(
                f"{name} is {chosen!r}, but must be one of: {', '.join(map(str, known))}."
            )
    for name in ("per_device_train_batch_size", "steps_per_generation", "num_iterations"):
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} is {getattr(settings, name)}, but must be above 0.")
    if not settings.temperature > 0:
        raise InputError(
            f"temperature is {settings.temperature}, but must be above 0: without chance all "
            "answers of a group are the same."
        )
    if settings.top_k < 0:
        raise InputError(f"top_k is {settings.top_k}, but must be at least 0, which is all tokens.")
    mu, most = settings.entropy_clip_mu, settings.entropy_clip_most
    if mu is not None and not mu >= 0:
        raise InputError(
            f"entropy_clip_mu is {mu}, but must be at least 0; inf leaves nothing out."
        )
    if not 0 < most <= 1:
        raise InputError(f"entropy_clip_most is {most}, but must be a share in (0, 1].")
    if settings.entropy_clip != "none" and settings.loss_type == "luspo":
        raise InputError(
            "loss_type luspo takes one advantage for a whole completion, so no token can be left "
            "out; choose another loss_type, or entropy_clip='none'."
        )
    by_sequence = settings.importance_sampling_level == "sequence"
    keeps = settings.entropy_clip_denominator == "keep"
    # The ratio of cispo has no gradient.
    moves_others = by_sequence and keeps and settings.loss_type != "cispo"
    if settings.entropy_clip != "none" and moves_others:
        raise InputError(
            "with one ratio for a whole completion (importance_sampling_level 'sequence') a token "
            "moves by the advantages of the others; set entropy_clip_denominator='shrink', which "
            "takes it out of the ratio, too."
        )
    other = (
        settings.top_p < 1 or settings.top_k or settings.min_p
        or settings.repetition_penalty != 1 or settings.generation_kwargs
    )  # fmt: skip
    if looks(settings) and other:
        log.warning(
            "top_p, top_k, min_p, repetition_penalty and generation_kwargs sample from another "
            "distribution than the one whose entropy is controlled: S - S_bar is not 0 on average "
            "then."
        )


@dataclass(frozen=True)
class OfAccelerator:
    """The processes that accelerate has started; see `processes.Processes`."""

    accelerator: Accelerator

    def sum(self, values: Tensor) -> Tensor:
        """[...] the sum over all of them."""
        found: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return found

    def gather(self, values: Tensor) -> Tensor:
        """[m] the values [n] of all of them, which are not NaN."""
        padded = self.accelerator.pad_across_processes(values, dim=0, pad_index=torch.nan)
        found: Tensor = self.accelerator.gather(padded)
        return found[~found.isnan()]


@dataclass(frozen=True)
class _Batch:
    """What is known of a generation batch before its updates; see `entropy_change`.

    Attributes:
        valid: [B, T] bool, the policy's tokens, those that are left out among them.
    """

    inputs: dict[str, Any]
    valid: Tensor
    entropy: float
    predicted: float


class _AfterStep(TrainerCallback):
    """Calls after every optimizer step, before it is logged."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._call()
