"""Prompts, responses and pairs: put in once by their content, and found again."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Table,
    Text,
    bindparam,
    column,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session, aliased

from rlhf_core.data.prepared import COLUMNS
from rlhf_core.data.prompts import canonical_prompt, writable
from rlhf_core.errors import DataError
from tasks.feedback.ordering.arrivals import Arrival, Arrivals
from tasks.feedback.ordering.places import ARRIVED, LATER, kept, wish_of, without_wish
from tasks.feedback.store.clock import now
from tasks.feedback.store.database import Database
from tasks.feedback.store.drawing import set_marks_back
from tasks.feedback.store.records import AddedPair, Answer, NewPair
from tasks.feedback.store.tables import JUDGE, Batch, BatchPair, GoldAnswer, Pair, Prompt, Response

T = TypeVar("T")

CHUNK = 500  # pairs in one transaction
PRIORITIES = 2**31  # the least and the greatest are this far from 0
EXCHANGED = {"a": "b", "b": "a"}


def digest(*parts: object) -> str:
    """The SHA-256 of some values, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of at most `size`."""
    waiting = iter(items)
    while some := list(islice(waiting, size)):
        yield some


@dataclass
class _Row:
    """A pair on its way in: as it is in the database, or will be."""

    spec: NewPair
    prompt: int
    a: int
    b: int
    digest: str
    exchanged: bool
    id: int = 0
    state: str = "done"
    priority: int = 0
    arm: str = ""
    wanted: int = 0
    votes: int = 0
    taken: int = 0
    new: bool = False
    changed: bool = False
    waited: bool = False  # it was in the queue, without a wish
    wish: int = 0
    gold: dict[str, Any] = field(default_factory=dict)

    @property
    def untouched(self) -> bool:
        """Whether nobody has begun with it."""
        return not (self.votes or self.taken)

    @property
    def comes_in(self) -> bool:
        """Whether it comes into the queue now, without a wish of a user."""
        asked = self.changed and self.state == "open" and not self.wish
        return asked and self.untouched and not self.waited


class Content:
    """The prompts, responses and pairs of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id
        self._arrivals = Arrivals(database, project_id)

    def add(self, pairs: Iterable[NewPair], *, batch: int | None = None) -> list[AddedPair]:
        """Put pairs in, or find them; in the order given.

        A pair is the same if it has the same prompt and the same two texts by the same models, in
        either order; what is said about it besides (sampling, sources, licences, kept columns, the
        right answer) stays as it was at first. One that is there already is asked about again if
        more votes are wanted.

        Raises: DataError for a pair that cannot be kept; those before it may be in the store.
        """
        added: list[AddedPair] = []
        for some in chunks(pairs, CHUNK):
            if any(pair.wanted for pair in some):
                self._arrivals.prepare()
            with self._database.writing(self._project) as session:
                added += self.put(session, some, batch)
        return added

    def put(
        self, session: Session, pairs: Sequence[NewPair], batch: int | None = None
    ) -> list[AddedPair]:
        """The same, for a few, in a transaction of this project that somebody else has begun."""
        for pair in pairs:
            check(pair)
        prompts = self._prompts(session, pairs)
        responses = self._responses(session, prompts, pairs)
        rows: dict[str, _Row] = {}
        order = []
        for pair in pairs:
            prompt = prompts[_prompt_digest(pair)]
            one, other = _response_digest(pair.a), _response_digest(pair.b)
            a, b = responses[prompt, one], responses[prompt, other]
            # Of digests, so that it does not depend on who came first.
            key = digest(*sorted([one, other]), _prompt_digest(pair))
            row = rows.setdefault(key, _Row(pair, prompt, a, b, key, one > other))
            order.append((row, pair, a))
        self._find(session, rows)
        placed, seen = [], set()
        for row, pair, a in order:
            swapped = row.a != a
            _ask(row, pair, swapped)
            placed.append((row, swapped, row.new and row.digest not in seen))
            seen.add(row.digest)
        self._place(session, list(rows.values()), batch)
        self._save(session, list(rows.values()), batch)
        return [AddedPair(row.id, new, swapped, row.digest) for row, swapped, new in placed]

    # ---- how it gets there: what is known is looked up, the rest is put in, many at a time ----

    def _prompts(self, session: Session, pairs: Sequence[NewPair]) -> dict[str, int]:
        """The ids of the prompts, by digest."""
        by_digest = {_prompt_digest(pair): pair for pair in pairs}
        query = select(Prompt.digest, Prompt.id).where(
            Prompt.project_id == self._project, Prompt.digest.in_(list(by_digest))
        )
        found = {row.digest: row.id for row in session.execute(query)}
        missing = [
            {
                "project_id": self._project,
                "digest": key,
                "content": pair.prompt,
                "source": pair.source,
                "licence": pair.licence,
            }
            for key, pair in by_digest.items()
            if key not in found
        ]
        if missing:
            made = session.execute(insert(Prompt).returning(Prompt.digest, Prompt.id), missing)
            found |= {row.digest: row.id for row in made}
        return found

    def _responses(
        self, session: Session, prompts: Mapping[str, int], pairs: Sequence[NewPair]
    ) -> dict[tuple[int, str], int]:
        """The ids of the responses, by prompt and digest."""
        wanted: dict[tuple[int, str], Answer] = {}
        for pair in pairs:
            prompt = prompts[_prompt_digest(pair)]
            for answer in (pair.a, pair.b):
                wanted.setdefault((prompt, _response_digest(answer)), answer)
        query = select(Response.prompt_id, Response.digest, Response.id).where(
            Response.prompt_id.in_({prompt for prompt, _ in wanted}),
            Response.digest.in_({key for _, key in wanted}),
        )
        found = {(row.prompt_id, row.digest): row.id for row in session.execute(query)}
        missing = [
            {
                "prompt_id": prompt,
                "digest": key,
                "text": answer.text,
                "model": answer.model,
                "sampling": dict(answer.sampling),
                "source": answer.source,
                "licence": answer.licence,
            }
            for (prompt, key), answer in wanted.items()
            if (prompt, key) not in found
        ]
        if missing:
            columns = Response.prompt_id, Response.digest, Response.id
            made = session.execute(insert(Response).returning(*columns), missing)
            found |= {(row.prompt_id, row.digest): row.id for row in made}
        return found

    def _find(self, session: Session, rows: Mapping[str, _Row]) -> None:
        """Fill in what the database has of the pairs."""
        query = select(
            Pair.digest, Pair.id, Pair.response_a_id, Pair.response_b_id, Pair.exchanged,
            Pair.state, Pair.priority, Pair.arm, Pair.wanted, Pair.votes, Pair.taken,
        ).where(Pair.project_id == self._project, Pair.digest.in_(list(rows)))  # fmt: skip
        for found in session.execute(query):
            row = rows[found.digest]
            row.id, row.a, row.b = found.id, found.response_a_id, found.response_b_id
            row.exchanged, row.state = found.exchanged, found.state
            row.priority, row.arm = found.priority, found.arm
            row.wish = wish_of(found.priority, found.arm)
            row.waited = found.state == "open" and not row.wish
            row.wanted, row.votes, row.taken = found.wanted, found.votes, found.taken
        for row in rows.values():
            row.new = not row.id

    def _place(self, session: Session, rows: Sequence[_Row], batch: int | None) -> None:
        """Arm and place of the pairs that are asked about from now on."""
        for row in rows:
            if row.changed and (row.wish or not row.waited):
                row.priority = kept(row.wish)
                row.arm = "" if row.untouched else row.arm
        coming = [Arrival(row.digest, row.prompt) for row in rows if row.comes_in]
        if not coming or (batch is not None and session.get_one(Batch, batch).kind == JUDGE):
            return
        if salt := self._arrivals.salt(session):
            placed = self._arrivals.place(session, salt, coming)
            for row in rows:
                if row.comes_in:
                    row.arm, row.priority = placed[row.digest]

    def _save(self, session: Session, rows: Sequence[_Row], batch: int | None) -> None:
        at = now()
        if new := [row for row in rows if row.new]:
            values = [
                {
                    "project_id": self._project,
                    "prompt_id": row.prompt,
                    "response_a_id": row.a,
                    "response_b_id": row.b,
                    "digest": row.digest,
                    "exchanged": row.exchanged,
                    "kept": dict(row.spec.kept),
                    "state": row.state,
                    "priority": row.priority,
                    "arm": row.arm,
                    "wanted": row.wanted,
                    "taken": 0,
                    "votes": 0,
                    "created_at": at,
                }
                for row in new
            ]
            made = session.execute(insert(Pair).returning(Pair.digest, Pair.id), values)
            ids = {row.digest: row.id for row in made}
            for row in new:
                row.id = ids[row.digest]
        if changed := [row for row in rows if row.changed and not row.new]:
            session.execute(
                update(Pair),
                [
                    {
                        "id": r.id,
                        "wanted": r.wanted,
                        "priority": r.priority,
                        "arm": r.arm,
                        "state": r.state,
                    }
                    for r in changed
                ],
            )
        free = [
            (row.priority, row.id)
            for row in rows
            if row.changed and row.state == "open" and row.taken < row.wanted
        ]
        if free:
            set_marks_back(session, self._project, *min(free))
        self._save_gold(session, rows)
        if batch is not None:
            self._save_batch(session, rows, batch)

    def _save_gold(self, session: Session, rows: Sequence[_Row]) -> None:
        if known := {row.id: row.gold for row in rows if row.gold}:
            query = select(GoldAnswer.pair_id).where(GoldAnswer.pair_id.in_(list(known)))
            there = set(session.scalars(query))
            missing = [
                {"pair_id": id_, "at": now(), "by": "", **answer}
                for id_, answer in known.items()
                if id_ not in there
            ]
            if missing:
                session.execute(insert(GoldAnswer), missing)

    def _save_batch(self, session: Session, rows: Sequence[_Row], batch: int) -> None:
        query = select(BatchPair.pair_id).where(
            BatchPair.batch_id == batch, BatchPair.pair_id.in_([row.id for row in rows])
        )
        there = set(session.scalars(query))
        missing = [{"batch_id": batch, "pair_id": row.id} for row in rows if row.id not in there]
        if missing:
            session.execute(insert(BatchPair), missing)
        asked_again = update(Batch).where(Batch.id == batch, Batch.withdrawn_at.is_not(None))
        session.execute(asked_again.values(withdrawn_at=None))

    # ---- the order of the queue ----

    def prioritise(self, order: Iterable[tuple[int, str]]) -> int:
        """Give pairs that wait for a vote their places in the queue, the first one first.

        A pair that was labelled or put on a desk meanwhile keeps its arm and its place, and so does
        one that is not open, or that a user wants sooner or later. All places change at once: who
        is stopped in the middle has changed none.

        Args:
            order: the number and the arm of each pair.

        Returns: how many have a new place.
        """
        places = [
            {"pair": pair, "place": place, "new_arm": arm}
            for place, (pair, arm) in enumerate(order, start=1)
        ]
        places.sort(key=itemgetter("pair"))
        with self._database.writing(self._project) as session:
            session.execute(
                update(Pair)
                .where(Pair.project_id == self._project, Pair.arm == "", Pair.priority > 0)
                .where(Pair.priority < ARRIVED)  # a wish from before wishes were kept apart
                .values(priority=Pair.priority + LATER)
                .execution_options(synchronize_session=False)
            )
            placed = self._move(session, places) if places else 0
            set_marks_back(session, self._project, 0, 0)
        return placed

    def _move(self, session: Session, places: Sequence[Mapping[str, Any]]) -> int:
        """Give what may still be moved its place; everybody waits meanwhile, so by the quickest
        way that a database has."""
        free = [
            *(Pair.project_id == self._project, without_wish()),
            *(Pair.state == "open", Pair.votes == 0, Pair.taken == 0),
        ]
        table, connection = Pair.__table__, session.connection()
        assert isinstance(table, Table)
        if self._database.is_sqlite:
            one = update(table).where(Pair.id == bindparam("pair"), *free)
            moved = one.values(priority=bindparam("place"), arm=bindparam("new_arm"))
            return connection.execute(moved, places).rowcount
        rows = func.json_to_recordset(sql_cast(literal(json.dumps(places), Text), JSON))
        columns = column("pair", BigInteger), column("place", BigInteger), column("new_arm", Text)
        new = rows.table_valued(*columns).render_derived(name="places", with_types=True)
        all_ = update(table).where(Pair.id == new.c.pair, *free)
        return connection.execute(all_.values(priority=new.c.place, arm=new.c.new_arm)).rowcount

    # ---- batches ----

    def batch(self, name: str, kind: str, details: dict[str, object] | None = None) -> int:
        """The batch of this name, made if there is none."""
        with self._database.writing(self._project) as session:
            found = session.scalar(select(Batch).filter_by(project_id=self._project, name=name))
            if found is None:
                found = Batch(
                    project_id=self._project,
                    name=name,
                    kind=kind,
                    details=details or {},
                    created_at=now(),
                )
                session.add(found)
                session.flush()
            return found.id

    def withdraw(self, batch: int) -> None:
        """Ask nobody about the pairs of a batch any more, unless another batch has them too.

        Votes stay, and so does what is on somebody's desk.
        """
        with self._database.writing(self._project) as session:
            session.execute(update(Batch).where(Batch.id == batch).values(withdrawn_at=now()))
            other, others = aliased(BatchPair), aliased(Batch)
            still_asked = exists().where(
                other.pair_id == Pair.id,
                others.id == other.batch_id,
                others.id != batch,
                others.withdrawn_at.is_(None),
            )
            of_batch = select(BatchPair.pair_id).where(BatchPair.batch_id == batch)
            session.execute(
                update(Pair)
                .where(Pair.id.in_(of_batch), Pair.state == "open", ~still_asked)
                .values(state="withdrawn")
                .execution_options(synchronize_session=False)
            )


def _ask(row: _Row, pair: NewPair, swapped: bool) -> None:
    """What a pair on its way in changes of the row."""
    if pair.wanted > 0 and (pair.wanted > row.wanted or row.state == "withdrawn"):
        row.wanted = max(row.wanted, pair.wanted)
        row.wish = pair.priority if row.state == "done" else _sooner(row.wish, pair.priority)
        row.state = "open" if row.votes < row.wanted else "done"
        row.changed = True
    elif pair.wanted > 0 and row.state == "open" and _sooner(row.wish, pair.priority) != row.wish:
        row.wish, row.changed = pair.priority, True
    if pair.gold is not None and not row.gold:
        row.gold = {"vote": EXCHANGED.get(pair.gold, pair.gold) if swapped else pair.gold}


def _prompt_digest(pair: NewPair) -> str:
    # A text that is written as the JSON of messages is another prompt than these messages.
    return digest(type(pair.prompt).__name__, canonical_prompt(pair.prompt))


def _response_digest(answer: Answer) -> str:
    return digest(answer.text, answer.model)


def _sooner(wish: int, other: int) -> int:
    """What is wished when somebody wishes something else; 0 is no wish, and takes none back."""
    return min(wish, other) if other else wish


# ---- what can be kept ----


def check(pair: NewPair) -> None:
    """Refuse what the store or a training could not hold.

    Raises: DataError that names the place.
    """
    prompt = pair.prompt
    if isinstance(prompt, str):
        check_text("the prompt", prompt)
    elif isinstance(prompt, list) and prompt:
        for message in prompt:
            if not isinstance(message, dict) or set(message) != {"role", "content"}:
                raise DataError("a message of the prompt is not {role: ..., content: ...}")
            check_text("the role of a message", message["role"])
            check_text("a message of the prompt", message["content"])
    else:
        raise DataError("the prompt is neither text nor a list of messages")
    for name, answer in (("answer a", pair.a), ("answer b", pair.b)):
        check_text(name, answer.text)
        for what in ("model", "source", "licence"):
            check_text(f"the {what} of {name}", getattr(answer, what))
        _check_json(f"the sampling settings of {name}", answer.sampling)
    check_text("the source of the prompt", pair.source)
    check_text("the licence of the prompt", pair.licence)
    check_kept(pair.kept)
    if pair.gold not in (None, "a", "b", "tie"):
        raise DataError(f"the right answer is {pair.gold!r}; it can be a, b or tie")
    for what, number, least in (("wanted", pair.wanted, 0), ("priority", pair.priority, 1 - 2**31)):
        if not isinstance(number, int) or not least <= number < PRIORITIES:
            raise DataError(f"`{what}` of a pair is {number!r}; it is a whole number from {least}")


def check_text(what: str, text: object) -> None:
    """Refuse what is no text, or cannot be written as UTF-8.

    Raises: DataError.
    """
    if not isinstance(text, str):
        raise DataError(f"{what} is of type {type(text).__name__}; it has to be text")
    if not writable(text):
        raise DataError(f"{what} is broken text: it has half of a surrogate pair")


def check_kept(kept: Mapping[str, str]) -> None:
    """Refuse kept columns that would hide those of a vote.

    Raises: DataError.
    """
    for name, value in kept.items():
        check_text("the name of a kept column", name)
        check_text(f"the kept column '{name}'", value)
        if name in COLUMNS["preferences"]:
            raise DataError(
                f"a column '{name}' cannot be kept beside the votes, which have one of that name; "
                "rename it"
            )


def _check_json(what: str, value: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} cannot be written as JSON: {error}") from error
    check_text(what, text)
