"""Tournament of checkpoints: policies along the training meet SFT and each other, and the strongest
goes on instead of the last.

A reward is over-optimised when it goes on rising while the answers get worse, so the last policy
need not be the best. Here a judge compares the answers of several policies of one training on the
same training prompts; Bradley-Terry strengths order them. The held-out prompts are not touched: a
policy that was chosen on them would look better there than it is.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_core.backbone.directory import read_card, weights_digest
from rlhf_core.backbone.networks import Policy
from rlhf_core.data.mapped.rows import PreparedRows
from rlhf_core.errors import DataError, NumericsError
from rlhf_core.evaluation.answers import Answers, Bench, answer
from rlhf_core.evaluation.comparison import verdicts_on
from rlhf_core.evaluation.judged import Examined, examine, reward_score
from rlhf_core.evaluation.kept import kept
from rlhf_core.evaluation.tournament import page as pages
from rlhf_core.evaluation.tournament.result import (
    LAST,
    SFT,
    Entrant,
    TournamentResult,
    evenly_spaced,
)
from rlhf_core.evaluation.tournament.schedule import play
from rlhf_core.evaluation.tournament.strengths import (
    Match,
    Result,
    choose,
    difference,
    intervals,
    resampled,
    strengths,
    strongest,
)
from rlhf_core.functional.interval import Interval
from rlhf_core.judges.judge import Judge, Winner
from rlhf_core.judges.load import JUDGE, load_judge
from rlhf_core.rewards.functions import load_function
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.seeding import generator, stream_seed
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.tournament import MILESTONE, TournamentConfig
from rlhf_core.types import Report
from rlhf_core.work import Work

RESAMPLES = 1000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TournamentReport(Report):
    """The result of a tournament, with its tables, plot and page."""

    tournament: TournamentResult

    @property
    def result(self) -> TournamentResult:
        """The result, which says which policy goes on."""
        return self.tournament

    @property
    def page(self) -> str:
        """The tournament for people."""
        return pages.page(self.tournament)

    @property
    def copies(self) -> Mapping[str, str]:
        """The chosen policy is a copy of its milestone."""
        found = self.tournament
        return {"policy": found.chosen} if found.replaces_last else {}

    def summary(self) -> dict[str, float]:
        """The choice, its strength beside that of the last policy, and what it took."""
        found = self.tournament
        chosen, last = found.entrant(found.chosen), found.entrant(LAST)
        numbers = {
            "verdicts": float(found.verdicts),
            "unanswered": float(found.unanswered),
            "checkpoints": len(found.entrants) - 1.0,
            "replaces_last": float(found.replaces_last),
        }
        for name, entrant in (("chosen", chosen), ("last", last)):
            if entrant.iteration is not None:
                numbers[f"{name}_iteration"] = float(entrant.iteration)
            value, low, high = entrant.strength
            numbers |= {f"{name}_strength": value, f"{name}_strength_low": low}
            numbers[f"{name}_strength_high"] = high
        return numbers


def hold_tournament(config: TournamentConfig, work: Work) -> TournamentReport:
    """Let SFT and the checkpoints answer training prompts, have a judge compare them with a budget
    of verdicts, and copy the strongest to the output policy, unless it is the last one.

    Args:
        work: inputs sft, policy (the last), reward and data; milestone.N for the policy after
            iteration N; judge, if that is a registered reward model; sections sampling and judge;
            output policy, written only when an earlier policy is chosen.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix; NumericsError when
        the judge gives no verdict at all.
    """
    logger = work.logger
    roles = entrants_of(config, work.inputs)
    if len(roles) == 2:
        _log.warning(
            "there is no milestone, so the last policy meets SFT alone: none was kept, or the "
            "training ended before the first"
        )
    bench = _bench(config, work)
    judge = _judge(config, work, bench)
    answers = []
    for done, role in enumerate(roles):
        logger.progress(done, len(roles) + 1, role)
        answers.append(
            kept(work.answers, role, partial(_entrants_answers, bench, role, config, work))
        )
    logger.progress(len(roles), len(roles) + 1, "verdicts")
    most = work.section(JudgeConfig).canary_prompts
    examined = examine(
        judge, bench, answers[0], work.inputs["data"], most=most, judging=work.judging
    )
    referee = _Referee(bench, answers, judge, config.samples_per_prompt)
    results = play(
        len(roles),
        prompts=len(bench.prompts),
        samples=config.samples_per_prompt,
        budget=config.verdicts,
        ask=referee,
        seed=work.seed,
    )
    found = _result(config, roles, work, referee, results, examined)
    logger.progress(len(roles) + 1, len(roles) + 1, found.chosen)
    for entrant in found.entrants:
        if entrant.iteration is not None:
            logger.metrics(_curve(entrant), entrant.iteration)
    _log.log(logging.WARNING if found.replaces_last else logging.INFO, "%s", found.sentence())
    if found.replaces_last and "policy" in work.outputs:
        shutil.copytree(work.inputs[found.chosen], work.outputs["policy"])
    return TournamentReport(
        tournament=found,
        tables={
            "tournament_strengths": pages.strengths_table(found),
            "tournament_pairs": pages.pairs_table(results, roles),
        },
        figures={"tournament_strengths": pages.draw(found)},
    )


def _entrants_answers(bench: Bench, role: str, config: TournamentConfig, work: Work) -> Answers:
    bench.logger.phase(f"loading {role}")
    actor = Policy.load(work.inputs[role], work.device, config.precision)
    return answer(bench, f"tournament/{role}", *actor, config.samples_per_prompt)


def entrants_of(config: TournamentConfig, inputs: Mapping[str, Path]) -> list[str]:
    """The roles of the entrants: SFT, evenly spaced milestones by iteration, the last policy.

    A milestone with the weights of the last policy is the same policy, and left out. Without a
    number of checkpoints in the config every milestone plays.
    """
    last = weights_digest(inputs[LAST])
    numbers = sorted(
        int(role.removeprefix(MILESTONE))
        for role, directory in inputs.items()
        if role.startswith(MILESTONE) and weights_digest(directory) != last
    )
    wanted = config.checkpoints - 1 if config.on else len(numbers)
    return [SFT, *(f"{MILESTONE}{n}" for n in evenly_spaced(numbers, wanted)), LAST]


def _bench(config: TournamentConfig, work: Work) -> Bench:
    """The models and settings that all answers are made and measured with, on prompts of training
    that the seed draws."""
    table = PreparedRows(work.inputs["data"], "prompts", "train")
    if not len(table):
        raise DataError("there are no training prompts; lower data.eval_fraction")
    order = torch.randperm(len(table), generator=generator(work.seed, "tournament/prompts"))
    prompts = [row["prompt"] for row in table.pick(order[: config.prompts].tolist())]
    work.logger.phase("loading the models")
    sft, tokenizer = Policy.load(work.inputs[SFT], work.device, config.precision)
    reward_model, reward_tokenizer = load_reward_model(
        work.inputs["reward"], work.device, config.precision, members=config
    )
    truth, setting = None, "tournament.true_reward"
    if config.true_reward:
        truth = load_function(config.true_reward, setting=setting, places=work.rewards_from)
    return Bench(
        prompts=prompts,
        sft=sft,
        tokenizer=tokenizer,
        reward_model=reward_model,
        reward_tokenizer=reward_tokenizer,
        truth=truth,
        sampling=work.section(SamplingConfig),
        seed=work.seed,
        logger=work.logger,
    )


def _judge(config: TournamentConfig, work: Work, bench: Bench) -> Judge | None:
    """The judge; None when the truth or without one the reward model decides."""
    return load_judge(
        work.section(JudgeConfig),
        registered=work.inputs.get(JUDGE),
        max_length=bench.sampling.max_length,
        device=work.device,
        precision=config.precision,
        members=config,
        places=work.rewards_from,
        judging=work.judging,
        reward=None if bench.truth is None else reward_score(bench),
    )


@dataclass(frozen=True)
class _Referee:
    """Asks the judge about matches, in the answers of the entrants."""

    bench: Bench
    answers: Sequence[Answers]
    judge: Judge | None
    samples: int

    def __call__(self, matches: Sequence[Match]) -> list[Winner | None]:
        """The winner of each match."""
        self.bench.logger.phase("asking the judge")
        winners: list[Winner | None] = [None] * len(matches)
        places: dict[tuple[int, int], list[int]] = {}
        for place, match in enumerate(matches):
            places.setdefault((match.first, match.second), []).append(place)
        asked = [place for found in places.values() for place in found]
        ours, theirs = (
            joined(
                [
                    self.answers[pair[side]].pick(self._rows([matches[n] for n in found]))
                    for pair, found in places.items()
                ]
            )
            for side in (0, 1)
        )
        verdicts = verdicts_on(ours, theirs, self.bench.prompts, self.judge)
        for place, verdict in zip(asked, verdicts, strict=True):
            winners[place] = verdict.winner
        return winners

    def _rows(self, matches: Sequence[Match]) -> Tensor:
        return torch.tensor([match.prompt * self.samples + match.sample for match in matches])


def joined(parts: Sequence[Answers]) -> Answers:
    """Answers of several policies to the same prompts, one after the other; their KL is dropped."""
    trues = [part.true for part in parts if part.true is not None]
    return Answers(
        texts=[text for part in parts for text in part.texts],
        prompt=torch.cat([part.prompt for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        proxy=torch.cat([part.proxy for part in parts]),
        true=torch.cat(trues) if len(trues) == len(parts) else None,
        kl=None,
        sft_logprob=torch.cat([part.sft_logprob for part in parts]),
    )


def _result(
    config: TournamentConfig,
    roles: Sequence[str],
    work: Work,
    referee: _Referee,
    results: Sequence[Result],
    examined: Examined,
) -> TournamentResult:
    """The strengths of the entrants, and the choice."""
    unanswered = sum(result.winner is None for result in results)
    # Equal answers are a tie that nobody was asked about.
    if unanswered and all(result.winner in (None, "tie") for result in results):
        raise NumericsError(
            f"the judge {examined.name} gave no verdict in the tournament; look at its log, and "
            "check judge.endpoint"
        )
    rng = np.random.default_rng(stream_seed(work.seed, "tournament/bootstrap"))
    values = strengths(results, len(roles))
    drawn = resampled(results, len(roles), resamples=RESAMPLES, rng=rng)
    bounds = intervals(values, drawn)
    chosen, last = choose(values, drawn), len(roles) - 1
    entrants = tuple(
        _entrant(role, n, bounds[n], referee.answers[n], results, _iteration(role, work.inputs))
        for n, role in enumerate(roles)
    )
    return TournamentResult(
        judge=examined.name,
        entrants=entrants,
        strongest=roles[strongest(values)],
        chosen=roles[chosen],
        over_last=None if chosen == last else difference(values, drawn, chosen, last),
        over_sft=difference(values, drawn, strongest(values), 0),
        verdicts=len(results),
        unanswered=unanswered,
        budget=config.verdicts,
        prompts=len(referee.bench.prompts),
        samples_per_prompt=config.samples_per_prompt,
    )


def _iteration(role: str, inputs: Mapping[str, Path]) -> int | None:
    """After which iteration of the training a policy was kept; 0 for SFT."""
    if role == SFT:
        return 0
    if role.startswith(MILESTONE):
        return int(role.removeprefix(MILESTONE))
    known = read_card(inputs[role]).get("iterations")
    return known if isinstance(known, int) else None


def _entrant(
    role: str,
    number: int,
    strength: Interval,
    answers: Answers,
    results: Sequence[Result],
    iteration: int | None,
) -> Entrant:
    sides = [
        (winner, "a" if match.first == number else "b")
        for match, winner in results
        if number in (match.first, match.second) and winner is not None
    ]
    return Entrant(
        name=role,
        iteration=iteration,
        strength=strength,
        wins=sum(winner == side for winner, side in sides),
        ties=sum(winner == "tie" for winner, _ in sides),
        losses=sum(winner not in ("tie", side) for winner, side in sides),
        reward=answers.proxy.mean().item(),
        true_reward=None if answers.true is None else answers.true.mean().item(),
        kl=None if answers.kl is None else answers.kl.mean().item(),
        length=answers.tokens.mean().item(),
    )


def _curve(entrant: Entrant) -> dict[str, float]:
    """An entrant as metrics, whose step is its iteration."""
    value, low, high = entrant.strength
    numbers = {"strength": value, "strength_low": low, "strength_high": high}
    numbers["reward"] = entrant.reward
    if entrant.true_reward is not None:
        numbers["true_reward"] = entrant.true_reward
    if entrant.kl is not None:
        numbers["kl"] = entrant.kl
    return {f"tournament/{name}": number for name, number in numbers.items()}
