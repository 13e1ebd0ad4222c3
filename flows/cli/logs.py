"""What Prefect logs about a failed run: a user error is one sentence without a traceback."""

import logging

from rlhf_core.errors import UserError

RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
DELIVERERS = ("EventsWorker", "APILogWorker")  # they say when they wait
DELIVERY_SECONDS = 10.0


class WithoutTraceback(logging.Filter):
    """Removes the traceback from records of user errors; defects keep theirs."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass every record, shortened if it is a user error."""
        from prefect.exceptions import ParameterTypeError

        if record.exc_info and isinstance(record.exc_info[1], (UserError, ParameterTypeError)):
            record.msg, record.args, record.exc_info = str(record.exc_info[1]), (), None
        return True


class WithoutRuns(logging.Filter):
    """Keeps log records of runs off the terminal; the Prefect UI shows them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Reject records of a flow run or a task run."""
        return record.name not in RUN_LOGGERS


def shorten_user_errors() -> None:
    """Make Prefect log a UserError as one sentence from now on, also in runs of a worker."""
    for name in RUN_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, WithoutTraceback) for known in logger.filters):
            logger.addFilter(WithoutTraceback())


def quiet_terminal() -> None:
    """Leave the terminal to the progress bars; only warnings of libraries are shown."""
    import prefect.main  # noqa: F401  (sets up the handlers that we change here)

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry is a warning there
    for name in DELIVERERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
        handler.addFilter(WithoutRuns())


def deliver() -> None:
    """Wait until Prefect has received logs and events, which are sent in the background."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=DELIVERY_SECONDS)
