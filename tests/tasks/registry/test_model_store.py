"""What is stored comes back to the byte, or not at all."""

import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core.digests import tree_digest
from rlhf_core.errors import DataError, ModelError
from tasks.record.describe import ensure_experiment
from tasks.record.tracking import connect
from tasks.registry.datasets import fetch_dataset, store_dataset
from tasks.registry.files import model_digest
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import DatasetRef, ModelRef


@pytest.fixture
def client(settings) -> MlflowClient:
    return connect(settings)


@pytest.fixture
def new_run(client, settings):
    """A function that opens an MLflow run and gives its id."""
    experiment = ensure_experiment(client, "demo", settings)
    return lambda: client.create_run(experiment).info.run_id


@pytest.fixture
def store(client):
    return MlflowModelStore(client)


@pytest.fixture
def publish(store, policy_dir, new_run):
    """A function that publishes the tiny policy."""

    def _publish(name="demo-sft", directory=policy_dir, run_id=None, **tags):
        return store.publish(directory, name, run_id=run_id or new_run(), tags=tags)

    return _publish


def test_a_reference_is_its_uri():
    ref = ModelRef(name="demo-sft", version=3)
    assert ref.uri == "models:/demo-sft/3"
    assert ModelRef.parse(ref.uri) == ref


@pytest.mark.parametrize(
    "uri",
    ["", "demo-sft", "models:/demo-sft", "models:/demo-sft/0", "models:/../x/1", "models:/a/1/b"],
)
def test_what_is_no_reference_is_refused(uri, store):
    with pytest.raises(ModelError, match="models:/name/3"):
        ModelRef.parse(uri)
    with pytest.raises(ModelError, match="models:/name/3"):
        store.resolve(uri)


@pytest.mark.parametrize("name", ["../etc", "a/b", "", ".hidden"])
def test_a_name_cannot_leave_the_store(name):
    with pytest.raises(ValidationError):
        ModelRef(name=name, version=1)


def test_versions_count_up_for_each_model(store, publish):
    assert [publish().version, publish().version] == [1, 2]
    assert publish("demo-policy") == ModelRef(name="demo-policy", version=1)
    assert store.versions("demo-sft") == [1, 2]
    assert store.names() == ["demo-policy", "demo-sft"]


def test_what_is_fetched_is_what_was_published(store, publish, policy_dir, tmp_path):
    ref = publish()
    got = store.fetch(ref, tmp_path / "deep" / "model")
    assert got == tmp_path / "deep" / "model"
    assert sorted(p.name for p in got.iterdir()) == sorted(p.name for p in policy_dir.iterdir())
    assert model_digest(got) == model_digest(policy_dir)


def test_plain_transformers_loads_it_and_the_logits_are_the_same(
    store, publish, policy_dir, tmp_path
):
    got = store.fetch(publish(), tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(got)("a fine room", return_tensors="pt").input_ids
    here, there = (AutoModelForCausalLM.from_pretrained(d)(ids).logits for d in (policy_dir, got))
    torch.testing.assert_close(there, here, rtol=0, atol=0)


def test_an_upload_alone_is_no_version(store, policy_dir, new_run):
    upload = store.upload(policy_dir, "demo-sft", run_id=new_run())
    assert store.names() == []
    assert store.register(upload, tags={}) == ModelRef(name="demo-sft", version=1)


def test_tags_are_kept(store, publish):
    tags = store.tags(publish(seed="7", **{"parent.sft": "models:/demo-sft/3"}))
    assert tags["seed"] == "7"
    assert tags["parent.sft"] == "models:/demo-sft/3"


def test_an_alias_points_at_one_version(store, publish):
    first, second = publish(), publish()
    assert store.get_alias("demo-sft", "champion") is None
    store.set_alias(first, "champion")
    assert store.resolve("models:/demo-sft@champion") == first
    store.set_alias(second, "champion")
    assert store.get_alias("demo-sft", "champion") == second
    assert store.resolve("models:/demo-sft/1") == first


def test_a_deleted_version_is_gone_and_its_number_stays_taken(store, publish, tmp_path):
    publish()
    ref = publish()
    store.set_alias(ref, "champion")
    store.delete(ref)
    assert not store.exists(ref)
    assert store.get_alias("demo-sft", "champion") is None
    with pytest.raises(ModelError):
        store.fetch(ref, tmp_path / "model")
    assert publish().version == 3


def test_the_versions_of_one_run_can_be_deleted(store, publish, new_run):
    ours, theirs = new_run(), new_run()
    kept = publish(run_id=theirs)
    publish(run_id=ours)
    publish("demo-critic", run_id=ours)
    store.delete_of_run(ours)
    assert store.versions("demo-sft") == [kept.version]
    assert store.versions("demo-critic") == []


def test_what_is_missing_is_said_with_what_there_is(store, publish, tmp_path):
    with pytest.raises(ModelError, match="no model is registered yet"):
        store.resolve("models:/demo-sft/1")
    publish()
    publish()
    cases = {
        "models:/demo-sft/9": r"there is no models:/demo-sft/9; 'demo-sft' has the versions 1, 2",
        "models:/demo-sft@champion": r"points to no version; 'demo-sft' has the versions 1, 2",
        "models:/demo/1": r"there is no model 'demo'; the registered models are demo-sft",
        "models:/demo@champion": r"there is no model 'demo'; the registered models are demo-sft",
    }
    for uri, message in cases.items():
        with pytest.raises(ModelError, match=message):
            store.resolve(uri)
    ghost = ModelRef(name="demo-sft", version=9)
    for call in (
        lambda: store.fetch(ghost, tmp_path / "model"),
        lambda: store.tags(ghost),
        lambda: store.set_alias(ghost, "champion"),
        lambda: store.delete(ghost),
    ):
        with pytest.raises(ModelError, match="versions 1, 2"):
            call()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "training_args.bin").write_bytes(b"\x80"), "run code"),
        (lambda d: (d / "deep").mkdir() or (d / "deep/x.pkl").write_bytes(b""), "run code"),
        (lambda d: (d / "link.json").symlink_to("/etc/hostname"), "is a link"),
        (lambda d: (d / "model.safetensors").unlink(), "no safetensors"),
    ],
)
def test_a_directory_that_could_carry_code_is_refused(
    store, publish, policy_dir, tmp_path, spoil, message
):
    bad = shutil.copytree(policy_dir, tmp_path / "bad")
    spoil(bad)
    with pytest.raises(ModelError, match=message):
        publish(directory=bad)
    assert store.names() == []


def stored_weights(root: Path) -> Path:
    (path,) = root.rglob("model.safetensors")
    return path


def test_a_damaged_version_is_not_handed_out(publish, store, settings, tmp_path):
    ref = publish()
    weights = stored_weights(settings.home)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ModelError, match="models:/demo-sft/1 is damaged"):
        store.fetch(ref, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_several_processes_may_publish_at_once(publish, store):
    with ThreadPool(4) as pool:
        refs = pool.map(lambda _: publish(), range(6))
    assert sorted(ref.version for ref in refs) == [1, 2, 3, 4, 5, 6]
    assert store.versions("demo-sft") == [1, 2, 3, 4, 5, 6]


def test_mlflow_knows_the_run_and_the_logged_model_of_a_version(client, policy_dir, new_run):
    run_id = new_run()
    ref = MlflowModelStore(client).publish(policy_dir, "demo-sft", run_id=run_id, tags={})
    version = client.get_model_version(ref.name, str(ref.version))
    assert version.run_id == run_id
    model = client.get_logged_model(version.tags["logged_model_id"])
    assert model.status == "READY"
    assert model.source_run_id == run_id
    assert model.tags["mlflow.modelVersions"] == '[{"name": "demo-sft", "version": "1"}]'


def test_data_goes_through_its_run_unchanged(client, new_run, data_dir, tmp_path):
    ref = store_dataset(client, new_run(), data_dir)
    got = fetch_dataset(client, ref, tmp_path / "data")
    assert {p.name: p.read_text() for p in got.iterdir()} == {
        p.name: p.read_text() for p in data_dir.iterdir()
    }


def test_missing_or_changed_data_is_refused(client, new_run, data_dir, settings, tmp_path):
    ref = store_dataset(client, new_run(), data_dir)
    for absent in (new_run(), "0" * 32):
        with pytest.raises(DataError, match="there is no prepared data at runs:/"):
            fetch_dataset(client, DatasetRef(run_id=absent, digest=ref.digest), tmp_path / "x")
    (stored,) = settings.home.rglob("prompts.train.jsonl")
    stored.write_text('{"id":"a","prompt":"another film"}\n')
    with pytest.raises(DataError, match=f"should be {ref.digest}"):
        fetch_dataset(client, ref, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- the model card, which is written into a version that is there already ----


def test_a_model_card_joins_a_version_and_its_digest_stays(store, client, publish, tmp_path):
    ref = publish()
    digest = store.tags(ref)["digest"]
    store.describe(ref, "# first", "short")
    store.describe(ref, "# second", "**short**")
    got = store.fetch(ref, tmp_path / "got")
    assert (got / "README.md").read_text() == "# second"
    assert model_digest(got) == store.tags(ref)["digest"] == digest
    assert client.get_model_version(ref.name, "1").description == "**short**"
    (got / "README.md").unlink()
    assert model_digest(got) == digest


def test_a_changed_model_is_found_beside_a_card(store, client, publish, tmp_path):
    ref = publish()
    store.describe(ref, "# card", "")
    location = Path(
        client.get_logged_model(store.tags(ref)["logged_model_id"]).artifact_location[7:]
    )
    for file, content in (("config.json", "{}"), ("sub/README.md", "elsewhere it counts")):
        path = location / file
        before = path.read_bytes() if path.exists() else None
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        with pytest.raises(ModelError, match="is damaged"):
            store.fetch(ref, tmp_path / "damaged")
        path.unlink() if before is None else path.write_bytes(before)
    store.fetch(ref, tmp_path / "whole")


def test_a_card_is_no_way_around_the_checks(store, client, publish, tmp_path):
    ref = publish()
    location = Path(
        client.get_logged_model(store.tags(ref)["logged_model_id"]).artifact_location[7:]
    )
    (location / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(ModelError):
        store.fetch(ref, tmp_path / "linked")


def test_a_model_that_came_with_a_card_keeps_its_digest(
    store, client, policy_dir, new_run, tmp_path
):
    """As a release before wrote it, whose digest counted every file."""
    directory = shutil.copytree(policy_dir, tmp_path / "with")
    (directory / "README.md").write_text("# theirs")
    whole = tree_digest(directory)
    upload = store.upload(directory, "demo-sft", run_id=new_run())
    ref = store.register(upload.model_copy(update={"digest": whole}), tags={})
    got = store.fetch(ref, tmp_path / "got")
    assert (got / "README.md").read_text() == "# theirs"


def test_a_description_has_the_length_that_a_database_takes(store, client, publish):
    ref = publish()
    store.describe(ref, "# card", "a" * 6000)
    text = client.get_model_version(ref.name, "1").description
    assert (len(text), text[-1]) == (5000, "…")
