"""What the order of a queue saves, as curves and a figure in MLflow: one run a project."""

import io
import time
from collections.abc import Sequence

from mlflow.entities import Metric
from PIL import Image

from tasks.feedback.ordering.outcome import QueueOrder, orders
from tasks.feedback.store.store import FeedbackProject
from tasks.record import tags
from tasks.record.describe import ensure_experiment, origin
from tasks.record.record import Record

NAME = "labelling"
FIGURE = "figures/labels_saved.png"


def publish_order(project: FeedbackProject, order: QueueOrder, record: Record) -> str:
    """Add the numbers of an order to the run of the project's queue, made if there is none.

    Their step is the number of votes, so they draw the estimate as labels come in. A figure has the
    estimates so far with their intervals, and the losses of both arms.

    Returns: the id of the run.
    """
    experiment = ensure_experiment(record.client, project.name, record.settings)
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
    if estimates := [one for one in orders(project) if one.savings is not None]:
        record.client.log_image(run_id, Image.open(io.BytesIO(draw(estimates))), FIGURE)
    return run_id


def draw(estimates: Sequence[QueueOrder]) -> bytes:
    """A PNG of the estimates by the number of votes, and of the losses behind the last of them."""
    from matplotlib.figure import Figure  # not at the top: few runs order a queue

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    votes = [one.votes for one in estimates]
    saved = [one.savings.saved for one in estimates if one.savings is not None]
    value, low, high = ([100 * share for share in column] for column in zip(*saved, strict=True))
    left.axhline(0, color="0.6", linewidth=0.8)
    left.fill_between(votes, low, high, alpha=0.2, linewidth=0)
    off = [[v - a for v, a in zip(value, low, strict=True)],
           [b - v for v, b in zip(value, high, strict=True)]]  # fmt: skip
    left.errorbar(votes, value, yerr=off, marker="o", capsize=3, linewidth=1.2)
    left.set(title="Labels saved, with 95 % interval", xlabel="votes", ylabel="%")
    left.set_ylim(max(min(low), -200) - 10, 105)
    last = estimates[-1].savings
    assert last is not None
    right.plot(last.sizes, last.random_loss, marker="o", label="random arm")
    right.plot(last.sizes, last.design_loss, marker="o", label="design")
    right.set(title="Loss on prompts that neither has seen", xlabel="labels", ylabel="nats a vote")
    right.set_xscale("log")
    right.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
