"""Reward models on votes that people cast, beside rules and a bag of words.

    python benchmarks/reward_models.py --model .rlhf/bench/smol --ways longer,words --folds 12
    python benchmarks/reward_models.py --model .rlhf/bench/smol --folds 4 --train-pairs 800 \\
        --test-pairs 240
    python benchmarks/reward_models.py --write      # writes README.md from the results

Two sets of `--data` (see its README.md), which are not part of this repository:

    arguments   pairs of arguments on one side of a debate; whole sides are left out, so nothing
                that is tested was argued in training, and the interval draws whole sides
    pandalm     pairs of answers to an instruction, ties left out; whole prompts are left out

A fold is measured in each way, and its counts are appended to --output at once, so nothing is lost
when this is stopped: the same command measures what is missing. The reward models are trained by
the stages of this project, `prepare_data` and `train_reward_model`, with labels of one vote a pair.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from flows.local import allocator

if __name__ == "__main__":
    allocator.keep_memory()

import numpy as np
import torch
from pages import put_between
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from table import machine

from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import clustered_bootstrap, clustered_share
from rlhf_core.rewards.models import load_reward_model, score_texts
from rlhf_core.seeding import generator
from rlhf_core.settings.data import DataConfig, LengthLimits, TableConfig
from rlhf_core.settings.model import ModelConfig, SamplingConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.work import Work

HERE = Path(__file__).parent
BEGIN = "<!-- written by reward_models.py -->"
END = "<!-- end of what reward_models.py has written -->"
TRAINED = {
    "LoRA": {"learning_rate": 3e-4, "lora_rank": 16, "lora_layers": 8},
    "all weights": {"learning_rate": 3e-5},
}
TITLES = {
    "longer": "prefer the longer",
    "words": "TF-IDF + Bradley-Terry",
    "words+length": "TF-IDF and length + Bradley-Terry",
    "LoRA": "SmolLM2-135M-Instruct, LoRA rank 16 in the last 8 of 30 blocks",
    "all weights": "SmolLM2-135M-Instruct, all weights",
}
SETS = {"arguments": "argument pairs", "pandalm": "PandaLM"}
CLUSTERS = {"arguments": "debate sides", "pandalm": "prompts"}
# Of the README.md of the data; there nothing but the test side is held out, so `--folds 12`.
REFERENCE = {
    "arguments": {"longer": 0.774, "words": 0.716, "words+length": 0.794},
    "pandalm": {"longer": 0.674, "words": 0.630, "words+length": 0.663},
}
Line = dict[str, Any]


class Pair(NamedTuple):
    """One label: which of two answers to a prompt people preferred."""

    cluster: int  # pairs of one cluster share texts, and are tested together
    prompt: str
    chosen: str
    rejected: str


class Fold(NamedTuple):
    train: list[Pair]
    test: list[Pair]


# --- the data ------------------------------------------------------------------------------------


def read_set(name: str, data: Path) -> list[Pair]:
    """The labelled pairs of a set that have a winner.

    Raises: SystemExit when the data are not there.
    """
    file, label, group = {
        "arguments": ("argument-pairs-5annotators-dev.jsonl", "gold", "debate"),
        "pandalm": ("pandalm-pairs-3annotators.jsonl", "majority", "prompt"),
    }[name]
    path = data / file
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there, and nothing can be measured without it: name the folder that "
            "holds it with --data"
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("strict", True) and row[label] in ("a", "b")]
    numbers = {value: n for n, value in enumerate(sorted({row[group] for row in rows}))}
    return [
        Pair(
            numbers[row[group]],
            row["prompt"],
            *(row[f"response_{side}"] for side in ("ab" if row[label] == "a" else "ba")),
        )
        for row in rows
    ]


def split(pairs: Sequence[Pair], folds: int, train: int, test: int, seed: int) -> list[Fold]:
    """Folds of whole clusters, of which at most so many pairs are used (0 = all), drawn evenly.

    Raises: SystemExit when there are fewer clusters than folds.
    """
    clusters = sorted({pair.cluster for pair in pairs})
    if not 2 <= folds <= len(clusters):
        raise SystemExit(f"--folds {folds} must lie between 2 and {len(clusters)}, the clusters")
    draws = random.Random(seed)
    draws.shuffle(clusters)
    found = []
    for number in range(folds):
        held_out = set(clusters[number::folds])
        parts = ([], [])  # type: tuple[list[Pair], list[Pair]]
        for pair in pairs:
            parts[pair.cluster in held_out].append(pair)
        found.append(Fold(draw_evenly(parts[0], train, draws), draw_evenly(parts[1], test, draws)))
    return found


def draw_evenly(pairs: Sequence[Pair], most: int, draws: random.Random) -> list[Pair]:
    """At most so many pairs (0 = all), in turn one of each cluster, in random order."""
    by_cluster: dict[int, list[Pair]] = {}
    for pair in draws.sample(pairs, len(pairs)):
        by_cluster.setdefault(pair.cluster, []).append(pair)
    depth = max(map(len, by_cluster.values()))
    turns = [own[n] for n in range(depth) for own in by_cluster.values() if n < len(own)]
    kept = turns[: most or None]
    return draws.sample(kept, len(kept))


# --- ways to tell which answer wins: (fold, arguments) -> (len(fold.test),) lead of the chosen ----


def longer(fold: Fold, arguments: argparse.Namespace) -> torch.Tensor:
    return torch.tensor([float(len(pair.chosen) - len(pair.rejected)) for pair in fold.test])


def words(fold: Fold, arguments: argparse.Namespace, *, length: bool = False) -> torch.Tensor:
    """Bradley-Terry on TF-IDF: a logistic regression without intercept on differences of texts."""
    vectorizer = TfidfVectorizer(min_df=2)
    vectorizer.fit([text for pair in fold.train for text in (pair.chosen, pair.rejected)])

    def differences(pairs: Sequence[Pair]) -> np.ndarray:
        chosen, rejected = (
            vectorizer.transform([getattr(pair, side) for pair in pairs]).toarray()
            for side in ("chosen", "rejected")
        )
        if not length:
            return chosen - rejected
        logs = [[math.log1p(len(p.chosen)) - math.log1p(len(p.rejected))] for p in pairs]
        return np.hstack([chosen - rejected, np.array(logs)])

    train = differences(fold.train)
    signs = np.tile([1, -1], len(train))[: len(train)]  # both outcomes, or nothing can be fitted
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(train * signs[:, None], signs)
    return torch.from_numpy(model.decision_function(differences(fold.test)))


def words_and_length(fold: Fold, arguments: argparse.Namespace) -> torch.Tensor:
    return words(fold, arguments, length=True)


def trained(way: str) -> Callable[[Fold, argparse.Namespace], torch.Tensor]:
    """A reward model of this project."""

    def leads(fold: Fold, arguments: argparse.Namespace) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return _train(fold, way, arguments, Path(folder))

    return leads


WAYS = {
    "longer": longer,
    "words": words,
    "words+length": words_and_length,
    **{way: trained(way) for way in TRAINED},
}


def _train(fold: Fold, way: str, arguments: argparse.Namespace, folder: Path) -> torch.Tensor:
    # The stage wants held-out votes of its own; the test is scored apart, and whole. Some answers
    # of PandaLM are empty: nothing is learnt from those, but they are tested.
    for name, pairs in (("train", fold.train), ("eval", fold.test[:8])):
        rows = [{k: v for k, v in pair._asdict().items() if k != "cluster"} for pair in pairs]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    longest = arguments.max_length
    table = TableConfig(path=str(folder / "train.jsonl"), eval_path=str(folder / "eval.jsonl"))
    prepare_data(
        DataConfig(
            source="files",
            preferences=table,
            prompt_template="{prompt}\n\n",
            on_bad_row="drop",
        ),
        Work(
            outputs={"data": folder / "data"},
            sections={
                "model": ModelConfig(source=str(arguments.model)),
                "limits": LengthLimits(prompt=longest, sft=longest, reward=longest, response=8),
            },
            seed=arguments.seed,
        ),
    )
    config = RewardModelConfig.model_validate(
        {
            "max_length": longest,
            "precision": arguments.precision,
            "batch_size": 8,
            "micro_batch_size": 4,
            "normalization_samples": 2,  # only the order of two rewards is looked at
            **TRAINED[way],
        }
    )
    sampling = SamplingConfig(max_prompt_length=longest - 8, max_new_tokens=8, batch_size=2)
    train_reward_model(
        config,
        Work(
            inputs={"sft": arguments.model, "data": folder / "data"},
            outputs={"reward": folder / "reward"},
            sections={"sampling": sampling},
            seed=arguments.seed,
            device=arguments.device,
        ),
    )
    model, tokenizer = load_reward_model(folder / "reward", arguments.device, arguments.precision)
    prompts = [f"{pair.prompt}\n\n" for pair in fold.test]
    chosen, rejected = (
        score_texts(model, tokenizer, prompts, texts, max_length=longest, batch_size=8)[0]
        for texts in ([pair.chosen for pair in fold.test], [pair.rejected for pair in fold.test])
    )
    return chosen - rejected


# --- measuring -----------------------------------------------------------------------------------


def counts(leads: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Right, equal and wrong by cluster: no text and no name of the data."""
    found: dict[str, list[int]] = {}
    for lead, pair in zip(leads.sign().int().tolist(), pairs, strict=True):
        found.setdefault(str(pair.cluster), [0, 0, 0])[1 - lead] += 1
    return found


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, fold by fold."""
    started = time.monotonic()
    for name in arguments.sets:
        pairs = read_set(name, arguments.data)
        folds = split(
            pairs, arguments.folds, arguments.train_pairs, arguments.test_pairs, arguments.seed
        )
        for number, fold in enumerate(folds[: arguments.only or None]):
            for way in arguments.ways:
                key = {
                    **{"set": name, "way": way, "folds": arguments.folds, "fold": number},
                    **{"train_pairs": len(fold.train), "test_pairs": len(fold.test)},
                    **{"seed": arguments.seed},
                }
                if way in TRAINED:
                    key |= {"max_length": arguments.max_length, "precision": arguments.precision}
                done = [{k: line[k] for k in key if k in line} for line in read(arguments.output)]
                if key in done:
                    continue
                if time.monotonic() - started > 60 * arguments.minutes:
                    say(f"the time is up before {name}, fold {number}: {way}")
                    return
                begun = time.monotonic()
                found = counts(WAYS[way](fold, arguments), fold.test)
                line = key | {
                    **{"counts": found, "seconds": round(time.monotonic() - begun, 1)},
                    **machine(),
                    **{"threads": arguments.threads, "torch": torch.__version__},
                    **{"device": arguments.device},
                    **{"date": date.today().isoformat()},
                }
                with arguments.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                value = accuracy([line]).value
                say(f"{name}, fold {number}, {way}: {value:.3f} ({line['seconds']:.0f} s)")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the section of README.md --------------------------------------------------------------------


def read(path: Path) -> list[Line]:
    """The lines that have been measured."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def accuracy(
    lines: Sequence[Line], interval: Callable[..., Interval] = clustered_share
) -> Interval:
    """Share of the pairs that are told rightly, over all folds; whole clusters are drawn."""
    values, clusters = [], []
    for line in lines:
        for cluster, numbers in line["counts"].items():
            for value, number in zip((1.0, 0.5, 0.0), numbers, strict=True):
                values += [value] * number
                clusters += [int(cluster)] * number
    return interval(
        torch.tensor(values), torch.tensor(clusters), generator=generator(0, "bootstrap")
    )


def render(lines: Sequence[Line]) -> str:
    """The table: a row for each way and each amount of work."""
    rows: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        # With all pairs the folds differ in size: they are one row.
        size = line["train_pairs"] if line["train_pairs"] < 600 else 0
        key = (line["set"], line["folds"], size, line["test_pairs"] if size else 0, line["way"])
        rows.setdefault(key, []).append(line)
    told = [
        "| set | way | accuracy | bootstrap | bounds for so few | prefer the longer | tested on | "
        "trained on |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        name, folds, size, tested, way = key
        return [*SETS].index(name), -folds, -size, -tested, [*TITLES].index(way)

    for key in sorted(rows, key=place):
        tested = {line["fold"] for line in rows[key]}
        same = [line for line in rows.get((*key[:4], "longer"), ()) if line["fold"] in tested]
        told.append(_row(key[0], key[4], rows[key], same))
    return "\n".join([*told, "", _circumstances(lines)])


def _row(name: str, way: str, lines: Sequence[Line], same: Sequence[Line]) -> str:
    drawn, bounds = accuracy(lines, clustered_bootstrap), accuracy(lines)
    pairs = sum(line["test_pairs"] for line in lines)
    clusters = len({cluster for line in lines for cluster in line["counts"]})
    few, many = (pick(line["train_pairs"] for line in lines) for pick in (min, max))
    trained_on = f"{few:,} pairs" if few == many else f"{few:,} to {many:,} pairs"
    if precision := lines[0].get("precision"):
        trained_on += f", {precision}"
    cells = [
        SETS[name],
        TITLES[way],
        f"{drawn.value:.3f}",
        f"{drawn.low:.3f}–{drawn.high:.3f}",
        f"{bounds.low:.3f}–{bounds.high:.3f}",
        f"{accuracy(same).value:.3f}" if same and way != "longer" else "–",
        f"{pairs:,} pairs, {clusters} {CLUSTERS[name]}, {len(lines)} of {lines[0]['folds']} folds",
        "–" if way == "longer" else trained_on,
    ]
    return f"| {' | '.join(cells)} |"


def _circumstances(lines: Sequence[Line]) -> str:
    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(line[key]) for line in lines))

    return (
        f"{all_of('date')}; {all_of('cpu')} with {all_of('features')}, {all_of('threads')} thread; "
        f"torch {all_of('torch')}. One epoch; no setting of SmolLM2 was searched. TF-IDF was "
        "chosen among five variants on three folds of the arguments."
    )


def parse(words_of_command: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    add("--model", type=Path, help="directory that models.py wrote for smol")
    add("--sets", type=_names(SETS), default=list(SETS), help="with commas between")
    add("--ways", type=_names(WAYS), default=list(WAYS), help="with commas between")
    add("--folds", type=int, default=12, help="parts of whole clusters, each held out once")
    add("--only", type=int, default=0, help="measure only the first folds (0 = all)")
    add("--train-pairs", type=int, default=0, help="most pairs to train on (0 = all)")
    add("--test-pairs", type=int, default=0, help="most pairs to test on, each fold (0 = all)")
    add("--max-length", type=int, default=384, help="tokens of prompt and answer")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--minutes", type=float, default=math.inf, help="begin nothing after so many")
    add("--output", type=Path, default=HERE / "reward_models.jsonl")
    add("--write", action="store_true", help="write README.md from the results; measure nothing")
    arguments = parser.parse_args(words_of_command)
    if arguments.model is None and not arguments.write and {*arguments.ways} & {*TRAINED}:
        parser.error("--model is needed to train a reward model: see benchmarks/models.py")
    return arguments


def _names(known: Any) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return names


def main() -> None:
    arguments = parse(sys.argv[1:])
    if arguments.write:
        put_between(render(read(arguments.output)), HERE / "README.md", BEGIN, END)
        return
    torch.set_num_threads(arguments.threads)
    run(arguments)


if __name__ == "__main__":
    main()
