"""What the preference store knows of its votes reaches the prepared data."""

import json

import pytest
from sqlalchemy import select

from rlhf_core.data.origins.counts import FILE, Origins
from rlhf_core.data.origins.of_votes import file_beside
from rlhf_core.data.prepared import digest
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.model import FreshModelConfig, ModelConfig
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.work import Work
from tasks.feedback.asking.votes import fetch_snapshot
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Annotator
from tasks.lineage.votes import judgments_of, verdicts_of
from tasks.registry.refs import SnapshotRef

SECTIONS = {
    "model": ModelConfig(fresh=FreshModelConfig(vocab_size=300)),
    "limits": LengthLimits(prompt=64, sft=128, reward=128, response=48),
}


def pair(n):
    return NewPair(
        f"Question {n}?",
        Answer(f"yes {n}", "models:/shop-policy/1", {}, "rlhf ask", "CC0"),
        Answer(f"no {n}", "models:/shop-policy/2", {}, "rlhf ask", "CC0"),
        source="wiki",
        licence="CC BY-SA 3.0",
    )


@pytest.fixture
def snapshot(settings):
    store = Store.open(settings)
    try:
        project = store.project("shop", make=True)
        project.judgments.add(
            (pair(n), [Ballot("a" if n % 2 else "b", annotator=f"p{n % 3}", source="page")])
            for n in range(40)
        )
        with project.database.reading() as session:
            someone = session.scalar(select(Annotator.id).filter_by(pseudonym="p1"))
        project.people.agree(someone, version="1", text="Agreed?", licence="CC BY 4.0")
        taken = project.snapshots.take("a test")
    finally:
        store.close()
    return SnapshotRef(project="shop", digest=taken.digest), "p1"


def prepared(path, output):
    path_of = {"store": "shop", "snapshot": "latest"}
    config = DataConfig(source="files", eval_fraction=0.3, preferences=path_of)
    work = Work(outputs={"data": output}, sections=SECTIONS, seed=0, inputs={"preferences": path})
    prepare_data(config, work)
    return Origins.read(output / FILE)


def test_sources_licences_and_writers_come_with_the_votes_and_change_none(
    settings, snapshot, tmp_path
):
    ref, who = snapshot
    path = fetch_snapshot(ref, tmp_path / "inputs", settings)
    found = prepared(path, tmp_path / "out")
    votes = [c for c in found.counts if c.table == "preferences"]
    assert sum(c.rows for c in votes) == 40
    for count in votes:
        given = {"CC BY 4.0"} if count.annotator == who else set()
        assert set(count.sources) == {"wiki", "rlhf ask", "page"}
        assert set(count.licences) == {"CC BY-SA 3.0", "CC0"} | given
        assert set(count.models) == {"models:/shop-policy/1", "models:/shop-policy/2"}
    # A prompt has its own source and licence, and not those of the answers.
    prompts = [c for c in found.counts if c.table == "prompts"]
    assert {(c.sources, c.licences) for c in prompts} == {(("wiki",), ("CC BY-SA 3.0",))}
    before = digest(tmp_path / "out")
    file_beside(path).unlink()
    without = prepared(path, tmp_path / "again")
    assert digest(tmp_path / "again") == before
    assert {c.licences for c in without.counts} == {()}


def test_a_snapshot_is_written_as_it_always_was(settings, snapshot, tmp_path):
    ref, _ = snapshot
    path = fetch_snapshot(ref, tmp_path / "inputs", settings)
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert "licence" not in row
    assert {found.name for found in path.parent.iterdir()} == {path.name, file_beside(path).name}


def test_judgments_of_somebody_are_counted_by_project(settings, snapshot):
    _, who = snapshot
    counted = judgments_of(who, settings)
    assert list(counted) == ["shop"]
    assert counted["shop"] == 13
    assert judgments_of("nobody", settings) == {}
    assert verdicts_of(who, settings) == []


def test_no_store_is_no_judgments(settings):
    assert judgments_of("p1", settings) == {}
