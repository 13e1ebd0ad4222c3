"""Foreign exceptions that mean a user's situation and not a defect, each as one sentence.

The project's own `UserError` needs no translation. Exceptions of other libraries are known by
their names, so that nothing heavy is imported to say that a disk is full.
"""

import errno
from collections.abc import Iterator

NETWORK = frozenset({"requests", "urllib3", "httpx", "httpx2", "httpcore", "huggingface_hub"})
UNREACHABLE = ("Connect", "Timeout", "Unreachable", "Offline", "MaxRetry", "Resolution")
READ_ONLY = ("readonly database", "unable to open database file")


def explain(error: BaseException) -> str:
    """What the user can do about `error` or what caused it; empty when it is a defect."""
    for cause in _causes(error):
        if sentence := _explain_one(cause):
            return sentence
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling, down to the root."""
    seen = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _explain_one(error: BaseException) -> str:
    text = str(error)
    if "disk is full" in text or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return (
            f"The disk is full ({_first_line(text)}): free some space, or set RLHF_HOME to a "
            "folder on another disk."
        )
    if any(phrase in text for phrase in READ_ONLY) or (
        isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
    ):
        return (
            f"A file cannot be written or read ({_first_line(text)}): mend its permissions, or set "
            "RLHF_HOME to a folder of yours."
        )
    kind = type(error)
    if kind.__module__.partition(".")[0] in NETWORK and any(
        w in kind.__name__ for w in UNREACHABLE
    ):
        return (
            f"A server cannot be reached ({_first_line(text) or kind.__name__}): see that MLflow, "
            "Prefect and the network are up, then start again."
        )
    return ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
