"""What the last layer of a reward model sees of a pair: the difference of two hidden states."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.packing import pack
from rlhf_core.data.encoding import Prompt, encode_answers
from rlhf_core.data.prepared import canonical_prompt
from rlhf_core.rewards.models import RewardModel


@torch.no_grad()
def pair_features(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str, str]],
    *,
    max_length: int,
    batch_size: int = 32,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """(N, d) h(a) - h(b) for each pair of a prompt and two answers, on the CPU.

    h is the hidden state that the model's head reads, at the last token. An answer that is in
    several pairs is read once.

    Args:
        max_length: tokens of prompt and answer; longer texts are cut as in training.
        between: called before each batch.
    """
    place: dict[tuple[str, str], int] = {}
    texts: list[tuple[Prompt, str]] = []
    for prompt, a, b in pairs:
        for answer in (a, b):
            if place.setdefault((canonical_prompt(prompt), answer), len(texts)) == len(texts):
                texts.append((prompt, answer))
    states = []
    for start in range(0, len(texts), batch_size):
        between()
        rows = []
        for prompt, answer in texts[start : start + batch_size]:
            found = encode_answers(prompt, [answer], tokenizer, max_length)
            rows.append(found.prompt + found.responses[0] or [tokenizer.eos_token_id])
        states.append(model.last_states(pack(rows, model.model.device)).float().cpu())
    if not states:
        raise ValueError("pair_features needs at least one pair.")
    state = torch.cat(states)
    left = [place[canonical_prompt(prompt), a] for prompt, a, _ in pairs]
    right = [place[canonical_prompt(prompt), b] for prompt, _, b in pairs]
    return state[left] - state[right]
