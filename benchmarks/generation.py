"""What does it save to read a prompt once for all its answers (GRPO, RLOO, best-of-n)?

    python benchmarks/generation.py --model .rlhf/bench/gpt2
    python benchmarks/generation.py --model .rlhf/bench/smol --prompts 2 --rounds 3

Samples the same answers with the same random numbers, each prompt read once, and read again for
each of its answers as before; the two take turns in one process. Prompts are uniform over the
vocabulary, and no token ends an answer. Prints one line of JSON: medians of CPU seconds and of
tokens of answers a CPU second, the median of the ratios of the pairs, and how much of the answers
is equal.

    git worktree add --detach ../before 2b60228
    python benchmarks/generation.py --model .rlhf/bench/gpt2 --before ../before

compares with the sampler of an older commit instead, in a process for each measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    import_module("flows.local.allocator").keep_memory()

import torch

TREE = Path(__file__).resolve().parents[1]
NEVER = 10**9  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="directory that models.py wrote")
    parser.add_argument("--before", type=Path, help="a working tree of an older commit")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens")
    parser.add_argument("--response-length", type=int, default=64, help="tokens")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.once:
        seconds, tokens = Sampled(arguments)(shares=True)
        print(json.dumps([seconds, tokens.tolist()]))
        return
    sampled = Sampled(arguments)
    sampled(shares=True)  # touches the memory
    pairs, equal = [], []
    for number in range(arguments.rounds):

        def old() -> tuple[float, torch.Tensor]:
            if arguments.before is None:
                return sampled(shares=False)
            return elsewhere(arguments.before)

        def new() -> tuple[float, torch.Tensor]:
            return sampled(shares=True) if arguments.before is None else elsewhere(TREE)

        first, second = (old, new) if number % 2 == 0 else (new, old)
        found = {first: first(), second: second()}
        pairs.append((found[old][0], found[new][0]))
        equal.append((found[old][1] == found[new][1]).float().mean().item())
        print(*(round(seconds, 2) for seconds in pairs[-1]), file=sys.stderr)
    count = arguments.prompts * arguments.answers * arguments.response_length
    seconds = {side: median(pair[i] for pair in pairs) for i, side in enumerate(("before", "now"))}
    ratios = sorted(round(before / now, 2) for before, now in pairs)
    line = {
        "model": arguments.model.name,
        "precision": arguments.precision,
        "rows": f"{arguments.prompts} x {arguments.answers}",
        "tokens": f"{arguments.prompt_length} + {arguments.response_length}",
        "cpu_seconds": {side: round(value, 3) for side, value in seconds.items()},
        "tokens_a_second": {side: round(count / value, 1) for side, value in seconds.items()},
        "ratio": median(ratios),
        "ratios": ratios,
        "equal tokens": min(equal),
    }
    print(json.dumps(line))


class Sampled:
    """Answers to the prompts, sampled again and again."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        networks = import_module("rlhf_core.backbone.networks")
        self.sampling = import_module("rlhf_core.backbone.sampling")
        batch = import_module("rlhf_core.types").PromptBatch
        self.policy, tokenizer = networks.Policy.load(arguments.model, "cpu", arguments.precision)
        self.pad = tokenizer.pad_token_id
        draws = torch.Generator().manual_seed(0)
        shape = (arguments.prompts, arguments.prompt_length)
        ids = torch.randint(32, len(tokenizer) - 32, shape, generator=draws)
        ids = ids.repeat_interleave(arguments.answers, dim=0)
        self.prompts = batch(ids, torch.ones_like(ids, dtype=torch.bool))
        self.draws = torch.rand(len(ids), arguments.response_length, generator=draws)

    def __call__(self, *, shares: bool) -> tuple[float, torch.Tensor]:
        """CPU seconds, and the tokens of the answers."""
        threshold = getattr(self.sampling, "SHARED", NEVER)
        self.sampling.SHARED = threshold if shares else NEVER
        begun = time.process_time()
        found = self.sampling.sample(
            self.policy,
            self.prompts,
            self.draws,
            temperature=1.0,
            eos_token_id=-1,
            pad_token_id=self.pad,
        )
        seconds = time.process_time() - begun
        self.sampling.SHARED = threshold
        return seconds, found.tokens


def elsewhere(tree: Path) -> tuple[float, torch.Tensor]:
    """The same, by the code of a working tree, in a process of its own."""
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *sys.argv[1:], "--once"]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(tree.resolve())},
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, tokens = json.loads(done.stdout.splitlines()[-1])
    return seconds, torch.tensor(tokens)


if __name__ == "__main__":
    main()
