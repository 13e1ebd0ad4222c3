"""The errors that a server has logged lately, for those who do not read its log.

A service inside a server may fail every minute and say so nowhere else: Prefect's scheduler once
did, and no schedule fired.
"""

import logging
import time
from collections import deque
from functools import cache

PATH = "/errors"
LOGGERS = ("", "prefect", "uvicorn", "uvicorn.error", "mlflow", "alembic")
KEPT = 50
LATELY_SECONDS = 600.0


class ErrorLog(logging.Handler):
    """Keeps the first line of what is logged as an error, and when."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: deque[tuple[float, str]] = deque(maxlen=KEPT)
        self._last: logging.LogRecord | None = None

    @staticmethod
    @cache
    def of_this_process() -> "ErrorLog":
        """The one log of this process: whoever asks first attaches it."""
        log = ErrorLog()
        log.attach()
        return log

    def attach(self) -> None:
        """Listen to every logger that does not pass on what it hears; again is no harm.

        To be called when a server starts, too: uvicorn takes foreign handlers off its loggers.
        """
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record; several loggers pass on the same one."""
        if record is self._last:
            return
        self._last = record
        text = record.getMessage().strip().partition("\n")[0]
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            text = f"{text} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        self._lines.append((time.time(), f"{record.name}: {text}"))

    def recent(self, seconds: float = LATELY_SECONDS) -> list[str]:
        """What was logged in the last `seconds`, oldest first."""
        since = time.time() - seconds
        return [line for at, line in list(self._lines) if at >= since]
