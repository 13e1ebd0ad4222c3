"""The queue and the votes of a project, as the order needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import exists, select
from sqlalchemy.orm import aliased

from rlhf_core.data.encoding import Prompt as PromptText
from rlhf_core.data.near import near_groups
from rlhf_core.data.prepared import prompt_key
from rlhf_core.labelling.order import Waiting
from tasks.feedback.store.judgments import AUDITED, HOLD_OUT, JUDGE, JUDGED, MACHINE
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import Batch, BatchPair, Pair, Prompt, Response

_OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
ROWS = 2000  # fetched at a time


class QueuedPair(NamedTuple):
    """A pair of the store."""

    id: int
    digest: str
    prompt: PromptText
    a: str
    b: str
    state: str
    votes: int
    taken: int
    arm: str

    @property
    def answers(self) -> tuple[str, str]:
        """Both."""
        return self.a, self.b

    @property
    def waits(self) -> bool:
        """Whether it is open and nobody has begun with it."""
        untouched = self.state == "open" and not self.votes and not self.taken
        return untouched and self.arm != AUDITED  # which has its place


class CountedVote(NamedTuple):
    """A vote, by the place of its pair in `Queued.pairs`."""

    pair: int
    outcome: float  # 1 if a won, 0 if b did, 0.5 for a tie


@dataclass(frozen=True)
class Queued:
    """All pairs that people are or were asked about for training, and the votes on them."""

    pairs: Sequence[QueuedPair]
    groups: Sequence[int]  # of nearly equal prompts, for each pair
    votes: Sequence[CountedVote]  # in the order in which they came, each person's first on a pair

    @property
    def waiting(self) -> list[int]:
        """The places of the pairs that can be put in order."""
        return [i for i, pair in enumerate(self.pairs) if pair.waits]

    def of_arm(self, arm: str) -> list[CountedVote]:
        """The votes on the pairs of an arm; "" = those from before any order."""
        return [vote for vote in self.votes if self.pairs[vote.pair].arm == arm]

    def tested(self) -> list[CountedVote]:
        """The votes of the hold-out on prompts that training has seen nothing like."""
        trained = self._trained_on()
        return [v for v in self.of_arm(HOLD_OUT) if self.groups[v.pair] not in trained]

    def as_waiting(self) -> Waiting:
        """What waits, as the core puts it in order."""
        count = max(self.groups, default=-1) + 1
        names = [""] * count
        asked = [0] * count
        held_out = set()
        for pair, group in zip(self.pairs, self.groups, strict=True):
            # The least, so that the name of a group does not depend on the order of its pairs.
            key = prompt_key(pair.prompt)
            names[group] = min(names[group], key) if names[group] else key
            asked[group] += bool(pair.votes or pair.taken)
            if pair.arm == HOLD_OUT and (pair.votes or pair.taken):
                held_out.add(group)
        trained = self._trained_on()
        some = self.waiting
        return Waiting(
            keys=[self.pairs[i].digest for i in some],
            groups=[self.groups[i] for i in some],
            names=names,
            asked=asked,
            held_out=frozenset(held_out - trained),
            trained_on=frozenset(trained),
        )

    def _trained_on(self) -> set[int]:
        return {
            group
            for pair, group in zip(self.pairs, self.groups, strict=True)
            if pair.arm != HOLD_OUT and (pair.votes or pair.taken or pair.arm == JUDGED)
        }


def read_queue(project: FeedbackProject) -> Queued:
    """The pairs and votes of a project, without those that people see as judges of an evaluation.

    Control questions and repeats are no votes here: the same pair over and over tells little, and
    their order is drawn otherwise.
    """
    pairs = list(_pairs(project))
    place = {pair.id: i for i, pair in enumerate(pairs)}
    votes: list[CountedVote] = []
    seen: set[tuple[int, str]] = set()
    for vote in project.judgments.stream():
        who = (vote.pair, vote.annotator)
        if vote.pair not in place or vote.kind in ("gold", "repeat", MACHINE):
            continue
        if vote.annotator and who in seen:
            continue
        seen.add(who)
        votes.append(CountedVote(place[vote.pair], _OUTCOMES[vote.vote]))
    groups = near_groups([prompt_key(pair.prompt) for pair in pairs])
    return Queued(pairs, groups, votes)


def _pairs(project: FeedbackProject) -> Iterator[QueuedPair]:
    a, b = aliased(Response), aliased(Response)
    judged = (
        exists()
        .where(BatchPair.pair_id == Pair.id)
        .where(Batch.id == BatchPair.batch_id, Batch.kind == JUDGE)
    )
    query = (
        select(
            *(Pair.id, Pair.digest, Prompt.content, a.text, b.text),
            *(Pair.state, Pair.votes, Pair.taken, Pair.arm),
        )
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(a, a.id == Pair.response_a_id)
        .join(b, b.id == Pair.response_b_id)
        .where(Pair.project_id == project.id, Pair.state != "withdrawn", ~judged)
        .order_by(Pair.id)
    )
    with project.database.reading() as session:
        for row in session.execute(query.execution_options(yield_per=ROWS)):
            yield QueuedPair(*row)
