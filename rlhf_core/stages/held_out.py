"""The held-out reward model: a second one, trained on votes that the first has not seen.

While a policy learns to please the first, the monitor asks the second. Both learn from the same
people, so what all of them get wrong, they get wrong together: the gap between the two shows what
the first learnt by chance, and not a bias that the votes share.
"""

from dataclasses import replace

from rlhf_core.seeding import stream_seed
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages.reward_model import RewardModelReport, train_reward_model
from rlhf_core.work import Work


def train_held_out(config: RewardModelConfig, work: Work) -> RewardModelReport:
    """Train a reward model on the second half of the votes, from another seed; write it.

    Args:
        work: as of `train_reward_model`, but with the output held_out.

    Raises: as `train_reward_model` does.
    """
    return train_reward_model(
        config.model_copy(update={"votes": "second_half"}),
        replace(
            work,
            outputs={"reward": work.outputs["held_out"]},
            seed=stream_seed(work.seed, "held_out"),
        ),
    )
