"""When a stage was doing what: a logger that notes the time at each word that a stage says."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rlhf_core.metrics import Alarm, StageLogger

_BATCH = re.compile(r", batch \d+ of \d+$")


@dataclass(frozen=True)
class Span:
    """The time between two words of a stage."""

    what: str  # the phase, without the number of its batch
    part: int
    parts: int  # of the phase; 0: it has none
    unit: int  # how many units of progress were done: optimizer steps or iterations
    seconds: float
    cpu_seconds: float

    @property
    def last(self) -> bool:
        """Whether it is the last part of its phase, with what follows the parts."""
        return self.part + 1 >= self.parts


@dataclass
class Clock:
    """Passes everything on to another logger, and notes what took how long.

    Args:
        logger: receives everything.
        between: what a stage does after a word of progress; "" = what the note says, as stages do
            that train nothing.
        heard: is told each phase.
    """

    logger: StageLogger
    between: str = ""
    heard: Callable[[str], None] = lambda what: None
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._at = (time.monotonic(), time.process_time())
        self._now: tuple[str, int, int] = ("opening the run", 0, 0)
        self._unit = 0
        self._note = ""

    @property
    def unit(self) -> int:
        """How many units of progress are done."""
        return self._unit

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Pass on."""
        self.logger.metrics(values, step)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """End a span; what follows is named by the note, or by `between`."""
        self._turn((self.between or note, 0, 0))
        self._unit, self._note = done, "" if self.between else note
        self.logger.progress(done, total, note)

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """End a span, and begin the next."""
        name = _BATCH.sub("", what)
        self._turn((f"{self._note}: {name}" if self._note else name, done, total))
        self.heard(name)
        self.logger.phase(what, done, total)

    def alarm(self, alarm: Alarm) -> None:
        """Pass on."""
        self.logger.alarm(alarm)

    def stop(self) -> list[Span]:
        """End the last span; return all of them."""
        self._turn(("", 0, 0))
        return self.spans

    def __getattr__(self, name: str) -> object:
        return getattr(self.logger, name)  # such as `flush` of a logger that has more

    def _turn(self, new: tuple[str, int, int]) -> None:
        now = (time.monotonic(), time.process_time())
        seconds, cpu = now[0] - self._at[0], now[1] - self._at[1]
        self.spans.append(Span(*self._now, self._unit, seconds, cpu))
        self._at, self._now = now, new
