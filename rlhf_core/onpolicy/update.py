"""The clipped policy update shared by PPO, RLOO and GRPO. It does not know where advantages come
from, nor critics."""

from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor

from rlhf_core.backbone.responses import ResponseRows, restore_rows, rounding
from rlhf_core.errors import NumericsError
from rlhf_core.functional.logprobs import kl_estimate
from rlhf_core.functional.losses import clipped_policy
from rlhf_core.settings.model import Precision
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.types import Rollout


class Surrogate:
    """The policy loss of a micro-batch, computed a chunk of tokens at a time for the chunked head.

    A chunk is put into the rows of the micro-batch, with all other tokens masked. With a common
    normalizer the losses of the chunks add up to that of the minibatch; so do the clip fractions.
    """

    def __init__(
        self,
        response_rows: ResponseRows,
        experience: Rollout,
        advantages: Tensor,  # (B, R)
        normalizer: float,
        config: OnPolicySection,
        kl_coef: float,
    ) -> None:
        self._response_rows = response_rows
        self._experience = experience
        self._advantages = advantages
        self._normalizer = normalizer
        self._config = config
        self._kl_coef = kl_coef
        self.clipped = advantages.new_zeros(())  # so far: clipped tokens / normalizer

    def __call__(self, logprobs: Tensor, span: slice) -> Tensor:
        """() the loss of the tokens in `span`, from their (n,) log-probabilities."""
        rows, mask = (
            self._response_rows.to_rows(logprobs, span),
            self._response_rows.span_mask(span),
        )
        loss, clipped = clipped_policy(
            rows,
            self._experience.logprobs,
            self._advantages,
            mask,
            clip_range=self._config.clip_range,
            dual_clip=self._config.dual_clip or None,
            normalizer=self._normalizer,
            importance=self._experience.importance,
        )
        self.clipped += clipped
        if self._kl_coef:
            kl = kl_estimate(rows, self._experience.ref_logprobs, kind="k3")[mask].sum()
            loss = loss + self._kl_coef * kl / self._normalizer
        return loss


def update_policy(
    learner: Learner,
    rollout: Rollout,
    advantages: Tensor,
    picked: list[int],
    *,
    normalizer: float,
    config: OnPolicySection,
    temperature: float,
    ranks: Ranks,
    check: Callable[[], None],
    kl_coef: float = 0.0,
    first: bool = False,
) -> dict[str, float]:
    """Add the gradient of one minibatch, micro-batch by micro-batch; return its token means.

        loss = Σₜ (wₜ·clipped surrogate of PPO at token t + kl_coef·k3ₜ) / normalizer

    w is 1, unless another engine sampled the roll-out.

    Args:
        advantages: (B, R) of the whole roll-out.
        picked: the rows of the minibatch.
        normalizer: divides the sum: the tokens of the minibatch, or its responses.
        kl_coef: β of a KL term that is differentiated, 0 for none.
        first: whether this is the first update since the roll-out, so every ratio must be 1.

    Raises: NumericsError when the loss is not finite, or a first ratio is not 1.
    """
    sums: dict[str, float] = {}
    tokens = float(rollout.responses.mask[picked].sum())
    for micro in ranks.micro_batches(picked, config.micro_batch_size):
        check()
        rows = torch.tensor(micro.rows, device=advantages.device)
        experience = rollout.rows(rows)
        mask = experience.responses.mask
        response_rows = restore_rows(experience, learner.network)
        surrogate = Surrogate(
            response_rows, experience, advantages[rows], normalizer, config, kl_coef
        )
        with learner.accumulate(last=micro.last):
            out = learner(
                response_rows.packed,
                response_rows.positions,
                response_rows.tokens,
                temperature=temperature,
                token_loss=surrogate,
                with_entropy=True,
            )
            learner.backward(out.loss * micro.weight, "the policy loss")
        if first and micro.weight:
            _require_ratio_one(out.logprobs, experience.logprobs[mask], config.precision)
        kl = kl_estimate(experience.logprobs, response_rows.to_rows(out.logprobs), kind="k3")
        means = {
            "policy/loss": out.loss.item(),
            "policy/clip_fraction": surrogate.clipped.item() * normalizer / tokens,
            "policy/approx_kl": kl[mask].sum().item() / tokens,
            "policy/entropy": cast(Tensor, out.entropy).sum().item() / tokens,
        }
        for name, value in means.items():
            sums[name] = sums.get(name, 0.0) + value * micro.weight
    return ranks.sum(sums)


def optimise_policy(
    rollout: Rollout,
    advantages: Tensor,
    picked: list[int],
    *,
    first: bool,
    check: Callable[[], None],
    learner: Learner,
    config: OnPolicySection,
    temperature: float,
    ranks: Ranks,
    mean_over: Literal["tokens", "responses"] = "tokens",
    kl_coef: float = 0.0,
) -> dict[str, float] | None:
    """Update the policy on the picked rows; None, without an update, if it has moved too far."""
    tokens = float(rollout.responses.mask[picked].sum())
    stats = update_policy(
        learner,
        rollout,
        advantages,
        picked,
        normalizer=tokens if mean_over == "tokens" else float(len(picked)),
        config=config,
        temperature=temperature,
        ranks=ranks,
        check=check,
        kl_coef=kl_coef,
        first=first,
    )
    if not first and went_too_far(stats, config):
        learner.drop_gradient()
        return None
    rate = learner.learning_rate
    return stats | {"policy/grad_norm": learner.step(), "optimizer/learning_rate": rate}


def went_too_far(stats: Mapping[str, float], config: OnPolicySection) -> bool:
    """Whether the policy has moved so far from the one that sampled that the epochs must end."""
    return 0 < 1.5 * config.update_kl_limit < stats["policy/approx_kl"]


def _require_ratio_one(logprobs: Tensor, old_logprobs: Tensor, precision: Precision) -> None:
    difference = (logprobs - old_logprobs).abs().max().item() if len(logprobs) else 0.0
    if difference > rounding(logprobs, precision):
        raise NumericsError(
            "a broken invariant: the ratio is not 1 on the first minibatch of an iteration "
            f"(log-probabilities differ by {difference:.3g}), though the policy is the one that "
            "sampled. This is a defect: please report it with the config"
        )
