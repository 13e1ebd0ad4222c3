"""`rlhf feedback order`."""

from getpass import getuser

from flows.cli.printing import line
from tasks.feedback.ordering.ordering import order_project
from tasks.feedback.ordering.publish import publish_order
from tasks.feedback.store.store import Store
from tasks.record.record import Record
from tasks.settings import read_settings


def put_in_order(name: str, model: str) -> None:
    """Put a queue in order, log what the order saves, and say it.

    Args:
        model: models:/NAME/VERSION or models:/NAME@ALIAS; "" = the newest of the project.
    """
    settings = read_settings()
    record = Record.open(settings)
    project = Store.open(settings).project(name)
    ref = record.store.resolve(model) if model else None
    found = order_project(project, record, by=getuser(), model=ref)
    publish_order(name, found, record)
    line(f"{found.placed:,} pairs in order. {found.sentence}")
