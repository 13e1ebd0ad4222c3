"""The networks of an on-policy stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.rewards.models import RewardModel, load_on_trunk
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.settings.rewards import PIPELINE_REWARD
from rlhf_core.training.learner import adapt
from rlhf_core.training.saving import save_policy
from rlhf_core.work import Work


@dataclass(frozen=True)
class Actors:
    """The policy that is trained and the networks it needs. With LoRA they share transformers."""

    policy: Policy
    reference: Policy
    tokenizer: PreTrainedTokenizerBase
    critic: ScalarModel | None = None  # of PPO
    rewards: Mapping[str, RewardModel] = field(default_factory=dict)  # already loaded, by source

    @classmethod
    def load(cls, config: OnPolicySection, work: Work) -> Self:
        """Load the SFT policy twice: as the policy to train, and as the reference.

        With LoRA both share one transformer, and the reference has the adapters off. The pipeline's
        reward model shares it too if it was trained as an adapter of this SFT policy.
        """
        work.logger.phase("loading the models")
        sft, precision = work.inputs["sft"], config.precision
        policy, tokenizer = Policy.load(sft, work.device, precision)
        if not config.lora_rank:
            return cls(policy, Policy.load(sft, work.device, precision)[0], tokenizer)
        reference = Policy(policy.model, precision=precision)
        adapt(policy, config, "policy", seed=work.seed, stream="policy/adapter")
        directory = work.inputs.get("reward")
        reward = directory and load_on_trunk(
            directory, sft, policy.model, "reward", precision, members=config
        )
        return cls(
            policy, reference, tokenizer, rewards={PIPELINE_REWARD: reward} if reward else {}
        )

    def save(self, output: Path, work: Work, iterations: int) -> None:
        """Write the policy; `iterations` are those done so far."""
        facts = {"iterations": iterations}
        sft, ranks = work.inputs["sft"], work.ranks
        save_policy(self.policy, self.tokenizer, output, facts, sft=sft, ranks=ranks)
