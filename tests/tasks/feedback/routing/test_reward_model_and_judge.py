"""A judge's votes in a training that knows who voted, and what the next batch makes of them."""

import pytest

from rlhf_core.labelling.router import RouterConfig
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.training import RewardModelConfig, SFTConfig
from tasks.feedback.routing.config import AskJudgeConfig
from tasks.feedback.routing.judging import pin
from tasks.feedback.routing.route import judge_batch
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Judgment, Pair
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.steps import data as steps
from tasks.steps import reward_model, sft

MODEL = ModelConfig(fresh=FreshModelConfig(layers=1, width=32, heads=2, context=64))
LIMITS = LengthLimits(prompt=32, response=32, sft=64, reward=64)
DATA = DataConfig.model_validate(
    {"source": "files", "preferences": {"store": "shop"}, "eval_fraction": 0.2}
)
SHORT = SamplingConfig(max_prompt_length=32, max_new_tokens=16)
SFT = SFTConfig(max_length=64, epochs=1)
AWARE = RewardModelConfig(max_length=64, epochs=2, annotators="aware")
JUDGE = AskJudgeConfig(source="biased_judges:often_first", name="m")


def pair(n, **more):
    return NewPair(f"Review {n}", Answer(f" fine {n}"), Answer(f" dull {n}"), **more)


@pytest.fixture
def project(home, monkeypatch):
    monkeypatch.setattr(steps, "publish_report", lambda snapshot, record: "")
    store = Store.open()
    yield store.project("shop", make=True)
    store.close()


def judged(project, record, config, numbers, name):
    batch = project.content.batch(name, "ask")
    project.content.add(map(pair, numbers), batch=batch)
    return judge_batch(
        project, batch, config, RouterConfig(audit=0.1), wanted=1, priority=0, record=record,
        logger=MemoryLogger(),
    )  # fmt: skip


def test_a_reward_model_learns_a_judges_habits_and_the_next_batch_knows_them(project, settings):
    record = Record.open(settings)
    assert pin(JUDGE, project, record).habits is None
    _, became = judged(project, record, JUDGE, range(80), "first")
    assert became.unsure == 40  # what it answers by side
    project.judgments.add(
        (pair(n), [Ballot("a", who, first="ab"[(n + len(who)) % 2])])
        for n in range(80)
        for who in ("ada", "bobby")
    )
    with open_run("shop", MODEL, 0) as run:
        data = steps.prepare_data.__wrapped__(DATA, MODEL, LIMITS, run)
        policy = sft.train_sft.__wrapped__(SFT, MODEL, data, run)
        ref = reward_model.train_reward_model.__wrapped__(AWARE, SHORT, policy, data, run)
    # Its liking for the left is learnt from both orders, and kept for the next batch.
    who, _ = judged(project, record, JUDGE, range(80, 90), "second")
    assert who.name == "judge:m"
    assert who.habits.left > 0.5
    assert who.habits.length_unit > 0
    assert who.habits.reward_gap > 0
    assert judged(project, record, JUDGE, range(80, 90), "second")[0] == who

    # The reward model itself as a judge: both orders say the same.
    asked = AskJudgeConfig(source="reward_model")
    who, became = judged(project, record, asked, range(90, 130), "third")
    assert (who.name, who.source) == ("judge:shop-reward-1", ref.uri)
    assert became.alone + became.audited + became.unsure == 40
    with project.database.reading() as session:
        found = session.query(Judgment, Pair).join(Pair, Pair.id == Judgment.pair_id)
        said = {}
        for vote, row in found.where(Judgment.source == ref.uri):
            said.setdefault(row.id, []).append((vote.first, vote.vote))
    assert len(said) == 40
    assert all({first for first, _ in votes} == {"a", "b"} for votes in said.values())
    assert all(len({vote for _, vote in votes}) == 1 for votes in said.values())
