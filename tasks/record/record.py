"""The one connection of a task to MLflow, and what the task reads and writes over it.

A task builds its `Record` once, from the environment, and passes it to everything that it calls.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

from rlhf_core.redaction import masked
from tasks.record import tags
from tasks.record.runs import Runs
from tasks.record.tracking import connect
from tasks.registry.model_store import MlflowModelStore
from tasks.settings import Settings, read_settings

PAGE = "report.md"


@dataclass(frozen=True)
class Record:
    """Runs, models and settings of this installation."""

    settings: Settings
    client: MlflowClient
    runs: Runs
    store: MlflowModelStore

    @classmethod
    def open(cls, settings: Settings | None = None, *, patient: bool = False) -> Self:
        """Connect to MLflow.

        Args:
            settings: default to those of the environment.
            patient: wait `RLHF_OUTAGE_SECONDS` for a server that does not answer.

        Raises: UserError if MLflow does not respond or refuses, ConfigError if the environment is
            invalid.
        """
        settings = settings or read_settings()
        client = connect(settings, patience=settings.outage_seconds if patient else 0.0)
        return cls(settings, client, Runs(client), MlflowModelStore(client))

    def add_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tag a run in one call."""
        new = [RunTag(name, masked(value)) for name, value in tags.items()]
        self.client.log_batch(run_id, tags=new)

    def add_numbers(self, run_id: str, numbers: Mapping[str, float]) -> None:
        """Log metrics with one value each to a run, in one call."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, 0) for name, value in numbers.items()]
        self.client.log_batch(run_id, metrics=metrics)

    def write_page(self, run_id: str, text: str, name: str = PAGE) -> None:
        """Store a Markdown report with a run, and make it the description of the run."""
        text = masked(text)
        self.client.log_text(run_id, text, name)
        self.client.set_tag(run_id, tags.DESCRIPTION, text)
