"""Pairs whose right answer is known: they are asked now and then as control questions."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from sqlalchemy import delete, exists, func, insert, select
from sqlalchemy.orm import Session, aliased

from rlhf_core.errors import ConfigError, DataError
from tasks.feedback.store import audit, clock
from tasks.feedback.store.content import EXCHANGED, Content, check, check_text, chunks
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import CHOICES, Answer, NewPair
from tasks.feedback.store.tables import MACHINE, GoldAnswer, Judgment, Pair

GoldVote: TypeAlias = Literal["a", "b", "tie"]
CHUNK = 500


class KnownAnswer(NamedTuple):
    """The right answer to a pair, and why it is right."""

    pair: NewPair
    vote: GoldVote
    reason: str = ""


class Marked(NamedTuple):
    """What became of known answers."""

    new: int
    changed: int  # another answer was known to be right before
    same: int


class Gold:
    """The known answers of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id

    def count(self) -> int:
        """How many pairs have a known answer."""
        with self._database.reading() as session:
            return (
                session.scalar(
                    select(func.count())
                    .select_from(GoldAnswer)
                    .join(Pair, Pair.id == GoldAnswer.pair_id)
                    .where(Pair.project_id == self._project)
                )
                or 0
            )

    def mark(self, answers: Iterable[KnownAnswer], by: str) -> Marked:
        """Say what is right, of pairs that are put in if they are new. A later word counts.

        Snapshots that were taken keep what was right then.

        Raises: DataError for an answer that is none, or a pair that cannot be kept.
        """
        content = Content(self._database, self._project)
        total = Marked(0, 0, 0)
        for some in chunks(answers, CHUNK):
            for answer in some:
                check_answer(answer)
            with self._database.writing(self._project) as session:
                placed = content.put(session, [answer.pair for answer in some])
                rows = {
                    there.id: (
                        EXCHANGED.get(answer.vote, answer.vote) if there.swapped else answer.vote,
                        answer.reason,
                    )
                    for there, answer in zip(placed, some, strict=True)
                }
                done = self._save(session, rows, by)
            total = Marked(*(one + more for one, more in zip(total, done, strict=True)))
        self._note(by, total)
        return total

    def mark_agreed(self, by: str, *, votes: int = 3, share: float = 1.0) -> Marked:
        """Take for right what annotators agree on.

        Args:
            votes: a pair needs so many, of different annotators.
            share: of them, that have to say the same; over one half.

        Raises: ConfigError for numbers that make no sense.
        """
        if votes < 2 or not 0.5 < share <= 1:
            raise ConfigError("agreement takes at least 2 votes, and a share over 0.5 and up to 1")
        later = aliased(Judgment)
        query = (
            select(Judgment.pair_id, Judgment.vote, func.count(Judgment.annotator_id.distinct()))
            .where(
                Judgment.project_id == self._project,
                Judgment.vote.in_(CHOICES),
                Judgment.kind.not_in(("repeat", MACHINE)),
                Judgment.annotator_id.is_not(None),
                ~exists().where(later.replaces_id == Judgment.id),
                ~exists().where(GoldAnswer.pair_id == Judgment.pair_id),
            )
            .group_by(Judgment.pair_id, Judgment.vote)
        )
        counts: dict[int, dict[str, int]] = {}
        with self._database.reading() as session:
            for pair, vote, number in session.execute(query):
                said = "tie" if vote == "both_bad" else vote
                of_pair = counts.setdefault(pair, {})
                of_pair[said] = of_pair.get(said, 0) + number
        agreed = {
            pair: (max(said, key=lambda vote: said[vote]), f"{max(said.values())} agreed")
            for pair, said in counts.items()
            if sum(said.values()) >= votes and max(said.values()) >= share * sum(said.values())
        }
        total = Marked(0, 0, 0)
        for some in chunks(agreed.items(), CHUNK):
            with self._database.writing(self._project) as session:
                done = self._save(session, dict(some), by)
            total = Marked(*(one + more for one, more in zip(total, done, strict=True)))
        self._note(by, total)
        return total

    def _save(self, session: Session, rows: dict[int, tuple[str, str]], by: str) -> Marked:
        known = {
            row.pair_id: row.vote
            for row in session.execute(
                select(GoldAnswer.pair_id, GoldAnswer.vote).where(
                    GoldAnswer.pair_id.in_(list(rows))
                )
            )
        }
        changed = [pair for pair in known if known[pair] != rows[pair][0]]
        if changed:
            session.execute(
                delete(GoldAnswer)
                .where(GoldAnswer.pair_id.in_(changed))
                .execution_options(synchronize_session=False)
            )
        written = [pair for pair in rows if pair not in known or pair in set(changed)]
        if written:
            at = clock.now()
            session.execute(
                insert(GoldAnswer),
                [
                    {
                        "pair_id": pair,
                        "vote": rows[pair][0],
                        "reason": rows[pair][1],
                        "by": by,
                        "at": at,
                    }
                    for pair in written
                ],
            )
        return Marked(len(rows) - len(known), len(changed), len(known) - len(changed))

    def _note(self, by: str, total: Marked) -> None:
        with self._database.writing() as session:
            details = {"new": total.new, "changed": total.changed}
            audit.note(session, self._project, by, "gold", "", details)


def read_answers(path: Path) -> Iterator[KnownAnswer]:
    """Known answers from JSON lines: prompt, response_a, response_b, right, and perhaps reason.

    Raises: DataError that names the line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, start=1):
                if text.strip():
                    yield _answer(text, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def _answer(text: str, place: str) -> KnownAnswer:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: it is no JSON ({error})") from error
    needed = {"prompt", "response_a", "response_b", "right"}
    if not isinstance(row, dict) or not needed <= row.keys() <= needed | {"reason"}:
        raise DataError(
            f"{place}: a line has prompt, response_a, response_b, right, and perhaps a reason"
        )
    pair = NewPair(row["prompt"], Answer(row["response_a"]), Answer(row["response_b"]))
    answer = KnownAnswer(pair, row["right"], row.get("reason", ""))
    try:
        check_answer(answer)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    return answer


def check_answer(answer: KnownAnswer) -> None:
    """Refuse what is no known answer.

    Raises: DataError.
    """
    if answer.vote not in ("a", "b", "tie"):
        raise DataError(f"{answer.vote!r} is no right answer; it can be a, b or tie")
    check_text("the reason of a known answer", answer.reason)
    check(answer.pair)
