"""Report card: what a reward model is worth, before a policy learns from it.

It is asked about held-out votes (accuracy beside simple rules and beside the agreement of the
annotators, calibration, slices), about samples of the SFT policy (does reward follow length?), and
about known-bad answers. Nothing is trained. Each number has an interval over prompts, or it is said
that nobody can tell: with few prompts that is the truth.
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.backbone.context import SAMPLING_LENGTH, context_of, require_context
from rlhf_core.backbone.directory import read_card
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.packing import pack_pairs
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import Prompt, decode_responses, encode_prompt
from rlhf_core.data.mapped.rows import PreparedRows
from rlhf_core.data.pairs import encode_pairs
from rlhf_core.data.prepared import canonical_prompt, read_table
from rlhf_core.evaluation.card import page as card_page
from rlhf_core.evaluation.card.held_out import HeldOutVotes, pair_numbers
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.intervals import Estimate, rank_correlation
from rlhf_core.evaluation.leaks import find_leaks
from rlhf_core.metrics import counted
from rlhf_core.rewards.canaries import CanaryResult, end_marks, make_canaries, measure_canaries
from rlhf_core.rewards.models import RewardModel, load_reward_model, score_texts
from rlhf_core.seeding import generator
from rlhf_core.settings.evaluation import ReportCardConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.types import Report
from rlhf_core.work import Work

_STEPS = 4  # of the progress bar
_PLOTTED = 30  # slices in the plot


@dataclass(frozen=True, kw_only=True)
class ReportCardReport(Report):
    """The report card, with its tables, plots and page."""

    card: ReportCard

    @property
    def result(self) -> ReportCard:
        """The card, which the gate before the policy reads."""
        return self.card

    @property
    def page(self) -> str:
        """The card for people."""
        return card_page.page(self.card)

    def summary(self) -> dict[str, float]:
        """The key numbers of the card; those that are unknown are left out."""
        return self.card.numbers()


@dataclass(frozen=True)
class _Examinee:
    """The reward model, and how it is asked."""

    model: RewardModel
    tokenizer: PreTrainedTokenizerBase
    config: ReportCardConfig
    longest: int
    work: Work

    def ask(self, what: str, prompts: list[Prompt], answers: list[str]) -> Tensor:
        """(N,) the reward of each answer, of an ensemble the mean of its members."""
        size = self.config.batch_size
        return score_texts(
            self.model,
            self.tokenizer,
            prompts,
            answers,
            max_length=self.longest,
            batch_size=size,
            between=counted(self.work.logger, what, -(-len(answers) // size)),
        ).mean(0)

    def ask_pairs(self, table: pd.DataFrame) -> tuple[pd.DataFrame, Tensor, Tensor]:
        """The rows whose answers differ after the cut, (K, M) the reward of the first answer of
        each less that of the second, and (M,) the tokens of the first less those of the second."""
        pairs, kept, _ = encode_pairs(
            table.assign(vote="a"), self.tokenizer, self.longest, "report_card.max_length"
        )
        size, device = self.config.batch_size, self.model.model.device
        between = counted(self.work.logger, "held-out pairs", -(-len(pairs) // size))
        scores = []
        for start in range(0, len(pairs), size):
            between()
            packed = pack_pairs(pairs[start : start + size], device)
            scores.append(self.model.member_scores(packed).cpu())
        first, second = torch.cat(scores, 1).unflatten(1, (-1, 2)).unbind(2)
        longer = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
        return kept, first - second, torch.tensor(longer)


@torch.no_grad()
def write_report_card(config: ReportCardConfig, work: Work) -> ReportCardReport:
    """Examine a reward model on held-out votes, samples of the SFT policy and canaries.

    Args:
        work: inputs reward, sft and data; section sampling.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix.
    """
    logger, data = work.logger, work.inputs["data"]
    logger.progress(0, _STEPS, "held-out votes")
    logger.phase("loading the reward model")
    model, tokenizer = load_reward_model(work.inputs["reward"], work.device, config.precision)
    context = context_of(model.model) or sys.maxsize
    longest = min(config.max_length or context, context)
    exam = _Examinee(model, tokenizer, config, longest, work)
    table = read_table(data, "preferences", "eval")
    drawn = _draw(table, config.votes, work.seed)
    votes = _vote_scores(exam, drawn)
    logger.progress(1, _STEPS, "texts seen in training")
    logger.phase("comparing with the texts of training")
    trained_on = PreparedRows(data, "preferences", "train")
    leaks, seen = find_leaks(trained_on, votes.table, config.votes)
    logger.progress(2, _STEPS, "samples of the SFT policy")
    samples = _sample(exam, list(read_table(data, "prompts", "eval")["prompt"]))
    logger.progress(3, _STEPS, "canaries")
    canaries, against = _canaries(exam, votes, samples)
    calibration = votes.calibration()
    error, noise, confidence, bins = calibration or (None, None, None, ())
    slices, small = votes.slices(config.min_slice_prompts)
    card = ReportCard(
        votes=int(votes.decided.sum()),
        ties=int((~votes.decided).sum()),
        prompts=len(votes.prompt[votes.decided].unique()),
        same_after_cut=len(drawn) - len(votes.table),
        not_sampled=len(table) - len(drawn),
        min_slice_prompts=config.min_slice_prompts,
        accuracy=votes.accuracy(),
        longer=votes.longer_rule(),
        first_shown=votes.first_rule(),
        log_loss=votes.log_loss(),
        calibration_error=error,
        calibration_noise=noise,
        confidence=confidence,
        bins=bins,
        agreement=votes.agreement(),
        shorter_won=votes.where_won(longer=False),
        longer_won=votes.where_won(longer=True),
        slices=slices,
        small_slices=small,
        length_correlation=samples.correlation(work.seed),
        samples=len(samples.texts),
        leaks=leaks,
        elsewhere=votes.accuracy(~seen) if leaks.votes else None,
        canaries=tuple(canaries),
        canaries_against=against,
        members=votes.members(),
    )
    logger.progress(_STEPS, _STEPS, "report card")
    return _report(card)


def _draw(table: pd.DataFrame, most: int, seed: int) -> pd.DataFrame:
    """All votes, or those of as many randomly drawn prompts as have at most `most` votes.

    The first prompt is always kept, so that something is left.
    """
    if len(table) <= most:
        return table
    prompts = table["prompt"].map(canonical_prompt)
    sizes = prompts.value_counts(sort=False)
    order = torch.randperm(len(sizes), generator=generator(seed, "report_card/votes")).tolist()
    votes = sizes.iloc[order].cumsum()
    kept = set(votes.index[(votes <= most).to_numpy() | (np.arange(len(votes)) == 0)])
    return table[prompts.isin(kept)]


def _vote_scores(exam: _Examinee, table: pd.DataFrame) -> HeldOutVotes:
    """The votes whose answers differ after the cut, with their scores; each pair is asked once."""
    if table.empty:
        nothing = torch.zeros(0)
        return HeldOutVotes(table, nothing[None], nothing, 1.0, exam.work.seed)
    pair, flipped = pair_numbers(table)
    asked = table.assign(pair=pair.numpy(), flipped=flipped.numpy()).drop_duplicates("pair")
    kept, gaps, longer = exam.ask_pairs(asked)
    # A pair is asked in the order of its first vote.
    place = {int(number): at for at, number in enumerate(kept["pair"])}
    found = torch.tensor([place.get(number, -1) for number in pair.tolist()])
    first_flipped = torch.tensor(kept["flipped"].to_numpy(dtype=bool))
    known = found >= 0
    at = found[known]
    sign = torch.where(flipped[known] == first_flipped[at], 1.0, -1.0)
    return HeldOutVotes(
        table[known.numpy()],
        gaps[:, at] * sign,
        longer[at] * sign,
        _logits_in_a_unit(exam.work.inputs["reward"]),
        exam.work.seed,
    )


def _logits_in_a_unit(reward_model: Path) -> float:
    """The standard deviation that the reward was divided by; of an ensemble its members' mean."""
    card = read_card(reward_model)
    scales = [float(one["reward_std"]) for one in card.get("members", [card])]
    return sum(scales) / len(scales)


@dataclass(frozen=True)
class _Samples:
    """Answers of the SFT policy."""

    prompts: list[Prompt]  # of each answer
    texts: list[str]
    tokens: Tensor  # (N,) length
    reward: Tensor  # (N,)
    prompt: Tensor  # (N,) number of the prompt

    def correlation(self, seed: int) -> Estimate | None:
        """How reward and length go together; None if one of the two does not vary."""
        return rank_correlation(
            self.reward.double().numpy(),
            self.tokens.double().numpy(),
            self.prompt.numpy(),
            generator(seed, "report_card/length"),
        )


def _sample(exam: _Examinee, prompts: list[Prompt]) -> _Samples:
    """Answers of the SFT policy to held-out prompts; each is used once before any repeats."""
    work, config = exam.work, exam.config
    sampling = work.section(SamplingConfig)
    work.logger.phase("loading the SFT policy")
    policy, tokenizer = Policy.load(work.inputs["sft"], work.device, config.precision)
    require_context(policy.model, sampling.max_length, SAMPLING_LENGTH)
    order = torch.randperm(len(prompts), generator=generator(work.seed, "report_card/prompts"))
    numbers = list(islice(cycle(order.tolist()), config.samples)) if prompts else []
    asked = [prompts[i] for i in numbers]
    rows = [encode_prompt(prompt, tokenizer, sampling.max_prompt_length) for prompt in asked]
    texts: list[str] = []
    tokens: list[Tensor] = []
    draws, between = generator(work.seed, "report_card/samples"), partial(counted, work.logger)
    for _, answers in respond(
        policy, rows, sampling, generator=draws, between=between, what="samples"
    ):
        texts += decode_responses(answers.tokens, answers.mask, tokenizer)
        tokens.append(answers.mask.sum(-1).cpu())
    reward = exam.ask("scoring the samples", asked, texts) if texts else torch.zeros(0)
    lengths = torch.cat(tokens) if tokens else torch.zeros(0)
    return _Samples(asked, texts, lengths, reward, torch.tensor(numbers).long())


def _canaries(
    exam: _Examinee, votes: HeldOutVotes, samples: _Samples
) -> tuple[list[CanaryResult], str]:
    """How often each canary beats a real answer, and what the real answers are."""
    winners = votes.winners()
    prompts, answers = list(winners["prompt"]), list(winners["chosen"])
    against = "chosen answer of a held-out vote"
    if not answers:
        one_each = {number: i for i, number in reversed(list(enumerate(samples.prompt.tolist())))}
        prompts = [samples.prompts[i] for i in one_each.values()]
        answers = [samples.texts[i] for i in one_each.values()]
        against = "sample of the SFT policy"
    seed, most = exam.work.seed, exam.config.canary_prompts
    order = torch.randperm(len(answers), generator=generator(seed, "report_card/canaries"))
    picked = order[:most].tolist()
    real = [prompts[i] for i in picked], [answers[i] for i in picked]
    if not picked:
        return [], against
    canaries = make_canaries(*real, seed=seed, ends=end_marks(exam.tokenizer))
    score = partial(exam.ask, "canaries")
    return measure_canaries(canaries, *real, score, seed=seed), against


def _report(card: ReportCard) -> ReportCardReport:
    plots = {}
    if card.bins:
        plots["report_card_reliability"] = figures.reliability(
            [(dot.predicted, dot.observed, dot.votes) for dot in card.bins]
        )
    if card.slices and card.accuracy is not None:
        worst = sorted(card.slices, key=lambda part: part.accuracy.share.value)[:_PLOTTED]
        plots["report_card_slices"] = figures.forest(
            [(f"{part.column} = {part.value}", part.accuracy.share, part.worse) for part in worst],
            card.accuracy.share,
        )
    if card.canaries:
        plots["report_card_canaries"] = figures.canaries(
            {canary.kind: canary.beats_real for canary in card.canaries}
        )
    return ReportCardReport(
        card=card,
        tables={
            "report_card_slices": card_page.slices_table(card),
            "report_card_canaries": card_page.canaries_table(card),
        },
        figures=plots,
    )
