"""What `rlhf feedback import` and its like do: options into settings, results into lines."""

from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from typing import TYPE_CHECKING, Any

from flows.cli.printing import line
from rlhf_core.errors import UserError
from tasks.settings import read_settings

if TYPE_CHECKING:
    from tasks.feedback.forms.options import ExportOptions, ImportOptions, Progress
    from tasks.feedback.forms.tools.review_queues import ReviewQueues


def settings(option: str, given: list[str], *, many: bool = False) -> dict[str, Any]:
    """`OURS=THEIRS` options as a mapping, with `many` to lists of values.

    Raises: UserError for one that has not this form, and for one that is given twice.
    """
    found: dict[str, Any] = {}
    for text in given:
        ours, equals, theirs = (part.strip() for part in text.partition("="))
        if not ours or not equals or not theirs:
            raise UserError(f"{option} takes OURS=THEIRS, not '{text}'.")
        if many:
            found.setdefault(ours, []).append(theirs)
        elif found.setdefault(ours, theirs) != theirs:
            raise UserError(f"{option} maps '{ours}' twice; remove one.")
    return found


def put_in(project: str, file: str, options: "ImportOptions") -> None:
    """Import a file, and print what became of it."""
    from tasks.feedback.forms.incoming import import_checked
    from tasks.feedback.store.store import Store

    store = Store.open(read_settings())
    with _progress("import") as progress:
        found = import_checked(
            lambda: store.project(project, make=True), file, options, progress=progress
        )
    for text in found.lines():
        line(text)


def write(project: str, file: str, options: "ExportOptions") -> None:
    """Export to a file, and print what became of it."""
    from tasks.feedback.forms.outgoing import export_file
    from tasks.feedback.store.store import Store

    found_project = Store.open(read_settings()).project(project)
    with _progress("export") as progress:
        found = export_file(found_project, file, options, progress=progress)
    for text in found.lines():
        line(text)


def push_pairs(project: str, reviewers: list[str], pairs: int, days: float) -> None:
    """Push pairs to MLflow, and print what became of them."""
    found = _queues(project).push(reviewers, pairs, days=days, by=getuser())
    for text in found.lines():
        line(text)


def pull_votes(project: str) -> None:
    """Pull choices from MLflow, and print what became of them."""
    for text in _queues(project).pull(by=getuser()).lines():
        line(text)


def _queues(project: str) -> "ReviewQueues":
    from tasks.feedback.forms.tools.review_queues import ReviewQueues
    from tasks.feedback.store.store import Store

    settings = read_settings()
    return ReviewQueues(Store.open(settings).project(project), settings)


@contextmanager
def _progress(title: str) -> Iterator["Progress"]:
    from tasks.record.terminal import TerminalDisplay

    display = TerminalDisplay(title, passing=True)
    try:
        yield lambda done, total: display.show(done, total, "")
    finally:
        display.close()
