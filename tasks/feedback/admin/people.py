"""Annotators and their links, as an admin sees and changes them. Every change is audited."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import Literal, NamedTuple, TypeAlias

from sqlalchemy import ColumnElement, Select, and_, case, delete, exists, func, or_, select
from sqlalchemy.orm import Session as Transaction
from sqlalchemy.orm import aliased

from rlhf_core.errors import UserError
from tasks.feedback.store import audit, clock
from tasks.feedback.store.people import INVITATION_DAYS
from tasks.feedback.store.records import CHOICES, Role
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import (
    JUDGE,
    Annotator,
    GoldAnswer,
    Identity,
    Invitation,
    Judgment,
    Session,
)

State: TypeAlias = Literal["active", "paused", "left"]
PAGE = 50  # people or links on a page
TIMED = 500  # latest votes of which the median time is taken
MOST_DAYS = 366.0


class Person(NamedTuple):
    """An annotator, with what came of the work. Rates come as counts: so many of so many."""

    id: int
    pseudonym: str
    name: str  # "" = unknown, or forgotten
    email: str
    role: Role
    state: State
    via: str  # page, import, mlflow
    votes: int
    skips: int
    gold_passed: int
    gold: int
    repeats_agreed: int
    repeats: int
    seconds: float | None  # median of the latest votes
    last: datetime | None  # of the last vote


class OpenLink(NamedTuple):
    """An invitation that nobody has used yet."""

    id: int
    role: Role
    name: str
    by: str
    created: datetime
    expires: datetime
    pseudonym: str  # of whom it brings back; "" = a new person


class Roster:
    """The people of a project."""

    def __init__(self, project: FeedbackProject) -> None:
        self._project = project
        self._database = project.database

    # ---- reading ----

    def count(self, search: str = "") -> int:
        """How many people there are, or are called like this."""
        with self._database.reading() as session:
            query = self._people(search).with_only_columns(func.count()).order_by(None)
            return session.scalar(query) or 0

    def people(self, page: int = 0, search: str = "") -> list[Person]:
        """A page of people, in the order in which they came."""
        with self._database.reading() as session:
            query = self._people(search).limit(PAGE).offset(page * PAGE)
            rows = session.execute(query).all()
            ids = [row[0].id for row in rows]
            votes, gold, repeats = _votes(session, ids), _gold(session, ids), _repeats(session, ids)
            made = []
            for row in rows:
                person, identity = row
                count, skips, last = votes.get(person.id, (0, 0, None))
                passed, asked = gold.get(person.id, (0, 0))
                agreed, repeated = repeats.get(person.id, (0, 0))
                made.append(
                    Person(
                        person.id,
                        person.pseudonym,
                        identity.name if identity else "",
                        identity.email if identity else "",
                        person.role,
                        person.state,
                        person.via,
                        count,
                        skips,
                        passed,
                        asked,
                        agreed,
                        repeated,
                        _median_seconds(session, person.id),
                        last,
                    )
                )
            return made

    def _people(self, search: str) -> Select[tuple[Annotator, Identity]]:
        query = (
            select(Annotator, Identity)
            .outerjoin(Identity, Identity.annotator_id == Annotator.id)
            .where(Annotator.project_id == self._project.id, Annotator.via != JUDGE)
            .order_by(Annotator.id)
        )
        if search:
            query = query.where(
                or_(
                    Annotator.pseudonym.icontains(search, autoescape=True),
                    Identity.name.icontains(search, autoescape=True),
                )
            )
        return query

    def find(self, pseudonym: str) -> int:
        """The number of somebody.

        Raises: UserError when nobody has this pseudonym.
        """
        with self._database.reading() as session:
            found = session.scalar(
                select(Annotator.id).filter_by(project_id=self._project.id, pseudonym=pseudonym)
            )
        if found is None:
            raise UserError(
                f"Nobody in the project {self._project.name} is called '{pseudonym}': its page "
                "lists the people."
            )
        return found

    def links(self, page: int = 0) -> list[OpenLink]:
        """A page of the invitations that are still open, newest first."""
        with self._database.reading() as session:
            rows = session.execute(
                self._open_links()
                .add_columns(Annotator.pseudonym)
                .outerjoin(Annotator, Annotator.id == Invitation.annotator_id)
                .order_by(Invitation.id.desc())
                .limit(PAGE)
                .offset(page * PAGE)
            ).all()
            return [
                OpenLink(
                    link.id,
                    link.role,
                    link.name,
                    link.by,
                    link.created_at,
                    link.expires_at,
                    pseudonym or "",
                )
                for link, pseudonym in rows
            ]

    def _open_links(self) -> Select[tuple[Invitation]]:
        return select(Invitation).where(
            Invitation.project_id == self._project.id,
            Invitation.used_at.is_(None),
            Invitation.revoked_at.is_(None),
            Invitation.expires_at > clock.now(),
        )

    # ---- changing ----

    def invite(
        self, *, role: Role, by: str, name: str = "", email: str = "", days: float = INVITATION_DAYS
    ) -> str:
        """The token of a link for somebody new.

        Raises: UserError for a number of days that makes no sense.
        """
        if not 0 < days <= MOST_DAYS:
            raise UserError(f"A link lasts between 0 and {MOST_DAYS:.0f} days; not {days:g}.")
        return self._project.people.invite(role=role, name=name, email=email, by=by, days=days)

    def link_for(self, id_: int, by: str, *, days: float = INVITATION_DAYS) -> str:
        """The token of a link with which somebody comes back as the same person."""
        with self._database.reading() as session:
            person = self._get(session, id_)
            if person.state == "left":
                raise UserError(f"{person.pseudonym} is not let in: let them in again first.")
            role = person.role
        return self._project.people.invite(
            role=role,  # type: ignore[arg-type]
            by=by,
            days=days,
            annotator=id_,
        )

    def own_link(self, name: str, role: Role) -> str:
        """The token of a link for the user of this machine, who is the same person each time."""
        with self._database.reading() as session:
            found = session.scalar(
                select(Annotator.id)
                .join(Identity, Identity.annotator_id == Annotator.id)
                .where(
                    Annotator.project_id == self._project.id,
                    Annotator.role == role,
                    Annotator.state == "active",
                    Identity.name == name,
                )
                .order_by(Annotator.id)
                .limit(1)
            )
        if found is None:
            return self.invite(role=role, by=name, name=name)
        return self.link_for(found, name)

    def revoke(self, link: int, by: str) -> None:
        """Withdraw an invitation that was not used yet."""
        with self._database.writing() as session:
            found = session.get(Invitation, link)
            if found is None or found.project_id != self._project.id:
                raise UserError("There is no such link in this project.")
            if found.used_at is not None:
                raise UserError("This link was used before: pause the person instead.")
            found.revoked_at = clock.now()
            found.name = found.email = ""
            audit.note(session, self._project.id, by, "revoke", str(link))

    def set_state(self, id_: int, state: State, by: str) -> None:
        """Pause somebody, or let them go on; whoever is not let in any more is signed out."""
        with self._database.writing() as session:
            person = self._get(session, id_)
            person.state = state
            if state == "left":
                session.execute(delete(Session).where(Session.annotator_id == id_))
                for link in session.scalars(self._open_links().filter_by(annotator_id=id_)):
                    link.revoked_at = clock.now()
            audit.note(session, self._project.id, by, f"state {state}", person.pseudonym)

    def set_role(self, id_: int, role: Role, by: str) -> None:
        """Make somebody an admin or an annotator; their sessions end, and a new link is needed."""
        with self._database.writing() as session:
            person = self._get(session, id_)
            person.role = role
            session.execute(delete(Session).where(Session.annotator_id == id_))
            audit.note(session, self._project.id, by, f"role {role}", person.pseudonym)

    def sign_out(self, id_: int, by: str) -> None:
        """End all sessions of somebody."""
        with self._database.writing() as session:
            person = self._get(session, id_)
            session.execute(delete(Session).where(Session.annotator_id == id_))
            audit.note(session, self._project.id, by, "sign out", person.pseudonym)

    def forget(self, id_: int, by: str) -> None:
        """Delete the name and address of somebody; the votes stay, with nobody's name."""
        with self._database.reading() as session:
            self._get(session, id_)
        self._project.people.forget(id_, by)

    def _get(self, session: Transaction, id_: int) -> Annotator:
        found = session.get(Annotator, id_)
        if found is None or found.project_id != self._project.id:
            raise UserError("There is no such person in this project.")
        if found.via == JUDGE:
            raise UserError(f"{found.pseudonym} is a machine: it has no name, link or session.")
        return found


def counts() -> ColumnElement[bool]:
    """The condition that no later judgment replaces one."""
    later = aliased(Judgment)
    return ~exists().where(later.replaces_id == Judgment.id)


def _votes(
    session: Transaction, ids: Sequence[int]
) -> Mapping[int, tuple[int, int, datetime | None]]:
    rows = session.execute(
        select(
            Judgment.annotator_id,
            func.sum(case((Judgment.vote.in_(CHOICES), 1), else_=0)),
            func.sum(case((Judgment.vote == "skip", 1), else_=0)),
            func.max(Judgment.at),
        )
        .where(Judgment.annotator_id.in_(ids), counts())
        .group_by(Judgment.annotator_id)
    )
    return {id_: (int(votes), int(skips), last) for id_, votes, skips, last in rows if id_}


def _gold(session: Transaction, ids: Sequence[int]) -> Mapping[int, tuple[int, int]]:
    passed = or_(
        Judgment.vote == GoldAnswer.vote,
        and_(GoldAnswer.vote == "tie", Judgment.vote == "both_bad"),
    )
    rows = session.execute(
        select(Judgment.annotator_id, func.sum(case((passed, 1), else_=0)), func.count())
        .join(GoldAnswer, GoldAnswer.pair_id == Judgment.pair_id)
        .where(
            Judgment.annotator_id.in_(ids),
            Judgment.vote.in_(CHOICES),
            Judgment.kind != "repeat",
            counts(),
        )
        .group_by(Judgment.annotator_id)
    )
    return {id_: (int(good), int(all_)) for id_, good, all_ in rows if id_}


def _repeats(session: Transaction, ids: Sequence[int]) -> Mapping[int, tuple[int, int]]:
    before, later = aliased(Judgment), aliased(Judgment)
    rows = session.execute(
        select(
            Judgment.annotator_id,
            func.sum(case((Judgment.vote == before.vote, 1), else_=0)),
            func.count(),
        )
        .join(
            before,
            and_(
                before.annotator_id == Judgment.annotator_id,
                before.pair_id == Judgment.pair_id,
                before.kind == "fresh",
                before.vote.in_(CHOICES),
                ~exists().where(later.replaces_id == before.id),
            ),
        )
        .where(
            Judgment.annotator_id.in_(ids),
            Judgment.kind == "repeat",
            Judgment.vote.in_(CHOICES),
            counts(),
        )
        .group_by(Judgment.annotator_id)
    )
    return {id_: (int(agreed), int(all_)) for id_, agreed, all_ in rows if id_}


def _median_seconds(session: Transaction, id_: int) -> float | None:
    times = session.scalars(
        select(Judgment.seconds)
        .where(Judgment.annotator_id == id_, Judgment.seconds.is_not(None))
        .order_by(Judgment.id.desc())
        .limit(TIMED)
    ).all()
    return median(time for time in times if time is not None) if times else None
