"""Shows log lines, progress, tables, figures and links of a stage in its Prefect run.

These are only for people. Outside a Prefect run nothing happens, and if Prefect does not respond a
warning is logged and the stage continues.
"""

import base64
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast
from uuid import UUID

import pandas as pd
from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext, get_run_context
from prefect.exceptions import MissingContextError, Pause
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run, task_run
from prefect.states import Completed

from rlhf_core.errors import VerdictsPendingError
from rlhf_core.redaction import mask_error
from tasks.record import tags
from tasks.record.runs import NAME_LENGTH
from tasks.record.terminal import how_far
from tasks.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")
SUSPENSION = Pause  # raised in a flow that suspends itself
LIBRARIES = ("rlhf_core", "tasks")
TABLE_ROWS = 20
FIGURE_BYTES = 200_000


@dataclass(frozen=True)
class PrefectRun:
    """The Prefect run that this code is part of."""

    flow_run_id: str
    task_run_id: str
    flow_name: str

    @classmethod
    def current(cls) -> "PrefectRun | None":
        """The run of this thread; None outside Prefect."""
        try:
            get_run_context()
        except MissingContextError:
            return None
        return cls(str(flow_run.id or ""), str(task_run.id or ""), str(flow_run.flow_name or ""))

    def tags(self, public_url: str) -> dict[str, str]:
        """The MLflow tags that lead back to this run."""
        content = {
            tags.FLOW_RUN: self.flow_run_id,
            tags.TASK_RUN: self.task_run_id,
            tags.FLOW_NAME: self.flow_name,
            tags.FLOW_URL: self.url(public_url),
        }
        return {name: value for name, value in content.items() if value}

    def url(self, public_url: str) -> str:
        """The page of the flow run; empty outside a flow run."""
        return f"{public_url}/runs/flow-run/{self.flow_run_id}" if self.flow_run_id else ""


def current_flow_run_name() -> str:
    """The name of this flow run, cut to MLflow's limit; empty outside Prefect."""
    return str(flow_run.name or "")[:NAME_LENGTH] if PrefectRun.current() else ""


def calling_flow_run() -> str:
    """The id of the flow run that has called this one; empty outside Prefect, and if none has."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or not context.flow_run.parent_task_run_id:
        return ""
    return str(flow_run.parent_flow_run_id or "")


def prefect_link_lines(settings: Settings) -> list[str]:
    """The last line of a report: a link to the flow run, if its page outlives the run."""
    prefect = PrefectRun.current()
    if prefect and settings.prefect_stays:
        return [f"- The flow run in Prefect: {prefect.url(settings.prefect_public_url)}"]
    if settings.artifact_root:  # MLflow is a file that no server serves now
        return ["- To open these pages and the flow run in Prefect, start `rlhf up`."]
    return []


def stage_task(name: str, run_name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function a Prefect task, shown as Cached if it returns `as_cached`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def masking(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except Exception as error:  # Prefect keeps its text as the state of the task
                mask_error(error)
                raise

        prefect_task = task(name=name, task_run_name=run_name)(masking)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            returned: object = prefect_task(*args, **kwargs)
            value = returned.result() if isinstance(returned, State) else returned
            if isinstance(value, _Waiting):
                raise value.pending
            return cast(T, value)

        return call

    return decorate


def as_cached(value: T, message: str) -> T:
    """The return value of a `stage_task` that is shown as Cached; its caller gets `value`."""
    if TaskRunContext.get() is None:
        return value
    return cast(T, Completed(name="Cached", message=message, data=value))


@dataclass(frozen=True)
class _Waiting:
    """What a task returns that waits for people."""

    pending: VerdictsPendingError


def as_waiting(pending: VerdictsPendingError) -> Any:
    """The return value of a `stage_task` that waits for people, shown as Waiting: its caller is
    raised the error, which is no failure of the task.

    Outside a task the error is raised at once.
    """
    if TaskRunContext.get() is None:
        raise pending
    return Completed(name="Waiting", message=pending.short, data=_Waiting(pending))


def artifact_key(*parts: str) -> str:
    """A key of lower-case letters, digits and dashes, the only characters that Prefect allows."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def forward_logs() -> None:
    """Forward log records of this project's packages, from INFO on, to the current Prefect run.

    Prefect's own handler assigns each record to its run, as with PREFECT_LOGGING_EXTRA_LOGGERS; but
    that variable would have to be set before Prefect is imported.
    """
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        if not any(isinstance(known, APILogHandler) for known in logger.handlers):
            logger.addHandler(_TO_PREFECT)


def _in_a_run(record: logging.LogRecord) -> bool:
    """Whether a record belongs to a run; Prefect warns about others."""
    return PrefectRun.current() is not None


_TO_PREFECT = APILogHandler()
_TO_PREFECT.addFilter(_in_a_run)


def show_link(key: str, url: str, text: str) -> None:
    """Show a link on the page of the run."""
    with _warn_on_failure(key):
        create_link_artifact(link=url, link_text=text, key=key, description=text)


def show_table(key: str, table: pd.DataFrame, title: str) -> None:
    """Show the first rows of a table."""
    rows = json.loads(table.head(TABLE_ROWS).to_json(orient="records"))
    more = f", first {TABLE_ROWS} of {len(table)} rows" if len(table) > TABLE_ROWS else ""
    with _warn_on_failure(key):
        create_table_artifact(table=rows, key=key, description=title + more)


def show_page(key: str, text: str, title: str) -> None:
    """Show a page of Markdown."""
    with _warn_on_failure(key):
        create_markdown_artifact(markdown=text, key=key, description=title)


def show_figures(key: str, images: Mapping[str, bytes], title: str) -> None:
    """Show PNG images on one page; an image too large for a database row is only named."""
    with _warn_on_failure(key):
        text = "\n\n".join(_image(name, png) for name, png in images.items())
        create_markdown_artifact(markdown=f"# {title}\n\n{text}", key=key, description=title)


def _image(name: str, png: bytes) -> str:
    if len(png) > FIGURE_BYTES:
        return f"**{name}** is too large to show here; see the MLflow run."
    return f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})"


@contextmanager
def _warn_on_failure(key: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.warning("the Prefect artifact %s could not be created", key, exc_info=True)


class ArtifactDisplay:
    """A Prefect progress artifact, updated at most once in `every` seconds.

    It is only for people: if Prefect does not respond, a warning is logged and training continues.
    """

    def __init__(self, key: str, title: str, *, every: float = 2.0) -> None:
        self._key = key
        self._title = title
        self._every = every
        self._artifact: UUID | None = None
        self._waiting: tuple[int, int, str] | None = None
        self._finished = False
        self._next = 0.0

    def show(self, done: int, total: int, note: str) -> None:
        """Create or update the artifact if an update is due or the work is done."""
        self._waiting = (done, total, note)
        finished, self._finished = self._finished, done >= total > 0
        if self._finished > finished or time.monotonic() >= self._next:
            self._publish()

    def close(self) -> None:
        """Show the last state, whose update may not have been due."""
        self._publish()

    def _publish(self) -> None:
        if self._waiting is None:
            return
        (done, total, note), self._waiting = self._waiting, None
        self._next = time.monotonic() + self._every
        percent = 100.0 * done / max(total, 1)
        description = f"{self._title}: {how_far(done, total, note)}"
        try:
            if self._artifact is None:
                made = create_progress_artifact(percent, key=self._key, description=description)
                self._artifact = cast(UUID, made)
            else:
                update_progress_artifact(self._artifact, percent, description=description)
        except Exception:
            self._next = math.inf
            log.warning(
                "the progress artifact for %s is no longer updated", self._title, exc_info=True
            )
