"""Requests to erase somebody: one row each in the preference store, which says how far it is.

While a request is open its row has the pseudonym, since everything has to be searched for it. Once
it is finished the row has a hash instead: HMAC-SHA256 of the pseudonym, with a code as the key that
only the person has. Without the code nobody can find out who it was, by guessing neither.
"""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from rlhf_core.data.prepared import JUDGE
from rlhf_core.errors import DataError
from tasks.feedback.store import audit, clock
from tasks.feedback.store.store import FeedbackProject, Store
from tasks.feedback.store.tables import Annotator, Erasure, Project

CODE_BYTES = 15
NOBODY = "(erased)"  # stands where a pseudonym stood


@dataclass(frozen=True)
class Request:
    """A request to erase somebody, as it is in the store now."""

    id: int
    project: FeedbackProject
    annotator: int | None
    pseudonym: str | None  # None once it is finished
    code: str | None
    mark: str
    by: str
    begun_at: datetime
    finished_at: datetime | None
    steps: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called wherever the pseudonym must not be."""
        return f"erasure {self.id} of the project {self.project.name}"


def mark_of(pseudonym: str, code: str) -> str:
    """What the certificate has in place of a pseudonym."""
    return hmac.new(code.encode(), pseudonym.encode(), hashlib.sha256).hexdigest()


def begin(store: Store, pseudonym: str, project: str, by: str) -> Request:
    """The open request of a person, made if there is none.

    Args:
        project: where the person is; "" = the only project that has this pseudonym.

    Raises: DataError when nobody is called so, or somebody in several projects is.
    """
    where, annotator = known(store, pseudonym, project)
    id_ = where.id
    with store.database.writing(id_) as session:
        row = session.scalar(
            select(Erasure).filter_by(project_id=id_, pseudonym=pseudonym, finished_at=None)
        )
        if row is None:
            code = base64.b32encode(secrets.token_bytes(CODE_BYTES)).decode().lower()
            row = Erasure(
                project_id=id_,
                annotator_id=annotator,
                pseudonym=pseudonym,
                code=code,
                mark=mark_of(pseudonym, code),
                by=by if by != pseudonym else NOBODY,
                steps={},
                begun_at=clock.now(),
            )
            session.add(row)
            session.flush()
            audit.note(session, id_, row.by, "erase", f"erasure {row.id}")
        number = row.id
    return read(store, number)


def known(store: Store, pseudonym: str, project: str) -> tuple[FeedbackProject, int | None]:
    """The project and the number of somebody, who may be half erased.

    Raises: DataError when nobody is called so, or somebody in several projects is, or it is a
        judge, which is nobody.
    """
    if pseudonym.startswith(JUDGE):
        raise DataError(
            f"'{pseudonym}' is a judge and no person: its votes are answers of a model or a rule, "
            "and are nobody's to be erased"
        )
    if project:
        store.project(project)
    with store.database.reading() as session:
        found = _known(session, pseudonym, project)
        if not found:
            raise DataError(_nobody(session, pseudonym, project))
        if len(found) > 1:
            names = ", ".join(sorted(name for _, name, _ in found))
            raise DataError(
                f"'{pseudonym}' is somebody in each of the projects {names}, and these need not be "
                "the same person: say with --project whom you mean"
            )
    [(id_, _, annotator)] = found
    return store.by_id(id_), annotator


def read(store: Store, number: int) -> Request:
    """A request by its number.

    Raises: DataError when there is none.
    """
    with store.database.reading() as session:
        row = session.get(Erasure, number)
        if row is None:
            raise DataError(
                f"there is no erasure {number} in the preference store: `rlhf erase PSEUDONYM` "
                "begins one"
            )
        return Request(
            row.id,
            store.by_id(row.project_id),
            row.annotator_id,
            row.pseudonym,
            row.code,
            row.mark,
            row.by,
            row.begun_at,
            row.finished_at,
            dict(row.steps),
        )


def still_open(store: Store) -> list[int]:
    """The numbers of the requests that are not finished, the oldest first."""
    with store.database.reading() as session:
        query = select(Erasure.id).where(Erasure.finished_at.is_(None)).order_by(Erasure.id)
        return list(session.scalars(query))


def note(store: Store, request: Request, step: str, facts: Mapping[str, Any]) -> Request:
    """Keep that a step is done, and what came of it."""
    with store.database.writing(request.project.id) as session:
        row = session.get_one(Erasure, request.id)
        done = {"at": clock.now().isoformat(timespec="seconds"), **facts}
        row.steps = {**row.steps, step: done}
    return read(store, request.id)


def finish(store: Store, request: Request) -> Request:
    """Forget the pseudonym and the code; nothing in the store names the person from now on."""
    with store.database.writing(request.project.id) as session:
        row = session.get_one(Erasure, request.id)
        row.pseudonym = row.code = row.annotator_id = None
        row.finished_at = row.finished_at or clock.now()
    return read(store, request.id)


def _known(session: Session, pseudonym: str, project: str) -> list[tuple[int, str, int | None]]:
    """Who is called so, or is being erased: number and name of the project, and of the person."""
    people = (
        select(Project.id, Project.name, Annotator.id)
        .join(Annotator, Annotator.project_id == Project.id)
        .where(Annotator.pseudonym == pseudonym)
    )
    begun = (
        select(Project.id, Project.name, Erasure.annotator_id)
        .join(Erasure, Erasure.project_id == Project.id)
        .where(Erasure.pseudonym == pseudonym, Erasure.finished_at.is_(None))
    )
    rows = [*session.execute(people), *session.execute(begun)]
    found = {row[0]: (row[0], row[1], row[2]) for row in rows if project in ("", row[1])}
    return list(found.values())


def _nobody(session: Session, pseudonym: str, project: str) -> str:
    where = f"in the feedback project '{project}'" if project else "in any feedback project"
    done = session.scalars(select(Erasure.id).where(Erasure.finished_at.is_not(None))).all()
    erased = (
        f"; erasures finished so far: {len(done)}; their certificates are in RLHF_HOME/erasures"
        if done
        else ""
    )
    return f"nobody {where} is called '{pseudonym}'{erased}"
