"""A person for tests, who labels through the queue of the preference store as the page does."""

import uuid
from collections.abc import Callable

from tasks.feedback.store.records import Task, Vote
from tasks.feedback.store.store import FeedbackProject, Store


def invited(store: Store, project: FeedbackProject, name: str = "Ada") -> int:
    """The number of a new annotator, who came in by an invitation and agreed to the text."""
    session = store.door.enter(project.people.invite(name=name))
    return store.door.who(session).annotator


def by_length(task: Task) -> str:
    """The longer answer is better."""
    left, right = len(task.left), len(task.right)
    return "tie" if left == right else "left" if left > right else "right"


def label(
    project: FeedbackProject,
    annotator: int,
    choose: Callable[[Task], str] = by_length,
    most: int = 10_000,
) -> list[Task]:
    """Vote on what is on the desk until nothing is left."""
    done: list[Task] = []
    while len(done) < most and (desk := project.queue.lease(annotator)):
        [task] = desk
        vote = Vote(choice=choose(task), key=uuid.uuid4().hex, seconds=3.0)
        project.queue.vote(annotator, task.token, vote)
        done.append(task)
    return done
