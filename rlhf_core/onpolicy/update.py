"""The clipped update of a policy, which PPO, RLOO and GRPO share. Knows nothing of where advantages
come from, and nothing of critics."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from rlhf_core.backbone.networks import Precision
from rlhf_core.backbone.responses import read_again, rounding
from rlhf_core.errors import NumericsError
from rlhf_core.functional.logprobs import ChunkedLoss, kl_estimate
from rlhf_core.functional.losses import clipped_policy
from rlhf_core.onpolicy.loop import OnPolicySection
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.types import Rollout


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

        loss = Σₜ (clipped surrogate of PPO at token t + kl_coef·k3ₜ) / normalizer

    Args:
        advantages: (B, R) of the whole roll-out.
        picked: the rows of the minibatch.
        normalizer: what the sum is divided by: the tokens of the minibatch, or its responses.
        kl_coef: β of a KL term that is differentiated, 0 for none.
        first: no update has come between the roll-out and this one, so every ratio must be 1.

    Raises: NumericsError when the loss is not finite, or a first ratio is not 1.
    """
    sums: dict[str, float] = {}
    tokens = float(rollout.responses.mask[picked].sum())
    for micro in ranks.micro_batches(picked, config.micro_batch_size):
        check()
        rows = torch.tensor(micro.rows, device=advantages.device)
        experience = rollout.rows(rows)
        mask = experience.responses.mask
        written = read_again(experience, learner.network)
        surrogate = partial(
            _surrogate,
            old_logprobs=experience.logprobs[mask],
            ref_logprobs=experience.ref_logprobs[mask],
            advantages=advantages[rows][mask],
            config=config,
            kl_coef=kl_coef,
            scale=micro.weight / normalizer,
        )
        with learner.accumulate(last=micro.last):
            out = learner(
                written.packed,
                written.places,
                written.tokens,
                temperature=temperature,
                token_loss=surrogate,
                with_entropy=True,
            )
            learner.backward(out.loss, "the policy loss")
        if first and micro.weight:
            _require_ratio_one(out.logprobs, experience.logprobs[mask], config.precision)
        for name, value in _policy_stats(out, experience, advantages[rows], config).items():
            sums[name] = sums.get(name, 0.0) + value * micro.weight / tokens
        sums["policy/loss"] = sums.get("policy/loss", 0.0) + out.loss.item()
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
    """One update of the policy on the picked rows; None when it has already moved too far."""
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
    """Whether the policy has moved so far from the one that sampled that the epochs end."""
    return 0 < 1.5 * config.update_kl_limit < stats["policy/approx_kl"]


def _surrogate(
    logprobs: Tensor,
    index: slice,
    *,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    config: OnPolicySection,
    kl_coef: float,
    scale: float,
) -> Tensor:
    """The loss of some tokens in a row of their own."""
    row, old, ref = (x.unsqueeze(0) for x in (logprobs, old_logprobs[index], ref_logprobs[index]))
    loss, _ = clipped_policy(
        row,
        old,
        advantages[index].unsqueeze(0),
        torch.ones_like(row, dtype=torch.bool),
        clip_range=config.clip_range,
        dual_clip=config.dual_clip or None,
        normalizer=1.0,
    )
    if kl_coef:
        loss = loss + kl_coef * kl_estimate(row, ref, kind="k3").sum()
    return loss * scale


@torch.no_grad()
def _policy_stats(
    out: ChunkedLoss, experience: Rollout, advantages: Tensor, config: OnPolicySection
) -> dict[str, float]:
    """Sums over the tokens of a micro-batch."""
    mask = experience.responses.mask
    old = experience.logprobs[mask]
    row, before = out.logprobs.unsqueeze(0), old.unsqueeze(0)
    _, clipped = clipped_policy(
        row,
        before,
        advantages[mask].unsqueeze(0),
        torch.ones_like(row, dtype=torch.bool),
        clip_range=config.clip_range,
        dual_clip=config.dual_clip or None,
        normalizer=1.0,
    )
    return {
        "policy/clip_fraction": clipped.item(),
        "policy/approx_kl": kl_estimate(before, row, kind="k3").sum().item(),
        "policy/entropy": cast(Tensor, out.entropy).sum().item(),
    }


def _require_ratio_one(logprobs: Tensor, old_logprobs: Tensor, precision: Precision) -> None:
    apart = (logprobs - old_logprobs).abs().max().item() if len(logprobs) else 0.0
    if apart > rounding(logprobs, precision):
        raise NumericsError(
            "a broken invariant: the ratio is not 1 on the first minibatch of an iteration "
            f"(log-probabilities differ by {apart:.3g}), though the policy is the one that "
            "sampled. This is a defect: please report it with the config"
        )
