"""Save a trained policy as a model directory."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.directory import read_card
from rlhf_core.backbone.networks import Policy
from rlhf_core.training.ranks import Ranks


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    facts: Mapping[str, object],
    *,
    sft: Path,
    ranks: Ranks,
) -> None:
    """Write a policy that was trained from `sft`, and copy that policy's fact `chat`.

    Only the main rank writes. `sft` is also the base of an adapter, if there is one.
    """
    with ranks.whole(policy):
        if ranks.main:
            chat = read_card(sft).get("chat", False)
            policy.save(tokenizer, output, {**facts, "chat": chat}, base=sft)
