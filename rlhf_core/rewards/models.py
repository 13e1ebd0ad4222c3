"""A reward model as those who score with it see it, wherever it comes from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.backbone.directory import load_saved_tokenizer, require_kind
from rlhf_core.backbone.networks import Precision, ScalarModel
from rlhf_core.backbone.packing import Packed, pack
from rlhf_core.data.encoding import Prompt, encode_answers


class RewardModel(Protocol):
    """Scores packed texts; its members, if there are several, can be asked one by one."""

    @property
    def model(self) -> PreTrainedModel:
        """The transformer."""

    def scores(self, packed: Packed) -> Tensor:
        """(S,) the reward of each text."""

    def member_scores(self, packed: Packed) -> Tensor:
        """(K, S) the reward of each text by each member; K is 1 for a model alone."""

    def last_states(self, packed: Packed) -> Tensor:
        """(S, d) the hidden state at the last token of each text."""


def load_reward_model(
    directory: Path, device: str = "cpu", precision: Precision = "float32"
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """A saved reward model and its tokenizer, dropout off.

    Raises: ModelError when the directory holds no reward model.
    """
    require_kind(directory, "reward")
    return ScalarModel.load(directory, device, precision), load_saved_tokenizer(directory)


@torch.no_grad()
def score_texts(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 32,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """(K, N) the reward of each answer by each member, encoded as in training, on the CPU.

    Args:
        max_length: tokens of prompt and answer; longer texts are cut as in training.
        between: called before each batch.
    """
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        found = encode_answers(prompt, [answer], tokenizer, max_length)
        rows.append(found.prompt + found.responses[0] or [tokenizer.eos_token_id])
    scores = []
    for start in range(0, len(rows), batch_size):
        between()
        batch = rows[start : start + batch_size]
        scores.append(model.member_scores(pack(batch, model.model.device)).cpu())
    return torch.cat(scores, 1)
