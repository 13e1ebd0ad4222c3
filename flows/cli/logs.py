"""What Prefect says of a failed run: a user's mistake is one sentence, not a traceback."""

import logging

from rlhf_core.errors import UserError

RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
DELIVERY_SECONDS = 10.0


class WithoutTraceback(logging.Filter):
    """Takes the traceback from records about a user's mistake; what a defect left behind stays."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through, changed if need be."""
        from prefect.exceptions import ParameterTypeError

        if record.exc_info and isinstance(record.exc_info[1], (UserError, ParameterTypeError)):
            record.msg, record.args, record.exc_info = str(record.exc_info[1]), (), None
        return True


class WithoutRuns(logging.Filter):
    """Keeps what a run logs from a terminal: the Prefect UI has it, the command tells a failure."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Refuse what was logged for a flow run or a task run."""
        return record.name not in RUN_LOGGERS


def shorten_user_errors() -> None:
    """From here on Prefect logs a UserError as its sentence; for runs by a worker as well."""
    for name in RUN_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, WithoutTraceback) for known in logger.filters):
            logger.addFilter(WithoutTraceback())


def quiet_terminal() -> None:
    """Leave the terminal to the progress bars: warnings of libraries are all that comes through."""
    import prefect.main  # noqa: F401  (it sets up the handlers that are changed here)

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry is a warning there
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.WARNING)
        handler.addFilter(WithoutRuns())


def deliver() -> None:
    """Wait until Prefect has what runs logged and reported: they are sent in the background."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=DELIVERY_SECONDS)
