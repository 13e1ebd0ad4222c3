"""What an erasure would do; nothing is changed."""

from collections.abc import Iterator
from dataclasses import replace

from sqlalchemy import select

from rlhf_core.errors import UserError
from tasks.feedback.erasure import models, steps, votes
from tasks.feedback.erasure.requests import Request, known
from tasks.feedback.store import clock
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Snapshot
from tasks.record.record import Record
from tasks.settings import Settings

MOST = 20  # lines of a kind


def preview(store: Store, pseudonym: str, project: str, settings: Settings) -> Iterator[str]:
    """Sentences about what there is of a person, and what would become of it.

    Raises: DataError when nobody is called so, or somebody in several projects is.
    """
    where, person = known(store, pseudonym, project)
    request = Request(0, where, person, pseudonym, "", "", "", clock.now(), None)
    name = steps.name_of(store, request, settings)
    rows = votes.rows_of(request, name)
    request = replace(
        request,
        steps={"plan": {"telling": name.telling, "shared": steps.is_shared(store, request)}},
    )
    yield (
        f"In the project {where.name}: {rows.judgments:,} votes, skips and withdrawals on "
        f"{rows.pairs:,} pairs are emptied, and the identity, {rows.sessions:,} sessions, "
        f"{rows.invitations:,} links and {rows.consents:,} consents are deleted."
    )
    digests = _digests(request)
    yield f"{len(digests):,} snapshots are rebuilt without these votes."
    if not name.telling:
        yield (
            "The pseudonym is a common word or a number here: it is taken out where annotators are "
            "named, and left where it may mean something else."
        )
    yield from _models(request, digests, settings)
    places = steps.places(request, settings, digests)
    everywhere = places.search(name)
    found = [path for path in everywhere if places.is_own(path)]
    yield f"{len(found):,} files and databases under {settings.home} have the pseudonym."
    yield from (f"  {path}" for path in found[:MOST])
    if len(found) > MOST:
        yield f"  and {len(found) - MOST:,} more"
    if others := len(everywhere) - len(found):
        yield (
            f"{others:,} more may be about somebody of the same name in another project, and stay."
        )


def _digests(request: Request) -> list[str]:
    wanted = votes.snapshots_of(request)
    with request.project.database.reading() as session:
        query = select(Snapshot.digest).where(Snapshot.id.in_(wanted)).order_by(Snapshot.id)
        return list(session.scalars(query))


def _models(request: Request, digests: list[str], settings: Settings) -> Iterator[str]:
    try:
        record = Record.open(settings)
    except UserError as error:
        yield f"Models were not looked for: {error}"
        return
    runs = models.of_snapshots(record, request.project.name, digests)
    found = models.affected(record, runs, steps.seen_of(record, request, runs))
    yield f"{len(found):,} versions learnt from these votes, and lose their aliases."
    for version in found[:MOST]:
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        yield f"  {version.version}{aliases}"
    if len(found) > MOST:
        yield f"  and {len(found) - MOST:,} more"
