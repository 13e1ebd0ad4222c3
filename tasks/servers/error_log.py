"""The recent errors of a server, for people who do not read its log.

A service inside a server may fail every minute and report it only in the log: Prefect's scheduler
once did, and no schedule fired.
"""

import logging
import time
from collections import deque
from functools import cache

from rlhf_core.redaction import masked

PATH = "/errors"
LOGGERS = ("", "prefect", "uvicorn", "uvicorn.error", "mlflow", "alembic")
KEPT = 50
RECENT_SECONDS = 600.0


class ErrorLog(logging.Handler):
    """Keeps the first line and the time of each logged error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: deque[tuple[float, str]] = deque(maxlen=KEPT)
        self._last: logging.LogRecord | None = None

    @staticmethod
    @cache
    def of_this_process() -> "ErrorLog":
        """The single error log of this process, attached at the first call."""
        log = ErrorLog()
        log.attach()
        return log

    def attach(self) -> None:
        """Add this handler to every logger that does not propagate; repeated calls do no harm.

        Call it again when a server starts, because uvicorn removes other handlers of its loggers.
        """
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record once, although several loggers pass it on."""
        if record is self._last:
            return
        self._last = record
        text = masked(record.getMessage()).strip().partition("\n")[0]
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text = f"{text} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        self._lines.append((time.time(), f"{record.name}: {text}"))

    def recent(self, seconds: float = RECENT_SECONDS) -> list[str]:
        """The errors of the last `seconds`, oldest first."""
        since = time.time() - seconds
        return [line for at, line in list(self._lines) if at >= since]
