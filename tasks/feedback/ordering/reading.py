"""The queue and the votes of a project, as the order needs them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import or_, select
from sqlalchemy.orm import aliased

from rlhf_core.data.encoding import Prompt as PromptText
from rlhf_core.data.near import NearGroups
from rlhf_core.data.prepared import prompt_key
from rlhf_core.labelling.arms import Arm, Shares
from rlhf_core.labelling.order import Waiting
from tasks.feedback.ordering.arrivals import of_a_judge
from tasks.feedback.ordering.places import has_come, wish_of
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import AUDITED, HOLD_OUT, JUDGED, MACHINE, Pair, Prompt, Response

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
    wish: int  # of a user: it is asked about sooner or later than all in the order

    @property
    def answers(self) -> tuple[str, str]:
        """Both."""
        return self.a, self.b

    @property
    def waits(self) -> bool:
        """Whether it is open and nobody has begun with it, or has said when it comes."""
        begun = self.votes or self.taken or self.wish
        return self.state == "open" and not begun and self.arm != AUDITED  # which has its place


class CountedVote(NamedTuple):
    """A vote, by the place of its pair in `Queued.pairs`."""

    pair: int
    outcome: float  # 1 if a won, 0 if b did, 0.5 for a tie


@dataclass(frozen=True)
class Queued:
    """All pairs that people are or were asked about for training, and the votes on them."""

    pairs: Sequence[QueuedPair]
    groups: Sequence[int]  # of nearly equal prompts, for each pair
    names: Sequence[str]  # of each group, the key of its first prompt
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

    def control(self, arms: Sequence[Arm]) -> list[CountedVote]:
        """The votes in random order on prompts that were drawn for it.

        Votes in random order on prompts of the design are not: they are on what the design left.

        Args:
            arms: of each group, by its hash.
        """
        return [v for v in self.of_arm("random") if arms[self.groups[v.pair]] == "random"]

    def before(self, arms: Sequence[Arm]) -> list[CountedVote]:
        """The votes that the design and the random arm both start from: those in no arm, and those
        that the prompts of the design had in random order before its first vote."""
        arm_of = [self.pairs[vote.pair].arm for vote in self.votes]
        first = arm_of.index("design") if "design" in arm_of else len(arm_of)
        return [
            vote
            for place, (vote, arm) in enumerate(zip(self.votes, arm_of, strict=True))
            if not arm
            or (arm == "random" and place < first and arms[self.groups[vote.pair]] == "design")
        ]

    def since_design(self) -> int:
        """The votes of all arms since the first that the design asked for."""
        arms = [self.pairs[vote.pair].arm for vote in self.votes]
        arms = [arm for arm in arms if arm not in ("", AUDITED)]
        return len(arms) - arms.index("design") if "design" in arms else 0

    def arms(self, salt: str, shares: Shares) -> list[Arm]:
        """The arm of each group."""
        return self.as_waiting().arms(salt, shares)

    def as_waiting(self) -> Waiting:
        """What waits, as the core puts it in order."""
        asked = [0] * len(self.names)
        held_out = set()
        for pair, group in zip(self.pairs, self.groups, strict=True):
            asked[group] += bool(pair.votes or pair.taken)
            if pair.arm == HOLD_OUT and (pair.votes or pair.taken):
                held_out.add(group)
        trained = self._trained_on()
        some = self.waiting
        return Waiting(
            keys=[self.pairs[i].digest for i in some],
            groups=[self.groups[i] for i in some],
            names=self.names,
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
    found = list(_pairs(project))
    pairs = [pair for _, pair in found]
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
    of_prompt, names = _groups(project)
    return Queued(pairs, [of_prompt[prompt] for prompt, _ in found], names, votes)


def _groups(project: FeedbackProject) -> tuple[dict[int, int], list[str]]:
    """The group of each prompt, by its id, and the name of each group.

    All prompts of the project count, as they do for a pair that comes in.
    """
    near, keys = NearGroups(), {}
    query = select(Prompt.id, Prompt.content).where(Prompt.project_id == project.id)
    with project.database.reading() as session:
        rows = session.execute(query.order_by(Prompt.id).execution_options(yield_per=ROWS))
        for id_, content in rows:
            keys[id_] = prompt_key(content)
            near.add(keys[id_])
    numbers: dict[str, int] = {}
    groups = {id_: numbers.setdefault(near.first(key), len(numbers)) for id_, key in keys.items()}
    return groups, list(numbers)


def _pairs(project: FeedbackProject) -> Iterator[tuple[int, QueuedPair]]:
    """The id of the prompt, and the pair."""
    a, b = aliased(Response), aliased(Response)
    query = (
        select(
            *(Pair.prompt_id, Pair.id, Pair.digest, Prompt.content, a.text, b.text),
            *(Pair.state, Pair.votes, Pair.taken, Pair.arm, Pair.priority),
        )
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(a, a.id == Pair.response_a_id)
        .join(b, b.id == Pair.response_b_id)
        .where(Pair.project_id == project.id, ~of_a_judge())
        .where(or_(Pair.state != "withdrawn", Pair.votes > 0))
        .order_by(Pair.id)
    )
    with project.database.reading() as session:
        for row in session.execute(query.execution_options(yield_per=ROWS)):
            prompt, *facts, arm, priority = row
            # What came in is in random order, whoever would have ordered it.
            placed = "random" if arm == "design" and has_come(priority) else arm
            yield prompt, QueuedPair._make((*facts, placed, wish_of(priority, arm)))
