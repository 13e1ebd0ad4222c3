"""What people who label notice while the places of a queue change.

    python benchmarks/labelling_queue.py                  # 10,000 pairs, about a minute

The queue lies in SQLite. Eight
people, a thread each in another process than the order, take a pair and vote, as fast as they can.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from tasks.feedback.ordering.outcome import begin
from tasks.feedback.store.database import open_database
from tasks.feedback.store.records import Answer, NewPair, Vote
from tasks.feedback.store.store import FeedbackProject, Store
from tasks.feedback.store.tables import Pair

PEOPLE = 8


def fill(project: FeedbackProject, pairs: int) -> None:
    """Pairs of texts of twenty words."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(5000)]

    def text() -> str:
        return " ".join(rng.choices(words, k=20))

    project.change("benchmark", {"gold_every": 0, "repeat_every": 0})
    begin(project, "benchmark")
    project.content.add(NewPair(text(), Answer(text()), Answer(text()), wanted=1)
                        for _ in range(pairs))  # fmt: skip


def label(url: str, stop: Event, out: Path) -> None:
    """Label until told to stop; the times of each step, and how many votes were answered."""
    store = Store(open_database(url))
    project = store.project("demo")
    people = [store.door.who(store.door.enter(project.people.invite())).annotator
              for _ in range(PEOPLE)]  # fmt: skip
    times: list[tuple[float, float]] = []  # when, and how long
    votes = [0] * PEOPLE

    def work(number: int) -> None:
        while not stop.is_set():
            at = time.time()
            [task] = project.queue.lease(people[number])
            project.queue.vote(
                people[number], task.token, Vote("left", f"{number}-{votes[number]}")
            )
            times.append((at, time.time() - at))
            votes[number] += 1
            time.sleep(0.05)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(PEOPLE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.write_text(json.dumps({"times": times, "votes": sum(votes)}))


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--orders", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = f"sqlite:///{folder / 'feedback.db'}"
        store = Store(open_database(url))
        project = store.project("demo", make=True)
        begun = time.time()
        fill(project, arguments.pairs)
        print(f"{arguments.pairs:,} pairs put in, with their arms: {time.time() - begun:.1f} s")
        context = multiprocessing.get_context("spawn")
        stop, out = context.Event(), folder / "times.json"
        people = context.Process(target=label, args=(url, stop, out))
        people.start()
        time.sleep(8)
        spans, cpu = [], []
        for number in range(arguments.orders):
            with project.database.reading() as session:
                ids = [row.id for row in session.query(Pair.id).filter_by(state="open", taken=0)]
            random.Random(number).shuffle(ids)
            begun, begun_cpu = time.time(), time.process_time()
            project.content.prioritise((id_, "random") for id_ in ids)
            spans.append((begun, time.time()))
            cpu.append(time.process_time() - begun_cpu)
            time.sleep(1)
        stop.set()
        people.join()
        found = json.loads(out.read_text())
        kept = len(list(project.judgments.stream()))
        during = [t for at, t in found["times"] if any(at < b and at + t > a for a, b in spans)]
        usual = [t for at, t in found["times"] if not any(at < b and at + t > a for a, b in spans)]
        print(f"places of all pairs: {statistics.median(b - a for a, b in spans):.2f} s, "
              f"{statistics.median(cpu):.2f} s of one core")  # fmt: skip
        longest = f"longest {max(usual):.2f} s, while places change {max(during):.2f} s"
        print(f"a pair and a vote: median {statistics.median(usual):.3f} s; {longest}")
        print(f"votes that were answered: {found['votes']:,}; in the store: {kept:,}")


if __name__ == "__main__":
    main()
