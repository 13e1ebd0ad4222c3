"""What the order of a queue saves, as curves in MLflow: one run a project."""

import time

from mlflow.entities import Metric

from tasks.feedback.ordering.outcome import QueueOrder
from tasks.record import tags
from tasks.record.describe import ensure_experiment, origin
from tasks.record.record import Record

NAME = "labelling"


def publish_order(project: str, order: QueueOrder, record: Record) -> str:
    """Add the numbers of an order to the run of the project's queue, made if there is none.

    Their step is the number of votes, so they draw the estimate as labels come in.

    Returns: the id of the run.
    """
    experiment = ensure_experiment(record.client, project, record.settings)
    found = record.runs.queue_order(experiment)
    if found is None:
        run_id = str(record.client.create_run(experiment, run_name=NAME).info.run_id)
        record.add_tags(run_id, {tags.STAGE: tags.QUEUE_ORDER} | origin(0, record.settings))
        record.client.set_terminated(run_id, "FINISHED")  # metrics can be added to it still
    else:
        run_id = str(found.info.run_id)
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, order.votes) for name, value in order.numbers.items()]
    record.client.log_batch(run_id, metrics=metrics)
    return run_id
