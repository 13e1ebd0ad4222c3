"""Hides secrets in texts that people read: passwords and tokens in addresses, keys, known values.

A message repeats addresses and the texts of libraries, and goes to a terminal, a log, MLflow and
Prefect. What looks like a secret is found by its form; the values of secret variables are told to
this module by whoever reads them.
"""

import logging
import re
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters: a shorter value would hide common words

_NAMES = r"(?:[\w.%-]*(?:token|secret|passw|pwd|key|signature|credential|auth|session)[\w.%-]*|sig)"
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(form, re.IGNORECASE), hidden)
    for form, hidden in (
        # scheme://user:password@host, whose password may hold @ or /, but is not a port and a path
        (r"(://[^\s/?#@:'\"\[]*:)(?!\d{1,5}(?:[/?#]|\s|$))[^\s'\"]*@", rf"\1{HIDDEN}@"),
        (r"(://[^\s/?#@:'\"\[]*:)\d+@", rf"\1{HIDDEN}@"),  # a password of digits
        (r"(://)[^\s/?#@:'\"]+@", rf"\1{HIDDEN}@"),  # scheme://token@host
        # what is left of an address that was taken for a path, http:/user:password@host
        (r"(\b(?:https?|s3|ftp|postgresql|mysql):/[^\s/?#@:'\"]*:)[^\s'\"]*@", rf"\1{HIDDEN}@"),
        (r"(\b(?:https?|s3|ftp):/)[^\s/?#@:'\"]+@", rf"\1{HIDDEN}@"),
        (rf"([?&;#]{_NAMES}=)[^&\s#'\"<>;)]+", rf"\1{HIDDEN}"),
        (r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer)\s+)[^\s'\"]+", rf"\1{HIDDEN}"),
        (
            r"(\b(?:aws_?)?(?:secret_?access_?key|session_?token|access_?key_?id)"
            r"['\"]?\s*[=:]\s*['\"]?)[^\s'\",;]+",
            rf"\1{HIDDEN}",
        ),
        (r"(\b(?:password|passwd|pgpassword)\s?=\s?['\"]?)[^\s'\",;]+", rf"\1{HIDDEN}"),
    )
)
_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bhf_[A-Za-z0-9]{20,}\b|\bgh[opsu]_[A-Za-z0-9]{20,}\b"
    r"|\bgithub_pat_\w{20,}\b|\bsk-[A-Za-z0-9_-]{20,}"
)
_known: set[str] = set()


def remember(values: Iterable[str]) -> None:
    """Hide these values in every text from now on; values of under 8 characters are ignored."""
    _known.update(value for value in values if len(value) >= SHORTEST)


def masked(text: str) -> str:
    """`text` with every secret replaced by `***`; a text without one comes back as it is."""
    text = without_forms(text)
    for value in sorted(_known, key=len, reverse=True):
        if value in text:
            text = text.replace(value, HIDDEN)
    return text


def without_forms(text: str) -> str:
    """`text` without what has the form of a secret; values that are only known stay."""
    if "=" in text or ":" in text:
        for form, hidden in _FORMS:
            text = form.sub(hidden, text)
    return _SHAPES.sub(HIDDEN, text)


def mask_error(error: BaseException) -> None:
    """Hide the secrets in the texts of an exception of any library, and in those of its causes."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        with suppress(AttributeError, TypeError):  # an exception that cannot be changed
            current.args = tuple(
                masked(part) if isinstance(part, str) else part for part in current.args
            )
            for name, value in list(vars(current).items()):
                if isinstance(value, str) and masked(value) != value:
                    setattr(current, name, masked(value))
        waiting += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions


def mask_logs() -> None:
    """Hide secrets in every log record of this process from now on; repeated calls do no harm."""
    present = logging.getLogRecordFactory()
    if not isinstance(present, _Masking):
        logging.setLogRecordFactory(_Masking(present))


class _Masking:
    """Makes log records whose message and traceback hold no secret, for all loggers."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # the handler reports a message that does not fit its arguments
            return record
        if (shown := masked(text)) != text:
            record.msg, record.args = shown, ()
        if record.exc_info and (error := record.exc_info[1]) is not None:
            trace = "".join(traceback.format_exception(error)).rstrip("\n")
            if (shown := masked(trace)) != trace:
                record.exc_text = shown  # formatters use it in place of their own
        return record
