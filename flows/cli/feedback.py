"""`rlhf feedback ...`: the commands of the preference store."""

from functools import partial
from getpass import getuser
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.printing import line, secret_line, votes_of
from flows.cli.process import Command, Commands, load
from flows.local import find
from rlhf_core.errors import UserError
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
    line(f"{found.digest[:16]} ({what}): {votes_of(found)}")
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


Fields = Annotated[
    list[str],
    typer.Option(
        "--fields",
        metavar="OURS=THEIRS",
        help="Where a field of ours is in the file: a column, a dotted path or a template.",
    ),
]
Votes = Annotated[
    list[str],
    typer.Option(
        "--votes",
        metavar="OURS=THEIRS",
        help="What a value of the votes means: `a`, `b`, `tie`, `both_bad` or `skip`.",
    ),
]


@command("import", epilog="Example: rlhf feedback import demo votes.jsonl --licence 'CC BY 4.0'")
def import_(
    project: Project,
    file: Annotated[str, typer.Argument(help="A file, a folder of save_to_disk, or a hub id.")],
    form: Annotated[
        str, typer.Option(help="Form of the file; `auto` tells it by its columns.")
    ] = "auto",
    fields: Fields = [],  # noqa: B006
    votes: Votes = [],  # noqa: B006
    keep: Annotated[list[str], typer.Option(help="A column to keep beside each pair.")] = [],  # noqa: B006
    ignore: Annotated[list[str], typer.Option(help="A column to leave out without a note.")] = [],  # noqa: B006
    source: Annotated[
        str, typer.Option(help="Where rows that do not say so come from; else the file's name.")
    ] = "",
    licence: Annotated[str, typer.Option(help="Licence of rows that name none.")] = "",
    prompt: Annotated[str, typer.Option(help="The prompt of a file that has none.")] = "",
    gold: Annotated[str, typer.Option(help="The column with the right answer.")] = "",
    who: Annotated[
        Literal["as-is", "hashed"],
        typer.Option(help="Annotators under the names of the file, or under new pseudonyms."),
    ] = "as-is",
    ask: Annotated[
        int,
        typer.Option(min=0, max=1000, help="Ask so many people about each pair; take no votes."),
    ] = 0,
    score_margin: Annotated[
        float, typer.Option(min=0.0, help="Margin for each point between two scores.")
    ] = 0.0,
    on_bad_row: Annotated[
        Literal["error", "drop"], typer.Option(help="Stop at a bad row, or leave it out.")
    ] = "error",
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    subset: Annotated[str, typer.Option(help="Of a data set on the hub.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Only the first rows; 0 = all.")] = 0,
) -> None:
    """Put votes, ratings, rankings or pairs of a file into the store; none is put in twice."""
    load("tasks.feedback.forms.incoming")
    from flows.cli.feedback_files import put_in, settings
    from tasks.feedback.forms.options import ImportOptions

    options = ImportOptions(
        form=form,
        fields=settings("--fields", fields),
        votes=settings("--votes", votes, many=True),
        keep=keep,
        ignore=ignore,
        source=source,
        licence=licence,
        prompt=prompt,
        gold=gold,
        who=who,
        ask=ask,
        score_margin=score_margin,
        on_bad_row=on_bad_row,
        split=split,
        subset=subset,
        limit=limit,
    )
    put_in(project, file, options)


@command(epilog="Example: rlhf feedback export demo pairs.jsonl --form pairs --snapshot latest")
def export(
    project: Project,
    file: Annotated[str, typer.Argument(help="Ends with .jsonl, .json or .parquet.")],
    form: Annotated[str, typer.Option(help="Form of the file.")] = "votes",
    snapshot: Annotated[
        str, typer.Option(help="A digest, its beginning, or `latest`; else the votes of now.")
    ] = "",
    without_annotators: Annotated[
        bool, typer.Option("--without-annotators", help="Numbers in place of pseudonyms.")
    ] = False,
    only_open: Annotated[
        bool,
        typer.Option("--only-open", help="For labelling tools: only pairs that want votes."),
    ] = False,
    also: Annotated[
        list[str],
        typer.Option(
            "--with",
            metavar="WHICH",
            help="Votes that no training may see: `hold-out`, `verdicts`; may be repeated.",
        ),
    ] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write votes or pairs of the store to a file, and say what its form has no place for.

    Votes that no training may see are left out and counted.
    """
    load("tasks.feedback.forms.outgoing")
    from flows.cli.feedback_files import write
    from tasks.feedback.forms.options import ExportOptions

    options = ExportOptions(
        form=form,
        snapshot=snapshot,
        without_annotators=without_annotators,
        only_open=only_open,
        also=tuple(also),
        force=force,
    )
    write(project, file, options)


@command(epilog="Example: rlhf feedback push demo --reviewer ann --reviewer bob --pairs 50")
def push(
    project: Project,
    reviewer: Annotated[
        list[str], typer.Option(help="A user of MLflow; `default` where it has no accounts.")
    ] = ["default"],  # noqa: B006
    pairs: Annotated[
        int, typer.Option(min=1, max=10_000, help="Pairs in the queue of each reviewer.")
    ] = 50,
    days: Annotated[
        float, typer.Option(min=0.01, max=365, help="How long a pair is held for its reviewer.")
    ] = 14.0,
) -> None:
    """Put pairs of the queue into MLflow's review queues; experimental in MLflow."""
    load("tasks.feedback.forms.tools.review_queues")
    from flows.cli.feedback_files import push_pairs

    push_pairs(project, reviewer, pairs, days)


@command(epilog="Example: rlhf feedback pull demo")
def pull(project: Project) -> None:
    """Take the choices of MLflow's reviewers as votes; a second time adds nothing."""
    load("tasks.feedback.forms.tools.review_queues")
    from flows.cli.feedback_files import pull_votes

    pull_votes(project)


@command(epilog="Example: rlhf feedback resume")
def resume(
    watch: Annotated[
        bool, typer.Option("--watch", help="Look every few seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """Resume the runs that wait for people and have their answers, and start what follows complete
    batches; show how far the others are.

    `rlhf label` and `rlhf up` do this by themselves every few seconds.
    """
    settings = find.join(read_settings(), prefect=True)
    if not settings.prefect_api_url:
        raise UserError(
            "No Prefect server is running here: start `rlhf up`, or set PREFECT_API_URL."
        )
    load("tasks.feedback.asking.waiting")
    from flows.cli.asking import resume_by_hand, resume_for_ever

    if watch:
        resume_for_ever(settings)
    for said in resume_by_hand(settings):
        line(said)


@command(epilog="Example: rlhf feedback loop demo --stop")
def loop(
    project: Project,
    stop: Annotated[
        bool, typer.Option("--stop", help="Let nothing follow the batches that wait.")
    ] = False,
) -> None:
    """Show what follows the batches of a project, or stop it.

    A stopped batch is labelled to its end, and starts nothing. A run that is under way goes on.
    """
    load("flows.cli.feedback_store")
    from flows.cli import feedback_store

    feedback_store.loop(project, stop=stop)


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


@command(epilog="Example: rlhf feedback order demo")
def order(
    project: Project,
    model: Annotated[
        str, typer.Option(help="A reward model, as models:/demo-reward/3; else the newest.")
    ] = "",
) -> None:
    """Put the queue in order: the pairs that a reward model learns most from come first.

    A fifth of the labels stays random, and a tenth is held out, to measure what the order saves.
    """
    settings = find.join(read_settings())
    load("flows.cli.feedback_store", "tasks.feedback.ordering.task")
    from flows.cli import feedback_store

    feedback_store.put_in_order(project, model, settings)


@command(epilog="Example: rlhf feedback projects")
def projects() -> None:
    """List the feedback projects, and what is in them."""
    load("flows.cli.feedback_store")
    from flows.cli import feedback_store

    feedback_store.show_projects()


@command(epilog="Example: rlhf feedback snapshots demo")
def snapshots(project: Project) -> None:
    """List the snapshots of a project, newest first."""
    load("flows.cli.feedback_store")
    from flows.cli import feedback_store

    feedback_store.show_snapshots(project)


@command(epilog="Example: rlhf feedback rules demo --set votes_per_pair=3 --guidelines help.md")
def rules(
    project: Project,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="RULE=VALUE", help="Change a rule; may be repeated."),
    ] = None,
    guidelines: Annotated[
        Path | None, typer.Option(help="File with help for annotators, in Markdown.")
    ] = None,
    consent: Annotated[
        Path | None, typer.Option(help="File with what annotators agree to, in Markdown.")
    ] = None,
    make: Annotated[bool, typer.Option(help="Make the project if there is none.")] = False,
) -> None:
    """Show or change how a project asks its annotators."""
    load("flows.cli.feedback_store")
    from flows.cli import feedback_store

    texts = {"guidelines": guidelines, "consent": consent}
    feedback_store.rules(project, settings or [], texts, make=make)


@command(epilog="Example: rlhf feedback gold demo --file known.jsonl")
def gold(
    project: Project,
    file: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with prompt, response_a, response_b, right (a, b or tie), and perhaps "
            "a reason."
        ),
    ] = None,
    agreed: Annotated[
        int | None,
        typer.Option(help="Instead of a file: take for right what so many votes or more agree on."),
    ] = None,
    share: Annotated[
        float, typer.Option(help="With --agreed: how much of the votes must say the same.")
    ] = 1.0,
) -> None:
    """Say of some pairs what is right: they become control questions."""
    load("flows.cli.feedback_store")
    from flows.cli import feedback_store

    feedback_store.gold(project, file, agreed, share)


@command(epilog="Example: rlhf feedback audit demo --limit 20")
def audit(
    project: Project,
    limit: Annotated[int, typer.Option(min=1, help="Entries that are shown, newest first.")] = 50,
) -> None:
    """Show who changed what in a project."""
    load("flows.cli.feedback_store")
    from flows.cli import feedback_store

    feedback_store.show_audit(project, limit)
