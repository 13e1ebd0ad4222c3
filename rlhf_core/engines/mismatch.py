"""How far the engine that sampled is from the policy that is trained, token by token.

Both compute the same distribution from the same weights, with other products and so with other
rounding, and in other number formats much of it. What remains of the difference is corrected by
importance weights, up to a limit beyond which something else must be wrong.
"""

from dataclasses import replace

import torch

from rlhf_core.errors import NumericsError
from rlhf_core.functional.losses import importance_weights
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.types import Rollout


def with_importance(rollout: Rollout, config: SamplingConfig) -> Rollout:
    """The roll-out with the weight of each token, if another engine sampled it.

    Raises: NumericsError when the engine is further away than `max_engine_kl`.
    """
    if rollout.sampled is None:
        return rollout
    mask = rollout.responses.mask
    weights = importance_weights(rollout.logprobs, rollout.sampled, mask, cap=config.max_importance)
    weighted = replace(rollout, importance=weights)
    found = mismatch(weighted)
    # The mean is a KL, so below 0 only by chance: far below, the log-probabilities are wrong.
    if abs(found["engine/kl"]) > config.max_engine_kl:
        raise NumericsError(
            f"the server that samples is {found['engine/kl']:.3g} nats a token away from the "
            f"policy that is trained (at most {found['engine/max_gap']:.3g}), beyond "
            f"sampling.max_engine_kl {config.max_engine_kl:g}: it computes another distribution. "
            "Start it with --logprobs-mode processed_logprobs, a number format like that of the "
            "training and without quantisation (docs/engines.md); raise max_engine_kl if the gap "
            "is that of its number format"
        )
    return weighted


def mismatch(rollout: Rollout) -> dict[str, float]:
    """The metrics of the gap log π_engine - log π over all tokens; none without another engine.

    `engine/kl` is its mean, an estimate of KL(π_engine ‖ π), `engine/max_gap` its largest size, and
    `engine/truncated` the share of tokens whose weight is at the cap.
    """
    if rollout.sampled is None or rollout.importance is None:
        return {}
    mask = rollout.responses.mask
    gap = (rollout.sampled - rollout.logprobs)[mask]
    cut = rollout.importance[mask] < torch.exp(-gap)
    return {
        "engine/kl": gap.mean().item(),
        "engine/max_gap": gap.abs().max().item(),
        "engine/truncated": cut.float().mean().item(),
    }
