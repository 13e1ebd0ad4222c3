"""Back up a home, destroy it, restore it: everything is as it was, or nothing has been written."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_core.errors import DataError, UserError
from tasks.backup import MANIFEST, Bucket, backup, restore
from tasks.record.describe import ensure_experiment
from tasks.record.tracking import connect
from tasks.registry.files import model_digest
from tasks.registry.model_store import MlflowModelStore
from tasks.settings import Settings, StoreSettings

HERE = StoreSettings()


@pytest.fixture
def publish(settings, policy_dir):
    """A function that registers the tiny policy in the home."""
    client = connect(settings)
    store = MlflowModelStore(client)
    experiment = ensure_experiment(client, "demo", settings)

    def _publish(name="demo-sft"):
        run = client.create_run(experiment).info.run_id
        return store.publish(policy_dir, name, run_id=run, tags={"seed": "7"})

    return _publish


# In a process of its own, as whoever restores: this one still has the lost database open.
LATER = """
import json, sys
from pathlib import Path
from tasks.registry.files import model_digest
from tasks.registry.model_store import MlflowModelStore
from tasks.settings import read_settings
from tasks.record.tracking import connect

client = connect(read_settings())
store = MlflowModelStore(client)
ref = store.resolve("models:/demo-sft@champion")
got = store.fetch(ref, Path(sys.argv[1]))
run = client.create_run("1").info.run_id
print(json.dumps([ref.uri, store.tags(ref)["seed"], model_digest(got),
                  store.publish(got, "demo-sft", run_id=run, tags={}).uri]))
"""


def test_a_model_survives_the_loss_of_the_home(settings, publish, policy_dir, tmp_path):
    ref = publish()
    MlflowModelStore(connect(settings)).set_alias(ref, "champion")
    backup(settings, HERE, tmp_path / "saved" / "monday")
    shutil.rmtree(settings.home)
    restore(settings, HERE, tmp_path / "saved" / "monday")
    done = subprocess.run(
        [sys.executable, "-c", LATER, tmp_path / "model"],
        env={**os.environ, **settings.environment()},
        capture_output=True,
        text=True,
        check=True,
    )
    uri, seed, digest, following = json.loads(done.stdout)
    assert (uri, seed, digest) == (ref.uri, "7", model_digest(policy_dir))
    assert following == "models:/demo-sft/2"  # it goes on
    ids = torch.tensor([[5, 6, 7]])
    here, there = (
        AutoModelForCausalLM.from_pretrained(directory)(ids).logits
        for directory in (policy_dir, tmp_path / "model")
    )
    torch.testing.assert_close(there, here, rtol=0, atol=0)


def registered(home: Path) -> dict[Path, str]:
    """Where the files of each version are, and the digest that they should have."""
    query = (
        "select v.source, t.value from model_versions v join model_version_tags t "
        "on t.name = v.name and t.version = v.version where t.key = 'digest'"
    )
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database:
        rows = database.execute(query).fetchall()
    return {Path(source.removeprefix("file://")): digest for source, digest in rows}


@pytest.mark.parametrize(("moment", "there"), [("sqlite3.connect", 2), ("shutil.copy2", 1)])
def test_a_model_that_comes_meanwhile_is_there_whole_or_not_at_all(
    settings, publish, tmp_path, monkeypatch, moment, there
):
    """Just before the database is copied, and between the database and the files."""
    publish()
    module, _, name = moment.partition(".")
    original = getattr(sys.modules[module], name)

    def publish_first(*arguments, **options):
        monkeypatch.undo()
        publish()
        return original(*arguments, **options)

    monkeypatch.setattr(moment, publish_first)
    backup(settings, HERE, tmp_path / "saved")
    assert len(registered(settings.home)) == 2
    shutil.rmtree(settings.home)
    restore(settings, HERE, tmp_path / "saved")
    versions = registered(settings.home)
    assert len(versions) == there
    assert {path: model_digest(path) for path in versions} == versions


def test_what_a_database_has_not_written_to_its_file_yet_is_saved(settings, tmp_path):
    """A plain copy of the file would miss what lies in the log beside it."""
    path = settings.home / "prefect" / "prefect.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("pragma journal_mode = wal")
        writer.execute("create table runs (name)")
        writer.execute("insert into runs values ('kept')")
        writer.commit()
        writer.execute("insert into runs values ('not committed')")
        backup(settings, HERE, tmp_path / "saved")
    saved = tmp_path / "saved" / "home" / "prefect" / "prefect.db"
    assert [file.name for file in saved.parent.iterdir()] == ["prefect.db"]
    with closing(sqlite3.connect(saved)) as copy:
        assert copy.execute("select name from runs").fetchall() == [("kept",)]


def test_what_passes_is_left_out(settings, tmp_path):
    for name in ("work/a/lock", "logs/mlflow.log", "huggingface/hub/x", "prefect/storage/result"):
        (settings.home / name).parent.mkdir(parents=True, exist_ok=True)
        (settings.home / name).write_text("x")
    (settings.home / "services.json").write_text("{}")
    (settings.home / "password").write_text("of this start")
    manifest = backup(settings, HERE, tmp_path / "saved")
    assert set(manifest.files) == {"home/mlflow/mlflow.db", "home/prefect/storage/result"}


@pytest.fixture
def saved(settings, tmp_path):
    """A back-up of a home that is gone."""
    (settings.home / "prefect").mkdir()
    (settings.home / "prefect" / "result").write_text("x")
    backup(settings, HERE, tmp_path / "saved")
    shutil.rmtree(settings.home)
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "home/prefect/result").write_text("y"), "home/prefect/result has changed"),
        (lambda f: (f / "home/prefect/result").unlink(), "home/prefect/result has changed"),
        (lambda f: (f / "home/more").write_text("y"), "home/more has changed"),
        (lambda f: (f / MANIFEST).unlink(), "is not a back-up"),
        (lambda f: (f / MANIFEST).write_text("{}"), "is not a back-up"),
        (shutil.rmtree, "is not a back-up"),
    ],
)
def test_a_damaged_back_up_writes_nothing(settings, saved, spoil, message):
    spoil(saved)
    with pytest.raises(DataError, match=message):
        restore(settings, HERE, saved)
    assert not settings.home.exists()


def test_a_home_that_is_not_empty_is_left_as_it_is(settings, saved):
    settings.home.mkdir()
    (settings.home / "mine").write_text("mine")
    with pytest.raises(UserError, match="home is not empty: a back-up is restored only into empty"):
        restore(settings, HERE, saved)
    assert [path.name for path in settings.home.iterdir()] == ["mine"]


def test_a_back_up_belongs_to_its_home(saved, tmp_path):
    other = Settings.model_validate({"RLHF_HOME": tmp_path / "other"})
    with pytest.raises(UserError, match=r"set RLHF_HOME to .*/home\."):
        restore(other, HERE, saved)


def test_a_home_and_a_stack_are_not_mixed_up(settings, saved):
    url = "postgresql+psycopg2://mlflow:x@127.0.0.1:1/mlflow"
    stack = StoreSettings.model_validate({"MLFLOW_BACKEND_STORE_URI": url})
    with pytest.raises(UserError, match=r"the back-up of a home, but .* a stack"):
        restore(settings, stack, saved)


def test_a_folder_that_is_there_is_not_written_to(settings, saved):
    settings.home.mkdir()
    with pytest.raises(UserError, match="exists already"):
        backup(settings, HERE, saved)


def test_a_server_is_not_a_home(tmp_path):
    settings = Settings.model_validate(
        {"RLHF_HOME": tmp_path, "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    )
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI is http://mlflow:5000: .* tools"):
        backup(settings, HERE, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_back_up_that_fails_leaves_nothing(settings, tmp_path):
    (settings.home / "mlflow" / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        backup(settings, HERE, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_only_an_s3_store_is_one():
    with pytest.raises(UserError, match="it should be s3://NAME"):
        Bucket("/data/artifacts")


def test_the_manifest_says_what_each_file_is(saved):
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["kind"] == "home"
    # echo -n x | sha256sum
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert manifest["files"]["home/prefect/result"] == digest
