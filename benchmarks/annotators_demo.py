"""The demo with annotators who are biased: policies from a pooled and from an aware reward model.

For each seed, as `configs/demo.yaml` has it but for its annotators: data, SFT, a reward model of
each kind on the same votes, and PPO on each. What is made is kept in a folder.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from scipy import stats

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import decode_responses, encode_prompt
from rlhf_core.data.prepared import read_table
from rlhf_core.rewards.models import load_reward_model, score_texts
from rlhf_core.seeding import generator
from rlhf_core.simulation import simulate, true_reward
from rlhf_core.simulation.grammar import words_of
from rlhf_core.stages.ppo import train_ppo
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.stages.sft import train_sft
from rlhf_core.work import Work

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
BIASED = [
    "data.simulation.annotators.count=20",
    "data.simulation.annotators.lowest_reliability=0.7",
    "data.simulation.annotators.spammer_share=0.15",
    "data.simulation.annotators.contrary_share=0.05",
    "data.simulation.annotators.side_bias=0.5",
    "data.simulation.gold_share=0.02",
]
# Mean liking for length; care for repetition, half of it as in the demo or all; and kl_coef of PPO,
# as in the demo, or as in the benchmark of the tournament, whose policies are hacked.
WORLDS = ((0.4, 0.5, 0.1), (0.8, 0.5, 0.1), (0.8, 0.5, 0.03), (0.8, 1.0, 0.1))
WAYS = ("pooled", "aware")
EACH = 16  # answers to each held-out prompt


@dataclass(frozen=True)
class World:
    """The folder of a seed, and what is made in it."""

    root: Path
    seed: int
    length_bias: float  # mean over the annotators, sentiment for ten words
    care: float  # share of the penalty for repetition that the annotators notice
    kl_coef: float  # of PPO; what comes before it is shared

    def config(self, way: str = "pooled") -> PipelineConfig:
        """The demo with biased annotators."""
        settings = [
            f"seed={self.seed}",
            f"reward_model.annotators={way}",
            f"ppo.kl_coef={self.kl_coef:g}",
            f"data.simulation.annotators.length_bias={self.length_bias}",
            f"data.simulation.annotators.care={self.care}",
            *BIASED,
        ]
        return load_config(DEMO, settings, PipelineConfig)

    @property
    def folder(self) -> Path:
        """Where everything of this world lies."""
        return self.root / f"length-{self.length_bias:g}-care-{self.care:g}" / f"seed-{self.seed}"

    @property
    def results(self) -> Path:
        """The file in which it is kept what was measured."""
        return self.folder / f"measured-{self.kl_coef:g}.json"

    def measured(self) -> dict[str, Any]:
        """What the reward models and policies of this seed are worth."""
        path = self.results
        if not path.is_file():
            found: dict[str, Any] = {way: self._measure(way) for way in WAYS}
            found["sft"] = self._worth(self._sft, "sft")
            path.write_text(json.dumps(found, indent=1))
        return dict(json.loads(path.read_text()))

    def _measure(self, way: str) -> dict[str, float]:
        reward = self._made(f"reward-{way}", lambda folder: self._train_reward(folder, way))
        policy = self._made(
            f"ppo-{way}-{self.kl_coef:g}",
            lambda folder: self._train_policy(folder, reward, way),
        )
        report = json.loads((reward / "report.json").read_text())
        return {
            "vote_accuracy": report["accuracy"],
            "pair_accuracy": self._pair_accuracy(reward),
            "spammer_auc": report.get("spammer_auc", float("nan")),
            **self._worth(policy / "policy", way),
        }

    def _pair_accuracy(self, reward: Path) -> float:
        """How often the reward model prefers the truly better answer of a held-out vote."""
        votes = read_table(self._data, "preferences", "eval")
        prompts, model, tokenizer = list(votes["prompt"]), *load_reward_model(reward)
        sides = [list(votes[f"response_{side}"]) for side in "ab"]
        with torch.no_grad():
            ours = [
                score_texts(model, tokenizer, prompts, texts, max_length=80)[0] for texts in sides
            ]
        gap, truth = ours[0] - ours[1], [true_reward(prompts, texts) for texts in sides]
        better = torch.tensor(truth[0]) - torch.tensor(truth[1])
        decided = better != 0
        return float(((gap > 0) == (better > 0))[decided].double().mean())

    @torch.no_grad()
    def _worth(self, policy: Path, name: str) -> dict[str, float]:
        """The true reward and the length of a policy's answers to the held-out prompts."""
        sampling = self.config().sampling
        actor, tokenizer = Policy.load(policy, "cpu")
        prompts = list(read_table(self._data, "prompts", "eval")["prompt"])
        asked = [prompt for prompt in prompts for _ in range(EACH)]
        rows = [encode_prompt(p, tokenizer, sampling.max_prompt_length) for p in asked]
        texts: list[str] = []
        draws = generator(self.seed, f"benchmark/{name}")
        for _, responses in respond(actor, rows, sampling, generator=draws):
            texts += decode_responses(responses.tokens, responses.mask, tokenizer)
        words = mean(len(words_of(text)) for text in texts)
        return {"true_reward": mean(true_reward(asked, texts)), "words": words}

    @property
    def _data(self) -> Path:
        def prepare(folder: Path) -> None:
            config = self.config()
            sections = {"model": config.model, "limits": config.length_limits}
            work = Work(outputs={"data": folder}, sections=sections, seed=self.seed)
            prepare_data(config.data, work)

        return self._made("data", prepare)

    @property
    def _sft(self) -> Path:
        def train(folder: Path) -> None:
            train_sft(self.config().sft, self._work({"data": self._data}, {"sft": folder}))

        return self._made("sft", train)

    def _train_reward(self, folder: Path, way: str) -> None:
        inputs = {"sft": self._sft, "data": self._data}
        config = self.config(way)
        report = train_reward_model(config.reward_model, self._work(inputs, {"reward": folder}))
        found = report.summary()
        table = report.tables.get("reward_annotators")
        if table is not None:
            # The simulation draws from a seed of its own for its data.
            people = {p.name: p for p in simulate(config.data.simulation, self.seed).annotators}
            kind = [people[name].reliability == 0 for name in table["annotator"]]
            usual = [
                not people[n].contrary and people[n].reliability > 0 for n in table["annotator"]
            ]
            found["spammer_auc"] = auc(table["reliability"].tolist(), kind, usual)
        (folder / "report.json").write_text(json.dumps(found, indent=1))

    def _train_policy(self, folder: Path, reward: Path, way: str) -> None:
        inputs = {"sft": self._sft, "data": self._data, "reward": reward}
        outputs = {kind: folder / kind for kind in ("policy", "critic")}
        train_ppo(self.config(way).optimised, self._work(inputs, outputs))

    def _work(self, inputs: dict[str, Path], outputs: dict[str, Path]) -> Work:
        config = self.config()
        sections = {"sampling": config.sampling, "model": config.model}
        return Work(inputs=inputs, outputs=outputs, sections=sections, seed=self.seed)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder that is made once; what was left half done is made again."""
        folder = self.folder / name
        begun = folder.with_name(f"{name}.begun-{os.getpid()}")
        if not folder.is_dir():
            begun.mkdir(parents=True)
            make(begun)
            if folder.is_dir():  # another process was faster; it has made the same
                shutil.rmtree(begun)
            else:
                begun.rename(folder)
        return folder


def auc(values: list[float], low: list[bool], high: list[bool]) -> float:
    """How often one of `low` has the smaller value than one of `high`; equal counts half."""
    pairs = [
        (x < y) + 0.5 * (x == y)
        for x, is_low in zip(values, low, strict=True)
        if is_low
        for y, is_high in zip(values, high, strict=True)
        if is_high
    ]
    return mean(pairs) if pairs else float("nan")


def with_interval(values: list[float]) -> str:
    """The mean with the 95 % interval of Student's t, as it is written in a table."""
    if len(values) == 1:
        return f"{values[0]:+.3f}, one seed"
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean(values):+.3f} ± {half:.3f}"


TITLES = {
    "true_reward": "**true reward of the policy**",
    "words": "words of its answers",
    "pair_accuracy": "reward model: truly better answer of held-out pairs",
    "vote_accuracy": "reward model: held-out votes as they were cast",
}


def demo_section(seeds: int, root: Path, *, kept: bool) -> str:
    """The table of the demo, as Markdown; with `kept` only of what was measured before."""
    rows = [
        "| liking for length, care, KL | seeds | | pooled | aware | difference |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for world in WORLDS:
        name = ", ".join(f"{value:g}" for value in world)
        each_seed = [World(root, seed, *world) for seed in range(seeds)]
        found = []
        for one in each_seed:
            if one.results.is_file() or not kept:
                found.append(one.measured())
                print(f"{name}; seed {one.seed}: {found[-1]}", flush=True)
        if not found:
            continue
        for key, title in TITLES.items():
            pooled, aware = ([one[way][key] for one in found] for way in WAYS)
            differences = [b - a for a, b in zip(pooled, aware, strict=True)]
            rows.append(
                f"| {name} | {len(found)} | {title} | {mean(pooled):.3f} | {mean(aware):.3f} | "
                f"{with_interval(differences)} |"
            )
        each = ", ".join(
            f"{one['pooled']['true_reward']:.3f} and {one['aware']['true_reward']:.3f}"
            for one in found
        )
        spammers = mean(one["aware"]["spammer_auc"] for one in found)
        sft = mean(one["sft"]["true_reward"] for one in found)
        notes.append(
            f"* {name}: true reward, pooled and aware, seed by seed: {each}; of SFT {sft:.3f}; "
            f"spammers against usual annotators by reliability: AUC {spammers:.3f}."
        )
    about = (
        "A difference has the 95 % interval of Student's t over the paired seeds. "
        "The mean liking for length is in units of sentiment for ten words, care is the share of "
        "the penalty for repetition that annotators notice, and KL is `ppo.kl_coef`."
    )
    return "\n".join([*rows, "", about, "", *notes])
