"""The arm and the place of a pair that comes in: at once, and until the queue is ordered next.

The arm follows from a hash of the prompt, as in an order (`rlhf_core.labelling.arms`). Prompts that
are nearly equal to one that is there belong to its group, and share its arm. Nobody has looked yet
at what the pair would tell, so it waits behind all that was ordered, in random order among those
that came with it. The arms take turns by their shares: random pairs are as frequent among those
that came in as in the order, so many new pairs change no share. The second pair of a group comes
behind the first one of every other.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import ColumnElement, case, exists, func, or_, select
from sqlalchemy.orm import Session

from rlhf_core.data.prepared import prompt_key
from rlhf_core.labelling.arms import Known, Shares, hashed
from tasks.feedback.ordering.places import ARRIVED, LATER
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import ProjectRules
from tasks.feedback.store.tables import (
    HOLD_OUT,
    JUDGE,
    JUDGED,
    AuditEntry,
    Batch,
    BatchPair,
    Pair,
    Project,
    Prompt,
)

if TYPE_CHECKING:
    from rlhf_core.data.near import NearGroups

ORDER = "order"  # the action in the log of a project
TURN, TURNS = 2**28, 4000  # places for the n-th pairs of all groups, and how many n
STEP = 64  # places between two pairs, if there were one arm
MANY = 5000  # ids in a query; with more, all pairs are looked at


class Arrival(NamedTuple):
    """A pair that comes into the queue."""

    digest: str
    prompt: int  # its id


class Arrivals:
    """Gives pairs of a project their arms and places as they come in.

    The prompts of the project are read once for each object: about 0.3 ms a prompt.
    """

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id
        self._keys: dict[int, str] = {}  # of prompts, by id
        self._read = 0  # the last prompt that is known for good
        self._begun = False

    @cached_property
    def _groups(self) -> "NearGroups":
        from rlhf_core.data.near import NearGroups  # a server of votes does without its libraries

        return NearGroups()

    def prepare(self) -> None:
        """Read the prompts, so that the transaction to come need not, and nobody waits for it."""
        with self._database.reading() as session:
            if self.salt(session):
                self._read = self._catch_up(session)

    def salt(self, session: Session) -> str:
        """What arms are drawn with; "" while pairs of this project have none.

        They have arms from the first order on, unless the rules say that the queue is not ordered.
        """
        project = session.get_one(Project, self._project)
        if not ProjectRules.model_validate(project.rules).ordered:
            return ""
        if not self._begun:
            query = select(AuditEntry.id).filter_by(project_id=self._project, action=ORDER)
            self._begun = session.scalar(query.limit(1)) is not None
        return project.name if self._begun else ""

    def place(
        self, session: Session, salt: str, new: Sequence[Arrival]
    ) -> dict[str, tuple[str, int]]:
        """Arm and `priority` of each, by digest; their prompts are in the database."""
        self._catch_up(session)
        group_of = {one.prompt: self._groups.first(self._keys[one.prompt]) for one in new}
        groups, asked = self._known(session, set(group_of.values()))
        shares = Shares()
        turns = Counter(asked)
        lanes: dict[tuple[int, str], list[str]] = defaultdict(list)
        for one in sorted(new, key=lambda one: hashed(one.digest, f"{salt}/order")):
            group = group_of[one.prompt]
            turn = min(turns[group], TURNS)
            turns[group] += 1
            lanes[turn, groups[group].arm(salt, shares)].append(one.digest)
        last, first = self._waiting(session)
        placed = {}
        for (turn, arm), digests in lanes.items():
            step = STEP / shares.of(arm)  # type: ignore[arg-type]
            begin = ARRIVED + turn * TURN
            # Behind its own, or in the middle of a step from where people are now.
            place = last.get((turn, arm), first.get(turn, begin) - step / 2)
            for key in digests:
                place += step
                placed[key] = (arm, min(int(place), begin + TURN - 1))
        return placed

    def _catch_up(self, session: Session) -> int:
        """Read the prompts that are new; those of this transaction may yet be undone, so only a
        reader may count them as known."""
        last = self._read
        query = select(Prompt.id, Prompt.content).where(
            Prompt.project_id == self._project, Prompt.id > last
        )
        for id_, content in session.execute(query.order_by(Prompt.id)):
            key = self._keys[id_] = prompt_key(content)
            self._groups.add(key)
            last = id_
        return last

    def _known(self, session: Session, groups: set[str]) -> tuple[dict[str, Known], Counter[str]]:
        """What became of some groups, and how many of their pairs are or were asked about."""
        members = {
            id_: first
            for id_, key in self._keys.items()
            if (first := self._groups.first(key)) in groups
        }
        touched = case((or_(Pair.votes > 0, Pair.taken > 0, Pair.arm == JUDGED), 1), else_=0)
        conditions = [
            Pair.project_id == self._project,
            or_(Pair.state == "open", Pair.votes > 0, Pair.arm == JUDGED),
            ~of_a_judge(),
        ]
        if len(members) <= MANY:
            conditions.append(Pair.prompt_id.in_(list(members)))
        rows = session.execute(
            select(Pair.prompt_id, Pair.arm, touched, func.count())
            .where(*conditions)
            .group_by(Pair.prompt_id, Pair.arm, touched)
        )
        found = {group: Known(group) for group in groups}
        asked: Counter[str] = Counter()
        for prompt, arm, labelled, count in rows:
            if prompt not in members:
                continue
            group = members[prompt]
            asked[group] += count
            if labelled and arm == HOLD_OUT:
                found[group] = found[group]._replace(held_out=True)
            elif labelled:
                found[group] = found[group]._replace(trained_on=True)
        return found, asked

    def _waiting(self, session: Session) -> tuple[dict[tuple[int, str], float], dict[int, float]]:
        """The last place of those that came in and wait, by turn and arm, and the first by turn."""
        turn = (Pair.priority - ARRIVED) // TURN
        rows = session.execute(
            select(turn, Pair.arm, func.max(Pair.priority), func.min(Pair.priority))
            .where(
                Pair.project_id == self._project,
                *(Pair.state == "open", Pair.taken < Pair.wanted),
                *(Pair.priority >= ARRIVED, Pair.priority < LATER),
            )
            .group_by(turn, Pair.arm)
        )
        last: dict[tuple[int, str], float] = {}
        first: dict[int, float] = {}
        for number, arm, highest, lowest in rows:
            last[int(number), arm] = highest
            first[int(number)] = min(lowest, first.get(int(number), lowest))
        return last, first


def of_a_judge() -> ColumnElement[bool]:
    """Whether people see a pair as judges of an evaluation."""
    return (
        exists()
        .where(BatchPair.pair_id == Pair.id)
        .where(Batch.id == BatchPair.batch_id, Batch.kind == JUDGE)
    )
