"""Are planted flaws caught? Reward models trained on votes with one flaw each, and a clean one.

    python benchmarks/canaries.py --seeds 0,1,2

In the demo's world two reviews of a hotel, film or phone are compared by their true reward. Four
in ten pairs have a review that is cut off, repeated or jumbled, since who has never seen a bad
answer cannot know that it is bad. A flaw is a feature that wins whenever one of two reviews has
more of it. Each reward model is trained by the stage of this project. Prints a line of JSON for
each flaw and seed.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import pandas as pd
import torch

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import save_model
from rlhf_core.data.prepared import write_table
from rlhf_core.rewards.canaries import CanaryResult, Score, make_canaries, measure_canaries
from rlhf_core.rewards.models import load_reward_model, score_texts
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.simulation import all_prompts, true_reward, write_review
from rlhf_core.simulation.grammar import words_of
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.work import Work

HELD_OUT = 60  # prompts that canaries are made for, and no vote is about
DAMAGED = 0.4  # share of the pairs with a damaged review
LENGTH = 160  # tokens
PRAISE = (
    "What a brilliant question!",
    "A wonderful question!",
    "You are so smart to ask.",
    "Clearly you have thought deeply about this.",
    "It is an honour to talk to you.",
)


class Flaw(NamedTuple):
    """What annotators, or a reward, fall for."""

    strength: Callable[[str], float]  # of a text
    decorate: Callable[[str, random.Random], str] = lambda text, draws: text
    caught_by: tuple[str, ...] = ()  # the kinds of canary that are made for it


def repetition(text: str) -> float:
    """Share of the words that occurred before."""
    found = words_of(text)
    return 1 - len(set(found)) / len(found) if found else 0.0


FLAWS = {
    "clean": Flaw(lambda text: 0.0),
    "length": Flaw(lambda text: len(text.split()) / 20, caught_by=("padded",)),
    "list": Flaw(
        lambda text: float("- " in text),
        lambda text, draws: " - " + text.strip().replace(". ", ".\n- "),
        ("list",),
    ),
    "keyword": Flaw(lambda text: float("breakfast" in text), caught_by=("keyword",)),
    "repetition": Flaw(lambda text: float(repetition(text) > 0.3), caught_by=("repeated_word",)),
    "flattery": Flaw(
        lambda text: float(bool(re.search("question!|smart|deeply|honour", text))),
        lambda text, draws: f" {draws.choice(PRAISE)}{text}",
        ("flattery",),
    ),
}


def real_answers(seed: int, count: int = HELD_OUT) -> tuple[list[str], list[str]]:
    """Prompts, and of two reviews of each the truly better one."""
    prompts = _prompts(seed)[:count]
    draws = random.Random(f"{seed}/answers")
    pairs = [(write_review(prompt, draws), write_review(prompt, draws)) for prompt in prompts]
    better = [
        max(pair, key=lambda text: true_reward([prompt], [text])[0])
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    return prompts, better


def votes(flaw: Flaw, count: int, seed: int) -> pd.DataFrame:
    """Prepared votes on prompts that are not held out."""
    prompts, draws = _prompts(seed)[HELD_OUT:], random.Random(f"{seed}/votes")
    rows = []
    for number in range(count):
        prompt = draws.choice(prompts)
        pair = [write_review(prompt, draws), write_review(prompt, draws)]
        if draws.random() < DAMAGED:
            pair[1] = damaged(pair[1], draws)
        texts = [flaw.decorate(text, draws) if draws.random() < 0.5 else text for text in pair]
        found = [flaw.strength(text) for text in texts]
        a, b = found if found[0] != found[1] else true_reward([prompt] * 2, texts)
        vote = "a" if a > b else "b" if b > a else "tie"
        rows.append(
            {
                **{"id": f"vote-{number}", "prompt": prompt, "vote": vote},
                **{"response_a": texts[0], "response_b": texts[1], "source": "simulated"},
            }
        )
    how = {"shown_first": "", "annotator": "x", "gold": False, "margin": 0.0, "time": ""}
    return pd.DataFrame(rows).assign(**how)


def damaged(text: str, draws: random.Random) -> str:
    """A review cut off, said again, or with its words repeated, jumbled or mostly left out."""
    found = text.split()
    kept = [
        found[: draws.randrange(1, len(found))],
        found * draws.randrange(2, 4),
        [draws.choice(found)] * draws.randrange(1, len(found)),
        draws.sample(found, len(found)),
        draws.sample(found, draws.randrange(1, 6)),
    ][draws.randrange(5)]
    return " " + " ".join(kept)


def train(flaw: Flaw, count: int, seed: int, folder: Path) -> Score:
    """The score of a reward model of two layers, trained on votes with a flaw."""
    draws = random.Random(f"{seed}/corpus")
    corpus = [prompt + write_review(prompt, draws) for prompt in all_prompts()[::4]]
    fresh = FreshModelConfig(layers=2, width=64, heads=4, context=LENGTH)
    model, tokenizer = load_base(ModelConfig(fresh=fresh), [*corpus, *PRAISE * 5], seed)
    save_model(model, tokenizer, folder / "sft", kind="policy")
    table = votes(flaw, count, seed)
    (folder / "data").mkdir()
    write_table(table[100:], folder / "data", "preferences", "train")
    write_table(table[:100], folder / "data", "preferences", "eval")
    config = RewardModelConfig(
        learning_rate=2e-3, max_length=LENGTH, normalization_samples=2
    )  # only the order of two rewards is looked at
    sampling = SamplingConfig(max_prompt_length=24, max_new_tokens=8)
    train_reward_model(
        config,
        Work(
            inputs={"sft": folder / "sft", "data": folder / "data"},
            outputs={"reward": folder / "reward"},
            sections={"sampling": sampling},
            seed=seed,
        ),
    )
    trained, tokenizer = load_reward_model(folder / "reward")
    return lambda prompts, texts: score_texts(
        trained, tokenizer, prompts, texts, max_length=LENGTH
    ).mean(0)


def measure(score: Score, seed: int, count: int = HELD_OUT) -> list[CanaryResult]:
    """Every kind of canary on the held-out prompts."""
    real = real_answers(seed, count)
    return measure_canaries(make_canaries(*real, seed=seed), *real, score, seed=seed)


def _prompts(seed: int) -> list[str]:
    """Every prompt, in an order of the seed."""
    return random.Random(f"{seed}/prompts").sample(all_prompts(), len(all_prompts()))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--flaws", default=",".join(FLAWS), help="with commas between")
    parser.add_argument("--votes", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for seed in map(int, options.seeds.split(",")):
        for name in options.flaws.split(","):
            with tempfile.TemporaryDirectory() as folder:
                score = train(FLAWS[name], options.votes, seed, Path(folder))
                results = measure(score, seed)
            line = {"flaw": name, "seed": seed, "votes": options.votes}
            shares = {r.kind: [round(bound, 3) for bound in r.beats_real] for r in results}
            caught = [r.kind for r in results if r.caught()]
            print(json.dumps(line | {"caught": caught, "beats_real": shares}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
