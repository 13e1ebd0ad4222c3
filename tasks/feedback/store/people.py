"""Annotators: who they are, and how they come in. Links and sessions are kept as digests only."""

import hashlib
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session as Transaction

from rlhf_core.errors import DataError, UserError
from tasks.feedback.store import audit, clock
from tasks.feedback.store.content import check_text
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import Role
from tasks.feedback.store.tables import (
    Annotator,
    Consent,
    Identity,
    Invitation,
    Project,
    Session,
)

INVITATION_DAYS = 14.0
MOST_DAYS = 3660.0
LONGEST_NAME, LONGEST_ADDRESS = 200, 320  # characters
SESSION_HOURS = 12.0
SEEN_EVERY = timedelta(minutes=1)  # how exactly the last use of a session is known


class InvitationError(UserError):
    """A link that does not let anybody in."""


class SignedIn(NamedTuple):
    """Who is behind a session."""

    annotator: int
    pseudonym: str
    role: Role
    state: str
    project: int
    csrf: str


class InvitedTo(NamedTuple):
    """What an invitation is to."""

    project: str
    role: Role
    expires: datetime


class People:
    """The annotators of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id

    def invite(
        self,
        *,
        role: Role = "annotator",
        name: str = "",
        email: str = "",
        by: str = "",
        days: float = INVITATION_DAYS,
        annotator: int | None = None,
    ) -> str:
        """The token of a link that lets one person in, once.

        Args:
            annotator: somebody who comes back; None = a new one.

        Raises: DataError for a name, an address or a time that cannot be.
        """
        check_text("the name of a person", name)
        check_text("an address", email)
        if len(name) > LONGEST_NAME or len(email) > LONGEST_ADDRESS:
            raise DataError(
                f"the name or the address of a person is longer than {LONGEST_NAME} or "
                f"{LONGEST_ADDRESS} characters"
            )
        if not 0 < days <= MOST_DAYS:
            raise DataError(f"a link lasts between 0 and {MOST_DAYS:,.0f} days; not {days:g}")
        token = secrets.token_urlsafe(32)
        with self._database.writing(self._project) as session:
            if annotator is not None:
                self._get(session, annotator)
            session.add(
                Invitation(
                    project_id=self._project,
                    token_digest=token_digest(token),
                    role=role,
                    name=name,
                    email=email,
                    by=by,
                    created_at=clock.now(),
                    expires_at=clock.now() + timedelta(days=days),
                    annotator_id=annotator,
                )
            )
            audit.note(session, self._project, by, "invite", role)
        return token

    def agree(self, annotator_id: int, *, version: str, text: str, licence: str) -> None:
        """Keep that somebody agreed to a text."""
        with self._database.writing() as session:
            session.add(
                Consent(
                    annotator_id=annotator_id,
                    version=version,
                    digest=hashlib.sha256(text.encode()).hexdigest(),
                    licence=licence,
                    at=clock.now(),
                )
            )

    def has_agreed(self, annotator_id: int, version: str) -> bool:
        """Whether somebody agreed to this version."""
        with self._database.reading() as session:
            return bool(
                session.scalar(
                    select(Consent.id)
                    .filter_by(annotator_id=annotator_id, version=version)
                    .limit(1)
                )
            )

    def forget(self, annotator_id: int, by: str) -> None:
        """Delete who is behind a pseudonym, wherever it is written; the votes stay.

        That is the name and the address, also in links that wait for the same person. What the
        person wrote in notes stays, and so does the pseudonym.
        """
        with self._database.writing(self._project) as session:
            self._get(session, annotator_id)
            identity = session.get(Identity, annotator_id)
            same = [Invitation.annotator_id == annotator_id]
            if identity is not None and identity.email:
                same.append(func.lower(Invitation.email) == identity.email.lower())
            elif identity is not None and identity.name:
                same.append((Invitation.name == identity.name) & (Invitation.email == ""))
            session.execute(
                update(Invitation)
                .where(Invitation.project_id == self._project, or_(*same))
                .values(name="", email="")
                .execution_options(synchronize_session=False)
            )
            session.execute(delete(Identity).where(Identity.annotator_id == annotator_id))
            audit.note(session, self._project, by, "forget", str(annotator_id))
        self._database.erase("identities", "invitations")

    def _get(self, session: Transaction, annotator_id: int) -> Annotator:
        person = session.get(Annotator, annotator_id)
        if person is None or person.project_id != self._project:
            raise DataError("there is no such person in this project")
        return person


class Door:
    """Lets people in, whatever their project."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def enter(self, token: str, *, hours: float = SESSION_HOURS) -> str:
        """Use an invitation: a session begins.

        Returns: the token of the session.

        Raises: InvitationError when the link is unknown, used, revoked or too old.
        """
        link = select(Invitation).filter_by(token_digest=token_digest(token))
        with self._database.writing() as session:
            project = session.scalar(link.with_only_columns(Invitation.project_id))
            if project is not None:
                self._database.take_turn(session, project)
            found = session.scalar(link)
            if found is None or found.used_at or found.revoked_at:
                raise InvitationError("This link was used before, or there is no such link.")
            if found.expires_at < clock.now():
                raise InvitationError("This link has expired; ask for a new one.")
            found.used_at = clock.now()
            if found.annotator_id is None:
                found.annotator_id = self._newcomer(session, found)
            session.execute(delete(Session).where(Session.expires_at < clock.now()))
            browser = secrets.token_urlsafe(32)
            session.add(
                Session(
                    token_digest=token_digest(browser),
                    annotator_id=found.annotator_id,
                    csrf=secrets.token_urlsafe(24),
                    created_at=clock.now(),
                    seen_at=clock.now(),
                    expires_at=clock.now() + timedelta(hours=hours),
                )
            )
            return browser

    def who(self, token: str, *, idle: Mapping[str, timedelta] | None = None) -> SignedIn | None:
        """Who is behind a session; None if it is unknown or has expired.

        Args:
            idle: by role, how long a session lasts that nobody uses.
        """
        with self._database.reading() as session:
            row = session.execute(
                select(Session, Annotator)
                .join(Annotator, Annotator.id == Session.annotator_id)
                .where(Session.token_digest == token_digest(token))
            ).first()
            if row is None or row[0].expires_at < clock.now() or row[1].state == "left":
                return None
            browser, person = row
            unused = clock.now() - browser.seen_at
            if idle and unused > idle[person.role]:
                return None
            found = SignedIn(
                person.id, person.pseudonym, person.role, person.state, person.project_id,
                browser.csrf,
            )  # fmt: skip
        if unused > SEEN_EVERY:
            self._seen(token)
        return found

    def _seen(self, token: str) -> None:
        with self._database.writing() as session:
            session.execute(
                update(Session)
                .where(Session.token_digest == token_digest(token))
                .values(seen_at=clock.now())
            )

    def look(self, token: str) -> InvitedTo:
        """What an invitation is to, without using it.

        Raises: InvitationError when the link is unknown, used, revoked or too old.
        """
        with self._database.reading() as session:
            row = session.execute(
                select(Invitation, Project.name)
                .join(Project, Project.id == Invitation.project_id)
                .where(Invitation.token_digest == token_digest(token))
            ).first()
            found = None if row is None else row[0]
            if row is None or found is None:
                raise InvitationError("There is no such link. Check that it was copied whole.")
            if found.revoked_at:
                raise InvitationError("This link was withdrawn. Ask for a new one.")
            if found.used_at:
                raise InvitationError(
                    "This link was used before, and each link lets in one browser. If that was "
                    "you, go on in that browser; else ask for a new link."
                )
            if found.expires_at < clock.now():
                raise InvitationError("This link has expired. Ask for a new one.")
            return InvitedTo(row[1], found.role, found.expires_at)

    def is_own(self, token: str, annotator_id: int) -> bool:
        """Whether an invitation let in this very person."""
        with self._database.reading() as session:
            owner = session.scalar(
                select(Invitation.annotator_id).filter_by(token_digest=token_digest(token))
            )
            return owner == annotator_id

    def leave(self, token: str) -> None:
        """End a session."""
        with self._database.writing() as session:
            session.execute(delete(Session).where(Session.token_digest == token_digest(token)))

    def _newcomer(self, session: Transaction, invitation: Invitation) -> int:
        count = session.scalar(
            select(func.count()).select_from(Annotator).filter_by(project_id=invitation.project_id)
        )
        person = Annotator(
            project_id=invitation.project_id,
            pseudonym=f"p{(count or 0) + 1:03d}-{secrets.token_hex(2)}",
            role=invitation.role,
            state="active",
            created_at=clock.now(),
        )
        session.add(person)
        session.flush()
        if invitation.name or invitation.email:
            session.add(
                Identity(
                    annotator_id=person.id,
                    name=invitation.name,
                    email=invitation.email,
                    at=clock.now(),
                )
            )
            invitation.name = invitation.email = ""
        return person.id


def token_digest(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()
