"""How fast the preference store is with a million votes, on SQLite or on Postgres.

    python benchmarks/feedback_store.py sqlite:////tmp/feedback.db
    python benchmarks/feedback_store.py postgresql+psycopg2://postgres@127.0.0.1:5432/empty

The database has to be empty. 200,000 pairs get five imported votes each, by 100 annotators. All are
asked about again, three votes each, so that they are free; somebody has labelled the first 20,000
of them on the page. Then each operation is timed, `--repeats` times, each in its own transaction.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import insert, select, text, update

from tasks.feedback.store import clock
from tasks.feedback.store.database import open_database
from tasks.feedback.store.records import Answer, Ballot, NewPair, Task, Vote
from tasks.feedback.store.store import FeedbackProject, Store
from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair

VOTES_A_PAIR, PEOPLE = 5, 100
CHOICES = ("a", "b", "a", "b", "tie", "both_bad")


def votes(pairs: int, seed: int = 0) -> Iterator[tuple[NewPair, list[Ballot]]]:
    """Synthetic pairs, two to a prompt, with votes of different annotators."""
    rng = random.Random(seed)
    filler = "A sentence of an answer, as long as such sentences are. " * 4
    for n in range(pairs):
        prompt = f"Question {n // 2}: what is the best way to do it, and why would you say so?"
        a, b = Answer(f"Answer {n} of one. {filler}", "m/1"), Answer(f"Answer {n}. {filler}", "m/2")
        ballots = [
            Ballot(
                rng.choice(CHOICES),
                f"annotator {(n + k * 17) % PEOPLE}",
                rng.choice("ab"),
                time=f"2026-01-01T{n % 24:02d}:{k:02d}:00",
            )
            for k in range(VOTES_A_PAIR)
        ]
        yield NewPair(prompt, a, b), ballots


class Took(NamedTuple):
    """How long a call took (ms)."""

    wall: float
    cpu: float  # of this process


def timed(what: Callable[[], object]) -> Took:
    """The time of a call."""
    start, cpu = time.perf_counter(), time.process_time()
    what()
    return Took(1000 * (time.perf_counter() - start), 1000 * (time.process_time() - cpu))


def peak_mb() -> float:
    """The most memory that this process has had (MB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def annotator(project: FeedbackProject) -> int:
    """Somebody new, on the page."""
    with project.database.writing() as session:
        made = Annotator(
            project_id=project.id,
            pseudonym=f"p{time.monotonic_ns()}",
            created_at=clock.now(),
        )
        session.add(made)
        session.flush()
        return made.id


def has_labelled(project: FeedbackProject, person: int, first: int) -> None:
    """Somebody has voted on the first pairs, as if on the page."""
    at = clock.now()
    with project.database.writing(project.id) as session:
        query = text("SELECT id FROM pairs WHERE project_id = :p ORDER BY priority, id LIMIT :n")
        ids = [row.id for row in session.execute(query, {"p": project.id, "n": first})]
        session.execute(
            insert(Assignment.__table__),
            [
                {
                    "token": f"{person:08x}{id_:024x}",
                    "project_id": project.id,
                    "pair_id": id_,
                    "annotator_id": person,
                    "kind": "fresh",
                    "first": "a",
                    "state": "voted",
                    "leased_until": at,
                    "created_at": at,
                    "ended_at": at,
                }
                for id_ in ids
            ],
        )
        found = session.execute(
            text("SELECT id, pair_id FROM assignments WHERE annotator_id = :who"), {"who": person}
        )
        session.execute(
            insert(Judgment.__table__),
            [
                {
                    "project_id": project.id,
                    "pair_id": row.pair_id,
                    "annotator_id": person,
                    "assignment_id": row.id,
                    "key": f"{person:08x}{row.pair_id:024x}",
                    "kind": "fresh",
                    "vote": "a",
                    "first": "a",
                    "source": "page",
                    "time": at.isoformat(),
                    "at": at,
                }
                for row in found
            ],
        )
        mine = select(Assignment.pair_id).where(Assignment.annotator_id == person)
        session.execute(
            update(Pair)
            .where(Pair.id.in_(mine))
            .values(votes=Pair.votes + 1, taken=Pair.taken + 1)
            .execution_options(synchronize_session=False)
        )


def operations(project: FeedbackProject, person: int, repeats: int) -> dict[str, list[Took]]:
    """The times of what an annotator's page does."""
    times: dict[str, list[Took]] = {"next pair": [], "vote": [], "undo": [], "progress": []}
    for n in range(repeats):
        tasks: list[Task] = []
        get = partial(_lease, project, person, tasks)
        times["next pair"].append(timed(get))
        if not tasks:
            continue
        said = Vote("left", f"{person}-{n}-{time.monotonic_ns()}", 2.0)
        cast = partial(project.queue.vote, person, tasks[0].token, said)
        times["vote"].append(timed(cast))
        if n % 4 == 0:
            times["undo"].append(timed(lambda: project.queue.undo(person)))
        times["progress"].append(timed(lambda: project.queue.progress(person)))
    return times


def _lease(project: FeedbackProject, person: int, tasks: list[Task]) -> None:
    tasks += project.queue.lease(person, 1)


def percentile(times: list[float], share: float) -> float:
    """The time that a share of them does not exceed."""
    return sorted(times)[min(len(times) - 1, round(share * len(times)))]


def row(name: str, times: list[Took]) -> str:
    """A row of the table."""
    wall, cpu = [one.wall for one in times], [one.cpu for one in times]
    middle, late = statistics.median(wall), percentile(wall, 0.95)
    return f"| {name} | {middle:.1f} | {late:.1f} | {statistics.median(cpu):.1f} |"


def measure(url: str, pairs: int, labelled: int, repeats: int) -> Iterator[str]:
    """The lines of the report, as they are known."""
    store = Store(open_database(url))
    if store.names():
        raise SystemExit("the database is not empty")
    project = store.project("benchmark", make=True)
    total = pairs * VOTES_A_PAIR
    before = peak_mb()
    seconds = timed(lambda: project.judgments.put(votes(pairs))).wall / 1000
    yield f"import of {total:,} votes: {seconds:.1f} s, {total / seconds:,.0f} a second"
    again = votes(min(pairs, 20_000))
    start = time.perf_counter()
    added = project.judgments.put(again)
    seconds = time.perf_counter() - start
    yield f"the same again: {added.new} new, {added.known / seconds:,.0f} votes a second"
    with store.database.writing(project.id) as session:
        wanted = VOTES_A_PAIR + 3
        session.execute(update(Pair).values(wanted=wanted, state="open"))
    if not store.database.is_sqlite:  # as its autovacuum would, a little later
        with store.database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(
                text("VACUUM ANALYZE")
            )
    old, new = annotator(project), annotator(project)
    has_labelled(project, old, labelled)
    yield ""
    yield "| | median (ms) | 95th percentile (ms) | CPU of this process, median (ms) |"
    yield "|---|---|---|---|"
    first = [timed(lambda: project.queue.lease(old, 1))]
    yield row(f"the very first pair for one with {labelled:,} labelled", first)
    for who, person in (("a new annotator", new), (f"one with {labelled:,} labelled", old)):
        for name, times in operations(project, person, repeats).items():
            yield row(f"{name}, {who}", times)
    with store.database.writing(project.id) as session:
        keep = text("SELECT max(id) - 50 FROM pairs")
        last = session.scalar(keep)
        session.execute(update(Pair).where(Pair.id < last).values(state="done", wanted=1))
    for name, times in operations(project, annotator(project), min(repeats, 40)).items():
        yield row(f"{name}, nearly all pairs done", times)
    yield ""
    memory = peak_mb()
    took = timed(lambda: project.snapshots.take()).wall / 1000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        wrote = timed(lambda: project.snapshots.write("latest", path)).wall / 1000
        size = path.stat().st_size / 1e6
        with path.open() as lines:
            count = sum(1 for line in lines if json.loads(line))
    found = project.snapshots.find()
    yield f"snapshot of {found.votes:,} votes: {took:.1f} s to take, {wrote:.1f} s to write"
    yield f"its file: {count:,} lines, {size:,.0f} MB"
    yield f"load of the machine meanwhile: {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    yield (
        f"peak memory (MB): {before:.0f} after the imports of Python, {memory:.0f} before the "
        f"snapshot, {peak_mb():.0f} after it"
    )
    store.close()


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of an empty database")
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--labelled", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=200)
    given = parser.parse_args()
    for line in measure(given.url, given.pairs, given.labelled, given.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
