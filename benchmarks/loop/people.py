"""People of the demo's world who label on the page, each in a thread with a browser of its own.

How somebody judges is an [`Annotator`][rlhf_core.simulation.annotators.Annotator] of the
simulation: taste, liking for a side and for length, noise, ties, and a share of votes cast without
looking (a spammer's is 1). The left answer is what such an annotator is shown first. What people do
on a page beside voting is their `Manner`: now and then they take a vote back and give it again,
skip a pair, write a note, or call both answers bad.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

from benchmarks.loop.browser import Browser, PageError, Shown, StoppedError
from rlhf_core.simulation import Annotator

IDLE = 4.0  # seconds until somebody with nothing to do looks again
_SIDES = {"a": "left", "b": "right", "tie": "tie"}
_NOTES = ("It is close.", "Both say little.", "The second half repeats the first.")
_REASON = "I do not know enough about this topic"


@dataclass(frozen=True)
class Manner:
    """What somebody does on the page beside voting: shares of the pairs, and times."""

    undo: float = 0.03
    skip: float = 0.01
    note: float = 0.02
    both_bad: float = -0.5  # two answers that are equally liked, and less than this, are both bad
    seconds: float = 12.0  # the median time that is said to have been spent on a pair
    pause: float = 0.0  # the time that really passes, in seconds


class Person:
    """Somebody who came in by a link."""

    def __init__(
        self, annotator: Annotator, link: str, seed: int, manner: Manner, stop: threading.Event
    ) -> None:
        self.annotator = annotator
        self.did: Counter[str] = Counter()  # choices, and "undo", "late"
        self._link, self._manner, self._stop = link, manner, stop
        self._random = Random(f"{seed}/{annotator.name}")
        self._browser = Browser(stop)

    def label(self, *, until_empty: bool = True) -> None:
        """Vote on what is on the desk: until it is empty, or until there is a wish to stop.

        Raises: PageError: the page refused something that a browser does.
        """
        try:
            if self._link:
                self._browser.come_in(self._link)
                self._link = ""  # it lets in once
            while not self._stop.is_set():
                desk = self._browser.tasks()
                if not desk and until_empty:
                    return
                for shown in desk:
                    if self._stop.is_set():
                        return
                    self._judge(shown)
                if not desk:
                    self._stop.wait(IDLE)
        except StoppedError:
            return

    def close(self) -> None:
        """Close the browser."""
        self._browser.close()

    def _judge(self, shown: Shown) -> None:
        manner, random = self._manner, self._random
        choice = "skip" if random.random() < manner.skip else self.choose(shown)
        note = random.choice(_NOTES) if random.random() < manner.note else ""
        reason = _REASON if choice == "skip" else ""
        seconds = round(random.lognormvariate(0, 0.5) * manner.seconds, 2)
        again = random.random() < manner.undo
        if manner.pause:
            self._stop.wait(random.lognormvariate(0, 0.5) * manner.pause)
        for _ in range(2 if again else 1):
            if not self._browser.vote(
                shown.task, choice, seconds=seconds, note=note, reason=reason
            ):
                self.did["late"] += 1
                return
            self.did[choice] += 1
            if not again:
                return
            again = False
            if not self._browser.undo():
                return
            self.did[choice] -= 1
            self.did["undo"] += 1

    def choose(self, shown: Shown) -> str:
        """What this person thinks of a pair: left, right, tie or both_bad."""
        choice = _SIDES[self.annotator.prefers(shown.left, shown.right, self._random)]
        if choice == "tie" and self._manner.both_bad > max(
            self.annotator.utility(shown.left), self.annotator.utility(shown.right)
        ):
            return "both_bad"
        return choice


class Crowd:
    """People at work at the same time, for the length of the block: they look for pairs until then.

    with Crowd(annotators, invite, seed=1) as crowd:
        ...
        crowd.check()
    """

    def __init__(
        self,
        annotators: Sequence[Annotator],
        invite: Callable[[str], str],
        *,
        seed: int,
        manner: Manner | None = None,
    ) -> None:
        """Args: invite: a link for somebody of that name."""
        self._stop = threading.Event()
        self.people = [
            Person(one, invite(one.name), seed, manner or Manner(), self._stop)
            for one in annotators
        ]
        self._errors: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._work, args=(one,), name=one.annotator.name, daemon=True)
            for one in self.people
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Let them finish what they are at, and go."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(30)
        for person in self.people:
            person.close()

    @property
    def votes(self) -> int:
        """How many votes and skips they have given that stand."""
        return total(person.did for person in self.people)

    def check(self) -> None:
        """Raise what went wrong for one of them."""
        if self._errors:
            raise self._errors[0]

    def _work(self, person: Person) -> None:
        try:
            person.label(until_empty=False)
        except PageError as error:
            if not self._stop.is_set():
                self._errors.append(error)


def total(done: Iterable[Counter[str]]) -> int:
    """The votes and skips that stand."""
    return sum(count for did in done for what, count in did.items() if what not in ("undo", "late"))
