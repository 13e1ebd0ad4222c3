"""The networks of an on-policy stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.networks import Policy, ScalarModel, load_as_adapter
from rlhf_core.onpolicy.config import OnPolicySection
from rlhf_core.rewards.scoring import PIPELINE_REWARD
from rlhf_core.training.saving import save_policy
from rlhf_core.work import Work


@dataclass(frozen=True)
class Actors:
    """The policy that learns and the networks around it. With LoRA they share transformers."""

    policy: Policy
    reference: Policy
    tokenizer: PreTrainedTokenizerBase
    critic: ScalarModel | None = None  # of PPO
    rewards: Mapping[str, ScalarModel] = field(default_factory=dict)  # loaded already, by source

    @classmethod
    def load(cls, config: OnPolicySection, work: Work) -> Self:
        """The SFT policy twice: to learn, and as the reference.

        With LoRA both are one transformer, and the reference is that with its adapters off. The
        pipeline's reward model joins them if it was trained as an adapter of this very SFT policy.
        """
        work.logger.phase("loading the models")
        sft, precision = work.inputs["sft"], config.precision
        policy, tokenizer = Policy.load(sft, work.device, precision)
        if not config.lora_rank:
            return cls(policy, Policy.load(sft, work.device, precision)[0], tokenizer)
        reference = Policy(policy.model, precision=precision)
        config.adapt(policy, "policy", seed=work.seed, stream="policy/adapter")
        directory = work.inputs.get("reward")
        reward = directory and load_as_adapter(directory, sft, policy.model, "reward", precision)
        return cls(
            policy, reference, tokenizer, rewards={PIPELINE_REWARD: reward} if reward else {}
        )

    def save(self, output: Path, work: Work, iterations: int) -> None:
        """Write the policy as it is after so many iterations."""
        facts = {"iterations": iterations}
        sft, ranks = work.inputs["sft"], work.ranks
        save_policy(self.policy, self.tokenizer, output, facts, sft=sft, ranks=ranks)
