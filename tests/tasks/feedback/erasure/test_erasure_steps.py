"""An erasure from its first step to the certificate: killed anywhere, refused, resumed."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from safetensors.numpy import save_file

from rlhf_core.errors import ModelError, UserError
from tasks.backup import backup
from tasks.feedback.erasure import certificate, models, preview, requests, retraining, steps
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.record import tags
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.registry import champion
from tasks.registry.refs import ModelRef, SnapshotRef
from tasks.settings import Settings, StoreSettings

GONE = "w0042"
DATA = "0123456789abcdef"


@pytest.fixture
def store(settings):
    opened = Store.open(settings)
    yield opened
    opened.close()


def fill(store, name, people=(GONE, "ada")):
    project = store.project(name, make=True)
    project.judgments.add(
        [
            (NewPair(f"p{n}", Answer("one"), Answer("two")), [Ballot("a", who) for who in people])
            for n in range(5)
        ]
    )
    return project


class Lab:
    """What a pipeline would have left in MLflow, without one."""

    def __init__(self, settings, project, snapshot, work):
        import numpy as np

        self.record = Record.open(settings)
        client = self.record.client
        experiment = ensure_experiment(client, project, settings)
        pinned = {tags.SNAPSHOT: SnapshotRef(project=project, digest=snapshot).uri}
        self.pipeline = self.run(experiment, {**pinned, tags.STAGE: tags.PIPELINE}, name="otter")
        prepare = {
            **pinned,
            tags.STAGE: "prepare",
            tags.KEY: "k",
            tags.PARENT_RUN: self.pipeline,
            tags.DATA_DIGEST: DATA,
        }
        self.prepare = self.run(experiment, prepare)
        client.set_tag(self.prepare, tags.output_of(tags.DATA), f"runs:/{self.prepare}/data")
        row = json.dumps({"annotator": GONE, "vote": "a"}) + "\n"
        client.log_text(self.prepare, row, "data/preferences.train.jsonl")
        client.log_text(self.prepare, f"seen {GONE}\n", "notes.txt")
        client.log_param(self.prepare, "who", GONE)
        weights = work / "weights"
        weights.mkdir()
        save_file({"w": np.zeros(2, dtype=np.float32)}, weights / "model.safetensors")

        def publish(kind, **more):
            own = {tags.KIND: kind, tags.PIPELINE_RUN: self.pipeline, tags.RUN: self.prepare}
            return self.record.store.publish(
                weights, f"{project}-{kind}", run_id=self.prepare, tags={**own, **more}
            )

        self.sft = publish("sft", **{tags.DATA_DIGEST: DATA})
        self.reward = publish("reward", **{tags.DATA_DIGEST: DATA})
        self.policy = publish("policy", **{tags.parent_of("reward"): self.reward.uri})
        self.other = publish("other")
        self.record.store.set_alias(self.policy, "champion")
        self.record.store.set_alias(self.reward, "prod")

    def run(self, experiment, own, name="x"):
        client = self.record.client
        run = client.create_run(experiment, tags=own, run_name=name).info.run_id
        client.set_terminated(run, "FINISHED")
        return run


@pytest.fixture
def lab(settings, store, tmp_path):
    project = fill(store, "shop")
    return Lab(settings, "shop", project.snapshots.take().digest, tmp_path)


def run_all(store, number, settings):
    for step in steps.STEPS:
        steps.do_step(store, number, step, settings)
    return requests.read(store, number)


def check_gone(settings, store):
    store.database.erase()
    for path in settings.home.rglob("*"):
        if path.is_file():
            assert GONE.encode() not in path.read_bytes(), path


def test_all_that_is_there(settings, store, lab):
    record = lab.record
    request = requests.begin(store, GONE, "", "admin")
    done = run_all(store, request.id, settings)
    check_gone(settings, store)
    found = {model["version"] for model in done.steps["models"]["models"]}
    assert found == {lab.reward.uri, lab.policy.uri}  # neither SFT nor what has another parent
    assert record.store.get_alias("shop-policy", "champion") is None
    assert record.store.tags(lab.reward)[tags.RETIRED_ALIASES] == "prod"
    own = record.runs.tags(lab.prepare)
    assert tags.ERASED in own
    assert tags.KEY not in own  # nothing is taken from it any more
    assert record.client.list_artifacts(lab.prepare, "data") == []
    assert record.client.get_run(lab.prepare).data.params["who"] == "(erased)"
    with pytest.raises(ModelError, match="erased"):
        champion.crown(record, lab.policy, None, by="somebody")
    with pytest.raises(ModelError, match="erased"):
        champion.take_back(record, lab.sft, lab.policy, by="somebody")
    page = certificate.write(done, settings)
    made = json.loads(page.with_suffix(".json").read_text())
    assert made["finished"]
    assert [(m["version"], m["aliases_retired"]) for m in made["models"]] == [
        (lab.policy.uri, ["champion"]),
        (lab.reward.uri, ["prod"]),
    ]
    assert made["person"]["hash"] == requests.mark_of(GONE, request.code)
    assert request.code not in page.read_text()


class KilledError(BaseException):
    """The process was killed here."""


@pytest.mark.parametrize("step", list(steps.STEPS))
def test_killed_at_a_step(settings, store, lab, monkeypatch, step):
    """After what the step did, and before it is noted that it is done."""
    request = requests.begin(store, GONE, "", "admin")
    note = requests.note

    def killed(store, request, name, facts):
        if name == step:
            raise KilledError
        return note(store, request, name, facts)

    with monkeypatch.context() as patch:
        patch.setattr(requests, "note", killed)
        with pytest.raises(KilledError):
            run_all(store, request.id, settings)
    if step != "finish":  # the same command finds it
        assert requests.begin(store, GONE, "", "admin").id == request.id
    done = run_all(store, request.id, settings)
    check_gone(settings, store)
    assert {m["version"]: m["aliases"] for m in done.steps["models"]["models"]} == {
        lab.policy.uri: ["champion"],
        lab.reward.uri: ["prod"],
    }
    assert done.steps["votes"]["rows"]["judgments"] == 5
    assert len(done.steps["votes"]["snapshots"]) == 1


def test_mlflow_is_down(settings, store, lab):
    request = requests.begin(store, GONE, "", "admin")
    away = Settings.model_validate(
        {"RLHF_HOME": settings.home, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    )
    with pytest.raises(UserError):
        run_all(store, request.id, away)
    open_request = requests.read(store, request.id)
    assert "votes" in open_request.steps  # the votes are gone at least
    assert "models" not in open_request.steps
    assert requests.still_open(store) == [request.id]
    run_all(store, request.id, settings)
    check_gone(settings, store)


def test_a_run_that_trains_on_the_votes_stops_it(settings, store, lab):
    request = requests.begin(store, GONE, "", "admin")
    lab.record.client.update_run(lab.pipeline, status="RUNNING")
    with pytest.raises(UserError, match="the run otter is training on votes of this person"):
        run_all(store, request.id, settings)
    assert lab.record.store.get_alias("shop-policy", "champion") == lab.policy
    lab.record.client.set_terminated(lab.pipeline, "KILLED")
    run_all(store, request.id, settings)
    check_gone(settings, store)


def test_models_are_deleted_if_that_is_wanted(settings, store, lab):
    request = requests.begin(store, GONE, "", "admin")
    run_all(store, request.id, settings)
    steps.do_step(store, request.id, steps.PURGE, settings)
    done = requests.read(store, request.id)
    assert sorted(done.steps["purge"]["versions"]) == [lab.policy.uri, lab.reward.uri]
    assert len(list((settings.home / "mlflow").rglob("*.safetensors"))) == 2  # of those that stay
    assert lab.record.store.exists(lab.policy)  # the version says what it was


def test_a_preview_changes_nothing(settings, store, lab):
    before = lab.record.runs.tags(lab.prepare)
    said = "\n".join(preview.preview(store, GONE, "", settings))
    assert "5 votes, skips and withdrawals on 5 pairs" in said
    assert "1 snapshots are rebuilt" in said
    assert "2 versions learnt" in said
    assert f"{lab.policy.uri} (champion)" in said
    assert requests.still_open(store) == []
    assert lab.record.runs.tags(lab.prepare) == before
    assert {vote.annotator for vote in store.project("shop").judgments.stream()} == {GONE, "ada"}


def test_back_ups_that_still_hold_the_votes(settings, store, lab, tmp_path):
    backup(settings, StoreSettings(), tmp_path / "monday")
    request = requests.begin(store, GONE, "", "admin")
    done = run_all(store, request.id, settings)
    [kept] = certificate.content(done, settings)["backups"]
    assert kept["folder"] == str(tmp_path / "monday")
    assert kept["expires"] is None
    assert "RLHF_BACKUP_DAYS" in kept["sentence"]
    days = Settings.model_validate({"RLHF_HOME": settings.home, "RLHF_BACKUP_DAYS": 30})
    [kept] = certificate.content(done, days)["backups"]
    expires = datetime.fromisoformat(kept["expires"])
    assert timedelta(days=29) < expires - datetime.now(UTC) <= timedelta(days=30)
    # One that is made afterwards has none of them.
    backup(settings, StoreSettings(), tmp_path / "tuesday")
    assert len(certificate.content(done, settings)["backups"]) == 1


# ---- what is trained again ----


def test_what_is_trained_again(settings, store, lab):
    client = lab.record.client
    snapshots = store.project("shop").snapshots
    config = (
        "project: shop\nmodel: {}\nreward_model: {reuse: ''}\n"
        "data: {preferences: {store: shop, snapshot: latest}}\n"
    )
    client.log_text(lab.pipeline, config, "config.yaml")
    old = snapshots.find().digest
    request = requests.begin(store, GONE, "", "admin")
    done = run_all(store, request.id, settings)
    [again] = retraining.plan(lab.record, done, "used").again
    assert again.settings["data"]["preferences"]["snapshot"] == snapshots.successor(old)
    assert again.made == {"reward": lab.reward.uri, "policy": lab.policy.uri}
    assert retraining.plan(lab.record, done, "none").again == ()


def test_the_last_voter_leaves_nothing_to_train_on(settings, store, tmp_path):
    project = fill(store, "shop", [GONE])
    lab = Lab(settings, "shop", project.snapshots.take().digest, tmp_path)
    lab.record.client.log_text(
        lab.pipeline,
        "model: {}\nreward_model: {}\ndata: {preferences: {store: shop}}\n",
        "config.yaml",
    )
    request = requests.begin(store, GONE, "", "admin")
    done = run_all(store, request.id, settings)
    found = retraining.plan(lab.record, done, "used")
    assert found.again == ()
    assert found.notes == ("otter was not trained again: no vote is left in its snapshot",)
    check_gone(settings, store)


def test_settings_name_the_versions_that_were_trained_again():
    settings = {
        "reward_model": {"reuse": "models:/a/1"},
        "ppo": {"rewards": [{"s": "models:/a/1"}]},
    }
    new = retraining.with_new_versions(settings, {"models:/a/1": "models:/a/2"})
    assert new == {
        "reward_model": {"reuse": "models:/a/2"},
        "ppo": {"rewards": [{"s": "models:/a/2"}]},
    }
    assert retraining.uses(settings, ["models:/a/1"]) == "models:/a/1"
    assert retraining.uses(new, ["models:/a/1"]) == ""


def test_a_copy_of_an_affected_version_is_affected(settings, store, lab):
    client, record = lab.record.client, lab.record
    copied = {tags.KIND: "policy", tags.COPY_OF: lab.policy.uri}
    upload = record.store.fetch(lab.policy, settings.home / "copy")
    made = record.store.publish(upload, "shop-policy", run_id=lab.prepare, tags=copied)
    runs = [client.get_run(lab.prepare)]
    found = {one.version for one in models.affected(record, runs)}
    assert made.uri in found
    assert lab.sft.uri not in found
    assert found == {lab.reward.uri, lab.policy.uri, made.uri}
    assert isinstance(made, ModelRef)
