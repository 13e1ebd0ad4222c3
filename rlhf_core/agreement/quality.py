"""The report on what annotators agree on: everything in numbers, for people and for programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, TypeGuard

from rlhf_core.agreement.disclosure import FEWEST_PEOPLE, FEWEST_VOTES
from rlhf_core.agreement.drift import Trend
from rlhf_core.agreement.measures import Measure

REST: Final = "other reasons"


@dataclass(frozen=True)
class Habits:
    """Shares of whoever's votes these are; None without a case. `habits` defines each."""

    gold: Measure | None = None
    consistency: Measure | None = None
    left: Measure | None = None
    longer: Measure | None = None
    others: Measure | None = None
    ties: Measure | None = None
    skips: Measure | None = None
    fast: Measure | None = None


@dataclass(frozen=True)
class Person:
    """An annotator, or several that are shown together."""

    name: str  # the pseudonym; `3 others` for several
    people: int
    votes: int
    repeats: int
    habits: Habits
    left_when_balanced: Measure | None
    seconds: float | None  # median
    skill: float | None  # chance of being right by Dawid and Skene's model
    confusion: tuple[tuple[float, ...], ...] | None  # by that model: truth in rows, a, b, tie


@dataclass(frozen=True)
class Kappa:
    """Two annotators, by name."""

    first: str
    second: str
    shared: int
    kappa: Measure | None
    same: float


@dataclass(frozen=True)
class Group:
    """The votes on the pairs with one value of a column."""

    column: str
    value: str
    votes: int
    people: int
    alpha: Measure | None
    habits: Habits


@dataclass(frozen=True)
class Block:
    """The votes of a piece of time."""

    name: str
    votes: int
    people: int
    habits: Habits
    seconds: float | None


@dataclass(frozen=True)
class Said:
    """A flag, in words."""

    annotator: str
    habit: str
    measure: Measure
    p: float
    sentence: str


@dataclass(frozen=True)
class Reason:
    """Why pairs were skipped."""

    text: str
    skips: int
    people: int


@dataclass(frozen=True)
class Machine:
    """A judge that is a model or a rule, and what people say of what it answers alone."""

    name: str  # the pseudonym
    votes: int  # two on a pair that was asked about in both orders
    pairs: int
    same_in_both: Measure | None  # pairs with the same answer in both orders
    left: Measure | None  # votes for the answer on the left
    longer: Measure | None
    with_people: Measure | None  # agreement on the pairs that people answered too
    error: Measure | None  # share of the audited pairs on which people contradict it
    alone: int  # pairs that it answers without people
    to_audit: int  # pairs of the audit, those without an answer of people included

    @property
    def wrong(self) -> tuple[float, float, float] | None:
        """How many of the pairs that it answers alone people would contradict, with bounds."""
        if self.error is None or self.error.low is None or self.error.high is None:
            return None
        bounds = self.error.value, self.error.low, self.error.high
        low, value, high = sorted(bound * self.alone for bound in bounds)
        return value, low, high

    def redacted(self) -> "Machine":
        """Without what single votes of people could be read from."""
        error, shared = self.error, self.with_people
        few = shared is None or shared.of < FEWEST_VOTES
        return replace(
            self,
            error=None if error is None or error.of < FEWEST_VOTES else error,
            with_people=None if few else shared,
        )


@dataclass(frozen=True)
class Quality:
    """What the annotators of a project agree on.

    It is what an admin sees; `redacted()` is for everybody else.
    """

    project: str
    snapshot: str  # its digest; empty: the votes as they are now
    votes: int = 0  # repeats and control questions included, skips not
    skips: int = 0
    pairs: int = 0  # that somebody voted on
    prompts: int = 0
    annotators: int = 0
    anonymous: int = 0  # votes
    unknown_sides: int = 0  # decided votes of which nobody knows what was on the left
    twice: int = 0  # pairs that two or more people voted on
    alpha: Measure | None = None
    alpha_without_ties: Measure | None = None
    same: Measure | None = None  # share of equal votes among any two on a pair
    # what two votes on a pair are to each other; shares, sum 1
    together: Mapping[str, float] = field(default_factory=dict)
    habits: Habits = Habits()
    left_when_balanced: Measure | None = None
    seconds: float | None = None
    # share of pairs whose answer is a, b or a tie, by Dawid and Skene's model
    classes: Mapping[str, float] = field(default_factory=dict)
    sure: float | None = None  # share of pairs that the model is sure of to 95 %
    people: tuple[Person, ...] = ()
    flags: tuple[Said, ...] = ()
    tested: int = 0  # annotators that were looked at for flags
    kappas: tuple[Kappa, ...] = ()
    blocks: tuple[Block, ...] = ()
    weekly: bool = False
    trends: tuple[Trend, ...] = ()
    groups: tuple[Group, ...] = ()
    reasons: tuple[Reason, ...] = ()
    machines: tuple[Machine, ...] = ()  # judges, which count nowhere above
    # what is shown to everybody, decided where the votes were at hand
    pooled: Person | None = None
    hidden_people: frozenset[str] = frozenset()
    hidden_groups: frozenset[tuple[str, str]] = frozenset()
    is_redacted: bool = False

    def redacted(self) -> "Quality":
        """What everybody may see: people under five votes as "n others", no small groups.

        Flags, kappas and reasons of skips that would name those people are left out too.
        """
        if self.is_redacted:
            return self
        if self.votes < FEWEST_VOTES:
            found = tuple(machine.redacted() for machine in self.machines)
            return Quality(self.project, self.snapshot, machines=found, is_redacted=True)
        hidden = self.hidden_people
        people = tuple(person for person in self.people if person.name not in hidden)
        return replace(
            self,
            people=(*people, self.pooled) if _enough(self.pooled) else people,
            flags=tuple(flag for flag in self.flags if flag.annotator not in hidden),
            kappas=tuple(k for k in self.kappas if not {k.first, k.second} & hidden),
            groups=tuple(g for g in self.groups if (g.column, g.value) not in self.hidden_groups),
            reasons=_common(self.reasons),
            machines=tuple(machine.redacted() for machine in self.machines),
            pooled=None,
            hidden_people=frozenset(),
            hidden_groups=frozenset(),
            is_redacted=True,
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        content = asdict(self)
        for name in ("hidden_people", "hidden_groups"):
            content[name] = sorted(content[name])
        return content


def _enough(pool: Person | None) -> TypeGuard[Person]:
    """Whether a row of several people says nothing of any one of them."""
    return pool is not None and pool.people >= 2 and pool.votes >= FEWEST_VOTES


def _common(reasons: tuple[Reason, ...]) -> tuple[Reason, ...]:
    """The reasons that many gave; the others as one, which is no single reason either."""
    many = [r for r in reasons if r.skips >= FEWEST_VOTES and r.people >= FEWEST_PEOPLE]
    many.sort(key=lambda reason: reason.skips)
    few = [reason for reason in reasons if reason not in many]
    while few and many and (len(few) < 2 or sum(r.skips for r in few) < FEWEST_VOTES):
        few.append(many.pop(0))
    rest = (Reason(REST, sum(r.skips for r in few), 0),) if few else ()
    return (*sorted(many, key=lambda reason: -reason.skips), *rest)
