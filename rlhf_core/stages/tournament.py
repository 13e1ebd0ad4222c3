"""Tournament of checkpoints: policies along the training meet SFT and each other, and the strongest
goes on instead of the last.

A reward is over-optimised when it goes on rising while the answers get worse, so the last policy
need not be the best. Here a judge compares the answers of several policies of one training on the
same training prompts; Bradley-Terry strengths order them. The held-out prompts are not touched: a
policy that was chosen on them would look better there than it is.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf_core.backbone.directory import read_card, weights_digest
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import DataError, NumericsError
from rlhf_core.evaluation.answers import Answers, Bench, answer
from rlhf_core.evaluation.comparison import judge_name, verdicts_on
from rlhf_core.evaluation.tournament import page as pages
from rlhf_core.evaluation.tournament.config import TournamentConfig
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
    difference,
    intervals,
    resampled,
    strengths,
)
from rlhf_core.judges.config import REWARD_MODEL, JudgeConfig
from rlhf_core.judges.judge import Judge, Winner
from rlhf_core.judges.load import JUDGE, load_judge
from rlhf_core.rewards.functions import load_function
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.seeding import generator, stream_seed
from rlhf_core.types import Report
from rlhf_core.work import Work

MILESTONE = "milestone."  # begins the role of one among the inputs, followed by its iteration
RESAMPLES = 1000


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
    sampling, logger = work.section(SamplingConfig), work.logger
    judge = load_judge(
        work.section(JudgeConfig),
        registered=work.inputs.get(JUDGE),
        max_length=sampling.max_length,
        device=work.device,
        precision=config.precision,
        members=config,
        places=work.rewards_from,
        judging=work.judging,
    )
    roles = _entrants(config, work.inputs)
    bench = _bench(config, work)
    answers = []
    for done, role in enumerate(roles):
        logger.progress(done, len(roles) + 1, role)
        logger.phase(f"loading {role}")
        policy, tokenizer = Policy.load(work.inputs[role], work.device, config.precision)
        name = f"tournament/{role}"
        answers.append(answer(bench, name, policy, tokenizer, config.samples_per_prompt))
    logger.progress(len(roles), len(roles) + 1, "verdicts")
    by_reward_model = work.section(JudgeConfig).source == REWARD_MODEL
    referee = _Referee(bench, answers, judge, config.samples_per_prompt, by_reward_model)
    results = play(
        len(roles),
        prompts=len(bench.prompts),
        samples=config.samples_per_prompt,
        budget=config.verdicts,
        ask=referee,
        seed=work.seed,
    )
    logger.progress(len(roles) + 1, len(roles) + 1, "strengths")
    found = _result(config, referee, results, _iterations(roles, work.inputs), work.seed)
    for entrant in found.entrants:
        if entrant.iteration is not None:
            logger.metrics(_curve(entrant), entrant.iteration)
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


@dataclass(frozen=True)
class _Referee:
    """Asks the judge about matches, in the texts of the entrants."""

    bench: Bench
    answers: Sequence[Answers]
    judge: Judge | None
    samples: int
    by_reward_model: bool  # although the truth is known

    @property
    def name(self) -> str:
        """What reports call the judge."""
        return judge_name(self._of(self.answers[0]), self.judge)

    def __call__(self, matches: Sequence[Match]) -> list[Winner | None]:
        """The winner of each match."""
        self.bench.logger.phase("asking the judge")
        ours = self._picked([match.first for match in matches], matches)
        theirs = self._picked([match.second for match in matches], matches)
        verdicts = verdicts_on(ours, theirs, self.bench.prompts, self.judge)
        return [verdict.winner for verdict in verdicts]

    def _picked(self, entrants: Sequence[int], matches: Sequence[Match]) -> Answers:
        """The answer of an entrant in each match."""
        places = [match.prompt * self.samples + match.sample for match in matches]
        return _joined([self._of(answers) for answers in self.answers], entrants, places)

    def _of(self, answers: Answers) -> Answers:
        """The answers, without the truth if the reward model decides although it is known."""
        return _without_truth(answers) if self.by_reward_model else answers


def _joined(of: Sequence[Answers], entrants: Sequence[int], places: Sequence[int]) -> Answers:
    """Answers of several entrants, one for each place."""
    each = len(of[0].texts)
    index = torch.tensor([n * each + place for n, place in zip(entrants, places, strict=True)])
    everyone = Answers(
        texts=[text for answers in of for text in answers.texts],
        prompt=torch.cat([answers.prompt for answers in of]),
        tokens=torch.cat([answers.tokens for answers in of]),
        proxy=torch.cat([answers.proxy for answers in of]),
        true=None
        if any(answers.true is None for answers in of)
        else torch.cat([answers.true for answers in of if answers.true is not None]),
        kl=None,
        sft_logprob=torch.cat([answers.sft_logprob for answers in of]),
    )
    return everyone.pick(index)
