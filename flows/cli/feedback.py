"""`rlhf feedback ...`: the commands of the preference store."""

from functools import partial
from getpass import getuser
from typing import Annotated, Literal

import typer

from flows.cli.printing import line, secret_line
from flows.cli.process import Command, Commands, load
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
def snapshot(project: Project) -> None:
    """Take a snapshot of the votes that count now; the same votes are the same snapshot."""
    load("tasks.feedback.store.store")
    from tasks.feedback.store.store import Store

    found = Store.open(read_settings()).project(project).snapshots.take(getuser())
    what = "new" if found.new else "there already"
    line(
        f"{found.digest[:16]} ({what}): {found.votes:,} votes on {found.pairs:,} pairs by "
        f"{found.annotators:,} annotators"
    )


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
