"""A back-up that is made while votes arrive holds the votes of one moment, whole."""

import shutil
import sqlite3
import stat
import threading

import pytest

from tasks.backup import Database, backup, restore
from tasks.feedback.store.database import open_database
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.settings import Settings, StoreSettings


def bring(project, stop):
    n = 0
    while not stop.is_set():
        pairs = [NewPair(f"p{n + k}", Answer("a"), Answer("b")) for k in range(2)]
        project.judgments.add([(pair, [Ballot("a")]) for pair in pairs])
        n += 2


def test_the_file_under_the_home(tmp_path):
    settings = Settings.model_validate({"RLHF_HOME": tmp_path / "home"})
    store = Store.open(settings)
    project = store.project("demo", make=True)
    stop = threading.Event()
    thread = threading.Thread(target=bring, args=(project, stop))
    thread.start()
    try:
        while sum(1 for _ in project.judgments.stream()) < 10:
            pass
        backup(settings, StoreSettings(), tmp_path / "saved")
    finally:
        stop.set()
        thread.join()
    store.close()
    shutil.rmtree(settings.home)
    restore(settings, StoreSettings(), tmp_path / "saved")
    file = settings.home / "feedback" / "feedback.db"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with sqlite3.connect(file) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()
    again = Store.open(settings)
    votes = list(again.project("demo").judgments.stream())
    assert len(votes) >= 10
    assert len(votes) % 2 == 0  # both of a transaction, or neither
    again.close()


@pytest.mark.skipif(shutil.which("pg_dump") is None, reason="there is no pg_dump in the path")
def test_postgres(postgres, postgres_template, tmp_path):
    url = postgres.create(postgres_template)
    store = Store(open_database(url))
    store.project("demo", make=True).judgments.add(
        [(NewPair("p", Answer("a\0"), Answer("b")), [Ballot("a", "ann")])]
    )
    digest = store.project("demo").snapshots.take().digest
    saved = Database("feedback", store.database.engine.url)
    saved.save(tmp_path / saved.name)
    empty = postgres.create()
    other = Database("feedback", store.database.engine.url.set(database=empty.rpartition("/")[2]))
    assert other.occupied() == ""
    other.load(tmp_path / saved.name)
    again = Store(open_database(empty))
    project = again.project("demo")
    assert project.snapshots.find().digest == project.snapshots.look().digest == digest
    for one, address in ((store, url), (again, empty)):
        one.close()
        postgres.drop(address)
