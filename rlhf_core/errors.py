"""Errors that a user can cause and fix.

    UserError            one sentence: what is wrong, where, and how to fix it
    ├── ConfigError      a setting that contradicts another or the data
    ├── DataError        a file, row or field
    ├── ModelError       a model or tokenizer that cannot be found or used
    ├── NumericsError    a loss, gradient or reward that is no longer finite
    ├── CheckpointError  a saved state that is damaged or belongs to another run
    ├── EngineError      a server that samples responses and cannot, or does it wrongly
    └── VerdictsPendingError  no fault: the run goes on when people have answered

The command prints only their message; anything else is a defect and keeps its traceback. A message
quotes files and arguments, so `UserError` itself masks secrets in it, such as the password of an
address, and makes it safe to print, and short.
"""

import errno
import re

from rlhf_core.redaction import masked

LONGEST_LINE, MOST_LINES = 2_000, 60
# What a terminal obeys instead of showing: C0 but tab and line feed, DEL, C1, separators of lines,
# marks that reverse the order of writing. Half a surrogate pair cannot be written at all.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """One or two sentences: what is wrong, where, and how to fix it.

    Control characters in them are shown as escapes, and a line of more than `LONGEST_LINE`
    characters loses its middle.
    """

    def __str__(self) -> str:
        return brief(masked(super().__str__()))  # a secret cut in two would not be found

    @classmethod
    def kinds(cls) -> dict[str, type["UserError"]]:
        """All kinds of this error by name, also kinds of kinds, for one that came as text."""
        found = {kind.__name__: kind for kind in cls.__subclasses__()}
        for kind in cls.__subclasses__():
            found |= kind.kinds()
        return found


class ConfigError(UserError):
    """A setting that contradicts another setting or the data."""


class DataError(UserError):
    """A file, row or field that cannot be used."""


class ModelError(UserError):
    """A model or tokenizer that cannot be found, read or used."""


class RefusedError(ModelError):
    """A model that a gate refuses: nothing is broken, and better data may pass."""


class NumericsError(UserError):
    """A tensor that must be finite and is not."""


class CheckpointError(UserError):
    """A saved state of a training run that is damaged or belongs to another run."""


class EngineError(UserError):
    """A server that samples responses, and does not answer or gives wrong answers."""


class VerdictsPendingError(UserError):
    """People were asked and have not answered enough; called again, the stage goes on.

    Args:
        waiting: pairs without a verdict.
        pairs: all of them.
        batch: their name in the preference store.
        project: of the preference store.
        where: address of the page where people answer.
    """

    def __init__(self, waiting: int, pairs: int, batch: str, project: str, where: str) -> None:
        self.waiting, self.pairs = waiting, pairs
        self.batch, self.project, self.where = batch, project, where
        super().__init__(
            f"{self.short}; nothing is lost: when they have been answered, the same command goes on"
        )

    @property
    def short(self) -> str:
        """What is waited for."""
        return (
            f"{self.waiting:,} of {self.pairs:,} pairs wait for people at {self.where} (project "
            f"{self.project}, batch {self.batch})"
        )


_NO_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of any library says that there is not enough memory, of a CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in _NO_MEMORY)


def printable(text: str) -> str:
    """The text with `\\x1b` and the like in place of characters that would control a terminal."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def plural(number: int, one: str, many: str = "") -> str:
    """`1 version`, `2 versions`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def brief(text: str) -> str:
    """A message that is printable, with at most `MOST_LINES` lines of at most `LONGEST_LINE`."""
    lines = text.split("\n", MOST_LINES)
    if len(lines) > MOST_LINES:
        lines[-1] = f"… and {lines[-1].count(chr(10)) + 1} more lines"
    return printable("\n".join(map(_without_middle, lines)))


def _without_middle(line: str) -> str:
    """The sentence begins with the place and ends with what to do: a quotation is between them."""
    if len(line) <= LONGEST_LINE:
        return line
    head, tail = LONGEST_LINE // 2, LONGEST_LINE // 4
    return f"{line[:head]} … ({len(line) - head - tail:,} characters are left out) … {line[-tail:]}"
