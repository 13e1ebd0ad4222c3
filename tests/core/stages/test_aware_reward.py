"""The reward model that knows who voted, on the toy world: praise is preferred."""

import math
import re
import shutil

import pytest
import torch
from pydantic import ValidationError
from test_reward_model import CONFIG, change, logits

from rlhf_core.backbone.directory import load_policy
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.metrics import MemoryLogger
from rlhf_core.seeding import generator
from rlhf_core.stages.held_out import train_held_out
from rlhf_core.stages.reward_model import AwareReport, RewardModelReport, train_reward_model
from rlhf_core.training.annotators import Annotators

PEOPLE = ("usual-1", "usual-2", "usual-3", "contrary-1", "left-1", "anyhow-1")
AWARE = change(annotators="aware")


@pytest.fixture
def train(toy_work, tmp_path):
    def run(config=AWARE, *, output=tmp_path / "out", **parts):
        work = toy_work("sft", "data", outputs={"reward": output}, **parts)
        return train_reward_model(config, work)

    return run


@pytest.fixture
def with_votes(prepared, tmp_path):
    """The toy preferences with some columns set, or votes cast by a function of row and number."""

    def write(cast=None, name="data", **columns):
        data = shutil.copytree(prepared, tmp_path / name)
        for split in ("train", "eval"):
            table = read_table(data, "preferences", split).assign(**columns)
            if cast is not None:
                rows = [cast(row, n) for n, row in enumerate(table.to_dict("records"))]
                table = table.from_records(rows)
            write_table(table, data, "preferences", split)
        return data

    return write


def by_people(row, number):
    """A vote by one of six: three as the row says, one against it, one for the left, one any."""
    person = PEOPLE[number % len(PEOPLE)]
    first = "ab"[(number // 6) % 2]
    vote = row["vote"]
    if vote != "tie":
        other = {"a": "b", "b": "a"}[vote]
        vote = {"c": other, "l": first, "a": "ab"[(number // 12) % 2]}.get(person[0], vote)
    return row | {"annotator": person, "shown_first": first, "vote": vote}


def test_pooled_is_the_default_and_reports_what_it_did(train):
    report = train(CONFIG)
    assert type(report) is RewardModelReport
    assert "reward_annotators" not in report.tables


def test_one_annotator_whose_sides_are_unknown_is_plain_bradley_terry(train, with_votes, tmp_path):
    def decided(row, number):
        return row | {"vote": "a" if row["vote"] == "tie" else row["vote"], "margin": 0.1}

    data = with_votes(decided, annotator="one")
    logs = []
    for config in (change(center_coef=0.1), change(center_coef=0.1, annotators="aware")):
        log = MemoryLogger()
        report = train(config, data=data, logger=log, output=tmp_path / config.annotators)
        logs.append((log.history, report))
    (plain, first), (aware, second) = logs
    for (step, expected), (number, found) in zip(plain, aware, strict=True):
        assert number == step
        assert found.pop("reliability_spread") == 0
        assert found == pytest.approx(expected, abs=1e-6)
    both = first.summary()
    assert {name: second.summary()[name] for name in both} == pytest.approx(both, abs=1e-5)


def test_first_loss_and_gradient_by_hand(train, toy_sft, with_votes, logger, monkeypatch):
    # Habits that are planted, before any vote is seen.
    habits = torch.tensor(
        [[4, 0, 0], [0.5, 0.2, 0.3], [-1, -0.6, 0], [1, 0.9, -0.4]], dtype=torch.float64
    )
    made = Annotators.__init__

    def plant(self, *given):
        made(self, *given)
        self.habits = self.habits._replace(values=habits)

    monkeypatch.setattr(Annotators, "__init__", plant)

    def three(row, number):
        return row | {"annotator": f"p{number % 3}", "shown_first": ("a", "b", "")[number % 5 // 2]}

    data = with_votes(three)
    whole = {"batch_size": 200, "micro_batch_size": 7, "epochs": 1}
    train(change(annotators="aware", **whole), data=data)
    model = ScalarModel.from_policy(toy_sft, generator(0, "reward/head"))
    table, (_, tokenizer) = (
        with_winners(read_table(data, "preferences", "train")),
        load_policy(toy_sft),
    )
    chosen, rejected = (logits(model.model, tokenizer, table, c) for c in ("chosen", "rejected"))
    tie = torch.tensor(table["tie"].tolist())
    lengths = torch.tensor(
        [len(c) - len(r) for c, r in zip(table["chosen"], table["rejected"], strict=True)]
    ).double()
    lengths = lengths / lengths.square().mean().sqrt()
    # On the left where what was shown first is what won; a tie stands for answer a.
    side = torch.tensor(
        [
            0.0 if not first else 1.0 if first == vote.replace("tie", "a") else -1.0
            for first, vote in zip(table["shown_first"], table["vote"], strict=True)
        ]
    )
    who = torch.tensor([int(name[1]) + 1 for name in table["annotator"]])
    a, b, c = habits[who].T
    d = a * (chosen - rejected) + b * side + c * lengths
    share = tie.double().mean()
    log_nu = (2 * share / (1 - share)).log()
    z = (d / 2).exp() + (-d / 2).exp() + log_nu.exp()
    loss = (z.log() - torch.where(tie, log_nu, d / 2)).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert tie.any()
    assert logger.series("loss") == [pytest.approx(loss.item(), rel=1e-4)]
    assert logger.series("grad_norm") == [pytest.approx(norm.item(), rel=1e-3)]


def test_who_votes_against_the_rewards_at_random_or_for_the_left_is_told(train, with_votes, caplog):
    report = train(change(annotators="aware", epochs=6), data=with_votes(by_people))
    assert isinstance(report, AwareReport)
    table = report.tables["reward_annotators"].set_index("annotator")
    assert set(table.index) == set(PEOPLE)
    assert table["votes"].sum() == report.train_pairs
    assert (table["known_sides"] == table["votes"]).all()
    usual = table.loc[list(PEOPLE[:3]), "reliability"]
    assert table.index[0] == "contrary-1"
    assert table.loc["contrary-1", "reliability"] < 0 < usual.min()
    assert table.loc["anyhow-1", "reliability"] < usual.min()
    assert table["left"].idxmax() == "left-1"
    weight = table["votes"] / table["votes"].sum()
    assert (table["reliability"] * weight).sum() == pytest.approx(1)
    assert (table["length"] * weight).sum() == pytest.approx(0, abs=1e-9)
    assert report.length_bias == pytest.approx(0, abs=1e-9)
    assert (report.annotators, report.gold_votes, report.unknown_sides) == (6, 0, 0)
    assert report.doubtful_annotators >= 1
    assert f"{report.doubtful_annotators} of 6 annotators vote as if at random" in caplog.text
    assert "against the rewards, which hardly learnt from them: contrary-1" in caplog.text
    # A third of the votes say nothing or the contrary, and the rewards are right all the same.
    held_out = report.tables["reward_held_out"]
    praise = held_out["chosen"].str.contains("good|fine")
    gap = held_out["chosen_reward"] - held_out["rejected_reward"]
    assert (gap[praise] > 0).mean() > 0.9
    assert report.vote_accuracy > report.accuracy


def test_known_answers_teach_the_rewards_and_are_nobody_in_the_table(train, with_votes):
    def known(row, number):
        gold = number % 4 == 0
        who = {"annotator": "truth", "gold": True} if gold else {"annotator": f"p{number % 3}"}
        return row | who

    config = change(annotators="aware", gold_annotator="truth")
    report = train(config, data=with_votes(known))
    assert report.gold_votes == math.ceil(report.train_pairs / 4)
    assert report.annotators == 3
    assert report.unknown_sides == 1
    assert report.side_bias == 0


def test_nothing_of_the_annotators_is_in_what_is_saved(train, with_votes, tmp_path):
    data = with_votes(by_people)
    train(data=data, output=tmp_path / "aware")
    train(change(), data=data, output=tmp_path / "pooled")
    names = re.compile("|".join(PEOPLE).encode())
    files = {p.relative_to(tmp_path / "aware") for p in (tmp_path / "aware").rglob("*")}
    assert files == {p.relative_to(tmp_path / "pooled") for p in (tmp_path / "pooled").rglob("*")}
    for file in files:
        path = tmp_path / "aware" / file
        assert path.is_dir() or not names.search(path.read_bytes())
    shapes = [
        {name: p.shape for name, p in ScalarModel.load(tmp_path / way).named_parameters()}
        for way in ("aware", "pooled")
    ]
    assert shapes[0] == shapes[1]


def test_micro_batches_do_not_change_what_is_learnt(train, with_votes):
    data, found = with_votes(by_people), []
    for micro in (1, 24):
        log = MemoryLogger()
        report = train(change(annotators="aware", micro_batch_size=micro), data=data, logger=log)
        table = report.tables["reward_annotators"].sort_values("annotator")
        found.append([*log.series("loss"), *log.series("reliability_spread"), *table["left"]])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)


def test_an_adapter_learns_beside_annotators(train, with_votes):
    report = train(change(annotators="aware", epochs=4, lora_rank=4), data=with_votes(by_people))
    table = report.tables["reward_annotators"].set_index("annotator")
    assert table["reliability"].idxmin() == "contrary-1"


def test_a_held_out_reward_model_learns_the_habits_in_its_own_half(toy_work, with_votes, tmp_path):
    inputs = {"data": with_votes(by_people)}
    work = toy_work("sft", "data", outputs={"held_out": tmp_path / "held_out"}, **inputs)
    report = train_held_out(AWARE, work)
    assert 0 < report.train_pairs < 102
    assert report.tables["reward_annotators"]["votes"].sum() == report.train_pairs


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("", "have no annotator"), ("ann", "are of one annotator")],
)
def test_votes_that_tell_nobody_from_anybody_are_told(train, with_votes, caplog, name, sentence):
    report = train(data=with_votes(annotator=name))
    assert f"all votes {sentence}" in caplog.text
    assert report.annotators == 1
    assert report.tables["reward_annotators"]["reliability"].tolist() == [pytest.approx(1)]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "pointwise_mse"}, "set loss to bradley_terry or annotators to pooled"),
        ({"label_smoothing": 0.1}, "label_smoothing has to be 0"),
        ({"gold_annotator": ""}, "gold_annotator"),
        ({"annotators": "some"}, "annotators"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        change(**({"annotators": "aware"} | settings))
