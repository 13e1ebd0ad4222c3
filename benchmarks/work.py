"""The work that both sides of a benchmark do: its settings, and token ids drawn from a seed.

Standard library only, so that it runs in this project's environment and in the peer's. Nothing
depends on what the tokens say, so they are uniform over the vocabulary, but for both its ends:
there models keep tokens with a meaning of their own (end of text, padding, roles).
"""

import random
from argparse import ArgumentParser
from pathlib import Path
from typing import Literal

Work = Literal["ppo", "sft", "reward"]
Tokens = list[int]

SPECIAL = 32  # ids at each end of the vocabulary that are left out
PROMPT = (16, 48)  # tokens, shortest and longest, where lengths vary
COMPLETION = (16, 112)


def add_arguments(parser: ArgumentParser, work: Work) -> None:
    """The settings of one kind of work; the defaults are those of the table in README.md."""
    add, ppo = parser.add_argument, work == "ppo"
    add("--model", type=Path, required=True, help="directory that models.py wrote")
    if ppo:
        add("--reward", type=Path, required=True, help="its neighbour NAME-reward")
    rows = {"ppo": "samples an iteration", "sft": "rows a step", "reward": "pairs a step"}[work]
    add("--batch", type=int, default=16 if ppo else 8, help=rows)
    if ppo:
        add("--prompt-length", type=int, default=32, help="tokens of every prompt")
        add("--response-length", type=int, default=32, help="tokens of every response")
        add("--epochs", type=int, default=4, help="passes over the samples of an iteration")
        add("--minibatches", type=int, default=1, help="optimizer steps an epoch")
    else:
        add("--max-length", type=int, default=256, help="longest text, or tokens of a packed block")
    if work == "sft":
        add("--packing", action="store_true", help="rows are blocks filled with several texts")
    add("--micro-batch", type=int, help="rows a backward pass; default: all of an optimizer step")
    add("--iterations", type=int, default=5, help="how many are measured")
    add("--warmup", type=int, default=1, help="unmeasured iterations before")
    add("--threads", type=int, default=2)
    add(
        "--dtype",
        choices=("float32", "bfloat16", "autocast"),
        default="float32",
        help="bfloat16: ours has float32 masters, and the peer loads its models in it; autocast: "
        "the peer keeps float32 weights and computes under autocast",
    )
    add("--turns", action="store_true", help="wait for a line before each iteration, and print it")
    peer = parser.add_argument_group("settings of the peer, which ours does not read")
    peer.add_argument("--attention", choices=("sdpa", "eager"), help="default: its own choice")
    if ppo:
        peer.add_argument("--frozen", choices=("float32", "bfloat16"), help="reference and reward")
        peer.add_argument("--no-cache", action="store_true", help="no cache of keys in training")
    if work == "sft":
        peer.add_argument("--grouped", action="store_true", help="batches of about one length")
        peer.add_argument("--padding-free", action="store_true", help="the rows of a step in one")
    peer.add_argument(
        "--products",
        choices=("highest", "medium"),
        default="highest",
        help="of torch.set_float32_matmul_precision: medium may round to bfloat16",
    )
    add("--lora-rank", type=int, default=0, help="adapters of that rank instead of all weights")
    add(
        "--lora-layers",
        type=int,
        default=0,
        help="adapters in this many of the last blocks; 0 = all",
    )
    add("--seed", type=int, default=0)


def prompts(n: int, length: int, vocab: int, seed: int) -> list[Tokens]:
    """n prompts of one length."""
    rng = random.Random(seed)
    return [_tokens(rng, length, vocab) for _ in range(n)]


def sft_rows(n: int, vocab: int, seed: int) -> list[tuple[Tokens, Tokens]]:
    """n prompts with their completions; lengths uniform over PROMPT and COMPLETION."""
    rng = random.Random(seed)
    return [
        (_tokens(rng, rng.randint(*PROMPT), vocab), _tokens(rng, rng.randint(*COMPLETION), vocab))
        for _ in range(n)
    ]


def pairs(n: int, vocab: int, seed: int) -> list[tuple[Tokens, Tokens, Tokens]]:
    """n prompts, each with its chosen and its rejected completion; lengths as in `sft_rows`."""
    rng = random.Random(seed)
    return [
        (
            _tokens(rng, rng.randint(*PROMPT), vocab),
            _tokens(rng, rng.randint(*COMPLETION), vocab),
            _tokens(rng, rng.randint(*COMPLETION), vocab),
        )
        for _ in range(n)
    ]


def _tokens(rng: random.Random, length: int, vocab: int) -> Tokens:
    return rng.choices(range(SPECIAL, vocab - SPECIAL), k=length)
