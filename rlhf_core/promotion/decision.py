"""The rules of a promotion with their results, and the decision that follows from them."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

Family = Literal[
    "integrity",
    "win rate",
    "win rate at equal length",
    "slices",
    "canaries",
    "reward model",
    "judge",
    "limits",
    "monitor",
    "outcome",
]
FAMILIES: tuple[Family, ...] = get_args(Family)  # in the order in which they are shown


class Rule(BaseModel):
    """A row of the gate's table: what was measured, what was asked, and whether it is met.

    A rule that is a test has a p-value, and passes if that is below its level.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    measured: str
    required: str
    passed: bool | None  # None: it does not apply
    family: Family = "limits"
    p: float | None = None  # one-sided, of what is asked being untrue
    alpha: float | None = None  # the level of this row, after Holm's correction
    # by how much the truth has to exceed what is asked, to be shown in 85 % of the evaluations
    smallest_effect: float | None = None
    shows: str = ""  # what so many prompts can show, in words

    @property
    def answer(self) -> str:
        """`pass`, `FAIL` or `n/a`."""
        return "n/a" if self.passed is None else "pass" if self.passed else "FAIL"

    @property
    def sentence(self) -> str:
        """The rule and its result in one line."""
        test = "" if self.p is None else f" (p {self.p:.2g}, level {self.alpha:.2g})"
        return f"{self.answer}: {self.name} {self.measured}; {self.required}{test}"


class Look(BaseModel):
    """One of the repeated comparisons with a champion, and its share of the alpha budget."""

    model_config = ConfigDict(frozen=True)

    number: int  # 1 for the first since the opponent reigns
    alpha: float  # one-sided, of each family of tests in this look
    total: float  # of all looks at this opponent
    spent: float  # by all looks until now, this one included
    opponent: str  # a version, or the registered model while it has no champion
    again: bool = False  # the same comparison was looked at before, so nothing new is spent

    @property
    def left(self) -> float:
        """What later looks may spend together."""
        return max(self.total - self.spent, 0.0)


class Decision(BaseModel):
    """The decision about promotion: its rules, what it rests on, and a sentence for each rule."""

    model_config = ConfigDict(frozen=True)

    promote: bool
    reasons: tuple[str, ...]
    # Decisions of older releases have the sentences alone.
    rules: tuple[Rule, ...] = ()
    look: Look | None = None
    claim: str = ""  # what a promotion says: superior or non_inferior
    candidate: str = ""  # versions
    champion: str = ""
    digests: dict[str, str] = {}  # of the files, by version
    runs: dict[str, str] = {}  # MLflow's ids, by what ran
    at: str = ""

    def allow(self, reason: str) -> "Decision":
        """The decision with one more reason, which speaks for it."""
        return self._with(reason, passed=True)

    def refuse(self, reason: str) -> "Decision":
        """The decision with one more reason, which alone refuses."""
        return self._with(reason, passed=False).model_copy(update={"promote": False})

    def _with(self, reason: str, *, passed: bool) -> "Decision":
        row = Rule(name="outcome", family="outcome", measured=reason, required="", passed=passed)
        said = (*self.reasons, f"{row.answer}: {reason}")
        return self.model_copy(update={"reasons": said, "rules": (*self.rules, row)})
