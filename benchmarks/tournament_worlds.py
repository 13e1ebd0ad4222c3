"""The models of a benchmark of the tournament: the demo of a seed, with a low price of KL.

For each seed, as `configs/demo.yaml` has it: data, SFT, a reward model, and PPO that keeps policies
along the way; and another reward model, on the votes of other people about other texts. What is
made is kept in a folder, so that a second call only makes what is missing.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import decode_responses, encode_prompt
from rlhf_core.data.prepared import read_table
from rlhf_core.seeding import generator, stream_seed
from rlhf_core.settings.simulation import AnnotatorsConfig
from rlhf_core.simulation import draw_annotators, true_reward
from rlhf_core.stages.ppo import train_ppo
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.stages.sft import train_sft
from rlhf_core.work import Work

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
OTHERS = 1000  # added to the seed of a world: that of the other people
CHECKPOINTS = 6  # of 30 iterations


@dataclass(frozen=True)
class World:
    """The folder of a seed, and what is made in it."""

    root: Path
    seed: int
    kl_coef: float

    def config(self) -> PipelineConfig:
        """The demo, with this world's price of KL and seed."""
        return load_config(
            DEMO,
            [
                f"seed={self.seed}",
                f"ppo.kl_coef={self.kl_coef:g}",
                f"tournament.checkpoints={CHECKPOINTS}",
            ],
            PipelineConfig,
        )

    @property
    def data(self) -> Path:
        """The prepared tables."""
        return self._made("data", lambda folder: self._prepare(folder, self.seed))

    @property
    def sft(self) -> Path:
        """The SFT policy."""
        config = self.config().sft
        return self._made(
            "sft", lambda folder: train_sft(config, self.work({"data": self.data}, {"sft": folder}))
        )

    @property
    def reward(self) -> Path:
        """The reward model that the policy learns from."""
        return self._made("reward", lambda folder: self._reward(folder, self.data))

    @property
    def other_reward(self) -> Path:
        """A reward model on the votes of other people, about other texts to other prompts."""
        others = self._made("other-data", lambda folder: self._prepare(folder, self._others))
        return self._made("other-reward", lambda folder: self._reward(folder, others))

    @property
    def policies(self) -> dict[int, Path]:
        """The policies along the way, the last one included, by their iteration."""

        def train(folder: Path) -> None:
            inputs = {"sft": self.sft, "data": self.data, "reward": self.reward}
            kinds = {kind: folder / kind for kind in ("policy", "critic")}
            train_ppo(self.config().optimised, self.work(inputs, {**kinds, "milestones": folder}))
            for kind in kinds.values():
                shutil.rmtree(kind)

        folder = self._made(f"policies-{self.kl_coef:g}", train)
        return {int(path.name): path for path in sorted(folder.iterdir())}

    def truth(self, name: str, policy: Path, each: int) -> list[float]:
        """The true reward of a policy on each held-out prompt, the mean of `each` answers."""
        path = self.root / f"seed-{self.seed}" / "truth.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        key = f"{self.kl_coef:g}/{name}x{each}"
        if key not in known:
            prompts = list(read_table(self.data, "prompts", "eval")["prompt"])
            values = true_reward(*self.answers(policy, prompts, each, f"benchmark/truth/{name}"))
            means = torch.tensor(values, dtype=torch.float64).view(-1, each).mean(1)
            known[key] = means.tolist()
            path.write_text(json.dumps(known))
        return list(known[key])

    @torch.no_grad()
    def answers(
        self, policy: Path, prompts: Sequence[str], each: int, name: str
    ) -> tuple[list[str], list[str]]:
        """Prompts, each as often as it is answered, and the answers of a policy."""
        sampling = self.config().sampling
        actor, tokenizer = Policy.load(policy, "cpu")
        asked = [prompt for prompt in prompts for _ in range(each)]
        rows = [encode_prompt(p, tokenizer, sampling.max_prompt_length) for p in asked]
        texts: list[str] = []
        for _, responses in respond(actor, rows, sampling, generator=generator(self.seed, name)):
            texts += decode_responses(responses.tokens, responses.mask, tokenizer)
        return asked, texts

    def work(self, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> Work:
        """The arguments of a training in this world."""
        config = self.config()
        sections = {"sampling": config.sampling, "model": config.model}
        return Work(inputs=inputs, outputs=outputs, sections=sections, seed=self.seed)

    @property
    def _others(self) -> int:
        return self.seed + OTHERS

    def _prepare(self, folder: Path, seed: int) -> None:
        config = self.config()
        sections = {"model": config.model, "limits": config.length_limits}
        prepare_data(config.data, Work(outputs={"data": folder}, sections=sections, seed=seed))

    def _reward(self, folder: Path, data: Path) -> None:
        inputs = {"sft": self.sft, "data": data}
        report = train_reward_model(
            self.config().reward_model, self.work(inputs, {"reward": folder})
        )
        (folder / "report.json").write_text(json.dumps(report.summary(), indent=1))

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder that is made once; what was left half done is made again."""
        folder = self.root / f"seed-{self.seed}" / name
        begun = folder.with_name(f"{name}.begun-{os.getpid()}")
        if not folder.is_dir():
            begun.mkdir(parents=True)
            make(begun)
            begun.rename(folder)
        return folder


def votes(prompts: list[str], ones: list[str], others: list[str]) -> list[str]:
    """A judge as a function: other people of the same kind as those whose votes train the reward
    model, so with the same liking for length, and for words that repeat half unnoticed."""
    return _votes(AnnotatorsConfig(), prompts, ones, others)


def careful_votes(prompts: list[str], ones: list[str], others: list[str]) -> list[str]:
    """The same with people who are as noisy, and as often inattentive, but do not care for length
    and notice every repetition."""
    return _votes(AnnotatorsConfig(length_bias=0, care=1), prompts, ones, others)


def _votes(
    config: AnnotatorsConfig, prompts: list[str], ones: list[str], others: list[str]
) -> list[str]:
    """The vote of one of twelve people on each pair, shown to that person in this order."""
    people = draw_annotators(config, random.Random(OTHERS))
    found = []
    for prompt, one, other in zip(prompts, ones, others, strict=True):
        # Seeded by the texts: the same question gets the same answer again.
        rng = random.Random(stream_seed(OTHERS, f"{prompt}/{one}/{other}"))
        found.append(rng.choice(people).prefers(one, other, rng))
    return found
