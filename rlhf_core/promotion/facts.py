"""What the gate knows beside the scorecard: whoever runs it gathers this, and the rules read it."""

from pydantic import BaseModel, ConfigDict

from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.promotion.decision import Look


class Files(BaseModel):
    """The files of the candidate, now and when it was evaluated."""

    model_config = ConfigDict(frozen=True)

    candidate: str  # the version
    digest: str  # that the registry has; empty if it has none
    problem: str = ""  # why the files in the store are not those, in words
    evaluated: str | None = None  # the digest of what was evaluated; None if that is unknown
    evaluation: str = ""  # the run in which it was loaded and answered


class Facts(BaseModel):
    """Everything that a decision rests on, except the scorecard. What is None is not known."""

    model_config = ConfigDict(frozen=True)

    look: Look | None = None  # None: as the first one
    files: Files | None = None
    report_card: ReportCard | None = None
    alarms: dict[str, str] | None = None  # of the monitor, by measure; None without a monitor
