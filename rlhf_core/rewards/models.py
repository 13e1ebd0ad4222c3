"""A reward model as those who score with it see it, wherever it comes from."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.backbone.directory import (
    load_saved_tokenizer,
    read_card,
    require_kind,
    weights_digest,
)
from rlhf_core.backbone.networks import ADAPTER, ScalarModel, load_as_adapter
from rlhf_core.backbone.packing import Packed, pack
from rlhf_core.data.encoding import Prompt, encode_answers
from rlhf_core.rewards.ensemble import Ensemble, has_members
from rlhf_core.settings.model import Precision
from rlhf_core.settings.rewards import MEAN, MemberSection


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
    directory: Path,
    device: str = "cpu",
    precision: Precision = "float32",
    *,
    members: MemberSection = MEAN,
) -> tuple[RewardModel, PreTrainedTokenizerBase]:
    """A saved reward model, or an ensemble of them, and its tokenizer, dropout off.

    Args:
        members: how the members of an ensemble become one reward.

    Raises: ModelError when the directory holds no reward model.
    """
    require_kind(directory, "reward")
    tokenizer = load_saved_tokenizer(directory)
    if not has_members(directory):
        return ScalarModel.load(directory, device, precision), tokenizer
    return Ensemble.load(directory, device, precision, how=members), tokenizer


def load_on_trunk(
    directory: Path,
    base: Path,
    trunk: PreTrainedModel,
    name: str,
    precision: Precision = "float32",
    *,
    members: MemberSection = MEAN,
) -> RewardModel | None:
    """A saved reward model as an adapter, or several, of a transformer that is already loaded.

    None when it was not trained on the model in `base`, whose weights `trunk` has.
    """
    if not has_members(directory):
        return load_as_adapter(directory, base, trunk, name, precision)
    if read_card(directory).get(ADAPTER) != weights_digest(base):
        return None
    return Ensemble.on_trunk(directory, trunk, name, precision, how=members)


def scores_and_spread(model: RewardModel, packed: Packed) -> tuple[Tensor, Tensor | None]:
    """(S,) the reward of each text, and (S,) the standard deviation of the members' rewards.

    The second is None for a model without members.
    """
    if isinstance(model, Ensemble):
        return model.scores_and_spread(packed)
    return model.scores(packed), None


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
