"""An ensemble of reward models: members on one trunk, each an adapter with a head of its own.

    mean:  r̄ = Σₖ rₖ / K                    min:  minₖ rₖ
    mean_minus_variance:  r̄ - λ·Σₖ (rₖ - r̄)² / K
    weight_average:  one model, whose weights are the mean of the members'

Every rₖ is normalised: on samples of the SFT policy each member has mean 0 and standard deviation
1. What lies below the adapters is computed once for all members.

On disk an ensemble is a plain reward model, the weight average, so that whatever reads a single
reward model reads this one too. Beside it lie the trunk, a plain model, and each member as peft
writes adapters, with its head:

    PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(DIRECTORY / "trunk", num_labels=1),
        DIRECTORY / "members" / "1",
    )

The weights of LoRA are averaged as they act, Σₖ Bₖ·Aₖ / K, and not A and B by themselves.

Papers: Coste et al. 2023, https://arxiv.org/abs/2310.02743; Ramé et al. 2024 (weight averages),
https://arxiv.org/abs/2401.12187.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core.backbone.adapters import average_adapters, load_adapter, save_adapter
from rlhf_core.backbone.directory import add_facts, read_card, require_kind, weights_digest
from rlhf_core.backbone.networks import ScalarModel, adapter_of
from rlhf_core.backbone.packing import Packed
from rlhf_core.backbone.responses import share
from rlhf_core.errors import ModelError
from rlhf_core.functional.rewards import combine
from rlhf_core.settings.model import Precision
from rlhf_core.settings.rewards import MEAN, MemberSection

TRUNK = "trunk"  # a folder in a model directory
MEMBERS = "members"  # another, and a fact of its card


class Ensemble:
    """Several reward models on one transformer; a `RewardModel`.

    Args:
        members: at least one, each with an adapter of its own.
        average: the model with their mean weights, on the same transformer; weight_average needs
            it.
        how: how the scores of the members become one.

    Raises: ValueError when the average is needed and missing.
    """

    def __init__(
        self,
        members: Sequence[ScalarModel],
        average: ScalarModel | None = None,
        *,
        how: MemberSection = MEAN,
    ) -> None:
        if how.combine_members == "weight_average" and average is None:
            raise ValueError("weight_average needs the model with the mean weights")
        self.members = list(members)
        self._average = average
        self._how = how

    @property
    def model(self) -> PreTrainedModel:
        """The transformer that the members share."""
        return self.members[0].model

    def scores(self, packed: Packed) -> Tensor:
        """(S,) the combined reward of each text."""
        return self.scores_and_spread(packed)[0]

    def member_scores(self, packed: Packed) -> Tensor:
        """(K, S) the normalised reward of each text by each member."""
        return self._scores(share(packed, self.members[0]))

    def scores_and_spread(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """(S,) the combined reward of each text, and (S,) how far the members are apart: the
        standard deviation of their scores."""
        packed = share(packed, self.members[0])
        scores = self._scores(packed)
        spread = scores.std(0, correction=0)
        if self._how.combine_members == "weight_average":
            assert self._average is not None
            return self._average.scores(packed), spread
        coef = self._how.member_variance_coef
        return combine(scores, how=self._how.combine_members, variance_coef=coef), spread

    def last_states(self, packed: Packed) -> Tensor:
        """(S, d) the hidden state at the last token of each text, mean over the members."""
        packed = share(packed, self.members[0])
        return torch.stack([member.last_states(packed) for member in self.members]).mean(0)

    def _scores(self, packed: Packed) -> Tensor:
        return torch.stack([member.scores(packed) for member in self.members])

    @classmethod
    def load(
        cls,
        directory: Path,
        device: str = "cpu",
        precision: Precision = "float32",
        *,
        how: MemberSection = MEAN,
    ) -> Self:
        """A saved ensemble on a transformer of its own, dropout off.

        Raises: ModelError when the directory holds no ensemble, or a damaged one.
        """
        if not (directory / TRUNK).is_dir():
            raise ModelError(
                f"{directory} is damaged: the folder {TRUNK} of its members is missing; fetch or "
                "train the model again"
            )
        trunk = ScalarModel.on_body_of(str(directory / TRUNK)).to(device).model
        return cls.on_trunk(directory, trunk, "reward", precision, how=how)

    @classmethod
    def on_trunk(
        cls,
        directory: Path,
        trunk: PreTrainedModel,
        name: str,
        precision: Precision = "float32",
        *,
        how: MemberSection = MEAN,
    ) -> Self:
        """A saved ensemble as adapters `name-1` ... on a transformer with its trunk's weights.

        Raises: ModelError when the directory holds no ensemble, or a damaged one.
        """
        members = []
        for number, (mean, std) in enumerate(_scales(directory), start=1):
            adapter, folder = f"{name}-{number}", directory / MEMBERS / str(number)
            weight = load_adapter(trunk, adapter, folder)
            if weight is None or weight.ndim != 2 or len(weight) != 1:
                raise ModelError(
                    f"the member in {folder} has no head; fetch or train the model again"
                )
            head = nn.Linear(weight.shape[1], 1, bias=False, device="meta")
            head.weight = nn.Parameter(weight.to(trunk.device))
            members.append(
                ScalarModel(
                    trunk,
                    head,
                    mean=mean,
                    std=std,
                    adapter=adapter,
                    precision=precision,
                )
            )
        average = None
        if how.combine_members == "weight_average":
            average = adapter_of(directory, trunk, f"{name}-average", precision)
        return cls(members, average, how=how)

    def save(
        self,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        *,
        average: ScalarModel,
        base: Path,
    ) -> None:
        """Write the ensemble as a model directory.

        Args:
            average: see `average_of`, with its normaliser.
            base: the policy whose weights the trunk has.
        """
        average.save(tokenizer, directory, kind="reward", base=base)
        nothing = nn.Linear(average.head.in_features, 1, bias=False, device=self.model.device)
        nn.init.zeros_(nothing.weight)
        ScalarModel(self.model, nothing).save(tokenizer, directory / TRUNK, kind="trunk")
        digest = weights_digest(base)
        for number, member in enumerate(self.members, start=1):
            assert member.adapter is not None
            folder = directory / MEMBERS / str(number)
            save_adapter(self.model, member.adapter, folder, digest, member.head)
        facts = [{"reward_mean": m.mean, "reward_std": m.std} for m in self.members]
        add_facts(directory, {MEMBERS: facts})


def average_of(members: Sequence[ScalarModel], name: str) -> ScalarModel:
    """The model whose weights are the mean of the members': an adapter `name` on their transformer.

    Its head and its normaliser come from `average_head`, once the members are normalised.
    """
    adapters = [member.adapter for member in members if member.adapter is not None]
    average_adapters(members[0].model, adapters, name)
    average = members[0].with_own_head()
    average.adapter, average.mean, average.std = name, 0.0, 1.0
    return average


def average_head(average: ScalarModel, members: Sequence[ScalarModel]) -> None:
    """Give the weight average the mean head of the members, in their normalised units.

    h = s̄·Σₖ hₖ / (K·sₖ), where sₖ is a member's standard deviation and s̄ their mean, so that values
    of the average are logits as theirs are.
    """
    scale = sum(member.std for member in members) / len(members)
    with torch.no_grad():
        units = torch.stack([member.head.weight / member.std for member in members])
        average.head.weight.copy_(scale * units.mean(0))


def has_members(directory: Path) -> bool:
    """Whether a reward model's directory holds several."""
    return MEMBERS in read_card(directory)


def _scales(directory: Path) -> list[tuple[float, float]]:
    """The mean and the standard deviation of each member.

    Raises: ModelError when the card does not have them.
    """
    found: Any = require_kind(directory, "reward").get(MEMBERS)
    try:
        scales = [(float(m["reward_mean"]), float(m["reward_std"])) for m in found]
    except (TypeError, KeyError, ValueError):
        scales = []
    if not scales or not all(math.isfinite(mean) and 0 < std < math.inf for mean, std in scales):
        raise ModelError(
            f"{directory} is damaged: its card does not have the mean and the spread of each "
            "member; fetch or train the model again"
        )
    return scales
