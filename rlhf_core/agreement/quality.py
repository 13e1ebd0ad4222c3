"""The report on what annotators agree on: everything in numbers, for people and for programs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rlhf_core.agreement.disclosure import FEWEST_PEOPLE, FEWEST_VOTES
from rlhf_core.agreement.drift import Trend
from rlhf_core.agreement.measures import Measure

REST: Final = "other reasons"


@dataclass(frozen=True)
class Habits:
    """Shares of whoever's votes these are; None without a case. `habits` defines each."""

    gold: Measure | None
    consistency: Measure | None
    left: Measure | None
    longer: Measure | None
    others: Measure | None
    ties: Measure | None
    skips: Measure | None
    fast: Measure | None


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
class Quality:
    """What the annotators of a project agree on.

    It is what an admin sees; `redacted()` is for everybody else.
    """

    project: str
    snapshot: str  # its digest; empty: the votes as they are now
    votes: int  # repeats and control questions included, skips not
    skips: int
    pairs: int  # that somebody voted on
    prompts: int
    annotators: int
    anonymous: int  # votes
    unknown_sides: int  # decided votes of which nobody knows what was on the left
    twice: int  # pairs that two or more people voted on
    alpha: Measure | None
    alpha_without_ties: Measure | None
    same: Measure | None  # share of equal votes among any two on a pair
    together: Mapping[str, float]  # what two votes on a pair are to each other; shares, sum 1
    habits: Habits
    left_when_balanced: Measure | None
    seconds: float | None
    classes: Mapping[str, float]  # share of pairs whose answer is a, b or a tie, by the model
    sure: float | None  # share of pairs that the model is sure of to 95 %
    people: tuple[Person, ...]
    flags: tuple[Said, ...]
    tested: int  # annotators that were looked at for flags
    kappas: tuple[Kappa, ...]
    blocks: tuple[Block, ...]
    weekly: bool
    trends: tuple[Trend, ...]
    groups: tuple[Group, ...]
    reasons: tuple[Reason, ...]
    # what is shown to everybody, decided where the votes were at hand
    pooled: Person | None
    hidden_people: frozenset[str]
    hidden_groups: frozenset[tuple[str, str]]
    is_redacted: bool = False

    def redacted(self) -> "Quality":
        """What everybody may see: people under five votes as "n others", no small groups.

        Flags, kappas and reasons of skips that would name those people are left out too.
        """
        if self.is_redacted:
            return self
        if self.votes < FEWEST_VOTES:
            return _nothing(self)
        hidden = self.hidden_people
        people = tuple(person for person in self.people if person.name not in hidden)
        return replace(
            self,
            people=people if self.pooled is None else (*people, self.pooled),
            flags=tuple(flag for flag in self.flags if flag.annotator not in hidden),
            kappas=tuple(k for k in self.kappas if not {k.first, k.second} & hidden),
            groups=tuple(g for g in self.groups if (g.column, g.value) not in self.hidden_groups),
            reasons=_common(self.reasons),
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


def _common(reasons: tuple[Reason, ...]) -> tuple[Reason, ...]:
    """The reasons that many gave; the others as one, which is no single reason either."""
    many = [r for r in reasons if r.skips >= FEWEST_VOTES and r.people >= FEWEST_PEOPLE]
    many.sort(key=lambda reason: reason.skips)
    few = [reason for reason in reasons if reason not in many]
    while few and many and (len(few) < 2 or sum(r.skips for r in few) < FEWEST_VOTES):
        few.append(many.pop(0))
    rest = (Reason(REST, sum(r.skips for r in few), 0),) if few else ()
    return (*sorted(many, key=lambda reason: -reason.skips), *rest)


def _nothing(quality: Quality) -> Quality:
    """A report of fewer than five votes: nothing but that."""
    none = Habits(*[None] * 8)
    return replace(
        quality,
        **dict.fromkeys(("votes", "skips", "pairs", "prompts", "annotators", "anonymous"), 0),
        **dict.fromkeys(("unknown_sides", "twice", "tested"), 0),
        **dict.fromkeys(("alpha", "alpha_without_ties", "same", "left_when_balanced", "seconds")),
        **dict.fromkeys(("people", "flags", "kappas", "blocks", "trends", "groups", "reasons"), ()),
        **{"together": {}, "classes": {}, "habits": none, "sure": None, "pooled": None},
        **{"hidden_people": frozenset(), "hidden_groups": frozenset(), "is_redacted": True},
    )
