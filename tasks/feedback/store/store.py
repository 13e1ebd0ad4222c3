"""The preference store of this installation.

store = Store.open(settings)
project = store.project("demo", make=True)
project.content.add(pairs)
[task] = project.queue.lease(annotator)
snapshot = project.snapshots.take()
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from sqlalchemy import select

from rlhf_core.errors import DataError
from tasks.feedback.store import audit, clock
from tasks.feedback.store.content import Content
from tasks.feedback.store.database import Database, open_database
from tasks.feedback.store.judgments import Judgments
from tasks.feedback.store.people import Door, People
from tasks.feedback.store.queue import Queue
from tasks.feedback.store.records import ProjectRules
from tasks.feedback.store.snapshots import Snapshots
from tasks.feedback.store.tables import Project
from tasks.settings import Settings, read_settings


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
        """Change some of the rules."""
        with self.database.writing() as session:
            row = session.get_one(Project, self.id)
            rules = ProjectRules.model_validate({**row.rules, **changes})
            row.rules = rules.model_dump(mode="json")
            audit.note(session, self.id, by, "rules", self.name, changes)
            return rules

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
        with self.database.writing() if make else self.database.reading() as session:
            found = session.scalar(select(Project).filter_by(name=name))
            if found is None and make:
                rules = ProjectRules().model_dump(mode="json")
                found = Project(name=name, rules=rules, created_at=clock.now())
                session.add(found)
                session.flush()
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
