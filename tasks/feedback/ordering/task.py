"""The order of a queue as a task of a flow."""

from getpass import getuser

from prefect import task

from tasks.feedback.ordering.ordering import order_project
from tasks.feedback.ordering.outcome import QueueOrder
from tasks.feedback.ordering.publish import publish_order
from tasks.feedback.store.store import Store
from tasks.record.record import Record
from tasks.registry.refs import ModelRef
from tasks.settings import read_settings


@task(name="order-queue", task_run_name="order the queue of {project}")
def order_queue(project: str, model: ModelRef | None = None) -> QueueOrder:
    """Put the queue of a feedback project in order, and log what the order has saved.

    Args:
        model: whose features to use; None = the newest reward model of the pipeline of this name.

    Raises: DataError when there is no such feedback project, ModelError for a model that does not
        exist or is no reward model.
    """
    settings = read_settings()
    record = Record.open(settings, patient=True)
    store = Store.open(settings)
    try:
        order = order_project(store.project(project), record, by=getuser(), model=model)
    finally:
        store.close()
    publish_order(project, order, record)
    return order
