"""`rlhf feedback ...`: the commands of the preference store."""

from functools import partial
from getpass import getuser
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.printing import line, secret_line
from flows.cli.process import Command, Commands, load
from flows.local import find
from tasks.settings import read_settings

app = typer.Typer(
    cls=Commands,
    name="feedback",
    help="The preference store: votes in and out, snapshots, and what annotators agree on.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
command = partial(app.command, cls=Command)
Project = Annotated[str, typer.Argument(help="A feedback project.")]


@command(epilog="Example: rlhf feedback snapshot demo")
def snapshot(
    project: Project,
    report: Annotated[
        bool, typer.Option(help="Keep what the annotators agree on in MLflow, with the snapshot.")
    ] = True,
) -> None:
    """Take a snapshot of the votes that count now; the same votes are the same snapshot."""
    settings = find.join(read_settings()) if report else read_settings()
    load("tasks.feedback.store.store", *(["tasks.feedback.quality.publish"] if report else []))
    from tasks.feedback.store.store import Store

    votes = Store.open(settings).project(project)
    found = votes.snapshots.take(getuser())
    what = "new" if found.new else "there already"
    line(
        f"{found.digest[:16]} ({what}): {found.votes:,} votes on {found.pairs:,} pairs by "
        f"{found.annotators:,} annotators"
    )
    if report:
        from tasks.feedback.quality.publish import publish
        from tasks.record.record import Record

        line(f"What they agree on is in MLflow: run {publish(votes, found, Record.open(settings))}")


@command(epilog="Example: rlhf feedback invite demo --name Ann --days 7")
def invite(
    project: Project,
    name: Annotated[str, typer.Option(help="Whom the link is for; kept apart from votes.")] = "",
    role: Annotated[
        Literal["annotator", "admin"], typer.Option(help="What the person may do.")
    ] = "annotator",
    days: Annotated[float, typer.Option(help="How long the link can be used (days).")] = 14.0,
    back: Annotated[
        str, typer.Option("--for", metavar="PSEUDONYM", help="Somebody who comes back.")
    ] = "",
) -> None:
    """Print a link that lets in one person, once."""
    load("flows.local.label")
    from flows.local.label import invitation

    secret_line(
        invitation(
            read_settings(), project, name=name, role=role, days=days, back=back, by=getuser()
        )
    )


@command(epilog="Example: rlhf feedback report demo --snapshot latest --output agreement.html")
def report(
    project: Project,
    snapshot: Annotated[
        str,
        typer.Option(
            metavar="HASH|latest", help="A snapshot; without it the votes as they are now."
        ),
    ] = "now",
    output: Annotated[Path | None, typer.Option(help="The page to write.")] = None,
    admin: Annotated[
        bool,
        typer.Option(
            help="Also people with under five votes, and small groups: not for passing on."
        ),
    ] = False,
) -> None:
    """Say what the annotators agree on, who should be looked at, and what changed over time.

    The page needs no server and loads nothing from elsewhere. That of a snapshot is in MLflow too.
    """
    load("tasks.feedback.quality.page", "tasks.feedback.quality.examine")
    from tasks.feedback.quality.examine import examine
    from tasks.feedback.quality.page import quality_page, summary
    from tasks.feedback.store.store import Store

    found = Store.open(read_settings()).project(project)
    quality = examine(found, None if snapshot == "now" else snapshot)
    shown = quality if admin else quality.redacted()
    for sentence in (*summary(shown), *(flag.sentence for flag in shown.flags)):
        line(sentence)
    if output is not None:
        from tasks.pages.publish import write_page

        write_page(output, quality_page(shown))
        line(f"Written: {output}")
