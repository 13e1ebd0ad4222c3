"""Erasing a person, from the votes to the models, and everything searched for the pseudonym."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.config import PipelineConfig
from flows.erasure import ErasureConfig, erasure
from flows.rlhf import rlhf
from rlhf_core.errors import DataError
from tasks.feedback.erasure import requests
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.record import tags
from tasks.record.record import Record

# Two pipelines, and one again: minutes where several processes share the cores.
pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(3600)]

GONE = "w0042"
OTHERS = ["w004", "w00421", "ada"]  # one is the beginning of the name, one goes on
LENIENT = {
    "min_win_rate": 0.0,
    "max_kl": 1e6,
    "max_length_ratio": 1e3,
    "max_sign_excess": 1.0,
    "min_reward_accuracy": 0.0,
    "min_prompts": 1,
}


def fill(store, project, people):
    found = store.project(project, make=True)
    found.judgments.add(
        [
            (
                NewPair(
                    f"Review of the hotel in town {n % 24}:",
                    Answer(f" good {n} rooms"),
                    Answer(f" bad {n}"),
                ),
                [
                    Ballot("ab"[(n * len(who)) % 3 == 0], annotator=who, first="a", time=f"t{n}")
                    for who in people
                ],
            )
            for n in range(60)
        ]
    )
    return found


def config_of(tiny, project, votes, **changes):
    content = tiny.model_dump(mode="json")
    content |= {
        "project": project,
        "data": {"source": "files", "preferences": {"store": votes}},
        "promotion": LENIENT,
    }
    for section, values in changes.items():
        content[section] = {**content[section], **values}
    return PipelineConfig.model_validate(content)


@pytest.fixture(scope="module", params=["pooled", "aware"])
def annotators(request):
    return request.param


@pytest.fixture(scope="module")
def store(shared_home):
    opened = Store.open(shared_home)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def before(shared_home, tiny, store, annotators):
    """A run on everybody's votes, and one of a project in which the person never was."""
    name = f"shop-{annotators}"
    fill(store, name, [*OTHERS, GONE])
    fill(store, f"clean-{annotators}", OTHERS)
    settings = {"reward_model": {"annotators": annotators}}
    run = rlhf(config_of(tiny, name, name, **settings))
    clean = rlhf(config_of(tiny, f"clean-{annotators}", f"clean-{annotators}", **settings))
    scatter(shared_home)
    return run, clean


def scatter(settings):
    """Files under the home that have the pseudonym, in many forms."""
    import gzip

    import pandas as pd

    home = settings.home
    (home / "logs").mkdir(exist_ok=True)
    (home / "logs" / "label.log").write_text(f"vote by {GONE}.\nvote by w00421\nvote by w004\n")
    exports = home / "exports"
    exports.mkdir(exist_ok=True)
    frame = pd.DataFrame({"annotator": [GONE, "ada", "w00421"], "vote": ["a", "b", "a"]})
    frame.to_parquet(exports / "votes.parquet")
    frame.to_csv(exports / "votes.csv", index=False)
    frame.to_json(exports / "votes.jsonl", orient="records", lines=True)
    (exports / "packed.json.gz").write_bytes(gzip.compress(json.dumps({"by": GONE}).encode()))
    with sqlite3.connect(home / "cache.db") as database:
        database.execute("DROP TABLE IF EXISTS log")
        database.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, message TEXT)")
        database.execute("INSERT INTO log (message) VALUES (?)", (f"hello {GONE}",))
        database.execute("INSERT INTO log (message) VALUES ('hello w00421')")
        database.execute("INSERT INTO log (message) VALUES (?)", (f"{GONE} " * 50,))
        database.execute("DELETE FROM log WHERE id = 3")  # its bytes stay in the file


SEARCH = """
import gzip, json, re, sys
from pathlib import Path
import pyarrow.parquet as pq

home, name = Path(sys.argv[1]), sys.argv[2]
pattern = re.compile(rb"(?<![\\w])" + re.escape(name.encode()) + rb"(?![\\w])")
found = []
for path in home.rglob("*"):
    if not path.is_file():
        continue
    content = path.read_bytes()
    if path.suffix == ".gz":
        content += gzip.decompress(content)
    if path.suffix == ".parquet":
        content += str(pq.read_table(path).to_pylist()).encode()
    if pattern.search(content):
        found.append(path.relative_to(home).as_posix())
print(json.dumps(found))
"""


def files_with(home: Path, name: str) -> list[str]:
    """The files that have the name by itself, packed or not; written apart from ours.

    In a process of its own: this one has databases open, and would give up SQLite's locks.
    """
    command = [sys.executable, "-c", SEARCH, str(home), name]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def test_a_person_is_erased_from_the_votes_to_the_models(
    shared_home, store, before, annotators, tiny
):
    run, clean = before
    name = f"shop-{annotators}"
    record = Record.open(shared_home)
    assert record.store.get_alias(f"{name}-policy", "champion") == run.policy
    record.store.set_alias(run.reward_model, "prod")
    assert files_with(shared_home.home, GONE)
    old = store.project(name).snapshots.find().digest
    request = requests.begin(store, GONE, name, "admin")
    [certificate] = erasure(ErasureConfig(project=name, erasure=request.id))

    # The retrained reward model is, to the bit, the one of a project that never saw the person.
    made = json.loads(Path(certificate).with_suffix(".json").read_text())
    models = {model["version"]: model for model in made["models"]}
    again = models[run.reward_model.uri]["after"]
    assert again["digest"] == record.store.tags(clean.reward_model)[tags.DIGEST]
    assert again["digest"] != models[run.reward_model.uri]["digest"]
    policy = models[run.policy.uri]
    assert policy["after"]["digest"] == record.store.tags(clean.policy)[tags.DIGEST]
    # The demonstrations were the chosen answers, so SFT had learnt from the person too.
    sft = models[run.sft.uri]
    assert sft["after"]["digest"] == record.store.tags(clean.sft)[tags.DIGEST]

    # Aliases moved on with the retrained ones, which passed.
    assert policy["aliases_retired"] == ["champion"]
    champion = record.store.get_alias(f"{name}-policy", "champion")
    assert champion is not None
    assert champion.uri == policy["after"]["version"]
    assert record.store.get_alias(f"{name}-reward", "prod").uri == again["version"]
    assert tags.ERASED in record.store.tags(run.policy)

    # The snapshot is that of the other project, and the old one says what became of it.
    [snapshot] = made["snapshots"]
    assert snapshot["before"] == old
    assert snapshot["after"] == store.project(f"clean-{annotators}").snapshots.find().digest
    with pytest.raises(DataError, match="was erased"):
        store.project(name).snapshots.find(old)

    # Nothing has the pseudonym, and the others are where they were.
    store.database.erase()
    assert files_with(shared_home.home, GONE) == []
    log = (shared_home.home / "logs" / "label.log").read_text()
    assert log == "vote by xxxxx.\nvote by w00421\nvote by w004\n"
    exports = shared_home.home / "exports"
    assert (exports / "votes.csv").read_text() == "annotator,vote\nada,b\nw00421,a\n"
    assert not (exports / "packed.json.gz").exists()
    with sqlite3.connect(shared_home.home / "cache.db") as database:
        assert [row[0] for row in database.execute("SELECT message FROM log")] == [
            "hello (erased)",
            "hello w00421",
        ]
    text = Path(certificate).read_text() + json.dumps(made)
    assert GONE not in text
    assert made["person"]["hash"] == requests.mark_of(GONE, request.code)
    found = MlflowClient(shared_home.mlflow_uri).search_runs(
        [run.run.experiment_id], f"tags.{tags.STAGE} = '{tags.ERASURE}'"
    )
    assert len(found) == 1
