"""A trained policy as a model directory."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.directory import read_card
from rlhf_core.backbone.networks import Policy
from rlhf_core.work import Work


def save_policy(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    work: Work,
    facts: Mapping[str, object],
) -> None:
    """Write the policy, which answers messages if the SFT policy did. One rank does."""
    sft = work.inputs["sft"]
    with work.ranks.whole(policy):
        if work.ranks.main:
            chat = read_card(sft).get("chat", False)
            policy.save(tokenizer, output, {**facts, "chat": chat}, base=sft)
