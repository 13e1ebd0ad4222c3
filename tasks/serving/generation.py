"""Generates texts with a policy from any source. It knows nothing about training."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.context import require_context
from rlhf_core.backbone.directory import CARD, read_card
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import sample, uniforms
from rlhf_core.backbone.tokens import ending_ids
from rlhf_core.data.encoding import Prompt, decode_responses, encode_prompt, encode_prompts
from rlhf_core.errors import ModelError, UserError
from rlhf_core.metrics import SilentLogger, StageLogger, counted
from rlhf_core.settings.model import ModelConfig
from tasks.record.record import Record
from tasks.registry.refs import SHOWN
from tasks.settings import Settings

BATCH_ROWS = 64


def generate(
    model: str,
    prompts: Sequence[Prompt],
    *,
    settings: Settings,
    max_new_tokens: int,
    temperature: float,
    samples: int = 1,
    seed: int = 0,
    chat: bool = False,
    logger: StageLogger | None = None,
) -> list[list[str]]:
    """`samples` responses to each prompt, in the order of the prompts.

    `model` is `models:/name/version`, `models:/name@alias`, a local folder or a hub id. With
    `chat`, or if the policy was trained on messages, a text is sent as a user message. Temperature
    0 is greedy decoding. The same call gives the same texts.

    Raises:
        ModelError: there is no such model, it is not a policy, or its context is too short.
        UserError: a prompt has no tokens.
    """
    logger = logger or SilentLogger()
    logger.phase("loading the model")
    writer = load_writer(model, settings, chat=chat)
    lengths = writer.lengths(prompts)
    if 0 in lengths:
        raise UserError(
            f"prompt {lengths.index(0) + 1} is empty, and this model has no begin-of-sequence "
            "token; write at least one word"
        )
    longest = max(lengths, default=0)
    require_context(
        writer.policy.model, longest + max_new_tokens, "the longest prompt with --max-new-tokens"
    )
    return writer.write(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        samples=samples,
        generator=torch.Generator().manual_seed(seed),
        logger=logger,
    )


@dataclass(frozen=True)
class Writer:
    """A policy in memory that answers prompts."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    chat: bool  # a text is sent as a user message

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """The length of each prompt, in tokens."""
        return [len(encode_prompt(prompt, self.tokenizer)) for prompt in self._sent(prompts)]

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float,
        samples: int,
        generator: torch.Generator,
        logger: StageLogger,
    ) -> list[list[str]]:
        """`samples` responses to each prompt, in the order of the prompts."""
        rows = [prompt for prompt in self._sent(prompts) for _ in range(samples)]
        texts: list[str] = []
        for start in range(0, len(rows), BATCH_ROWS):
            logger.progress(start, len(rows))
            texts += _respond(
                self.policy,
                self.tokenizer,
                rows[start : start + BATCH_ROWS],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator,
                between=counted(logger, "writing", max_new_tokens),
            )
        return [texts[start : start + samples] for start in range(0, len(texts), samples)]

    def _sent(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        if not self.chat:
            return list(prompts)
        return [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]


def load_writer(model: str, settings: Settings, *, chat: bool = False) -> Writer:
    """The policy of a reference, a folder or a hub id, in memory.

    Raises: ModelError when there is no such model, or it is not a policy.
    """
    with tempfile.TemporaryDirectory() as scratch:
        policy, tokenizer, trained_on_chat = _load(model, Path(scratch) / "model", settings)
    return Writer(policy, tokenizer, chat or trained_on_chat)


def _load(
    name: str, scratch: Path, settings: Settings
) -> tuple[Policy, PreTrainedTokenizerBase, bool]:
    """Load the policy and its tokenizer, and whether it was trained on messages."""
    if not name.strip():
        raise ModelError("the name of the model is empty; pass a reference, a folder or a hub id")
    if "://" in name:
        raise ModelError(f"'{name[:SHOWN]}' is an address; pass a reference, a folder or a hub id")
    if name.startswith("models:/"):
        store = Record.open(settings).store
        source = str(store.fetch(store.resolve(name), scratch))
    else:
        source = name
    try:
        ours = (Path(source) / CARD).is_file()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(
            f"'{name[:SHOWN]}' is no model ({reason}); pass a reference, a folder or a hub id"
        ) from None
    card = read_card(Path(source)) if ours else {"kind": "policy"}
    if card["kind"] != "policy":
        raise ModelError(
            f"{name} is a {card['kind']} model, which generates no text; pass a policy"
        )
    model, tokenizer = load_base(ModelConfig(source=source), (), seed=0)
    return Policy(model.to(settings.device)), tokenizer, bool(card.get("chat"))


def _respond(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    between: Callable[[], None],
) -> list[str]:
    """One response to each prompt, in one batch."""
    longest = max(len(encode_prompt(prompt, tokenizer)) for prompt in prompts)
    responses = sample(
        policy,
        encode_prompts(tokenizer, prompts, longest).to(policy.model.device),
        uniforms(len(prompts), max_new_tokens, generator),
        temperature=temperature,
        eos_token_id=ending_ids(policy.model),
        pad_token_id=tokenizer.pad_token_id,
        between=between,
    )
    return decode_responses(responses.tokens, responses.mask, tokenizer)
