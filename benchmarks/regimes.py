"""The demo's world in regimes whose truth is known: models of a seed, and a policy measured while
it learns.

A regime is a kind of vote. The votes are split in two halves by prompt: one trains the reward model
that a policy learns from (the proxy), the other the held-out reward model. What is trained is kept
in a folder, so that a second call only measures what is missing.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.packing import pack
from rlhf_core.backbone.responses import lay_out, response_logprobs
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import decode_responses, encode_prompt
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.evaluation.overoptimisation import Measure, Point, best_of_n_path, gain_over
from rlhf_core.evaluation.overoptimisation import Path as GainPath
from rlhf_core.functional.ranking import clustered_bootstrap
from rlhf_core.rewards.models import RewardModel, load_reward_model
from rlhf_core.seeding import generator
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import PPOConfig
from rlhf_core.settings.rewards import MEAN, MemberSection
from rlhf_core.settings.simulation import AnnotatorsConfig, SimulationConfig
from rlhf_core.settings.training import RewardModelConfig, SFTConfig
from rlhf_core.simulation import true_reward
from rlhf_core.stages.ppo import train_ppo
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.stages.sft import train_sft
from rlhf_core.work import Work

_CLEAN = {
    "lowest_reliability": 1.0,
    "side_bias": 0.0,
    "length_bias": 0.0,
    "care": 1.0,
}
REGIMES = {
    "clean": AnnotatorsConfig(**_CLEAN),
    "flips": AnnotatorsConfig(**_CLEAN, flip_share=0.25),
    "shared": AnnotatorsConfig(**(_CLEAN | {"length_bias": 0.5})),
}
TITLES = {
    "clean": "clean votes",
    "flips": "25 % of the votes flipped",
    "shared": "a bias that all share (length)",
}
HALVES = ("proxy", "held_out")
TEXT_LENGTH = 80  # tokens
SCORED = 8  # answers of SFT to each prompt that are the zero of a reward model's gain

MODEL = ModelConfig(fresh=FreshModelConfig(layers=2, width=128, heads=4, context=96))
SAMPLING = SamplingConfig(max_prompt_length=24, max_new_tokens=48)
SFT = SFTConfig(learning_rate=3e-3, max_length=TEXT_LENGTH)
REWARD = RewardModelConfig(
    learning_rate=4e-3, max_length=TEXT_LENGTH, lora_rank=64, center_coef=0.05
)
FULL_REWARD = RewardModelConfig(learning_rate=1e-3, max_length=TEXT_LENGTH)
PAIRS = 12_000  # votes, before they are halved
PPO = PPOConfig(
    learning_rate=3e-4,
    critic_learning_rate=1e-3,
    schedule="constant",
    warmup_ratio=0.3,
    iterations=18,
    rollout_size=64,
    batch_size=32,
    epochs=3,
    kl_coef=0.02,
    kl_control="fixed",
    kl_budget=20,
    keep_every=1,
)


class Texts(NamedTuple):
    """Answers with what does not depend on a reward model, prompt by prompt."""

    rows: list[list[int]]  # tokens of prompt and answer, as they were sampled
    prompt: Tensor  # (N,) its number
    kl: Tensor  # (N,) log π - log π_sft of the answer, nats
    truth: Tensor  # (N,)
    length: Tensor  # (N,) tokens of the answer

    def first(self, each: int, count: int) -> "Texts":
        """The first `count` of the `each` answers to each prompt."""
        kept = torch.arange(len(self.rows)).view(-1, each)[:, :count].reshape(-1)
        rows = [self.rows[i] for i in kept.tolist()]
        return Texts(rows, *(values[kept] for values in self[1:]))


@dataclass(frozen=True)
class World:
    """The folders of one seed, and of one regime within it."""

    root: Path
    regime: str
    seed: int

    def folder(self, name: str) -> Path:
        """A folder of this seed and regime."""
        return self.root / f"seed-{self.seed}" / self.regime / name

    @property
    def data(self) -> Path:
        """The prepared tables, with all votes."""
        return self._made("data", self._prepare)

    @property
    def sft(self) -> Path:
        """The SFT policy: the demonstrations do not depend on the votes, so regimes share it."""
        if self.regime != "clean":
            return World(self.root, "clean", self.seed).sft
        return self._made("sft", self._train_sft)

    def half(self, name: str) -> Path:
        """The tables with the votes on one half of the prompts: proxy or held_out."""

        def halve(folder: Path) -> None:
            shutil.copytree(self.data, folder, dirs_exist_ok=True)
            votes = read_table(folder, "preferences", "train")
            order = sorted(set(votes["prompt"]))
            kept = set(order[HALVES.index(name) :: 2])
            write_table(votes[votes["prompt"].isin(kept)], folder, "preferences", "train")

        return self._made(f"data-{name}", halve)

    def reward(self, name: str, half: str, config: RewardModelConfig) -> Path:
        """A reward model trained on one half of the votes."""

        def train(folder: Path) -> None:
            work = self._work({"sft": self.sft, "data": self.half(half)}, {"reward": folder})
            report = train_reward_model(config, work)
            numbers = json.dumps(report.summary(), indent=1)
            (folder / "report.json").write_text(numbers)

        return self._made(name, train)

    def policies(self, name: str, reward: Path, config: PPOConfig) -> Path:
        """The folder of the policies along a run of PPO: a folder each, named by its iteration."""

        def train(folder: Path) -> None:
            inputs = {"sft": self.sft, "data": self.data, "reward": reward}
            kinds = {kind: folder / kind for kind in ("policy", "critic")}
            work = self._work(inputs, {**kinds, "milestones": folder})
            train_ppo(config, work)
            for kind in kinds.values():
                shutil.rmtree(kind)

        return self._made(name, train)

    def kept(self, name: str, measure: Callable[[], GainPath]) -> GainPath:
        """What was measured before under a name, or is measured now and kept: a line of JSON."""
        path = self.root / "results.jsonl"
        key = {"regime": self.regime, "seed": self.seed, "name": name}
        for line in path.read_text().splitlines() if path.is_file() else ():
            record = json.loads(line)
            if {field: record[field] for field in key} == key:
                return GainPath.model_validate(record["path"])
        begun = time.perf_counter()
        found = measure()
        seconds = round(time.perf_counter() - begun, 1)
        record = {**key, "seconds": seconds, "path": found.model_dump(mode="json")}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{self.regime}, seed {self.seed}, {name}: {seconds} s", file=sys.stderr)
        return found

    def _prepare(self, folder: Path) -> None:
        simulation = SimulationConfig(annotators=REGIMES[self.regime], preference_pairs=PAIRS)
        config = DataConfig(source="simulated", eval_fraction=0.2, simulation=simulation)
        limits = LengthLimits(
            prompt=SAMPLING.max_prompt_length,
            sft=TEXT_LENGTH,
            reward=TEXT_LENGTH,
            response=SAMPLING.max_new_tokens,
        )
        sections = {"model": MODEL, "limits": limits}
        prepare_data(config, Work(outputs={"data": folder}, sections=sections, seed=self.seed))

    def _train_sft(self, folder: Path) -> None:
        train_sft(SFT, self._work({"data": self.data}, {"sft": folder}))

    def _work(self, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> Work:
        sections = {"sampling": SAMPLING, "model": MODEL}
        return Work(inputs=inputs, outputs=outputs, sections=sections, seed=self.seed)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that is made once; what was left half done is made again."""
        folder, begun = self.folder(name), self.folder(f"{name}.begun-{os.getpid()}")
        if not folder.is_dir():
            begun.mkdir(parents=True)
            make(begun)
            if folder.is_dir():  # another process was faster; it has made the same
                shutil.rmtree(begun)
            else:
                begun.rename(folder)
        return folder


class Judge:
    """Measures policies of a seed against its SFT policy, on held-out prompts."""

    def __init__(self, world: World, prompts: int, each: int) -> None:
        self.world, self.each = world, each
        self.sft, self.tokenizer = Policy.load(world.sft, "cpu")
        table = read_table(world.data, "prompts", "eval")
        self.prompts = list(table["prompt"].iloc[:prompts])

    def pool(self, each: int) -> Texts:
        """Many answers of SFT to each prompt, kept in the folder of the seed."""
        clean = World(self.world.root, "clean", self.world.seed)
        path = clean.folder(f"pool-{len(self.prompts)}x{each}.pt")
        if not path.is_file():
            torch.save(tuple(self.texts(self.sft, each, "pool")), path)
        return Texts(*torch.load(path))

    @torch.no_grad()
    def texts(self, policy: Policy, each: int, name: str) -> Texts:
        """Answers of a policy, at the temperature of training."""
        prompts = [prompt for prompt in self.prompts for _ in range(each)]
        asked = [encode_prompt(p, self.tokenizer, SAMPLING.max_prompt_length) for p in prompts]
        draws = generator(self.world.seed, f"regimes/{name}")
        answers, kl, written = [], [], []
        for batch, responses in respond(policy, asked, SAMPLING, generator=draws):
            answers += decode_responses(responses.tokens, responses.mask, self.tokenizer)
            written += [
                t[m].tolist() for t, m in zip(responses.tokens, responses.mask, strict=True)
            ]
            laid = lay_out(batch, responses)
            ours, theirs = (
                response_logprobs(network, laid, temperature=SAMPLING.temperature).sum(-1)
                for network in (policy, self.sft)
            )
            kl.append(ours - theirs)
        return Texts(
            rows=[before + after for before, after in zip(asked, written, strict=True)],
            prompt=torch.arange(len(self.prompts)).repeat_interleave(each),
            kl=torch.cat(kl),
            truth=torch.tensor(true_reward(prompts, answers)),
            length=torch.tensor([len(row) for row in written]).float(),
        )


@torch.no_grad()
def scores(model: RewardModel, texts: Texts) -> Tensor:
    """(N,) the reward of each answer, of the tokens that were sampled."""
    parts = [texts.rows[start : start + 128] for start in range(0, len(texts.rows), 128)]
    return torch.cat([model.scores(pack(rows, model.model.device)).cpu() for rows in parts])


def measures(
    judge: Judge, proxy: Path, texts: Texts, members: MemberSection = MEAN
) -> dict[Measure, Tensor]:
    """(N,) each: what the proxy, the held-out reward model and the truth say of answers."""
    held_out = judge.world.reward("reward-held_out", "held_out", REWARD)
    return {
        "proxy": scores(load_reward_model(proxy, members=members)[0], texts),
        "held_out": scores(load_reward_model(held_out)[0], texts),
        "truth": texts.truth,
    }


def best_of_n(judge: Judge, name: str, proxy: Path, each: int) -> GainPath:
    """Best-of-n by a reward model, from one pool of SFT answers."""

    def measure() -> GainPath:
        found = measures(judge, proxy, judge.pool(each))
        pools = {key: values.view(-1, each) for key, values in found.items()}
        seed = judge.world.seed
        return best_of_n_path(f"seed {seed}", pools["proxy"], pools, seed)

    return judge.world.kept(f"{name}-best_of_{each}", measure)


def on_policy(judge: Judge, name: str, proxy: Path, each: int, config: PPOConfig = PPO) -> GainPath:
    """PPO against a reward model, with its policies along the way measured."""

    def measure() -> GainPath:
        seed = judge.world.seed
        pool = judge.pool(each)
        scored = measures(judge, proxy, pool.first(each, SCORED), config)
        base = {key: values.view(-1, SCORED).double().mean(1) for key, values in scored.items()}
        base["truth"] = pool.truth.view(-1, each).double().mean(1)
        points = []
        for folder in sorted(judge.world.policies(name, proxy, config).iterdir()):
            texts = judge.texts(Policy.load(folder, "cpu")[0], judge.each, f"{name}/{folder.name}")
            draws = generator(seed, f"regimes/kl/{folder.name}")
            found = measures(judge, proxy, texts, config)
            point = Point(
                number=int(folder.name),
                kl=clustered_bootstrap(texts.kl, texts.prompt, generator=draws),
                gains={
                    key: gain_over(values, texts.prompt, base[key], seed)
                    for key, values in found.items()
                },
            )
            points.append(point)
        chosen = points[-1].number
        return GainPath(name=f"seed {seed}", kind="on_policy", points=tuple(points), chosen=chosen)

    return judge.world.kept(name, measure)
