"""Which versions saw something, and what a version saw, in runs that our own code left."""

import random
import time

import pytest
from lineage_world import Toy, World, forget, votes
from mlflow.entities import ViewType

from rlhf_core.data.origins.counts import Count, Origins, Table
from rlhf_core.errors import ModelError, UserError
from rlhf_core.stages.table import STAGES
from tasks.lineage.lineage import EXAMINES, LEARNS, Lineage, Wanted, saw, seen_by
from tasks.lineage.names import versions_of
from tasks.lineage.words import verdict, way
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.registry.champion import crown
from tasks.registry.refs import ModelRef, SnapshotRef


@pytest.fixture
def world(settings, tmp_path):
    with open_run("shop", Toy(), seed=0, settings=settings) as run:
        yield World(Record.open(settings), run, tmp_path / "scratch")


def found(record, **wanted):
    """Addresses and ways of what was trained on something, and what was only evaluated."""
    answer = seen_by(record, **wanted)
    return {
        relation: {seen.ref.uri: way(seen.path) for seen in answer if seen.relation == relation}
        for relation in ("trained", "answers", "evaluated")
        if any(seen.relation == relation for seen in answer)
    }


def test_the_stages_are_those_of_the_table():
    trains = {name for name, spec in STAGES.items() if spec.trains}
    assert set(LEARNS) == trains
    for name, spec in STAGES.items():
        if spec.passes_over:
            assert LEARNS[name] == (spec.passes_over,)
    examines = {n for n, s in STAGES.items() if not s.trains and n != "prepare"}
    assert set(EXAMINES) == examines
    for name, (_, roles) in EXAMINES.items():
        spec = STAGES[name]
        known = [role.rstrip("*") for role in (*spec.inputs, *spec.optional_inputs)]
        assert set(roles) <= set(known)


def test_a_vote_is_followed_to_all_that_was_made_of_it(world):
    data = world.data(
        votes("p1", 10), votes("p2", 5), votes("p1", 3, split="eval"), votes("p3", 2, split="eval")
    )
    made = world.pipeline(data)
    crown(world.record, made["policy"], None, by="a test")
    assert found(world.record, annotator="p1") == {
        "trained": {
            "models:/shop-reward/1": "votes",
            "models:/shop-policy/1": "votes → shop-reward 1 (reward)",
            "models:/shop-critic/1": "votes → shop-reward 1 (reward)",
        },
        "evaluated": {"models:/shop-reward/1": "votes"},
    }
    assert found(world.record, annotator="p3") == {"evaluated": {"models:/shop-reward/1": "votes"}}
    assert found(world.record, annotator="nobody") == {}
    [policy] = [s for s in seen_by(world.record, annotator="p2") if s.kind == "policy"]
    assert policy.aliases == ("champion",)
    assert (policy.state, policy.rows, policy.direct) == ("registered", 5, False)
    assert policy.at is not None
    assert policy.run_id


def test_only_the_half_that_a_reward_model_was_trained_on_counts(world):
    data = world.data(votes("p1", 4), votes("p2", 6, half="second_half"))
    sft = world.stage("sft", "sft", data=data)["sft"]
    first = Toy(votes="first_half")
    reward = world.stage("reward_model", "reward", sft=sft, data=data, config=first)["reward"]
    second = Toy(votes="second_half")
    held_out = world.stage("held_out", "held_out", sft=sft, data=data, config=second)["held_out"]
    world.stage("rloo", "policy", sft=sft, data=data, reward=reward, held_out=held_out)
    assert set(found(world.record, annotator="p1")["trained"]) == {
        "models:/shop-reward/1",
        "models:/shop-policy/1",
    }
    assert found(world.record, annotator="p2")["trained"] == {
        "models:/shop-held-out/1": "votes",
        "models:/shop-policy/1": "votes → shop-held-out 1 (held_out)",
    }
    trained = saw(world.record, ModelRef(name="shop-policy", version=1)).trained
    assert trained.annotators == {"p1": {"votes": 4}, "p2": {"votes": 6}}
    assert trained.tables["votes"] == 10


def test_dpo_reads_the_votes_and_an_algorithm_that_samples_the_prompts(world):
    data = world.data(
        votes("p1", 4), Count(table="prompts", split="train", sources=("wiki",), rows=7)
    )
    sft = world.stage("sft", "sft", data=data)["sft"]
    world.stage("dpo", "policy", sft=sft, data=data)
    world.stage("grpo", "policy", sft=sft, data=data)
    assert found(world.record, annotator="p1") == {"trained": {"models:/shop-policy/1": "votes"}}
    assert found(world.record, source="wiki") == {"trained": {"models:/shop-policy/2": "prompts"}}


def test_demonstrations_that_were_chosen_by_votes_make_sft_a_version_that_saw_them(world):
    chosen = Count(table="demonstrations", split="train", annotator="p1", rows=2)
    data = world.data(votes("p1", 3), chosen, derived=True)
    world.pipeline(data)
    trained = {s.kind: s for s in seen_by(world.record, annotator="p1") if s.relation == "trained"}
    assert set(trained) == {"sft", "reward", "policy", "critic"}
    assert (way(trained["sft"].path), trained["sft"].rows) == ("demonstrations", 2)
    # The votes are told first, wherever a way from them is.
    assert way(trained["policy"].path) == "votes → shop-reward 1 (reward)"
    assert trained["policy"].also == ("demonstrations",)


def test_models_that_are_reused_and_rewards_of_others_are_followed_into_other_projects(
    world, settings, tmp_path
):
    first = world.pipeline(world.data(votes("p1", 3)))
    with open_run("other", Toy(), seed=0, settings=settings) as run:
        other = World(world.record, run, tmp_path / "scratch")
        data = other.data(votes("q1", 3))
        sft = first["sft"]
        reward = other.stage("reward_model", "reward", sft=sft, data=data)["reward"]
        other.stage("ppo", "policy", sft=sft, data=data, reward=reward, reward__1=first["reward"])
    assert found(world.record, annotator="p1")["trained"]["models:/other-policy/1"] == (
        "votes → shop-reward 1 (reward.1)"
    )
    whole = saw(world.record, ModelRef(name="other-policy", version=1))
    assert set(whole.trained.annotators) == {"p1", "q1"}
    assert len(whole.data) == 2


def test_a_copy_of_a_milestone_is_what_its_milestone_is(world):
    data = world.data(votes("p1", 3))
    sft = world.stage("sft", "sft", data=data)["sft"]
    reward = world.stage("reward_model", "reward", sft=sft, data=data)["reward"]
    made = world.stage("ppo", "policy", "milestone.2", sft=sft, reward=reward, data=data)
    milestone, last = made["milestone.2"], made["policy"]
    world.stage(
        "tournament", "policy", copies={"policy": milestone},
        policy=last, sft=sft, reward=reward, data=data, milestone__2=milestone,
    )  # fmt: skip
    trained = found(world.record, annotator="p1")["trained"]
    assert trained["models:/shop-policy/2"] == (
        "votes → shop-reward 1 (reward) → shop-milestone 1 (copy)"
    )
    # The last policy was no part of it.
    ancestors = saw(world.record, ModelRef(name="shop-policy", version=2)).ancestors
    assert last not in [found.version.ref for found in ancestors]


def test_answers_that_a_version_wrote_are_followed_apart(world):
    first = world.pipeline(world.data(votes("p1", 3)))
    asked = world.data(votes("p2", 5, models=(first["policy"].uri,)))
    second = world.pipeline(asked)
    answer = found(world.record, annotator="p1")
    assert second["reward"].uri not in answer["trained"]
    assert answer["answers"] == {
        "models:/shop-reward/2": "votes → shop-reward 1 (reward) → shop-policy 1 (answers)",
        "models:/shop-policy/2": "votes → shop-reward 1 (reward) → shop-policy 1 (answers)"
        " → shop-reward 2 (reward)",
        "models:/shop-critic/2": "votes → shop-reward 1 (reward) → shop-policy 1 (answers)"
        " → shop-reward 2 (reward)",
    }
    assert saw(world.record, second["policy"]).trained.models == {
        "models:/shop-policy/1": {"votes": 5}
    }


def test_filters_together_ask_for_the_same_rows(world):
    world.pipeline(
        world.data(
            votes("p1", 3, sources=("forum",), licences=("MIT",)),
            votes("p1", 2, sources=("shop",), licences=("CC BY 4.0",)),
            votes("p2", 4, sources=("forum",), licences=("CC BY 4.0",)),
        )
    )
    lineage = Lineage(world.record)
    assert lineage.search(Wanted(annotator="p1", source="forum")).rows == 3
    assert lineage.search(Wanted(annotator="p1", licence="CC BY 4.0")).rows == 2
    assert lineage.search(Wanted(annotator="p1", source="forum", licence="CC BY 4.0")).seen == ()
    # As people write them.
    for licence in ("cc-by-4.0", "CC_BY_4.0", " cc by 4.0 "):
        assert lineage.search(Wanted(licence=licence)).rows == 6
    assert lineage.search(Wanted(licence="CC BY 4")).rows == 0
    for source in ("/data/preferences.jsonl", "preferences.jsonl"):
        assert lineage.search(Wanted(source=source)).rows == 9


def test_a_project_of_the_store_keeps_others_with_the_same_pseudonym_out(world):
    one, other = (SnapshotRef(project=name, digest=name[0] * 64) for name in ("aaa", "bbb"))
    world.pipeline(world.data(votes("p1", 3), inputs={"preferences": one}))
    world.pipeline(world.data(votes("p1", 4), inputs={"preferences": other}))
    world.pipeline(world.data(votes("p1", 5)))
    rewards = {
        project: {s.rows for s in seen_by(world.record, annotator="p1", project=project)}
        for project in ("aaa", "bbb", "")
    }
    assert rewards == {"aaa": {3, 5}, "bbb": {4, 5}, "": {3, 4, 5}}
    assert saw(world.record, ModelRef(name="shop-policy", version=1)).snapshots == (one.uri,)


def test_the_two_ways_agree(world):
    """What `saw` says of each version is what `seen_by` says of each annotator."""
    draw = random.Random(5)
    people = [f"p{n}" for n in range(6)]
    data, sfts, rewards = [], [], []
    for _ in range(3):
        some = draw.sample(people, 3)
        data.append(world.data(*(votes(p, draw.randrange(1, 9)) for p in some)))
        sfts.append(world.stage("sft", "sft", data=data[-1])["sft"])
        found_sft = draw.choice(sfts)
        made = world.stage("reward_model", "reward", sft=found_sft, data=draw.choice(data))
        rewards.append(made["reward"])
        world.stage(
            "ppo", "policy", sft=draw.choice(sfts), reward=draw.choice(rewards),
            data=draw.choice(data), reward__1=draw.choice(rewards),
        )  # fmt: skip
    lineage = Lineage(world.record)
    refs = [*sfts, *rewards, *(ModelRef(name="shop-policy", version=n) for n in (1, 2, 3))]
    one_way = {(ref, p) for ref in refs for p in lineage.saw(ref).trained.annotators}
    other_way = {
        (seen.ref, p)
        for p in people
        for seen in lineage.search(Wanted(annotator=p)).seen
        if seen.relation == "trained"
    }
    assert one_way == other_way
    assert one_way


# ---- what is gone ----


def test_a_version_that_was_deleted_is_still_known_and_so_is_what_came_of_it(world):
    made = world.pipeline(world.data(votes("p1", 3)))
    world.record.store.delete(made["reward"])
    seen = {s.ref.uri: s for s in seen_by(world.record, annotator="p1") if s.relation == "trained"}
    assert seen["models:/shop-reward/1"].state == "deleted"
    assert way(seen["models:/shop-policy/1"].path) == "votes → shop-reward 1 (reward)"
    assert saw(world.record, made["reward"]).trained.annotators == {"p1": {"votes": 3}}


def test_runs_in_the_trash_and_deleted_experiments_are_read(world, settings):
    made = world.pipeline(world.data(votes("p1", 3)))
    before = found(world.record, annotator="p1")
    for run in world.record.client.search_runs([world.run.experiment_id]):
        if run.info.run_id != world.run.run_id:
            world.record.client.delete_run(run.info.run_id)
    answer = seen_by(world.record, annotator="p1")
    assert found(world.record, annotator="p1") == before
    assert {seen.run for seen in answer} == {"trash"}
    world.record.client.delete_experiment(world.run.experiment_id)
    assert found(world.record, annotator="p1") == before
    assert saw(world.record, made["policy"]).run == "trash"
    world.record.client.restore_experiment(world.run.experiment_id)  # its run is closed then


def gone_for_good(record, run_id):
    """As `mlflow gc` does."""
    record.client.delete_run(run_id)
    record.client._tracking_client.store._hard_delete_run(run_id)


def test_a_run_that_is_gone_for_good_leaves_what_the_tags_of_the_version_say(world):
    made = world.pipeline(world.data(votes("p1", 3)))
    run_id = world.record.store.tags(made["reward"])["run_id"]
    gone_for_good(world.record, run_id)
    seen = {s.ref.uri: s for s in seen_by(world.record, annotator="p1") if s.relation == "trained"}
    assert seen["models:/shop-reward/1"].run == "gone"
    assert seen["models:/shop-reward/1"].path[0].role == "votes"
    assert "models:/shop-policy/1" in seen


def test_data_whose_run_is_gone_are_found_by_equal_data_or_said_to_be_unknown(world):
    data = world.data(votes("p1", 3))
    world.pipeline(data)
    gone_for_good(world.record, data.run_id)
    answer = Lineage(world.record).search(Wanted(annotator="p1"))
    assert answer.seen == ()
    assert answer.unknown == (f"{data.uri}: the run that prepared them was deleted for good",)
    said = verdict(answer, Wanted(annotator="p1"))
    assert said == (
        "No version is known to have seen the annotator 'p1', but 1 thing could not be looked into."
    )
    whole = saw(world.record, ModelRef(name="shop-policy", version=1))
    assert whole.unknown == answer.unknown


def test_artifacts_that_were_purged_are_said(world):
    data, other = world.data(votes("p1", 3)), world.data(votes("p1", 2))
    world.pipeline(data)
    world.pipeline(other)
    forget(world.file_of(data, ""))
    answer = Lineage(world.record).search(Wanted(annotator="p1"))
    assert {seen.rows for seen in answer.seen} == {2}
    assert answer.unknown == (f"{data.uri}: the files of the data are gone from MLflow",)


def test_counts_that_are_damaged_are_said(world):
    data = world.data(votes("p1", 3))
    world.pipeline(data)
    world.file_of(data, "origins.json").write_text("{")
    [sentence] = Lineage(world.record).search(Wanted(annotator="p1")).unknown
    assert sentence.startswith(f"{data.uri}: origins.json cannot be read")


def test_an_archived_version_is_said_to_be_one(world):
    made = world.pipeline(world.data(votes("p1", 3)))
    with pytest.warns(FutureWarning):
        world.record.client.transition_model_version_stage("shop-reward", "1", "Archived")
    assert saw(world.record, made["reward"]).state == "archived"


def test_what_failed_has_left_no_version(world):
    data = world.data(votes("p1", 3))
    sft = world.stage("sft", "sft", data=data)["sft"]
    with pytest.raises(RuntimeError):
        world.failing("dpo", "policy", sft=sft, data=data)
    assert found(world.record, annotator="p1") == {}


# ---- names ----


def test_a_version_is_named_by_address_alias_or_run(world):
    made = world.pipeline(world.data(votes("p1", 3)))
    crown(world.record, made["policy"], None, by="a test")
    lineage = Lineage(world.record)

    def named(name):
        return versions_of(lineage, world.record, name)

    assert named("models:/shop-policy/1") == [made["policy"]]
    assert named("models:/shop-policy@champion") == [made["policy"]]
    of_run = named(world.run.run_id)
    assert set(of_run) == set(made.values())
    assert named(world.run.run_id[:8]) == of_run
    assert named(world.record.store.tags(made["sft"])["run_id"]) == [made["sft"]]
    with pytest.raises(ModelError, match="points to no version"):
        named("models:/shop-policy@nobody")
    with pytest.raises(ModelError, match="is not a model reference"):
        named("models:/shop policy")
    with pytest.raises(UserError, match="no pipeline run matches 'happy-otter'"):
        named("happy-otter")
    with pytest.raises(ModelError, match=r"there is no models:/shop-policy/9"):
        lineage.saw(ModelRef(name="shop-policy", version=9))


def test_nothing_found_names_what_there_is(world):
    world.pipeline(world.data(votes("annotator-07", 3), votes("annotator-08", 2)))
    lineage = Lineage(world.record)
    answer = lineage.search(Wanted(annotator="anotator-7"))
    assert answer.names[0] == "annotator-07"
    assert verdict(answer, Wanted(annotator="anotator-7")).startswith(
        "No version saw the annotator 'anotator-7': none of 1 data set has such rows. There are, "
        "for example: annotator-07"
    )


def test_rows_that_nothing_was_trained_on_are_said(world):
    world.data(votes("p1", 3))
    wanted = Wanted(annotator="p1")
    assert verdict(Lineage(world.record).search(wanted), wanted) == (
        "3 rows in 1 data set have the annotator 'p1', but no version was trained or evaluated on "
        "them."
    )


def test_an_empty_record_has_no_data(settings):
    wanted = Wanted(annotator="p1")
    answer = Lineage(Record.open(settings)).search(wanted)
    assert (
        verdict(answer, wanted) == "No version saw the annotator 'p1': there are no prepared data."
    )


def test_more_runs_and_versions_than_a_page_of_mlflow_are_read(world, monkeypatch):
    monkeypatch.setattr("tasks.record.runs.PAGE", 2)
    made = world.pipeline(world.data(votes("p1", 3)))
    runs = world.record.client.search_runs([world.run.experiment_id], run_view_type=ViewType.ALL)
    assert len(runs) > 4
    assert set(found(world.record, annotator="p1")["trained"]) == {
        made[kind].uri for kind in ("reward", "policy", "critic")
    }


def test_a_million_votes_by_a_thousand_people_are_answered_in_seconds(world):
    sources, licences = [("a",), ("b", "c"), ("d",)], [("MIT",), ("CC BY 4.0",)]
    counts = [
        votes(f"p{n}", 83, half=half, sources=source, licences=licence)
        for n in range(1000)
        for half in ("first_half", "second_half")
        for source in sources
        for licence in licences
    ]
    assert sum(count.rows for count in counts) > 990_000
    made = world.pipeline(world.data(*counts))
    start = time.process_time()
    answer = seen_by(world.record, annotator="p777")
    whole = saw(world.record, made["policy"])
    assert time.process_time() - start < 10
    assert {seen.rows for seen in answer} == {996}
    assert len(whole.trained.annotators) == 1000


def test_counts_of_unknown_tables_are_no_error(world):
    """A later version may count more."""
    table = Table(source="f", train=1, eval=0)
    text = Origins(tables={"preferences": table}, counts=()).model_dump_json()
    more = text.replace('"form":1', '"form":1,"more":[1]')
    data = world.data(votes("p1", 3))
    world.file_of(data, "origins.json").write_text(more)
    assert Lineage(world.record).search(Wanted(annotator="p1")).unknown == ()
