"""Memory and time of an ensemble beside one reward model, with the same LoRA settings.

    python benchmarks/models.py smol --output .rlhf/bench/smol
    python benchmarks/ensemble.py --model .rlhf/bench/smol

Each number of members is trained and scored with in processes of its own, so that a peak of memory
belongs to it alone. Training is the stage itself on votes of random tokens of one length. Its peak
is that of the process at the last step, before the normaliser loads the SFT policy; `stage_peak_mb`
is that of the whole stage. Prints one line of JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from rlhf_core.backbone.directory import load_saved_tokenizer
from rlhf_core.backbone.packing import pack
from rlhf_core.data.prepared import write_table
from rlhf_core.metrics import MemoryLogger
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.work import Work

WORDS = ("good", "bad", "warm", "cold", "room", "film", "very", "and", "the", "song", "was", "is")


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Watch(MemoryLogger):
    """Takes the CPU time of the steps, which others on the machine do not change, and the peak of
    memory at the last."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.peak = 0.0

    def progress(self, done: int, total: int, note: str = "") -> None:
        super().progress(done, total, note)
        self.times.append(time.process_time())
        if done == total:
            self.peak = peak_mb()


def votes(number: int, words: int, draws: torch.Generator) -> pd.DataFrame:
    """Votes on random words; every text has as many."""

    def text() -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=draws))

    rows = [
        {
            "id": str(n),
            "prompt": text(),
            "response_a": " " + text(),
            "response_b": " " + text(),
            "vote": "ab"[n % 2],
        }
        for n in range(number)
    ]
    rest = {"margin": 0.0, "annotator": "x", "shown_first": "", "gold": False, "time": ""}
    return pd.DataFrame(rows).assign(**rest, source="benchmark")


def train(arguments: argparse.Namespace) -> dict[str, float]:
    """Train `arguments.members` members on `arguments.folder`, and write them there."""
    folder, watch = arguments.folder, Watch()
    config = RewardModelConfig(
        learning_rate=1e-4,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.batch_size,
        max_length=arguments.words * 4,
        normalization_samples=4,
        lora_rank=arguments.lora_rank,
        lora_layers=arguments.lora_layers,
        members=arguments.members,
    )
    sampling = SamplingConfig(max_prompt_length=16, max_new_tokens=4, batch_size=4)
    work = Work(
        inputs={"sft": arguments.model, "data": folder / "data"},
        outputs={"reward": folder / f"reward-{arguments.members}"},
        sections={"sampling": sampling},
        logger=watch,
    )
    train_reward_model(config, work)
    # The first block of batches also warms the process up.
    seconds = (watch.times[-1] - watch.times[3]) / (len(watch.times) - 4)
    return {"seconds_a_step": seconds, "peak_mb": watch.peak, "stage_peak_mb": peak_mb()}


def score(arguments: argparse.Namespace) -> dict[str, float]:
    """Score texts with what was trained, as a roll-out does."""
    model, tokenizer = load_reward_model(arguments.folder / f"reward-{arguments.members}")
    draws = torch.Generator().manual_seed(1)
    size = (arguments.batch_size, 2 * arguments.words)
    batches = [
        pack(torch.randint(100, len(tokenizer) - 1, size, generator=draws).tolist(), "cpu")
        for _ in range(5)
    ]
    times = []
    with torch.no_grad():
        for packed in batches:
            start = time.process_time()
            model.scores(packed)
            times.append(time.process_time() - start)
    seconds = sorted(times[1:])[len(times[1:]) // 2]
    return {"seconds_a_batch": seconds, "peak_mb": peak_mb()}


def measured(what: str, members: int, given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The numbers of one case, from a process of its own."""
    command = [sys.executable, "-P", __file__, "--case", what, "--members", str(members)]
    for name in ("model", "batch_size", "words", "lora_rank", "lora_layers", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    command += ["--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """All cases, and the ratios."""
    result: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("members", "batch_size", "words", "steps", "lora_rank", "lora_layers")
    }
    result["model"] = given.model.name
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "data").mkdir()
        draws = torch.Generator().manual_seed(0)
        for split, number in (("train", given.steps * given.batch_size), ("eval", 4)):
            write_table(votes(number, given.words, draws), folder / "data", "preferences", split)
        load_saved_tokenizer(given.model)  # fails early
        for what in ("train", "score"):
            one, several = (measured(what, k, given, folder) for k in (1, given.members))
            result[what] = {
                name: {
                    "one": round(one[name], 3),
                    "members": round(several[name], 3),
                    "ratio": round(several[name] / one[name], 2),
                }
                for name in one
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a policy, from models.py")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8, help="votes in one step")
    parser.add_argument("--words", type=int, default=48, help="of a prompt, and of an answer")
    parser.add_argument("--steps", type=int, default=12, help="of training; a block is 4")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--lora-layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=("train", "score"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps({"train": train, "score": score}[arguments.case](arguments)))
    else:
        print(json.dumps(compare(arguments)))


if __name__ == "__main__":
    main()
