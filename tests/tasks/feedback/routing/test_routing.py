"""A judge answers pairs in both orders; people get what it is unsure of and an audit."""

import json
from collections import Counter

import biased_judges
import pytest
from model_server import KEY, longer, serving
from pydantic import SecretStr, ValidationError
from sqlalchemy import func, select

from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.labelling.router import RouterConfig
from rlhf_core.metrics import MemoryLogger
from tasks.feedback.admin.numbers import throughput
from tasks.feedback.admin.people import Roster
from tasks.feedback.asking import batches
from tasks.feedback.asking.config import AskConfig
from tasks.feedback.ordering.reading import read_queue
from tasks.feedback.quality.examine import examine
from tasks.feedback.quality.page import quality_page, summary
from tasks.feedback.quality.tables import numbers
from tasks.feedback.routing import route as routing
from tasks.feedback.routing.config import AskJudgeConfig
from tasks.feedback.routing.route import JudgeDownError, judge_batch, look_at
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.tables import Annotator, Judgment, Pair
from tasks.record.record import Record
from tests.flows.people import invited, label

ROUTER = RouterConfig(audit=0.2)


@pytest.fixture(autouse=True)
def fresh():
    biased_judges.ASKED.clear()
    biased_judges.FAILS["after"] = 10**9


@pytest.fixture
def record(settings):
    return Record.open(settings)


def config(function="longer", **changes):
    return AskJudgeConfig(source=f"biased_judges:{function}", **changes)


def pairs(count=60, prompt="prompt"):
    return [
        NewPair(f"{prompt} {n}", Answer("x" * (n % 7 + 1), "m"), Answer("y" * (n % 5 + 1), "m"))
        for n in range(count)
        if n % 7 != n % 5  # of one length, so that no judge is in doubt
    ]


def judged(project, record, asked=None, new=None, router=ROUTER, name="b", **more):
    asked = asked or config()
    project.change("x", {"repeat_every": 0, "gold_every": 0})
    batch = project.content.batch(name, "ask")
    project.content.add(pairs() if new is None else new, batch=batch)
    how = {"wanted": 1, "priority": 0, "record": record, "logger": MemoryLogger()} | more
    return judge_batch(project, batch, asked, router, **how)


def of(project, *columns, **conditions):
    with project.database.reading() as session:
        return list(session.execute(select(*columns).filter_by(**conditions).order_by(*columns)))


def votes(project):
    return of(project, Judgment.pair_id, Judgment.first, Judgment.vote, kind="machine")


def test_both_orders_are_votes_with_their_side_and_sure_pairs_leave_the_queue(project, record):
    who, became = judged(project, record)
    new = pairs()
    assert who.name == "judge:biased_judges:longer"
    assert became.alone + became.audited == len(new)
    assert 0 < became.audited < len(new) / 2
    assert became.unsure == became.unheard == 0
    # Each pair was asked about in both orders, and has a vote for each side.
    assert len(biased_judges.ASKED) == 2 * len(new)
    said = votes(project)
    assert Counter((pair, first) for pair, first, _ in said).most_common(1)[0][1] == 1
    assert len(said) == 2 * len(new)
    right = {
        (row.prompt, "a" if len(row.response_a) > len(row.response_b) else "b")
        for row in project.judgments.stream()
    }
    assert {(vote.prompt, vote.vote) for vote in project.judgments.stream()} == right
    # Only the audit is asked about.
    states = Counter((row.arm, row.state) for row in of(project, Pair.arm, Pair.state))
    assert states == {("judge", "done"): became.alone, ("audit", "open"): became.audited}


def test_what_a_judge_is_unsure_of_goes_to_people(project, store, record):
    _, became = judged(project, record, config("first"))
    assert became.unsure == len(pairs())
    assert became.alone == became.audited == 0
    ada = invited(store, project)
    assert len({task.prompt for task in label(project, ada)}) == len(pairs())
    left = [
        vote.vote == vote.first for vote in project.judgments.stream() if vote.kind == "machine"
    ]
    assert all(left)
    assert len(left) == 2 * len(pairs())


def test_the_audit_is_chosen_by_a_hash(project, record):
    judged(project, record, new=pairs(400))
    audited = {row.digest for row in of(project, Pair.digest, arm="audit")}
    total = len(pairs(400))
    assert len(audited) / total == pytest.approx(0.2, abs=0.09)  # four standard errors
    other = record.settings.home / "other.db"
    other.parent.mkdir(exist_ok=True)
    from tasks.feedback.store.database import open_database
    from tasks.feedback.store.store import Store

    second = Store(open_database(f"sqlite:///{other}"))
    again = second.project("demo", make=True)
    judged(again, record, new=pairs(400)[::-1])
    assert {row.digest for row in of(again, Pair.digest, arm="audit")} == audited
    second.close()


def test_nothing_is_asked_or_kept_twice(project, record):
    first = judged(project, record)
    asked, said = len(biased_judges.ASKED), votes(project)
    assert judged(project, record) == first
    # Another batch with the same pairs, and a judge that has another name.
    judged(project, record, config(name="again"), name="c")
    assert len(biased_judges.ASKED) == asked
    assert votes(project) == said


@pytest.mark.parametrize("where", ["settle", "route"])
def test_a_call_that_is_killed_goes_on(project, record, monkeypatch, where):
    monkeypatch.setattr(routing, "AT_ONCE", 5)
    original, calls = getattr(routing, where), []

    def killed(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    monkeypatch.setattr(routing, where, killed)
    with pytest.raises(KeyboardInterrupt):
        judged(project, record)
    assert len(votes(project)) == 2 * 2 * 5
    assert not of(project, Pair.id, state="open", arm="")  # nobody is asked too early
    monkeypatch.setattr(routing, where, original)
    _, became = judged(project, record)
    assert became.alone + became.audited == len(pairs())
    assert len(votes(project)) == 2 * len(pairs())
    # The five that were answered and not kept were remembered.
    assert len(biased_judges.ASKED) == 2 * len(pairs())


def test_a_judge_that_fails_midway_makes_pairs_wait_and_then_goes_on(project, record, monkeypatch):
    monkeypatch.setattr(routing, "AT_ONCE", 5)
    biased_judges.FAILS["after"] = 20
    with pytest.raises(JudgeDownError) as error:
        judged(project, record, config("failing"))
    assert f"{len(pairs()) - 10} pairs wait for judge:biased_judges:failing" in str(error.value)
    assert "judge.if_down" in str(error.value)
    assert len(votes(project)) == 20
    biased_judges.FAILS["after"] = 10**9
    _, became = judged(project, record, config("failing"))
    assert became.alone + became.audited == len(pairs())
    assert len(votes(project)) == 2 * len(pairs())
    assert len(set(biased_judges.ASKED)) == len(biased_judges.ASKED) == 2 * len(pairs())


def test_or_people_get_them(project, store, record, monkeypatch, caplog):
    monkeypatch.setattr(routing, "AT_ONCE", 5)
    biased_judges.FAILS["after"] = 20
    _, became = judged(project, record, config("failing", if_down="people"))
    assert became.unheard == len(pairs()) - 10
    assert f"people answer the {len(pairs()) - 10} pairs" in caplog.text
    ada = invited(store, project)
    assert len(label(project, ada)) == became.unheard + became.audited
    # They stay with people, also when the judge is back.
    biased_judges.FAILS["after"] = 10**9
    assert judged(project, record, config("failing", if_down="people"))[1] == became


def endpoint(settings, address):
    return settings.model_copy(update={"judge_url": address, "judge_key": SecretStr(KEY)})


ENDPOINT = {"source": "endpoint", "endpoint": {"model": "m", "retries": 0}}


def test_an_endpoint_that_answers_some_questions_leaves_the_others_to_people(project, settings):
    def trouble(number, question):
        return (500, {}) if "prompt 11\n" in question and "[Answer A]\nx" in question else None

    with serving(trouble=trouble, model=longer) as server:
        record = Record.open(endpoint(settings, server.address))
        _, became = judged(project, record, AskJudgeConfig(**ENDPOINT))
    assert became.unheard == 1  # half an answer is none
    assert became.alone + became.audited == len(pairs()) - 1
    assert len(votes(project)) == 2 * (len(pairs()) - 1)
    assert "prompt 11" not in {vote.prompt for vote in project.judgments.stream()}


def test_a_silent_endpoint_is_down(project, settings):
    with serving(trouble=lambda number, question: (500, {}) if number else None) as server:
        record = Record.open(endpoint(settings, server.address))
        with pytest.raises(JudgeDownError, match="are in no queue yet"):
            judged(project, record, AskJudgeConfig(**ENDPOINT), new=pairs(18))
        with serving(model=longer) as other:
            back = Record.open(endpoint(settings, other.address))
            _, became = judged(project, back, AskJudgeConfig(**ENDPOINT), new=pairs(18))
    assert became.alone + became.audited == len(pairs(18))


def test_a_judge_is_looked_at_before_anything_is_sampled(project, record, monkeypatch):
    look_at(AskJudgeConfig(), project, record)
    look_at(config(), project, record)
    with pytest.raises(ConfigError, match="nowhere"):
        look_at(AskJudgeConfig(source="nowhere:judge"), project, record)
    with pytest.raises(ModelError, match="has none yet"):
        look_at(AskJudgeConfig(source="reward_model"), project, record)
    with pytest.raises(ModelError, match="no model is registered"):
        look_at(AskJudgeConfig(source="models:/none/1"), project, record)
    monkeypatch.setenv("RLHF_JUDGE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="does not answer"):
        look_at(AskJudgeConfig(**ENDPOINT), project, record)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"judge": {"source": "people"}}, "people answer what the judge leaves them"),
        ({"judge": {"source": "gpt-4"}}, "'gpt-4' is not a judge"),
        ({"judge": {"source": "endpoint"}}, "endpoint.model must name its model"),
        ({"judge": {"source": "m:f", "name": "a\nb"}}, "should match pattern"),
        ({"judge": {"source": "m:f", "if_down": "guess"}}, "'wait' or 'people'"),
        ({"router": {"audit": 0}}, "greater than 0"),
        ({"router": {"sure": 0.3}}, "greater than or equal to 0.5"),
        (
            {"judge": {"source": "m:f"}, "evaluation": True, "against": "models:/x/1"},
            "evaluation asks people alone",
        ),
    ],
)
def test_settings_that_cannot_be(changes, says):
    with pytest.raises(ValidationError) as error:
        AskConfig.model_validate(changes)
    assert says in str(error.value)


# ---- a machine is no person ----


def test_a_machine_is_no_person(project, store, record):
    _, became = judged(project, record)
    ada = invited(store, project)
    label(project, ada)
    roster = Roster(project)
    assert [person.id for person in roster.people()] == [ada]
    assert roster.count() == 1
    machine = roster.find("judge:biased_judges:longer")
    for change in (
        lambda: roster.link_for(machine, "x"),
        lambda: roster.set_state(machine, "active", "x"),
        lambda: roster.set_role(machine, "admin", "x"),
        lambda: roster.forget(machine, "x"),
    ):
        with pytest.raises(Exception, match="is a machine"):
            change()
    assert throughput(project).total == became.audited
    assert of(project, Annotator.via, id=machine) == [("judge",)]
    info = project.snapshots.take()
    assert info.annotators == 1
    assert batches.annotators(project) == 1
    assert not project.gold.mark_agreed("x", votes=2).new


def test_people_who_are_called_so_are_not_mixed_up_with_it(project, record):
    name = "judge:biased_judges:longer"
    project.judgments.add([(pairs()[0], [Ballot("a", name)])])
    with pytest.raises(DataError, match=r"give judge\.name another"):
        judged(project, record)
    assert not biased_judges.ASKED


def test_a_training_file_has_both_orders_and_an_export_comes_back_the_same(
    project, store, record, tmp_path
):
    judged(project, record)
    info = project.snapshots.take()
    project.snapshots.write("latest", tmp_path / "votes.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert len(rows) == info.training == 2 * len(pairs())
    assert {row["annotator"] for row in rows} == {"judge:biased_judges:longer"}
    sides = Counter((row["id"], row["shown_first"]) for row in rows)
    assert set(sides.values()) == {1}
    assert {side for _, side in sides} == {"a", "b"}

    from tasks.feedback.forms.incoming import import_file
    from tasks.feedback.forms.outgoing import export_file

    export_file(project, str(tmp_path / "out.jsonl"))
    other = store.project("other", make=True)
    import_file(other, str(tmp_path / "out.jsonl"))
    assert other.snapshots.take().digest == info.digest
    assert of(other, Annotator.via, project_id=other.id) == [("judge",)]
    import_file(project, str(tmp_path / "out.jsonl"))
    assert len(votes(project)) == 2 * 2 * len(pairs())  # those of both projects, and no more


def test_held_out_prompts_are_left_to_people_and_never_trained_on(project, record):
    held = pairs()[:5]
    project.content.add(
        NewPair(pair.prompt, Answer("other one"), Answer("other two"), wanted=1) for pair in held
    )
    with project.database.writing(project.id) as session:
        for row in session.scalars(select(Pair)):
            row.arm = "hold_out"
    _, became = judged(project, record)
    assert became.unheard == 5
    asked = {prompt for prompt, _, _ in biased_judges.ASKED}
    assert not asked & {pair.prompt for pair in held}


def test_pairs_that_people_were_asked_about_before_stay_with_people(project, record):
    before = [pair.__class__(**{**vars(pair), "wanted": 2}) for pair in pairs()[:7]]
    project.content.add(before)
    _, became = judged(project, record)
    assert became.unheard == 7
    assert len(of(project, Pair.id, wanted=2, state="open")) == 7


# ---- the audit ----


def test_the_audit_says_how_often_people_contradict_it(project, store, record):
    """People prefer x on every pair; the judge the longer answer."""
    _, became = judged(project, record, new=pairs(400))
    ada = invited(store, project)
    label(project, ada, lambda task: "left" if "x" in task.left else "right")
    quality = examine(project)
    [machine] = quality.machines
    audited = of(project, Pair.id, arm="audit")
    wrong = sum(
        len(vote.response_a if "x" in vote.response_a else vote.response_b)
        < max(len(vote.response_a), len(vote.response_b))
        for vote in project.judgments.stream()
        if vote.kind == "fresh"
    )
    assert machine.error.of == became.audited == len(audited)
    assert machine.error.value == pytest.approx(wrong / became.audited)
    assert machine.error.low < machine.error.value < machine.error.high
    assert machine.alone == became.alone
    assert machine.same_in_both.value == 1
    assert machine.longer.value == 1
    assert machine.left.value == pytest.approx(0.5)
    assert machine.with_people.value == pytest.approx(1 - machine.error.value)
    assert machine.wrong[0] == pytest.approx(machine.error.value * became.alone)
    # It counts nowhere among people.
    assert quality.annotators == 1
    assert quality.votes == became.audited
    assert {person.name for person in quality.people} == {
        row.pseudonym for row in of(project, Annotator.pseudonym, via="page")
    }
    metrics = numbers(quality.redacted())
    at = "judge/biased_judges-longer"
    assert metrics[f"{at}/audit_error"] == machine.error.value
    assert metrics[f"{at}/audit_error_low"] < metrics[f"{at}/audit_error_high"]
    assert metrics[f"{at}/alone"] == became.alone
    said = " ".join(summary(quality))
    assert f"{became.alone:,} pairs alone" in said
    assert "judge:biased_judges:longer" in quality_page(quality.redacted())


def test_an_audit_that_nobody_has_answered_yet_claims_nothing(project, record):
    _, became = judged(project, record)
    [machine] = examine(project).redacted().machines
    assert machine.error is None
    assert machine.wrong is None
    assert machine.to_audit == became.audited
    assert "fewer than 5 of the" in " ".join(summary(examine(project)))
    with project.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Judgment)) == 2 * len(pairs())


def test_the_order_leaves_the_audit_where_it_is_and_knows_what_is_trained_on(project, record):
    _, became = judged(project, record)
    queue = read_queue(project)
    assert queue.waiting == []
    assert list(queue.votes) == []
    arms = Counter(pair.arm for pair in queue.pairs)
    assert arms == {"judge": became.alone, "audit": became.audited}
    alone = {
        group for pair, group in zip(queue.pairs, queue.groups, strict=True) if pair.arm == "judge"
    }
    assert queue.as_waiting().trained_on == alone
