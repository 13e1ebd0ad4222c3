"""Reward model: a score for each text, learnt from votes on which of two texts is better.

    P(chosen ≻ rejected) = σ(r(chosen) - r(rejected) - margin)          (Bradley-Terry)

With `annotators: aware` the votes are those of people with habits, learnt beside the rewards:
`rlhf_core.functional.annotators`.

It is the SFT model with a scalar head at the last token, trained for one epoch by default, since
more overfits. The reward is then shifted and scaled so that samples of the SFT policy have mean 0
and standard deviation 1; the constants are saved with the model.

Deliberate deviations from the literature:
1. A tie is a pair with label smoothing 0.5: it pulls the two rewards together.
2. The accuracy is reported with that of the rule "prefer the longer": a model that does not beat it
   may have learnt only length.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.backbone.context import SAMPLING_LENGTH, require_context
from rlhf_core.backbone.directory import add_facts, load_saved_tokenizer, read_card
from rlhf_core.backbone.networks import Network, Policy, ScalarModel
from rlhf_core.backbone.packing import Packed, pack_pairs
from rlhf_core.backbone.responses import lay_out
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import Prompt
from rlhf_core.data.mapped.rows import PreparedRows
from rlhf_core.data.mapped.training import Place, StoredPairs, distinct_prompts, pairs_of
from rlhf_core.data.pairs import Pair, half_for_ties, in_half, require_decided, smoothing
from rlhf_core.functional import ranking
from rlhf_core.functional.losses import bradley_terry, pointwise_mse
from rlhf_core.metrics import StageLogger, counted
from rlhf_core.rewards.ensemble import Ensemble, average_head, average_of
from rlhf_core.rewards.models import RewardModel
from rlhf_core.seeding import generator
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.training.annotators import (
    ANONYMOUS,
    Annotators,
    VoteFacts,
    average_habits,
    habits_table,
)
from rlhf_core.training.epochs import optimizer_steps
from rlhf_core.training.learner import Learner, adapt, require_finite
from rlhf_core.training.members import MemberBatches, MemberStep, PairStates, bootstrap
from rlhf_core.training.order import Batches
from rlhf_core.training.ranks import Micro, Ranks
from rlhf_core.training.recovery import run_identity
from rlhf_core.training.session import Stateful
from rlhf_core.types import Report
from rlhf_core.work import Work

_COMPARED = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "held_out_loss",
    "calibration_error",
    "reward_mean",
    "reward_std",
)  # of members, in a table
_LEAST_SPREAD = 0.01  # of the samples' scores, as a share of the usual gap between answers

_HALF = 0.5  # of the mean reliability
_SHOWN = 200  # held-out votes in the table
_NAMED = 10  # annotators in a line of the log

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RewardModelReport(Report):
    """How well the reward model predicts held-out votes; accuracies exclude ties."""

    accuracy: float
    accuracy_low: float  # 95 % bounds, bootstrapped over prompts
    accuracy_high: float
    longer_accuracy: float  # of the rule "prefer the longer response"
    held_out_loss: float  # Bradley-Terry, nats a pair
    calibration_error: float
    reward_mean: float  # of SFT samples before normalisation, in logits
    reward_std: float
    train_pairs: int
    held_out_pairs: int
    held_out_votes: int  # with a winner; the accuracies are measured on these
    held_out_prompts: int  # of these votes; the bootstrap draws these
    truncated: int  # pairs with a text cut to max_length
    same_after_cut: int  # votes left out, since both texts are the same tokens then


@dataclass(frozen=True, kw_only=True)
class EnsembleReport(RewardModelReport):
    """The same of the mean of the members, in logits by the mean of their standard deviations."""

    members: int
    spread: float  # standard deviation of the members' normalised rewards, mean over held-out texts
    member_accuracy: float  # mean over the members
    weight_average_accuracy: float


@dataclass(frozen=True, kw_only=True)
class AwareReport(RewardModelReport):
    """The same of rewards beside which the annotators were learnt. Their table is in `tables`."""

    annotators: int  # with votes to train on, without gold
    doubtful_annotators: int  # below half the mean reliability, with 97.5 % probability
    gold_votes: int  # known answers to train on
    unknown_sides: float  # share of the votes, without gold
    side_bias: float  # mean of b over these votes, logits
    length_bias: float  # mean of c over these votes, logits a unit; 0 without gold
    tie_rate: float  # of answers of equal worth, ν / (2 + ν)
    vote_accuracy: float  # of the model of the annotators on the votes of `accuracy`


@dataclass(frozen=True, kw_only=True)
class AwareEnsembleReport(EnsembleReport, AwareReport):
    """The same of members, each of which learnt the annotators beside its rewards."""


class _Votes(NamedTuple):
    """The votes to learn from and those held out, encoded."""

    train: StoredPairs
    held_out: StoredPairs

    @property
    def same(self) -> int:
        return self.train.same + self.held_out.same


def train_reward_model(config: RewardModelConfig, work: Work) -> RewardModelReport:
    """Train a reward model on the prepared preferences, normalise it, and write it.

    With a recovery, a run that was killed resumes bit for bit.

    Args:
        work: inputs sft and data; output reward; section sampling, for the normaliser's samples.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix; NumericsError when a
    loss or gradient is not finite; CheckpointError when the checkpoints are from another run.
    """
    sft, seed, ranks = work.inputs["sft"], work.seed, work.ranks
    sampling, logger = work.section(SamplingConfig), work.logger
    logger.phase("loading the model")
    reward_model = ScalarModel.from_policy(sft, generator(seed, "reward/head")).to(work.device)
    reward_model.precision = config.precision
    require_context(reward_model.model, config.max_length, "reward_model.max_length")
    require_context(reward_model.model, sampling.max_length, SAMPLING_LENGTH)
    tokenizer = load_saved_tokenizer(sft)
    logger.phase("encoding the preferences")
    votes = _encode(config, work, tokenizer)
    if config.members > 1:
        return _train_ensemble(config, work, reward_model, tokenizer, votes)

    adapt(reward_model, config, "reward", seed=seed, stream="reward/adapter")
    train, held_out = votes
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    learner = Learner(reward_model, config, steps, ranks=ranks)
    batches = Batches(len(train), config.batch_size, config.epochs, generator(seed, "reward/order"))
    people = _annotators(config, votes, ranks)
    annotators = people[0] if people else None
    with work.recovery.open(
        logger,
        identity=_identity(config, work),
        learners={"reward_model": learner},
        positions={"batches": batches} | ({"annotators": annotators} if annotators else {}),
        ranks=ranks,
    ) as session:
        session.resume()

        def add(picked: list[int], check: Callable[[], None]) -> dict[str, float]:
            pairs = [train[i] for i in picked]
            if annotators is None:
                return accumulate(learner, pairs, config, ranks, check)
            return _accumulate_aware(learner, annotators, picked, pairs, config, ranks, check)

        for _ in optimizer_steps(session, learner, batches, add, config, ranks, total=steps):
            pass

    prompts = _train_prompts(config, work)
    kept = _kept(config, work)
    samples = _sft_scores(reward_model, sft, prompts, config, sampling, seed, logger, kept)
    chosen, rejected = _scores(reward_model, held_out, config, ranks, logger).squeeze(0)
    require_finite("the reward-model score", torch.cat([samples.cpu(), chosen, rejected]))
    mean, std = samples.mean().item(), scale_of(samples, chosen - rejected)
    reward_model.mean, reward_model.std = mean, std
    logger.phase("saving the model")
    with ranks.whole(reward_model):
        if ranks.main:
            reward_model.save(tokenizer, work.outputs["reward"], kind="reward", base=sft)
            add_facts(work.outputs["reward"], {"chat": read_card(sft).get("chat", False)})
    report = _report(votes, chosen, rejected, mean, std, seed)
    if annotators is None:
        return report
    return _aware_report(report, people, config, votes, (chosen - rejected).unsqueeze(0))


def _annotators(
    config: RewardModelConfig,
    votes: _Votes,
    ranks: Ranks,
    bootstraps: Sequence[Sequence[int] | None] = (None,),
) -> list[Annotators]:
    """What is to be learnt of the annotators, by each member; nothing when their votes are pooled.

    Args:
        bootstraps: of each member, how often each vote counts; None is once.
    """
    if config.annotators == "pooled":
        return []
    facts = VoteFacts.of(votes.train.votes(), config.gold_annotator)
    if len(facts.names) < 3:
        who = "have no annotator" if facts.names[1:] == (ANONYMOUS,) else "are of one annotator"
        _log.warning(
            "reward_model.annotators is aware, but all votes %s, so nobody can be told to be more "
            "reliable than others; prepare data with the column annotator",
            who,
        )
    return [Annotators(facts, ranks, times) for times in bootstraps]


def _train_prompts(config: RewardModelConfig, work: Work) -> Iterator[Prompt]:
    rows = PreparedRows(work.inputs["data"], "preferences", "train")
    return (row["prompt"] for row in rows if in_half(row["prompt"], config.votes))


def _encode(config: RewardModelConfig, work: Work, tokenizer: PreTrainedTokenizerBase) -> _Votes:
    place = Place(work.inputs["data"], tokenizer, work.recovery.tokens, work.logger)
    limit = (config.max_length, "reward_model.max_length")
    return _Votes(
        pairs_of(place, "train", *limit, which=config.votes), pairs_of(place, "eval", *limit)
    )


def _kept(config: RewardModelConfig, work: Work) -> Path | None:
    """Where the tokens of the normaliser's prompts are kept."""
    if work.recovery.tokens is None:
        return None
    key = hashlib.sha256(repr(_identity(config, work)).encode()).hexdigest()
    return work.recovery.tokens / f"normaliser-{key[:16]}"


def _identity(config: RewardModelConfig, work: Work) -> dict[str, str]:
    return run_identity(
        "reward_model",
        work.seed,
        {"reward_model": config, "sampling": work.section(SamplingConfig)},
        {name: work.inputs[name] for name in ("sft", "data")},
    )


def _accumulate_aware(
    learner: Learner,
    annotators: Annotators,
    rows: list[int],
    pairs: list[Pair],
    config: RewardModelConfig,
    ranks: Ranks,
    check: Callable[[], None],
) -> dict[str, float]:
    """As `accumulate`, by the likelihood of who voted; then the annotators learn, too."""
    loss = _AwareLoss(annotators, config, rows, pairs)
    metrics = accumulate(learner, pairs, config, ranks, check, loss=loss)
    return metrics | loss.learn()


class _AwareLoss:
    """The loss of one step by the likelihood of who voted; it keeps the gaps that it was given.

    Args:
        rows: the numbers of the pairs among all votes.
        times: how often each of them counts; once by default.
    """

    def __init__(
        self,
        annotators: Annotators,
        config: RewardModelConfig,
        rows: list[int],
        pairs: list[Pair],
        times: Sequence[int] | None = None,
    ) -> None:
        self._annotators, self._config = annotators, config
        self._rows, self._pairs = rows, pairs
        self._times = [1] * len(rows) if times is None else times
        self._gaps: dict[int, float] = {}

    def __call__(self, chosen: Tensor, rejected: Tensor, picked: Micro) -> Tensor:
        """Mean over the votes of a micro-batch, each as often as it counts."""
        gap = chosen - rejected
        places = [i for i in picked.rows for _ in range(self._times[i])]
        numbers = [self._rows[i] for i in places]
        if picked.weight:
            self._gaps.update(zip(numbers, gap.tolist(), strict=True))
        margin = torch.tensor([self._pairs[i].margin for i in places], device=gap.device)
        centre = self._config.center_coef * (chosen + rejected).square().mean()
        return self._annotators.loss(gap, numbers, margin) + centre

    def learn(self) -> dict[str, float]:
        """Have the annotators learn from the gaps; all ranks have to call this together."""
        self._annotators.learn(self._gaps, self._rows)
        spread = self._annotators.habits.values[1:, 0].std(correction=0).item()
        return {"reliability_spread": spread}


def _train_ensemble(
    config: RewardModelConfig,
    work: Work,
    trunk: ScalarModel,
    tokenizer: PreTrainedTokenizerBase,
    votes: _Votes,
) -> RewardModelReport:
    """Train the members on one trunk, normalise each, and write them as one model."""
    sft, seed, ranks, logger = work.inputs["sft"], work.seed, work.ranks, work.logger
    ranks.require_shared("set reward_model.members to 1")
    members = [
        trunk.with_new_head(generator(seed, f"reward/head/{number}"))
        for number in range(1, config.members + 1)
    ]
    for number, member in enumerate(members, start=1):
        adapt(member, config, f"reward-{number}", seed=seed, stream=f"reward/adapter/{number}")
    ensemble = Ensemble(members)
    annotators = _learn_together(config, work, members, votes)

    average = average_of(members, "reward-average")
    prompts = _train_prompts(config, work)
    sampling = work.section(SamplingConfig)
    sampled, states = [], []
    with torch.no_grad():
        kept = _kept(config, work)
        for packed in _sft_samples(sft, trunk, prompts, config, sampling, seed, logger, kept):
            sampled.append(ensemble.member_scores(packed))
            states.append(average.last_states(packed))
    samples = torch.cat(sampled, 1).cpu()
    scores = _scores(ensemble, votes.held_out, config, ranks, logger)
    require_finite("the reward-model score", torch.cat([samples.flatten(), scores.flatten()]))
    for member, its_samples, (chosen, rejected) in zip(members, samples, scores, strict=True):
        member.mean = its_samples.mean().item()
        member.std = scale_of(its_samples, chosen - rejected)
    average_head(average, members)
    averaged = _scores(average, votes.held_out, config, ranks, logger)[0]
    its_samples = average.head(torch.cat(states)).squeeze(-1).detach().cpu()
    require_finite("the score of the weight average", its_samples)
    average.mean = its_samples.mean().item()
    average.std = scale_of(its_samples, averaged[0] - averaged[1])
    logger.phase("saving the model")
    if ranks.main:
        output = work.outputs["reward"]
        ensemble.save(tokenizer, output, average=average, base=sft)
        add_facts(output, {"chat": read_card(sft).get("chat", False)})
    report = _ensemble_report(votes, members, average, scores, averaged, seed)
    if not annotators:
        return report
    return _aware_report(report, annotators, config, votes, scores[:, 0] - scores[:, 1])


def _learn_together(
    config: RewardModelConfig, work: Work, members: list[ScalarModel], votes: _Votes
) -> list[Annotators]:
    """One step of each member after another; what lies below the adapters is computed once.

    The loss of a step is the mean over the votes of the member's bootstrap.

    Returns: what each member has learnt of the annotators; nothing when their votes are pooled.
    """
    ranks, size, train = work.ranks, config.micro_batch_size, votes.train
    total = config.epochs * math.ceil(len(train) / config.batch_size)
    learners = [Learner(member, config, total, ranks=ranks) for member in members]
    prompts = train.prompts
    weights = [
        bootstrap(prompts, generator(work.seed, f"reward/votes/{number}"))
        for number in range(1, config.members + 1)
    ]
    batches = MemberBatches(weights, config.batch_size, config.epochs, work.seed)
    annotators = _annotators(config, votes, ranks, weights)
    people: dict[str, Stateful] = {
        f"annotators {n}": found for n, found in enumerate(annotators, start=1)
    }
    states: PairStates | None = None
    with work.recovery.open(
        work.logger,
        identity=_identity(config, work),
        learners={f"member {n}": learner for n, learner in enumerate(learners, start=1)},
        positions={"batches": batches, **people},
        ranks=ranks,
    ) as session:
        session.resume()
        for step in batches:
            number = session.step + 1
            if step.new or states is None:
                mine = _rows_of(step, ranks, size)
                check = session.between("texts that the members share", -(-len(mine) // size))
                states = PairStates(members[0], {row: train[row] for row in mine}, size, check)
            parts = sum(ranks.passes(len(rows), size) for rows in step.picked)
            check = session.between("batch", parts)
            rate, values = learners[0].learning_rate, []
            losses: list[_AwareLoss] = []
            for place, (learner, rows) in enumerate(zip(learners, step.picked, strict=True)):
                if rows:
                    pairs = [train[row] for row in rows]
                    times = [weights[place][row] for row in rows]
                    if annotators:
                        losses.append(_AwareLoss(annotators[place], config, rows, pairs, times))
                    values.append(
                        accumulate(
                            learner,
                            pairs,
                            config,
                            ranks,
                            check,
                            weights=times,
                            pack=partial(_pack, states, rows),
                            loss=losses[-1] if losses else None,
                        )
                    )
            # Nothing may stop from here to the safe point: some members are ahead of the others.
            for value, loss in zip(values, losses, strict=False):
                value |= loss.learn()
            norms = [learner.step() for learner in learners]
            metrics = _over_members(values) | {
                "grad_norm": sum(norms) / len(norms),
                "learning_rate": rate,
            }
            session.metrics(metrics, number)
            note = f"loss {metrics['loss']:.3f}" if values else "no member has votes here"
            session.progress(number, total, note)
            session.safe_point()
    return annotators


def _pack(states: PairStates, rows: list[int], places: list[int]) -> Packed:
    return states.pack([rows[place] for place in places])


def _rows_of(step: MemberStep, ranks: Ranks, size: int) -> list[int]:
    """The rows that this rank needs in the block of a step."""
    return sorted(
        {
            row
            for steps in step.block
            for rows in steps
            if rows
            for micro in ranks.micro_batches(rows, size)
            for row in micro.rows
        }
    )


def _over_members(values: list[dict[str, float]]) -> dict[str, float]:
    """Means over the members that had votes in this step, and how far their losses lie apart.

    Nothing if none had: with a few votes a step, a bootstrap may leave all of them out.
    """
    if not values:
        return {}
    found = torch.tensor([[v["loss"], v["accuracy"]] for v in values], dtype=torch.float64)
    loss, accuracy = found.mean(0).tolist()
    spread = found[:, 0].std(correction=0).item()
    metrics = {"loss": loss, "accuracy": accuracy, "loss_spread": spread}
    if "reliability_spread" in values[0]:
        metrics["reliability_spread"] = fmean(v["reliability_spread"] for v in values)
    return metrics


def _ensemble_report(
    votes: _Votes,
    members: list[ScalarModel],
    average: ScalarModel,
    scores: Tensor,
    averaged: Tensor,
    seed: int,
) -> EnsembleReport:
    """The report on the mean of the members, with a table of them.

    Shapes: scores (K, 2, N) raw scores of chosen and rejected texts, averaged (2, N).
    """
    means, stds = (torch.tensor([getattr(m, name) for m in members]) for name in ("mean", "std"))
    normalised = (scores - means[:, None, None]) / stds[:, None, None]
    mean, std = means.mean().item(), stds.mean().item()
    together = normalised.mean(0) * std + mean
    report = _report(votes, together[0], together[1], mean, std, seed)
    rows = []
    for name, (chosen, rejected), network in [
        *((f"member {n}", *each) for n, each in enumerate(zip(scores, members, strict=True), 1)),
        ("weight average", averaged, average),
    ]:
        found = _report(votes, chosen, rejected, network.mean, network.std, seed)
        rows.append({"model": name} | {column: getattr(found, column) for column in _COMPARED})
    rows.append({"model": "mean"} | {column: getattr(report, column) for column in _COMPARED})
    table = pd.DataFrame(rows)
    given = {field.name: getattr(report, field.name) for field in fields(report)}
    return EnsembleReport(
        **given | {"tables": {**report.tables, "reward_members": table}},
        members=len(members),
        spread=normalised.std(0, correction=0).mean().item(),
        member_accuracy=float(table["accuracy"][: len(members)].mean()),
        weight_average_accuracy=float(table["accuracy"][len(members)]),
    )


def scale_of(samples: Tensor, gaps: Tensor) -> float:
    """The standard deviation of scores, or 1 when it is no scale for the gaps between answers.

    Samples that are all alike have a spread of 0 or of rounding, by which rewards would become
    millions. It is no scale below a hundredth of the usual gap (root mean square).

    Shapes: (N,) scores of samples, (M,) gaps between chosen and rejected answers.
    """
    spread, usual = samples.std().item(), gaps.double().square().mean().sqrt().item()
    if spread > max(usual * _LEAST_SPREAD, 1e-6):
        return spread
    _log.warning(
        "the %d SFT samples have almost the same score (spread %.3g; the answers to compare are "
        "%.3g apart), so rewards are only centred and not scaled. Sample more varied texts: raise "
        "sampling.temperature or reward_model.normalization_samples, or train less in sft",
        len(samples),
        spread,
        usual,
    )
    return 1.0


@torch.no_grad()
def _sft_scores(
    reward_model: ScalarModel,
    sft: Path,
    prompts: Iterable[Prompt],
    config: RewardModelConfig,
    sampling: SamplingConfig,
    seed: int,
    logger: StageLogger,
    kept: Path | None = None,
) -> Tensor:
    """(normalization_samples,) raw scores of SFT samples."""
    texts = _sft_samples(sft, reward_model, prompts, config, sampling, seed, logger, kept)
    return torch.cat([reward_model.scores(packed) for packed in texts])


@torch.no_grad()
def _sft_samples(
    sft: Path,
    network: Network,
    prompts: Iterable[Prompt],
    config: RewardModelConfig,
    sampling: SamplingConfig,
    seed: int,
    logger: StageLogger,
    kept: Path | None,
) -> Iterator[Packed]:
    """SFT samples to normalise with; each prompt is used once before any repeats.

    Args:
        kept: a folder for the tokens of the prompts; None = until the process ends.
    """
    logger.phase("normaliser: loading the SFT policy")
    device = str(network.model.device)
    policy, tokenizer = Policy.load(sft, device, config.precision)
    # Distinct prompts, since a pair with several votes repeats its prompt.
    longest = sampling.max_prompt_length
    distinct = distinct_prompts(prompts, tokenizer, longest, kept)
    order = torch.randperm(len(distinct), generator=generator(seed, "reward/prompts")).tolist()
    rows = [distinct[i] for i in islice(cycle(order), config.normalization_samples)]
    draws = generator(seed, "reward/normalization")
    between = partial(counted, logger)
    what = "normaliser: sampling"
    for batch in respond(policy, rows, sampling, generator=draws, between=between, what=what):
        logger.phase("normaliser: scoring")
        yield lay_out(*batch).packed


def _report(
    votes: _Votes, chosen: Tensor, rejected: Tensor, mean: float, std: float, seed: int
) -> RewardModelReport:
    """Accuracy, baseline and calibration on the held-out votes; the scores are raw logits."""
    train, held_out = votes
    shown = held_out.shown(_SHOWN)
    decided = ~held_out.ties
    require_decided(decided)
    prompts = held_out.prompts
    gap = (chosen - rejected)[decided]
    correct = half_for_ties(gap)
    longer = half_for_ties(held_out.gaps[decided])
    accuracy = ranking.clustered_share(
        correct, prompts[decided], generator=generator(seed, "reward/bootstrap")
    )
    # Each pair counts in both orders, since the order has no meaning.
    probabilities = torch.sigmoid(torch.cat([gap, -gap]))
    outcomes = torch.cat([torch.ones_like(gap), torch.zeros_like(gap)])
    calibration = ranking.expected_calibration_error(probabilities, outcomes)
    ties = torch.where(held_out.ties, 0.5, 0.0)
    return RewardModelReport(
        accuracy=accuracy.value,
        accuracy_low=accuracy.low,
        accuracy_high=accuracy.high,
        longer_accuracy=longer.mean().item(),
        held_out_loss=bradley_terry(chosen, rejected, label_smoothing=ties).item(),
        calibration_error=calibration.error,
        reward_mean=mean,
        reward_std=std,
        train_pairs=len(train),
        held_out_pairs=len(held_out),
        held_out_votes=len(gap),
        held_out_prompts=len(prompts[decided].unique()),
        truncated=train.truncated + held_out.truncated,
        same_after_cut=votes.same,
        figures={
            "reward_calibration": figures.calibration(
                calibration.mean_predicted.tolist(),
                calibration.observed.tolist(),
                calibration.counts.tolist(),
            ),
            "reward_scores": figures.score_histogram(
                ((chosen - mean) / std).tolist(), ((rejected - mean) / std).tolist()
            ),
        },
        tables={
            "reward_held_out": pd.DataFrame(
                {
                    "prompt": shown["prompt"].map(_as_text),
                    "chosen": shown["chosen"],
                    "rejected": shown["rejected"],
                    "chosen_reward": ((chosen[:_SHOWN] - mean) / std).tolist(),
                    "rejected_reward": ((rejected[:_SHOWN] - mean) / std).tolist(),
                }
            )
        },
    )


def _aware_report(
    report: RewardModelReport,
    annotators: Sequence[Annotators],
    config: RewardModelConfig,
    votes: _Votes,
    gaps: Tensor,
) -> AwareReport:
    """The report with the table of annotators, as each member knows them.

    Shapes: gaps (K, M) of the held-out votes by each member, logits.
    """
    for member in annotators:
        member.fit()
    facts, habits = annotators[0].facts, average_habits(annotators)
    gap = math.sqrt(sum(member.gap**2 for member in annotators) / len(annotators))
    table, values, voted = habits_table(facts, habits, gap), habits.values, facts.annotator > 0
    means = values[facts.annotator[voted]].mean(0).tolist() if voted.any() else [1.0, 0.0, 0.0]
    unknown = (facts.side[voted] == 0).double().mean().item() if voted.any() else 0.0
    held_out = VoteFacts.of(votes.held_out.votes(), config.gold_annotator, facts)
    logits = torch.stack(
        [p.predict(held_out, gap) for p, gap in zip(annotators, gaps, strict=True)]
    )
    right = half_for_ties(logits.mean(0)[~held_out.tie])
    ties = habits.log_tie.exp().item()
    doubtful = table[table["reliability"] + 1.96 * table["reliability_sd"] < _HALF]
    if len(doubtful):
        _log.warning(
            "%d of %d annotators vote as if at random or against the rewards, which hardly learnt "
            "from them: %s; the table reward_annotators has their numbers",
            len(doubtful),
            len(table),
            ", ".join([*doubtful["annotator"][:_NAMED], *(["..."] * (len(doubtful) > _NAMED))]),
        )
    given = {field.name: getattr(report, field.name) for field in fields(report)}
    kind = AwareEnsembleReport if isinstance(report, EnsembleReport) else AwareReport
    return kind(
        **given | {"tables": {**report.tables, "reward_annotators": table}},
        annotators=len(table),
        doubtful_annotators=len(doubtful),
        gold_votes=int((~voted).sum()),
        unknown_sides=unknown,
        side_bias=means[1],
        length_bias=means[2],
        tie_rate=ties / (2 + ties),
        vote_accuracy=right.mean().item(),
    )


def _as_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def accumulate(
    learner: Learner,
    pairs: list[Pair],
    config: RewardModelConfig,
    ranks: Ranks,
    check: Callable[[], None],
    *,
    weights: Sequence[int] | None = None,
    pack: Callable[[list[int]], Packed] | None = None,
    loss: Callable[[Tensor, Tensor, Micro], Tensor] | None = None,
) -> dict[str, float]:
    """Add the gradient of one optimizer step; return its mean loss and its accuracy.

    Args:
        weights: how often each pair counts; once by default.
        pack: packs the pairs of some places in `pairs`, chosen and rejected in turn.
        loss: mean over the pairs of a micro-batch, instead of that of the config.
    """
    sums = {"loss": 0.0, "accuracy": 0.0}
    counts = [1] * len(pairs) if weights is None else weights
    for picked in ranks.micro_batches(range(len(pairs)), config.micro_batch_size):
        check()
        times = torch.tensor([counts[i] for i in picked.rows])
        micro = [pairs[i] for i in picked.rows for _ in range(counts[i])]
        share = picked.weight / sum(counts)
        with learner.accumulate(last=picked.last):
            if pack is None:
                packed = pack_pairs([pairs[i] for i in picked.rows], learner.network.model.device)
            else:
                packed = pack(picked.rows)
            scores = learner(packed, packed.last()).view(-1, 2)
            if weights is not None:
                scores = scores.repeat_interleave(times.to(scores.device), 0)
            chosen, rejected = scores.unbind(1)
            if loss is None:
                mean = _loss(chosen, rejected, micro, config)
            else:
                mean = loss(chosen, rejected, picked)
            value = mean * (len(micro) * share)
            learner.backward(value, "the reward-model loss")
        sums["loss"] += value.item()
        sums["accuracy"] += half_for_ties(chosen - rejected).sum().item() * share
    return ranks.sum(sums)


def _loss(chosen: Tensor, rejected: Tensor, pairs: list[Pair], config: RewardModelConfig) -> Tensor:
    """Mean loss over the pairs of a micro-batch."""
    if config.loss == "pointwise_mse":
        half = 0.5 * torch.tensor([pair.tie for pair in pairs], device=chosen.device)
        return pointwise_mse(torch.cat([chosen, rejected]), torch.cat([1 - half, half]))
    return bradley_terry(
        chosen,
        rejected,
        margin=torch.tensor([pair.margin for pair in pairs], device=chosen.device),
        label_smoothing=smoothing(
            torch.tensor([pair.tie for pair in pairs], device=chosen.device), config.label_smoothing
        ),
        center_coef=config.center_coef,
    )


@torch.no_grad()
def _scores(
    reward_model: RewardModel,
    pairs: Sequence[Pair],
    config: RewardModelConfig,
    ranks: Ranks,
    logger: StageLogger,
) -> Tensor:
    """(K, 2, N) raw scores of all chosen and all rejected texts by each member, on the CPU."""
    device = reward_model.model.device

    def score(rows: list[int]) -> Tensor:
        scores = reward_model.member_scores(pack_pairs([pairs[i] for i in rows], device))
        return scores.view(len(scores), -1, 2).transpose(0, 1)

    size = config.micro_batch_size
    between = counted(logger, "held-out votes", ranks.passes(len(pairs), size))
    return ranks.collect(len(pairs), size, score, between).permute(1, 2, 0)
