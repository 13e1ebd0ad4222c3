"""How time and memory of the data grow with their rows: places, tokens, preparation.

    python -m benchmarks.scale places --rows 1000000
    python -m benchmarks.scale make --rows 100000 --to pairs.jsonl
    python -m benchmarks.scale prepare --source pairs.jsonl --to prepared
    python -m benchmarks.scale encode --source prepared --to tokens --model DIRECTORY
    python -m benchmarks.scale encode --source prepared --model DIRECTORY --as-lists
    python -m benchmarks.scale train --source prepared --to work --model DIRECTORY --processes 2

Each prints a line of JSON: rows, seconds, and the most memory that the process and its children had
in use (MB, by getrusage). The pairs are drawn from a list of words, some 150 tokens an answer, and
are no more than that: what is measured is the way, and not what is learnt.
"""

import argparse
import copy
import json
import random
import resource
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_core.metrics import SilentLogger

WORDS = 20_000  # different ones
PROMPT, ANSWER = 50, 120  # words on average


def places(rows: int) -> dict[str, float]:
    """What a safe point pays for the position in the order (milliseconds, median of 9)."""
    import torch

    from rlhf_core.training.order import Batches, PromptStream

    found = {}
    for name, order in (
        ("batches", Batches(rows, 16, 2, torch.Generator().manual_seed(0))),
        ("prompts", PromptStream(rows, 16, torch.Generator().manual_seed(0))),
    ):
        next(order)
        times = []
        for _ in range(9):
            start = time.process_time()
            next(order)
            copy.deepcopy(order.state_dict())
            times.append(time.process_time() - start)
        found[f"{name}_ms"] = 1000 * statistics.median(times)
    return found


def pairs(rows: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Made preferences; one prompt in ten has two pairs, one pair in a thousand is twice there."""
    draws = random.Random(seed)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(draws.choices(letters, k=draws.randint(2, 9))) for _ in range(WORDS)]

    def text(mean: int) -> str:
        return " ".join(draws.choices(words, k=draws.randint(mean // 2, mean * 3 // 2)))

    row: dict[str, str] = {}
    for number in range(rows):
        prompt = row["prompt"] if row and draws.random() < 0.1 else text(PROMPT)
        if not row or draws.random() >= 0.001:
            row = {"prompt": prompt, "chosen": text(ANSWER), "rejected": text(ANSWER)}
        yield {**row, "annotator": f"p{number % 50}"} if number % 7 else row


def make(rows: int, to: Path) -> dict[str, float]:
    """Write made pairs as JSON lines."""
    with to.open("w", encoding="utf-8") as file:
        for row in pairs(rows):
            print(json.dumps(row), file=file)
    return {"megabytes": to.stat().st_size / 1e6}


def prepare(source: Path, to: Path, model: str) -> dict[str, float]:
    """Prepare the data with the tokenizer of a model."""
    from rlhf_core.metrics import SilentLogger
    from rlhf_core.settings.data import DataConfig, LengthLimits
    from rlhf_core.settings.model import ModelConfig
    from rlhf_core.stages.prepare import prepare_data
    from rlhf_core.work import Work

    config = DataConfig(source="files", preferences={"path": str(source)}, eval_fraction=0.01)
    limits = LengthLimits(prompt=256, sft=1024, reward=1024, response=512)
    sections = {"model": ModelConfig(source=model), "limits": limits}
    report = prepare_data(
        config, Work(outputs={"data": to}, sections=sections, logger=SilentLogger())
    )
    return {"train": report.preferences_train, "eval": report.preferences_eval}


def encode(data: Path, to: Path | None, model: str, *, as_lists: bool) -> dict[str, float]:
    """Encode the training pairs, and take 1,000 of them in a random order.

    Args:
        as_lists: as Python lists in this process, as trainings did before they were mapped.
    """
    import torch

    from rlhf_core.backbone.base_model import load_tokenizer
    from rlhf_core.data.pairs import encode_pairs
    from rlhf_core.data.prepared import read_table
    from rlhf_core.settings.model import ModelConfig

    tokenizer = load_tokenizer(ModelConfig(source=model), ())
    before = memory()
    start = time.process_time()
    if as_lists:
        found = encode_pairs(read_table(data, "preferences", "train"), tokenizer, 1024).pairs
    else:
        from rlhf_core.data.mapped.training import Place, pairs_of

        found = pairs_of(Place(data, tokenizer, to), "train", 1024, "max_length")
    encoded = time.process_time() - start
    draws = torch.Generator().manual_seed(0)
    places = torch.randint(len(found), (1000,), generator=draws).tolist()
    start = time.process_time()
    tokens = sum(len(found[place].chosen) for place in places)
    taken = time.process_time() - start
    after = memory()
    grown = {f"{name}_mb": after[name] - before[name] for name in after}
    return {"encode_cpu": encoded, "pair_us": taken * 1000, "tokens": tokens / 1000, **grown}


class Watch(SilentLogger):
    """Notes when the first step was done, and ends the training after a few."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seen, self.first, self.begun = steps, 0, 0.0, time.monotonic()
        self.phases: dict[str, float] = {}
        self.most: dict[str, float] = {}

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        self.phases.setdefault(what, round(time.monotonic() - self.begun, 1))
        self.look()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.seen += 1
        self.first = self.first or time.monotonic() - self.begun
        self.look()
        if self.seen == self.steps:
            raise KeyboardInterrupt

    def look(self) -> None:
        """The memory of all ranks together; what they share counts once (MB)."""
        import psutil

        found = {"all_mb": 0.0, "own_mb": 0.0, "ranks": 0}
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                used = child.memory_full_info()
                found["all_mb"] += used.pss / 2**20
                found["own_mb"] += used.uss / 2**20
                found["ranks"] += 1
        for name, value in found.items():
            self.most[name] = max(self.most.get(name, 0), value)


def train(data: Path, to: Path, model: Path, processes: int) -> dict[str, Any]:
    """Begin to train a reward model on the pairs, and stop after a few steps."""
    from rlhf_core.launch import Job, launch

    watch = Watch(steps=12)
    config = {"batch_size": 4 * processes, "micro_batch_size": 4, "max_length": 1024}
    job = Job(
        stage="reward_model",
        config=config,
        inputs={"data": data, "sft": model},
        outputs={"reward": to / "reward"},
        seed=0,
        checkpoints=to / "checkpoints",
        processes=processes,
    )
    with suppress(KeyboardInterrupt):
        launch(job, watch)
    return {"first_step": watch.first, "phases": watch.phases, **watch.most}


def memory() -> dict[str, float]:
    """What this process has of its own, and of files that it shares with others (MB)."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = dict(line.split(":", 1) for line in status)
    names = {"own": "RssAnon", "files": "RssFile"}
    return {name: int(found[key].split()[0]) / 1024 for name, key in names.items()}


def used() -> dict[str, float]:
    """The most memory in use so far (MB)."""
    who = {"self": resource.RUSAGE_SELF, "child": resource.RUSAGE_CHILDREN}
    return {f"{name}_mb": resource.getrusage(of).ru_maxrss / 1024 for name, of in who.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["places", "make", "prepare", "encode", "train"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--as-lists", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    start, cpu = time.monotonic(), time.process_time()
    if given.what == "places":
        found = places(given.rows)
    elif given.what == "make":
        found = make(given.rows, given.to)
    elif given.what == "encode":
        found = encode(given.source, given.to, given.model, as_lists=given.as_lists)
    elif given.what == "train":
        found = train(given.source, given.to, Path(given.model), given.processes)
    else:
        found = prepare(given.source, given.to, given.model)
    spent = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({"what": given.what, "rows": given.rows, **found, **spent, **used()}))


if __name__ == "__main__":
    main()
