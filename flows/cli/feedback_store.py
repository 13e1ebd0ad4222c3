"""What the commands that look at the preference store, set it up or erase from it do and print."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flows.cli.printing import line, secret_line, show_table
from flows.cli.process import own_prefect, stoppable
from rlhf_core.errors import ConfigError, DataError, UserError
from tasks.feedback.admin import loops, numbers
from tasks.feedback.store.gold import read_answers
from tasks.feedback.store.store import Store
from tasks.settings import Settings, read_settings

if TYPE_CHECKING:
    from flows.erasure import ErasureConfig

SHOWN = 12  # digits of a digest, so that the table fits into 80 columns

LONGEST_TEXT = 1_000_000  # bytes of a file with guidelines or a consent


@contextmanager
def _opened() -> Iterator[Store]:
    store = Store.open(read_settings())
    try:
        yield store
    finally:
        store.close()


def show_projects() -> None:
    """A row for each project."""
    with _opened() as store:
        found = store.summaries()
    if not found:
        line("There is no feedback project yet: `rlhf feedback import NAME FILE` makes one.")
    columns = ("project", "pairs", "votes", "votes to come", "snapshots", "")
    rows = [
        (one.name, one.pairs, one.votes, one.missing, one.snapshots, "paused" * one.paused)
        for one in found
    ]
    show_table(columns, rows)


def show_snapshots(project: str) -> None:
    """A row for each snapshot."""
    with _opened() as store:
        found = store.project(project).snapshots.all()
    if not found:
        line(f"There is no snapshot yet: `rlhf feedback snapshot {project}` takes one.")
    columns = ("snapshot", "taken (UTC)", "votes", "in training", "known", "pairs", "people")
    rows = [
        (
            one.digest[:SHOWN], f"{one.created_at:%Y-%m-%d %H:%M}", one.votes, one.training,
            one.known, one.pairs, one.annotators,
        )
        for one in found
    ]  # fmt: skip
    show_table(columns, rows)


def loop(project: str, *, stop: bool) -> None:
    """What follows the batches of a project, newest first."""
    with _opened() as store:
        found = store.project(project)
        if stop:
            names = loops.stop(found, getuser())
            for name in names:
                line(f"Nothing follows the batch {name} any more; votes on it still count.")
            if not names:
                line("No batch waits to start anything.")
            return
        rows = [
            (
                batch.name, batch.number, f"{batch.done + batch.withdrawn:,} of {batch.pairs:,}",
                batch.then, _whether(batch),
            )
            for batch in numbers.batches(found)
            if batch.then
        ]  # fmt: skip
    if not rows:
        line(f"There is no loop: `rlhf ask {project} --then retrain/{project}` begins one.")
        return
    show_table(("batch", "round", "done", "then", ""), rows)


def _whether(batch: numbers.BatchState) -> str:
    if batch.stopped:
        return "stopped"
    if batch.started is not None:
        return f"started {batch.started:%Y-%m-%d %H:%M} UTC"
    return batch.problem or ("answers are being sampled" if batch.sampling else "waits")


def rules(
    project: str, settings: Sequence[str], texts: Mapping[str, Path | None], *, make: bool
) -> None:
    """Change what is given, then show all."""
    changes: dict[str, object] = dict(map(_setting, settings))
    for name, path in texts.items():
        if path is not None:
            changes[name] = _text(path)
    with _opened() as store:
        found = store.project(project, make=make)
        now = found.change(getuser(), changes) if changes else found.rules
    for name, value in now.model_dump().items():
        line(f"{name}: {json.dumps(value, ensure_ascii=False)}")


def _setting(given: str) -> tuple[str, object]:
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise UserError(f"'{given}' is no RULE=VALUE; write for example --set votes_per_pair=3")
    return name, value


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LONGEST_TEXT:
            raise DataError(f"{path} is longer than {LONGEST_TEXT:,} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def gold(project: str, file: Path | None, agreed: int | None, share: float) -> None:
    """Mark known answers, from a file or by agreement."""
    if (file is None) == (agreed is None):
        raise ConfigError("say where the right answers come from: either --file or --agreed")
    with _opened() as store:
        found = store.project(project).gold
        if file is not None:
            marked = found.mark(read_answers(file), getuser())
        else:
            marked = found.mark_agreed(getuser(), votes=agreed or 0, share=share)
        line(
            f"{marked.new:,} new control questions, {marked.changed:,} with another answer than "
            f"before, {marked.same:,} as they were; {found.count():,} in all"
        )


def show_audit(project: str, limit: int) -> None:
    """A row for each entry."""
    with _opened() as store:
        rows = [
            (
                f"{one.at:%Y-%m-%d %H:%M:%S}", one.actor, one.action, one.subject,
                json.dumps(one.details, ensure_ascii=False) if one.details else "",
            )
            for one in store.project(project).log(limit)
        ]  # fmt: skip
    show_table(("time (UTC)", "by", "what", "of", "details"), rows)


def put_in_order(name: str, model: str, settings: Settings) -> None:
    """Put a queue in order, log what the order saves, and say it.

    Args:
        model: models:/NAME/VERSION or models:/NAME@ALIAS; "" = the newest of the project.
        settings: with the address of MLflow.
    """
    from tasks.feedback.ordering import task  # torch and MLflow take seconds
    from tasks.record.record import Record

    ref = Record.open(settings).store.resolve(model) if model else None
    line(task.put_in_order(name, settings, ref).said)


def erase(
    pseudonym: str,
    project: str,
    settings: Settings,
    config: "ErasureConfig",
    *,
    yes: bool,
    dry_run: bool,
) -> None:
    """Erase somebody, once it is confirmed.

    Raises: UserError when nobody is called so, or it is not confirmed.
    """
    from tasks.feedback.asking.votes import opened
    from tasks.feedback.erasure import requests
    from tasks.feedback.erasure.preview import preview

    with opened(settings) as store:
        for sentence in preview(store, pseudonym, project, settings):
            line(sentence)
        if dry_run:
            return
        if not (yes or typer.confirm("Erase this person for good?")):
            raise UserError("Nothing was erased.")
        request = requests.begin(store, pseudonym, project, getuser())
    line(f"This is erasure {request.id}. The code of the person, which is not shown again:")
    secret_line(str(request.code))
    chosen = config.model_copy(update={"project": request.project.name, "erasure": request.id})
    with stoppable(), own_prefect(settings):
        from flows.erasure import erasure

        for certificate in erasure(chosen):
            line(f"The certificate: {certificate}")
