"""A judge that answers each pair in both orders, and how sure it is of it."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.backbone.context import context_of
from rlhf_core.data.encoding import Prompt
from rlhf_core.data.prepared import JUDGE
from rlhf_core.errors import ModelError
from rlhf_core.judges.judge import Judge, Pair, Verdict, Winner
from rlhf_core.judges.load import ScoreJudge, by_score, load_judge
from rlhf_core.judges.orders import BothOrders
from rlhf_core.labelling.router import Opinion
from rlhf_core.labelling.verdicts import JudgeHabits
from rlhf_core.metrics import StageLogger
from rlhf_core.rewards.models import load_reward_model, score_texts
from rlhf_core.settings.judge import ENDPOINT, REWARD_MODEL
from tasks.feedback.ordering.ordering import LONGEST, newest_reward_model
from tasks.feedback.ordering.outcome import last_order
from tasks.feedback.routing.config import AskJudgeConfig
from tasks.feedback.store.judgments import check_pseudonym
from tasks.feedback.store.store import FeedbackProject
from tasks.judges.judging import MlflowJudging
from tasks.pages.reading import Reader
from tasks.record import tags
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.reward_places import reward_places

TABLE = "reward_annotators"  # of a reward model that knows who voted
_OTHER: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
_CHANCE: dict[Winner, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Pinned:
    """Who judges a batch. It is kept with the batch, so that a call that goes on asks the same."""

    source: str  # of the config, with the version that it stood for
    name: str  # of the annotator
    habits: JudgeHabits | None  # as the newest reward model had them when the batch was begun


@dataclass(frozen=True)
class Heard:
    """What a judge says of a pair. Both verdicts are about its answers, whatever was first."""

    a_first: Verdict
    b_first: Verdict
    opinion: Opinion | None  # None: it gave no usable answer in one of the orders


def pin(config: AskJudgeConfig, project: FeedbackProject, record: Record) -> Pinned:
    """The judge that a config names now.

    Raises: ModelError when there is no such reward model; DataError for a name that no annotator
        can have.
    """
    source, judge = config.source, config.as_judge()
    if source == REWARD_MODEL:
        newest = newest_reward_model(record, project.name, last_order(project))
        if newest is None:
            raise ModelError(
                f"judge.source is {REWARD_MODEL}, and '{project.name}' has none yet: train one, "
                "or name another judge"
            )
        source = newest.uri
    elif judge.is_registered:
        source = record.store.resolve(source).uri
    name = config.name or (config.endpoint.model if source == ENDPOINT else "")
    name = name or source.removeprefix("models:/").replace("/", "-")
    pseudonym = f"{JUDGE}{name}"
    check_pseudonym(pseudonym)
    return Pinned(source, pseudonym, _habits(pseudonym, project, record))


def _habits(pseudonym: str, project: FeedbackProject, record: Record) -> JudgeHabits | None:
    """What the newest reward model of the project has learnt of an annotator, if anything."""
    newest = newest_reward_model(record, project.name, last_order(project))
    run_id = record.store.tags(newest).get(tags.RUN) if newest is not None else None
    run = record.runs.find(run_id) if run_id else None
    for row in Reader(record).table(run, TABLE) if run is not None else []:
        if row["annotator"] == pseudonym and row.get("reward_gap"):
            names = ("reliability", "left", "length", "length_unit", "reward_gap")
            return JudgeHabits(*(float(row[name]) for name in names))
    return None


class AskedJudge:
    """Asks in both orders.

    A model of rewards says how sure it is: σ(r(a) - r(b)), whatever is shown first. Of any other
    judge a verdict is taken at its word, or for as much as its habits say, if they are known.
    """

    def __init__(self, judge: Judge, habits: JudgeHabits | None = None) -> None:
        self._judge = judge.judge if isinstance(judge, BothOrders) else judge
        self._habits = habits

    def __call__(self, pairs: Sequence[Pair]) -> list[Heard]:
        """What it says of each pair.

        Raises: UserError when it cannot work, or does not any more.
        """
        if isinstance(self._judge, ScoreJudge):
            return self._by_score(self._judge, pairs)
        asked = [each for pair in pairs for each in (pair, Pair(pair.prompt, pair.b, pair.a))]
        said = self._judge(asked)
        return [
            self._heard(pair, one, other)
            for pair, one, other in zip(pairs, said[::2], said[1::2], strict=True)
        ]

    def _by_score(self, judge: ScoreJudge, pairs: Sequence[Pair]) -> list[Heard]:
        prompts = [pair.prompt for pair in pairs]
        ours = judge.score(prompts, [pair.a for pair in pairs])
        theirs = judge.score(prompts, [pair.b for pair in pairs])
        chances = torch.sigmoid(ours.double() - theirs.double()).tolist()
        return [
            Heard(verdict, verdict, Opinion(chance, chance))
            for verdict, chance in zip(by_score(ours, theirs), chances, strict=True)
        ]

    def _heard(self, pair: Pair, one: Verdict, other: Verdict) -> Heard:
        turned = Verdict(None if other.winner is None else _OTHER[other.winner], other.reason)
        if one.winner is None or turned.winner is None:
            return Heard(one, turned, None)
        chances = self._chance(pair, one.winner, "a"), self._chance(pair, turned.winner, "b")
        # Of two verdicts that agree the one that says more counts; one that means the contrary,
        # of a judge that votes against the rewards, is worth nothing here.
        if one.winner == turned.winner == "a":
            chances = (max(0.5, *chances),) * 2
        elif one.winner == turned.winner == "b":
            chances = (min(0.5, *chances),) * 2
        return Heard(one, turned, Opinion(*chances))

    def _chance(self, pair: Pair, winner: Winner, first: Winner) -> float:
        """That a is better."""
        if self._habits is None or winner == "tie":
            return _CHANCE[winner]
        shown = (pair.a, pair.b) if first == "a" else (pair.b, pair.a)
        lengths = len(shown[0]), len(shown[1])
        left = self._habits.chance_of_left(winner == first, lengths)
        return left if first == "a" else 1 - left


def make_judge(
    config: AskJudgeConfig, pinned: Pinned, project: str, record: Record, logger: StageLogger
) -> AskedJudge:
    """The judge of a batch. What an endpoint and a function say is remembered in MLflow.

    Raises: ModelError, ConfigError when there is no such judge.
    """
    judge = config.as_judge(pinned.source)
    if judge.is_registered:
        return AskedJudge(_reward_model(pinned, record))
    experiment = ensure_experiment(record.client, project, record.settings)
    judging = MlflowJudging(record, experiment, logger)
    places = reward_places(record.settings)
    made = load_judge(judge, max_length=LONGEST, places=places, judging=judging)
    assert made is not None  # of a source that is neither empty nor the pipeline's reward model
    return AskedJudge(made, pinned.habits)


def _reward_model(pinned: Pinned, record: Record) -> ScoreJudge:
    with tempfile.TemporaryDirectory() as folder:
        directory = record.store.fetch(record.store.resolve(pinned.source), Path(folder) / "model")
        model, tokenizer = load_reward_model(directory, record.settings.device)
    longest = min(context_of(model.model) or LONGEST, LONGEST)

    def score(prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        return score_texts(model, tokenizer, prompts, texts, max_length=longest).mean(0)

    return ScoreJudge(pinned.name, score)
