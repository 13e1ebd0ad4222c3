"""Floating-point operations that a row of the table needs, counted from its sizes.

Only products of matrices are counted, a multiplication and an addition as two, and only what the
result needs: causal attention (half of the square), the head on scored positions alone, no padding,
nothing twice. So a side that computes padding, or logits that nobody reads, has a smaller share of
the peak. With a text of n tokens, d wide, L blocks with W weights in the linear layers of each, A =
heads x size of a head, and V tokens in the vocabulary:

    blocks(n)  = 2·L·W·n + 2·L·A·n·(n + 1)
    head(m)    = 2·d·V·m                          of m scored positions

The second term of blocks: token i has i scores of 2·A, and a mix of i values of 2·A again, so 4·A
times 1 + ... + n. The backward pass of a trained model is twice the forward pass: the gradients of
weights and of inputs. An iteration of PPO, of samples with q prompt tokens and r of response, n =
q + r, in E epochs:

    generate   blocks(n) + head(r)                each token is computed once, thanks to the cache
    score      blocks(n) + head(r) + 2·blocks(n)  reference; critic and reward model
    update     3·E·(2·blocks(n) + head(r))        policy and critic

SFT: 3·(blocks(n) + head(m)) of a text with m labelled tokens. Reward model: 3·blocks(n) of each
text; chosen and rejected are two texts.

With LoRA in the last K of L blocks there are no gradients of their weights, and none at all below
the first adapter. So a forward and backward pass of these K blocks is, with n tokens again,

    frozen(n)   = K·(2·2·W·n + 3·2·A·n·(n + 1))

and adapters of rank R, which train, need 3·adapters(n), with adapters(n) = 2·R·(inputs + outputs)·n
of all their layers. What each side has to compute differs. Ours, whose critic and reward model are
adapters too, and whose states below the first adapter are computed once for a sample and kept:

    score      blocks(n) below, 3 times blocks(n) of K, head(r), 2·adapters(n)
    update     E·(2·frozen(n) + 2·head(r) + 2·3·adapters(n))

The peer trains adapters of the policy and all of the critic, and its reward model has no adapter:

    update     E·(blocks(n) below + frozen(n) + 2·head(r) + 3·adapters(n) + 3·blocks(n))

`tests/test_benchmarks.py` compares the formulas with what torch counts while it runs a model.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from work import pairs, sft_rows


@dataclass(frozen=True)
class Sizes:
    """What the formulas need to know of a transformer."""

    width: int
    blocks: int
    weights: int  # of the linear layers of one block
    attention: int  # heads x size of a head
    vocabulary: int
    ends: int  # inputs and outputs of the linear layers of one block, added up: for adapters

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Sizes":
        """From the config.json of a GPT-2 or of a Llama."""
        if config["model_type"] == "gpt2":
            d = config["n_embd"]
            inner = config.get("n_inner") or 4 * d
            shapes = [(d, 3 * d), (d, d), (d, inner), (inner, d)]
            return cls._from(d, config["n_layer"], shapes, d, config["vocab_size"])
        if config["model_type"] != "llama":
            raise SystemExit(f"no formula for a {config['model_type']}; add it to flops.py")
        d, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or d // heads
        keys = size * config["num_key_value_heads"]
        inner = config["intermediate_size"]
        shapes = [(d, heads * size), (d, keys), (d, keys), (heads * size, d)]
        shapes += [(d, inner), (d, inner), (inner, d)]
        blocks = config["num_hidden_layers"]
        return cls._from(d, blocks, shapes, heads * size, config["vocab_size"])

    @classmethod
    def _from(
        cls, width: int, blocks: int, shapes: list[tuple[int, int]], attention: int, vocabulary: int
    ) -> "Sizes":
        weights = sum(a * b for a, b in shapes)
        return cls(width, blocks, weights, attention, vocabulary, sum(map(sum, shapes)))

    def linear(self, n: int, blocks: int) -> int:
        """A forward pass of n tokens through the linear layers of so many blocks."""
        return blocks * 2 * self.weights * n

    def scores(self, n: int, blocks: int) -> int:
        """The causal attention of a text of n tokens in so many blocks."""
        return blocks * 2 * self.attention * n * (n + 1)

    def trunk(self, n: int, blocks: int | None = None) -> int:
        """A forward pass of a text of n tokens through the blocks, or through so many of them."""
        number = self.blocks if blocks is None else blocks
        return self.linear(n, number) + self.scores(n, number)

    def frozen(self, n: int, blocks: int) -> int:
        """Forward and backward pass through blocks whose weights get no gradient."""
        return 2 * self.linear(n, blocks) + 3 * self.scores(n, blocks)

    def head(self, m: int) -> int:
        """The logits of m positions."""
        return 2 * self.width * self.vocabulary * m

    def adapters(self, n: int, rank: int, blocks: int) -> int:
        """A forward pass through adapters of a rank in so many blocks."""
        return 2 * rank * self.ends * blocks * n


def of_ppo(sizes: Sizes, arguments: Namespace, side: Literal["ours", "peer"]) -> float:
    """Of one iteration."""
    r, epochs = arguments.response_length, arguments.epochs
    n = arguments.prompt_length + r
    trunk, head = sizes.trunk(n), sizes.head(r)
    generate, score = trunk + head, trunk + head + 2 * trunk
    if not arguments.lora_rank:
        update = 3 * epochs * (2 * trunk + head)
        return arguments.batch * (generate + score + update)
    adapted = arguments.lora_layers or sizes.blocks
    below, upper = sizes.trunk(n, sizes.blocks - adapted), sizes.trunk(n, adapted)
    adapter = sizes.adapters(n, arguments.lora_rank, adapted)
    through = sizes.frozen(n, adapted)
    if side == "ours":  # three networks on one trunk; what lies below the adapters is kept
        score = below + 3 * upper + head + 2 * adapter
        update = epochs * (2 * through + 2 * head + 2 * 3 * adapter)
    else:
        update = epochs * (below + through + 2 * head + 3 * adapter + 3 * trunk)
    return arguments.batch * (generate + adapter + score + update)


def of_sft(sizes: Sizes, texts: Sequence[tuple[int, int]]) -> float:
    """Of a step on texts of (tokens, labelled tokens)."""
    return sum(3 * (sizes.trunk(n) + sizes.head(m)) for n, m in texts)


def of_reward(sizes: Sizes, texts: Sequence[int]) -> float:
    """Of a step on texts of so many tokens."""
    return sum(3 * sizes.trunk(n) for n in texts)


def per_token(work: str, arguments: Namespace, side: Literal["ours", "peer"]) -> float:
    """Operations per token, as `tokens_per_second` counts tokens: of the mean row of the work."""
    config = json.loads((Path(arguments.model) / "config.json").read_text(encoding="utf-8"))
    sizes = Sizes.of(config)
    if work == "ppo":
        return of_ppo(sizes, arguments, side) / (arguments.batch * arguments.response_length)
    many, vocabulary = 2048, sizes.vocabulary
    if work == "sft":
        texts = [(len(p) + len(c), len(c)) for p, c in sft_rows(many, vocabulary, arguments.seed)]
        return of_sft(sizes, texts) / sum(n for n, _ in texts)
    rows = pairs(many, vocabulary, arguments.seed)
    lengths = [len(p) + len(c) for p, *completions in rows for c in completions]
    return of_reward(sizes, lengths) / sum(lengths)
