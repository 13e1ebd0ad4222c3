"""The report on the annotators of a training's votes, published where the votes are taken."""

import logging

from tasks.feedback.asking.votes import opened
from tasks.record.record import Record
from tasks.registry.refs import SnapshotRef

log = logging.getLogger(__name__)


def publish_report(snapshot: SnapshotRef, record: Record) -> str:
    """Publish the report of a snapshot in MLflow, unless it is there.

    A training does not need it, so a failure is a warning.

    Returns: the id of its MLflow run; empty if it failed.
    """
    from tasks.feedback.quality.publish import publish  # scipy and matplotlib take a second

    try:
        with opened(record.settings) as store:
            return publish(store.project(snapshot.project), snapshot.digest, record)
    except Exception as error:
        log.warning(
            "the report on the annotators of %s could not be published (%s: %s); "
            "`rlhf feedback report` does it again",
            *(snapshot.project, type(error).__name__, error),
        )
        return ""
