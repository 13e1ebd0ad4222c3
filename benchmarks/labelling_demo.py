"""The pool `demo` of labelling.py: new pairs of the demo's world, as its reward model sees them.

Data, SFT and reward model are those of `configs/demo.yaml` for the seed, and are made once for a
folder. The pool and what is tested on are pairs of another draw of the same world; the truth is
which answer has the higher true reward.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from annotators_demo import DEMO
from annotators_demo import World as Trained
from torch import Tensor

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from rlhf_core.labelling.features import pair_features
from rlhf_core.labelling.probe import space_of
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.simulation import simulate, true_reward

OTHER = 10_000  # added to the seed for pairs that no model has seen
LONGEST = 80  # tokens, as in the demo
OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Demo(Trained):
    """The demo with 2,500 votes, a fifth of them held out."""

    def config(self, way: str = "pooled") -> PipelineConfig:
        """Its settings."""
        settings = [f"seed={self.seed}", "data.simulation.preference_pairs=2500"]
        return load_config(DEMO, settings, PipelineConfig)

    @property
    def folder(self) -> Path:
        """Where everything of this seed lies."""
        return self.root / "demo" / f"seed-{self.seed}"

    def reward_model(self) -> Path:
        """The directory of the reward model, trained if it is not there."""
        return self._made("reward", lambda folder: self._train_reward(folder, "pooled"))


def demo_world(
    seed: int, folder: Path, *, pool: int, tested: int
) -> tuple[Tensor, Tensor, Tensor, list[str], Tensor, Tensor]:
    """Features, what the order is made from, votes, prompts; features and truth of the tests."""
    demo = Demo(folder, seed, 0.0, 0.0, 0.0)
    network, tokenizer = load_reward_model(demo.reward_model())
    drawn = demo.config().data.simulation.model_copy(update={"preference_pairs": pool + 2 * tested})
    table = simulate(drawn, seed + OTHER).preferences
    rows = list(zip(table["prompt"], table["response_a"], table["response_b"], strict=True))
    states = pair_features(network, tokenizer, rows, max_length=LONGEST)
    x = space_of(states[:2000])(states)
    votes = torch.tensor([OUTCOMES[vote] for vote in table["vote"]], dtype=torch.float64)
    prompts, ones, others = map(list, zip(*rows, strict=True))
    truth = torch.tensor(true_reward(prompts, ones)) - torch.tensor(true_reward(prompts, others))
    decided = (truth != 0).nonzero().squeeze(1)
    test = decided[decided >= pool][:tested]
    return x[:pool], x[:pool], votes[:pool], prompts[:pool], x[test], (truth[test] > 0).double()
