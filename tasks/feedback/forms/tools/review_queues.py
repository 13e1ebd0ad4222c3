"""MLflow's review queues: pairs out as traces, choices back as votes. Experimental in MLflow.

A reviewer has a queue of their own, since one answer completes an item for the whole queue. What
is pushed is on the reviewer's desk in the store too: the side is drawn and kept there, nobody else
gets the pair meanwhile, and control questions and repeats come among the others. A trace has the
prompt, the two answers as A and B, and the token of the task: nothing tells who wrote what.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any

from sqlalchemy import select, update

from rlhf_core.errors import UserError
from tasks.feedback.forms.checks import Pseudonyms, is_mail
from tasks.feedback.forms.tools.naming import as_text
from tasks.feedback.store import audit, clock
from tasks.feedback.store.queue import StaleTaskError
from tasks.feedback.store.records import Task, Vote
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import Annotator, Assignment, Judgment
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.settings import Settings

OLDEST = "3.14"  # MLflow with review queues
TOKEN, PROJECT = "rlhf.task", "rlhf.feedback"  # tags of a trace
QUESTION = "preference"
CHOICES = {
    "A is better": "left",
    "B is better": "right",
    "They are equally good": "tie",
    "Both are bad": "both_bad",
    "I cannot tell (skip)": "skip",
}
NOBODY = "default"  # the reviewer of a server without accounts
SOURCE = "mlflow"
PAGE = 100  # traces and items that are fetched at once
DAYS = 14.0  # how long a pushed pair is held for its reviewer


@dataclass
class Pushed:
    """What became of a push."""

    experiment: str
    queues: dict[str, int] = field(default_factory=dict)  # name of a queue -> new items
    waiting: int = 0  # items that were in the queues before

    def lines(self) -> list[str]:
        """The result in sentences."""
        found = [
            f"{name}: {count:,} new pairs in the experiment '{self.experiment}'."
            for name, count in self.queues.items()
        ]
        if self.waiting:
            found.append(f"{self.waiting:,} pairs were in the queues already.")
        return found


@dataclass
class Pulled:
    """What became of a pull."""

    votes: int = 0
    skips: int = 0
    there_already: int = 0
    unanswered: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The result in sentences."""
        found = [
            f"{self.votes:,} new votes and {self.skips:,} new skips; {self.there_already:,} were "
            f"there already, {self.unanswered:,} pairs have no answer yet."
        ]
        return found + [f"Left out: {count:,} {why}." for why, count in self.left_out.items()]


class ReviewQueues:
    """The review queues of a feedback project on an MLflow server."""

    def __init__(self, project: FeedbackProject, settings: Settings) -> None:
        """
        Raises: UserError when the MLflow that is installed has no review queues, or when its server
        does not answer.
        """
        self._project = project
        self._mlflow, self._queues, self._schemas = _modules()
        self._client = Record.open(settings).client
        self._settings = settings
        self.experiment = f"feedback-{project.name}"

    @contextmanager
    def _spoken_to(self) -> Iterator[None]:
        """Queues and traces have no client of their own: they use the process's address."""
        self._mlflow.set_tracking_uri(self._settings.mlflow_uri)
        try:
            yield
        finally:
            self._mlflow.set_tracking_uri(self._settings.tracking_uri or None)

    # ---- out ----

    def push(self, reviewers: list[str], pairs: int, *, days: float = DAYS, by: str = "") -> Pushed:
        """Put so many pairs into the queue of each reviewer, fewer if no more are free.

        Raises: UserError when a reviewer is nobody's name in MLflow, or is no annotator any more.
        """
        made = Pushed(self.experiment)
        with self._spoken_to():
            experiment = ensure_experiment(self._client, self.experiment, self._settings)
            schema = self._schema(experiment)
            for reviewer in dict.fromkeys(reviewers):
                self._fill(experiment, schema, reviewer, pairs, days, made)
        with self._project.database.writing() as session:
            audit.note(
                session, self._project.id, by, "push", self.experiment, {"queues": made.queues}
            )
        return made

    def _fill(
        self, experiment: str, schema: str, reviewer: str, pairs: int, days: float, made: Pushed
    ) -> None:
        """Put pairs into the queue of a reviewer."""
        annotator = self._annotator(reviewer)
        tasks = self._project.queue.lease(annotator, pairs)
        self._hold(annotator, tasks, days)
        known = self._tokens(experiment)
        fresh = [task for task in tasks if task.token not in known]
        made.waiting += len(tasks) - len(fresh)
        ids = [self._trace(experiment, task) for task in fresh]
        self._mlflow.flush_trace_async_logging()
        queue = self._queue(experiment, schema, reviewer)
        # A push that was killed has left traces that are in no queue.
        ids += [known[task.token] for task in tasks if task.token in known]
        for start in range(0, len(ids), PAGE):
            some = ids[start : start + PAGE]
            self._queues.add_items_to_review_queue(queue.queue_id, item_ids=some)
        made.queues[queue.name] = len(fresh)

    def _trace(self, experiment: str, task: Task) -> str:
        prompt = as_text(task.prompt)
        span = self._mlflow.start_span_no_context(
            "comparison",
            inputs={"prompt": prompt},
            experiment_id=experiment,
            tags={TOKEN: task.token, PROJECT: self._project.name},
        )
        span.set_outputs({"A": task.left, "B": task.right})
        span.end()
        return str(span.trace_id)

    def _schema(self, experiment: str) -> str:
        """The question of all queues."""
        page = self._schemas.list_label_schemas(experiment, max_results=PAGE)
        found = next((one for one in page if one.name == QUESTION), None)
        if found is None:
            rules = self._project.rules
            found = self._schemas.create_label_schema(
                QUESTION,
                type="feedback",
                input=self._schemas.InputCategorical(options=list(CHOICES)),
                instruction=rules.question,
                enable_comment=True,
                experiment_id=experiment,
            )
        return str(found.schema_id)

    def _queue(self, experiment: str, schema: str, reviewer: str) -> Any:
        name = f"{self._project.name}: {reviewer}"
        for queue in self._pages(self._queues.list_review_queues, experiment_id=experiment):
            if queue.name == name:
                return queue
        return self._queues.create_review_queue(
            name,
            queue_type="custom",
            users=[reviewer],
            schema_ids=[schema],
            experiment_id=experiment,
        )

    def _annotator(self, reviewer: str) -> int:
        """The annotator of a reviewer, under a pseudonym: an e-mail address stays in MLflow."""
        pseudonym = self._pseudonym(reviewer)
        with self._project.database.writing() as session:
            query = select(Annotator).filter_by(project_id=self._project.id, pseudonym=pseudonym)
            found = session.scalar(query)
            if found is None:
                found = Annotator(
                    project_id=self._project.id,
                    pseudonym=pseudonym,
                    via=SOURCE,
                    state="active",
                    created_at=clock.now(),
                )
                session.add(found)
                session.flush()
            elif found.state != "active":
                raise UserError(
                    f"The annotator '{pseudonym}' of '{self._project.name}' is "
                    f"{found.state}, so nothing is pushed for them."
                )
            return found.id

    def _pseudonym(self, reviewer: str) -> str:
        people = Pseudonyms(hashed=is_mail(reviewer))
        people.use(self._project)
        name = reviewer.strip()
        if not name:
            raise UserError("A reviewer needs a name, as MLflow knows them.")
        return people.name(name if is_mail(name) else f"{SOURCE}-{name}", "reviewer")

    def _hold(self, annotator: int, tasks: list[Task], days: float) -> None:
        """Hold tasks for longer than somebody at the page would need."""
        until = clock.now() + timedelta(days=days)
        with self._project.database.writing() as session:
            mine = Assignment.token.in_([task.token for task in tasks])
            session.execute(
                update(Assignment)
                .where(Assignment.annotator_id == annotator, mine)
                .values(leased_until=until)
            )

    # ---- back ----

    def pull(self, *, by: str = "") -> Pulled:
        """Take the choices of the reviewers; those that were taken before add nothing."""
        made = Pulled()
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            raise UserError(
                f"MLflow has no experiment '{self.experiment}'; "
                f"`rlhf feedback push {self._project.name}` makes it."
            )
        with self._spoken_to():
            declined = self._declined(found.experiment_id)
            for trace in self._traces(found.experiment_id):
                self._take(trace, declined, made)
        with self._project.database.writing() as session:
            counts = {"votes": made.votes, "skips": made.skips}
            audit.note(session, self._project.id, by, "pull", self.experiment, counts)
        return made

    def _take(self, trace: Any, declined: dict[str, Any], made: Pulled) -> None:
        token = trace.info.tags[TOKEN]
        desk = self._desk(token)
        if desk is None:
            made.left_out["traces whose task is not in this store"] += 1
            return
        answers = self._answers(trace, desk[1], made)
        item = declined.get(trace.info.trace_id)
        if not answers and item is not None:
            key, time = f"mlflow-declined-{token}", item.completed_time_ms
            vote = Vote("skip", key, reason="declined", source=SOURCE, time=_time(time))
        elif not answers:
            made.unanswered += 1
            return
        else:
            last = max(answers, key=lambda one: one.last_update_time_ms)
            if last.value not in CHOICES:
                made.left_out["answers that are none of the choices"] += 1
                return
            vote = Vote(
                CHOICES[last.value],  # type: ignore[arg-type]
                f"mlflow-{last.assessment_id}-{last.last_update_time_ms}"[:64],
                note=last.rationale or "",
                source=SOURCE,
                time=_time(last.last_update_time_ms),
            )
        self._keep(desk, token, vote, made)

    def _keep(self, desk: tuple[int, str, str], token: str, vote: Vote, made: Pulled) -> None:
        annotator, _, state = desk
        if state in ("voted", "skipped"):
            if self._is_kept(vote.key):
                made.there_already += 1
            else:
                made.left_out["answers that were changed after they had been pulled"] += 1
            return
        try:
            self._project.queue.vote(annotator, token, vote)
        except StaleTaskError:  # somebody else pulls at the same time
            made.there_already += 1
            return
        if vote.choice == "skip":
            made.skips += 1
        else:
            made.votes += 1

    def _is_kept(self, key: str) -> bool:
        with self._project.database.reading() as session:
            query = select(Judgment.id).filter_by(project_id=self._project.id, key=key)
            return session.scalar(query) is not None

    def _answers(self, trace: Any, pseudonym: str, made: Pulled) -> list[Any]:
        """What the reviewer of a task has answered; without accounts everybody is `default`."""
        found = []
        for one in trace.info.assessments or ():
            if one.name != QUESTION or one.source.source_type != "HUMAN" or one.valid is False:
                continue
            who = one.source.source_id or NOBODY
            if who == NOBODY or self._pseudonym(who) == pseudonym:
                found.append(one)
            else:
                made.left_out["answers by another person than the reviewer of the queue"] += 1
        return found

    def _desk(self, token: str) -> tuple[int, str, str] | None:
        """Annotator, pseudonym and state of a task."""
        with self._project.database.reading() as session:
            row = session.execute(
                select(Annotator.id, Annotator.pseudonym, Assignment.state)
                .join(Assignment, Assignment.annotator_id == Annotator.id)
                .where(Assignment.token == token, Annotator.project_id == self._project.id)
            ).first()
            return None if row is None else (row[0], row[1], row[2])

    def _declined(self, experiment: str) -> dict[str, Any]:
        """The items that a reviewer has declined, by trace."""
        found: dict[str, Any] = {}
        for queue in self._pages(self._queues.list_review_queues, experiment_id=experiment):
            items = self._pages(
                self._queues.list_review_queue_items, queue.queue_id, status="declined"
            )
            found |= {item.item_id: item for item in items}
        return found

    def _tokens(self, experiment: str) -> dict[str, str]:
        """Token of a task -> the trace that shows it."""
        return {trace.info.tags[TOKEN]: trace.info.trace_id for trace in self._traces(experiment)}

    def _traces(self, experiment: str) -> Iterator[Any]:
        asked = f"tags.`{PROJECT}` = '{self._project.name}'"
        return self._pages(
            self._client.search_traces,
            locations=[experiment],
            filter_string=asked,
            include_spans=False,
        )

    @staticmethod
    def _pages(fetch: Any, *arguments: Any, **more: Any) -> Iterator[Any]:
        token = None
        while True:
            page = fetch(*arguments, **more, max_results=PAGE, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def _time(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _modules() -> tuple[Any, Any, Any]:
    """MLflow, and its modules of review queues and of questions."""
    import mlflow

    try:
        from mlflow.genai import label_schemas, review_queues

        needed = (
            *(review_queues.create_review_queue, review_queues.add_items_to_review_queue),
            *(review_queues.list_review_queue_items, label_schemas.list_label_schemas),
            mlflow.start_span_no_context,
        )
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"MLflow {version('mlflow')} has no review queues ({error}); they came with MLflow "
            f"{OLDEST} and are experimental. Install a version that has them, or use `rlhf label`."
        ) from error
    del needed
    return mlflow, review_queues, label_schemas
