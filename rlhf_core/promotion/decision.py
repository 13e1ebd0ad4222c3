"""The rules of a promotion with their results, and the decision that follows from them."""

from pydantic import BaseModel, ConfigDict


class Rule(BaseModel):
    """A rule: its name, the measured value, the requirement, and whether it is met."""

    model_config = ConfigDict(frozen=True)

    name: str
    measured: str
    required: str
    passed: bool

    @property
    def answer(self) -> str:
        """`pass` or `FAIL`."""
        return "pass" if self.passed else "FAIL"

    @property
    def sentence(self) -> str:
        """The rule and its result in one line."""
        return f"{self.answer}: {self.name} {self.measured}; {self.required}"


class Decision(BaseModel):
    """The decision about promotion, and one sentence for each rule."""

    model_config = ConfigDict(frozen=True)

    promote: bool
    reasons: tuple[str, ...]

    def allow(self, reason: str) -> "Decision":
        """The decision with one more rule, which passed."""
        return Decision(promote=self.promote, reasons=(*self.reasons, f"pass: {reason}"))

    def refuse(self, reason: str) -> "Decision":
        """The decision with one more rule, which failed."""
        return Decision(promote=False, reasons=(*self.reasons, f"FAIL: {reason}"))
