"""The order of a queue as a task of a flow, and after people were asked."""

import logging
from collections.abc import Callable
from getpass import getuser

from prefect import task

from rlhf_core.errors import UserError
from tasks.feedback.asking.votes import opened
from tasks.feedback.ordering.outcome import QueueOrder
from tasks.feedback.ordering.publish import publish_order
from tasks.record.record import Record
from tasks.registry.refs import ModelRef
from tasks.settings import Settings, read_settings

log = logging.getLogger(__name__)


def put_in_order(project: str, settings: Settings, model: ModelRef | None = None) -> QueueOrder:
    """Put the queue of a feedback project in order, and log what the order has saved.

    Args:
        model: whose features to use; None = the newest reward model of the project.

    Raises: DataError when there is no such feedback project, ModelError for a model that does not
        exist or is no reward model; StoreError.
    """
    from tasks.feedback.ordering.ordering import order_project  # with what computes

    record = Record.open(settings)
    with opened(settings) as store:
        found = store.project(project)
        order = order_project(found, record, by=getuser(), model=model, device=settings.device)
        try:
            publish_order(found, order, record)
        except Exception as error:
            log.warning("the queue of %s is in order, but MLflow does not show what that saves "
                        "(%s)", project, error)  # fmt: skip
    return order


@task(name="order-queue", task_run_name="order the queue of {project}")
def order_queue(project: str, model: ModelRef | None = None) -> QueueOrder:
    """The same as a task of a flow."""
    order = put_in_order(project, read_settings(), model)
    log.info("%s", order.said)
    return order


def order_by_itself(
    project: str,
    settings: Settings,
    order: Callable[[], QueueOrder] | None = None,
) -> QueueOrder | None:
    """Put a queue in order if the rules of its project want that.

    Nothing that goes wrong is raised: the queue keeps the order that it had, and a warning says so.

    Args:
        order: what does it; None = `put_in_order`.

    Returns: None if it was not put in order.
    """
    try:
        with opened(settings) as store:
            wanted = store.project(project).rules.ordered
        if not wanted:
            return None
        return order() if order is not None else put_in_order(project, settings)
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        warn_of_old_order(project, why)
        return None


def warn_of_old_order(project: str, why: str) -> None:
    """Say that a queue was not put in order, why, and how to do it."""
    log.warning(
        "the queue of the project %s keeps the order that it had (%s): `rlhf feedback order %s` "
        "puts it in order",
        *(project, why.rstrip("."), project),
    )


def order_after_asking(project: str) -> QueueOrder | None:
    """The queue of a project in order, in a flow that has asked people; it does not fail."""
    return order_by_itself(project, read_settings(), lambda: order_queue(project))
