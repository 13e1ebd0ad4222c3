"""Translates exceptions of libraries that are not defects into one sentence for the user.

The project's own `UserError` needs no translation. We look for the operating-system error at the
root, whichever library raised, so no library is imported for its exceptions.
"""

import errno
import os
from collections.abc import Iterator
from socket import gaierror

from rlhf_core.errors import brief, lacks_memory
from rlhf_core.redaction import masked

UNREACHABLE = (ConnectionError, TimeoutError, gaierror)  # gaierror: the host name is unknown
NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_NAMES = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR})
FORBIDDEN = frozenset({errno.EACCES, errno.EROFS, errno.EPERM})
# SQLite errors have no errno, and a server reports them as text.
# The writers of safetensors and of torch give a full disk as text.
DISK_FULL = ("disk is full", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
DATABASE_CLOSED = ("readonly database", "unable to open database file")


def explain(error: BaseException) -> str:
    """What the user can do about `error` or its cause; empty if it is a defect."""
    for cause in _causes(error):
        if sentence := _explain_one(cause, error):
            return brief(sentence)
    return ""


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is at the root of an error."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then its causes and contexts, down to the roots."""
    seen = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting.append(current.__cause__ or current.__context__)
            if isinstance(current, BaseExceptionGroup):  # one attempt per address of a host name
                waiting.extend(reversed(current.exceptions))


def _explain_one(cause: BaseException, error: BaseException) -> str:
    """A sentence for `cause`; only the outer `error` knows which server was unreachable."""
    text = str(cause)
    code = cause.errno if isinstance(cause, OSError) else None
    if lacks_memory(cause):
        return (
            f"There is not enough memory ({_first_line(text) or type(cause).__name__}): lower the "
            "micro_batch_size or the lengths in tokens, take a smaller model, or use a machine "
            "with more memory."
        )
    if code in FULL or any(phrase in text for phrase in DISK_FULL):
        return (
            f"The disk is full ({_first_line(text)}): free some space, or set RLHF_HOME to a "
            "folder on another disk."
        )
    if code == errno.ENAMETOOLONG:
        return f"A name is too long for this disk ({_first_line(text)}): choose a shorter one."
    if code in NO_NAMES:
        return f"There is no such file or folder ({_first_line(text)}): check the name."
    if code in FORBIDDEN or any(phrase in text for phrase in DATABASE_CLOSED):
        return (
            f"A file cannot be written or read ({_first_line(text)}): fix its permissions, or set "
            "RLHF_HOME to a folder of yours."
        )
    local = isinstance(cause, BrokenPipeError)  # our reader has exited
    if (isinstance(cause, UNREACHABLE) and not local) or code in NO_ROUTE:
        reason = _first_line(str(error)) or _first_line(text) or type(error).__name__
        return (
            f"A server cannot be reached ({reason}): check that MLflow, Prefect and the network "
            "are up, then try again."
        )
    return ""


def _first_line(text: str) -> str:
    return masked(text.strip().partition("\n")[0])[:300]  # a secret cut in two would not be found
