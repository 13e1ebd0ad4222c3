"""Judges outside the core, for a stage: an endpoint, and a memory of verdicts in MLflow."""

import logging
from typing import TYPE_CHECKING, cast

from rlhf_core import redaction
from rlhf_core.judges.judge import Cost, Judge, Panel
from rlhf_core.metrics import SilentLogger, StageLogger
from rlhf_core.settings.judge import EndpointConfig, PeopleConfig
from tasks.judges.memory import Memory, RememberedJudge, Streaming
from tasks.judges.meter import Meter
from tasks.record.record import Record
from tasks.settings import Settings

if TYPE_CHECKING:
    from tasks.judges.endpoint import EndpointJudge

log = logging.getLogger(__name__)


class MlflowJudging:
    """Makes judges for one stage, and counts what they cost.

    Args:
        experiment: of the project, whose verdicts are remembered.
        logger: shows how many questions are answered.
        project: whose people are asked, unless the config names another.
        stage: name and key of the stage, under which people are asked.
        source: the run of the stage, for people who look into the preference store.
    """

    def __init__(
        self,
        record: Record,
        experiment: str,
        logger: StageLogger,
        *,
        project: str = "",
        stage: str = "",
        source: str = "",
    ) -> None:
        self._record = record
        self._asked_as = {"project": project, "stage": stage, "source": source}
        self._experiment = experiment
        self._logger = logger
        self._meter = Meter()

    @property
    def cost(self) -> Cost:
        """What its judges have cost so far."""
        return self._meter.cost

    def endpoint(self, config: EndpointConfig) -> Judge:
        """The judge at the address in the environment, which sees each pair in one order.

        Raises: ConfigError when the environment names no address.
        """
        return _endpoint(config, self._record.settings, self._logger, self._meter)

    def people(self, config: PeopleConfig) -> Panel:
        """The annotators of a project of the preference store."""
        from tasks.feedback.asking.judge import PeopleJudge  # its database takes a second

        return PeopleJudge(config, self._record.settings, **self._asked_as)

    def remembered(self, judge: Judge, identity: str) -> Judge:
        """The same judge, which is asked about a pair only once in this project."""
        # Another address may have another model of that name.
        whole = f"{identity}\0{self._record.settings.judge_url}"
        memory = Memory(self._record, self._experiment, whole)
        return RememberedJudge(cast(Streaming, judge), memory, self._meter)


def try_endpoint(config: EndpointConfig, settings: Settings) -> None:
    """Ask the endpoint one easy question.

    Raises: ConfigError when the environment names no address, or nobody answers there.
    """
    judge = _endpoint(config, settings, SilentLogger(), Meter())
    judge.try_out()
    log.info("the judge %s at %s answers", judge.name, settings.judge_url)


def _endpoint(
    config: EndpointConfig, settings: Settings, logger: StageLogger, meter: Meter
) -> "EndpointJudge":
    from tasks.judges.endpoint import EndpointJudge  # openai takes a second

    address, key = settings.judge_address, settings.judge_key.get_secret_value()
    redaction.remember([key])
    return EndpointJudge(config, address, key, logger=logger, meter=meter)
