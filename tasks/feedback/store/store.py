"""The preference store of this installation.

store = Store.open(settings)
project = store.project("demo", make=True)
project.content.add(pairs)
[task] = project.queue.lease(annotator)
snapshot = project.snapshots.take()
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Self

from pydantic import ValidationError
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from rlhf_core.errors import ConfigError, DataError
from tasks.feedback.store import audit, clock
from tasks.feedback.store.content import Content
from tasks.feedback.store.database import Database, open_database
from tasks.feedback.store.gold import Gold
from tasks.feedback.store.judgments import Judgments
from tasks.feedback.store.people import Door, People
from tasks.feedback.store.queue import Queue
from tasks.feedback.store.records import ProjectRules
from tasks.feedback.store.snapshots import Snapshots
from tasks.feedback.store.tables import Annotator, AuditEntry, Consent, Pair, Project, Snapshot
from tasks.settings import Settings, read_settings

LONGEST_NAME = 100  # of a project


class ProjectSummary(NamedTuple):
    """A project, and what is in it."""

    name: str
    pairs: int
    votes: int  # without control questions and repeats
    missing: int  # votes until all open pairs are done
    snapshots: int
    paused: bool


class FeedbackProject:
    """What people are asked about under one name; usually that of a pipeline's project."""

    def __init__(self, database: Database, id_: int, name: str) -> None:
        self.database, self.id, self.name = database, id_, name

    @property
    def rules(self) -> ProjectRules:
        """The rules as they are now."""
        with self.database.reading() as session:
            return ProjectRules.model_validate(session.get_one(Project, self.id).rules)

    def change(self, by: str, changes: Mapping[str, Any]) -> ProjectRules:
        """Change some of the rules.

        Raises: ConfigError for rules that cannot be.
        """
        with self.database.writing(self.id) as session:
            row = session.get_one(Project, self.id)
            rules = _rules(row.rules, changes)
            if _is_other_text(row.rules, rules) and self._is_agreed(session, rules):
                raise ConfigError(
                    "people have agreed to the text of this consent_version: give the new text "
                    "or licence another consent_version, so that they are asked again"
                )
            row.rules = rules.model_dump(mode="json")
            audit.note(session, self.id, by, "rules", self.name, changes)
            return rules

    def _is_agreed(self, session: Session, rules: ProjectRules) -> bool:
        query = select(Consent.id).join(Annotator, Annotator.id == Consent.annotator_id)
        query = query.filter(
            Annotator.project_id == self.id, Consent.version == rules.consent_version
        )
        return session.scalar(query.limit(1)) is not None

    def log(self, limit: int | None = None) -> Iterator[AuditEntry]:
        """Who changed what, newest first."""
        return audit.entries(self.database, self.id, limit)

    @cached_property
    def gold(self) -> Gold:
        """Pairs whose right answer is known."""
        return Gold(self.database, self.id)

    @cached_property
    def content(self) -> Content:
        """Prompts, responses and pairs."""
        return Content(self.database, self.id)

    @cached_property
    def queue(self) -> Queue:
        """Tasks and votes."""
        return Queue(self.database, self.id)

    @cached_property
    def judgments(self) -> Judgments:
        """Votes cast elsewhere, and all that count."""
        return Judgments(self.database, self.id)

    @cached_property
    def people(self) -> People:
        """Annotators."""
        return People(self.database, self.id)

    @cached_property
    def snapshots(self) -> Snapshots:
        """Snapshots."""
        return Snapshots(self.database, self.id, self.name)


class Store:
    """All projects, and the door to them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.door = Door(database)

    @classmethod
    def open(cls, settings: Settings | None = None) -> Self:
        """The store that RLHF_FEEDBACK_DATABASE names, or the SQLite file under the home."""
        settings = settings or read_settings()
        return cls(open_database(settings.feedback_uri))

    def project(self, name: str, *, make: bool = False) -> FeedbackProject:
        """A project by its name.

        Raises: DataError when there is none, unless it may be made.
        """
        if make:
            check_name(name)
        with self.database.writing() if make else self.database.reading() as session:
            query = select(Project).filter_by(name=name)
            found = session.scalar(query)
            if found is None and make:
                values = {
                    "name": name,
                    "rules": ProjectRules().model_dump(mode="json"),
                    "created_at": clock.now(),
                }
                insert = sqlite_insert if self.database.is_sqlite else postgresql_insert
                # somebody else may make it at the same time
                session.execute(insert(Project).values(values).on_conflict_do_nothing())
                found = session.scalar(query)
            if found is None:
                known = session.scalars(select(Project.name).order_by(Project.name)).all()
                there = f"there are: {', '.join(known)}" if known else "there is none yet"
                raise DataError(
                    f"there is no feedback project '{name}' ({there}); "
                    f"`rlhf feedback import {name} FILE` or `rlhf ask {name}` makes it"
                )
            return FeedbackProject(self.database, found.id, found.name)

    def by_id(self, id_: int) -> FeedbackProject:
        """A project by its number."""
        with self.database.reading() as session:
            return FeedbackProject(self.database, id_, session.get_one(Project, id_).name)

    def names(self) -> list[str]:
        """The names of all projects."""
        with self.database.reading() as session:
            return list(session.scalars(select(Project.name).order_by(Project.name)))

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def summaries(self) -> list[ProjectSummary]:
        """All projects, with what is in them."""
        with self.database.reading() as session:
            pairs = dict(
                session.execute(select(Pair.project_id, func.count()).group_by(Pair.project_id))
                .tuples()
                .all()
            )
            votes = dict(
                session.execute(
                    select(Pair.project_id, func.sum(Pair.votes)).group_by(Pair.project_id)
                )
                .tuples()
                .all()
            )
            taken = dict(
                session.execute(
                    select(Snapshot.project_id, func.count()).group_by(Snapshot.project_id)
                )
                .tuples()
                .all()
            )
            missing = dict(
                session.execute(
                    select(Pair.project_id, func.sum(Pair.wanted - Pair.votes))
                    .where(Pair.state == "open")
                    .group_by(Pair.project_id)
                )
                .tuples()
                .all()
            )
            return [
                ProjectSummary(
                    row.name,
                    pairs.get(row.id, 0),
                    int(votes.get(row.id) or 0),
                    int(missing.get(row.id) or 0),
                    taken.get(row.id, 0),
                    bool(row.rules.get("paused")),
                )
                for row in session.scalars(select(Project).order_by(Project.name))
            ]


def check_name(name: str) -> None:
    """Refuse a name of a project that a terminal, a page or an address could not show.

    Raises: DataError.
    """
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable() or name != name.strip():
        raise DataError(
            f"a feedback project cannot be called {name[:120]!r}: a name has 1 to {LONGEST_NAME} "
            "printable characters, and no space at its ends"
        )


def _rules(old: Mapping[str, Any], changes: Mapping[str, Any]) -> ProjectRules:
    try:
        return ProjectRules.model_validate({**old, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"the rule '{where}' cannot be so: {first['msg']}") from None


def _is_other_text(old: Mapping[str, Any], rules: ProjectRules) -> bool:
    before = ProjectRules.model_validate(old)
    return (before.consent, before.licence) != (rules.consent, rules.licence)
