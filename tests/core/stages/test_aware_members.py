"""Ensembles that know who voted: each member with annotators of its own, in the tiny world."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny import CONFIGS, World, change, run, work_of
from transformers import AutoTokenizer

from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.data.encoding import encode_pair
from rlhf_core.data.pairs import prompt_numbers, with_winners
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.metrics import MemoryLogger
from rlhf_core.rewards.models import load_reward_model, score_texts
from rlhf_core.seeding import generator
from rlhf_core.settings.evaluation import ReportCardConfig
from rlhf_core.settings.fields import GOLD
from rlhf_core.stages import reward_model
from rlhf_core.stages.held_out import train_held_out
from rlhf_core.stages.report_card import write_report_card
from rlhf_core.training.annotators import Annotators
from rlhf_core.training.members import bootstrap

CONFIG = change(CONFIGS["reward_model_members"], annotators="aware")
WHOLE = {"batch_size": 100, "micro_batch_size": 5, "epochs": 1}  # one step on all votes
SD = (0.5, 0.7, 1.0)  # of the priors


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world, in which every fifth row is a known answer."""
    made = World.build(tmp_path_factory.mktemp("aware_members") / "world")
    for split in ("train", "eval"):
        votes = read_table(made.data, "preferences", split)
        known = votes.index % 5 == 3
        votes = votes.assign(annotator=votes["annotator"].mask(known, GOLD), gold=known)
        write_table(votes, made.data, "preferences", split)
    return made


@pytest.fixture
def members(monkeypatch):
    """The annotators of each member, as a run made them."""
    found = []
    made = Annotators.__init__

    def note(self, *given):
        made(self, *given)
        found.append(self)

    monkeypatch.setattr(Annotators, "__init__", note)
    return found


class Plain:
    """What the votes say, by numpy alone; annotator 0 is the one of known answers."""

    def __init__(self, world, split="train"):
        self.table = with_winners(read_table(world.data, "preferences", split))
        names = sorted(set(self.table["annotator"]) - {GOLD})
        self.names = [GOLD, *names]
        self.who = np.array([self.names.index(name) for name in self.table["annotator"]])
        self.tie = self.table["tie"].to_numpy(dtype=bool)
        self.side = np.array(
            [
                0.0 if not first else 1.0 if first == vote.replace("tie", "a") else -1.0
                for first, vote in zip(self.table["shown_first"], self.table["vote"], strict=True)
            ]
        )
        more = self.table["chosen"].str.len() - self.table["rejected"].str.len()
        self.length = more.to_numpy(dtype=float) / math.sqrt((more.to_numpy(float) ** 2).mean())
        margin = self.table["margin"].to_numpy(dtype=float)
        self.margin = np.where(self.tie, 0.0, margin)

    def times(self, member):
        return np.array(
            bootstrap(prompt_numbers(self.table), generator(0, f"reward/votes/{member}"))
        )

    def nll(self, gap, habits, log_nu, margin=0.0):
        a, b, c = habits[self.who].T
        half = (a * gap + b * self.side + c * self.length - margin) / 2
        total = np.exp(half) + np.exp(-half) + np.exp(log_nu)
        return np.log(total) - np.where(self.tie, log_nu, half)


def test_the_first_loss_of_each_member_is_the_likelihood_by_numpy(
    world, tmp_path, members, monkeypatch
):
    habits = np.array([[4, 0, 0], [0.5, 0.2, 0.3], [-1, -0.6, 0], [1, 0.9, -0.4]])
    made = Annotators.__init__

    def plant(self, *given):  # other habits in each member
        made(self, *given)
        mine = torch.tensor(habits * [1, 1, len(members)])
        self.habits = self.habits._replace(values=mine)

    monkeypatch.setattr(Annotators, "__init__", plant)
    log = MemoryLogger()
    config = change(CONFIG, **WHOLE, center_coef=0.1)
    run(config, world, tmp_path / "out", logger=log)
    plain, losses = Plain(world), []
    trunk = ScalarModel.from_policy(world.sft, generator(0, "reward/head"))
    tokenizer = AutoTokenizer.from_pretrained(world.sft)
    for member in (1, 2, 3):
        scalar = trunk.with_new_head(generator(0, f"reward/head/{member}"))
        chosen, rejected = (
            np.array(
                [
                    scored(scalar, encode_pair(prompt, text, tokenizer, 14)[0])
                    for prompt, text in zip(plain.table["prompt"], plain.table[name], strict=True)
                ]
            )
            for name in ("chosen", "rejected")
        )
        times = plain.times(member)
        ties = (times * plain.tie).sum() / times.sum()
        log_nu = math.log(2 * ties / (1 - ties)) if ties else -math.inf
        nll = plain.nll(chosen - rejected, habits * [1, 1, member], log_nu, plain.margin)
        centre = 0.1 * (chosen + rejected) ** 2
        losses.append((times * (nll + centre)).sum() / times.sum())
        assert (times == 0).any()
        assert (times > 1).any()
    assert log.series("loss") == [pytest.approx(np.mean(losses), rel=1e-4)]
    assert log.series("loss_spread") == [pytest.approx(np.std(losses), rel=1e-3)]


@torch.no_grad()
def scored(scalar, ids):
    """The score of one text, by plain transformers and the head."""
    states = scalar.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    return float(scalar.head(states))


def test_the_habits_of_each_member_are_the_mode_that_scipy_finds(world, tmp_path, members):
    report = run(change(CONFIG, epochs=2), world, tmp_path / "out")
    plain, found = Plain(world), []
    for number, member in enumerate(members, start=1):
        times = plain.times(number)
        gap = member.state_dict()["gaps"].numpy()
        assert (member.state_dict()["seen"].numpy() == (times > 0)).all()
        people = range(1, len(plain.names))
        share = np.array([times[plain.who == k].sum() for k in people]) / times[plain.who > 0].sum()
        has_ties = bool((plain.tie & (times > 0)).any())

        def posterior(x, times=times, gap=gap, has_ties=has_ties):
            habits = np.vstack([[4, 0, 0], x[:-1].reshape(-1, 3)])
            nll = plain.nll(gap, habits, x[-1] if has_ties else -math.inf)
            prior = (((habits[1:] - [1, 0, 0]) / SD) ** 2).sum() / 2
            return (np.where(times > 0, times * nll, 0.0)).sum() + prior

        known = bool(times[plain.who == 0].sum())
        held = [{"type": "eq", "fun": lambda x, s=share: s @ x[:-1].reshape(-1, 3)[:, 0] - 1}]
        if not known:
            held.append({"type": "eq", "fun": lambda x, s=share: s @ x[:-1].reshape(-1, 3)[:, 2]})
        start = np.append(np.tile([1.0, 0.0, 0.0], len(people)), -1.0)
        best = minimize(posterior, start, method="SLSQP", constraints=held, options={"ftol": 1e-12})
        assert best.success
        expected = best.x[:-1].reshape(-1, 3)
        assert member.habits.values[1:].numpy() == pytest.approx(expected, abs=2e-4)
        if has_ties:
            assert member.habits.log_tie.item() == pytest.approx(best.x[-1], abs=2e-3)
        found.append(expected)
    table = report.tables["reward_annotators"].set_index("annotator").loc[plain.names[1:]]
    mean = np.mean(found, axis=0)
    for place, name in enumerate(("reliability", "left", "length")):
        assert table[name].to_numpy() == pytest.approx(mean[:, place], abs=3e-4)
    votes = [(plain.who == k).sum() for k in range(1, 4)]
    assert table["votes"].tolist() == votes
    assert report.gold_votes == (plain.who == 0).sum()
    weights = np.array(votes) / sum(votes)
    assert report.length_bias == pytest.approx(weights @ mean[:, 2], abs=1e-3)


def test_the_report_has_what_members_and_annotators_have(world, tmp_path, members):
    report = run(change(CONFIG, epochs=8, learning_rate=1e-2), world, tmp_path / "out")
    assert type(report) is reward_model.AwareEnsembleReport
    assert {"reward_members", "reward_annotators", "reward_held_out"} <= report.tables.keys()
    summary = report.summary()
    assert summary["members"] == len(members) == 3
    assert (summary["annotators"], summary["spread"] > 0) == (3, True)
    # What rewards and habits together say of the held-out votes, from the saved members.
    plain, logits = Plain(world, "eval"), []
    saved, tokenizer = load_reward_model(tmp_path / "out")
    chosen, rejected = (
        score_texts(
            saved, tokenizer, list(plain.table["prompt"]), list(plain.table[name]), max_length=14
        ).numpy()
        for name in ("chosen", "rejected")
    )
    more = (plain.table["chosen"].str.len() - plain.table["rejected"].str.len()).to_numpy(float)
    for number, (member, network) in enumerate(zip(members, saved.members, strict=True)):
        a, b, c = member.habits.values.numpy()[
            [member.facts.names.index(name) for name in plain.table["annotator"]]
        ].T
        gap = (chosen[number] - rejected[number]) * network.std
        logits.append(a * gap + b * plain.side + c * more / member.facts.unit)
    right = np.mean(logits, axis=0)[~plain.tie]
    assert report.vote_accuracy == pytest.approx(((np.sign(right) + 1) / 2).mean())


def test_with_one_annotator_members_are_as_they_are_pooled(world, tmp_path):
    data = shutil.copytree(world.data, tmp_path / "data")
    for split in ("train", "eval"):
        votes = read_table(data, "preferences", split)
        decided = votes["vote"].replace("tie", "a")
        votes = votes.assign(annotator="one", shown_first="", gold=False, vote=decided)
        write_table(votes, data, "preferences", split)
    one = replace(world, data=data)
    found = []
    for way in ("pooled", "aware"):
        log = MemoryLogger()
        report = run(change(CONFIG, annotators=way), one, tmp_path / way, logger=log)
        found.append((log.history, report.summary()))
    (pooled, before), (aware, after) = found
    for (step, expected), (number, values) in zip(pooled, aware, strict=True):
        assert number == step
        assert values.pop("reliability_spread") == 0
        assert values == pytest.approx(expected, abs=1e-5)
    assert {name: after[name] for name in before} == pytest.approx(before, abs=1e-4)


def test_the_held_out_model_may_have_members_that_know_who_voted(world, tmp_path, members):
    work = work_of("reward_model", world, tmp_path / "unused")
    work = replace(work, outputs={"held_out": tmp_path / "held_out"})
    report = train_held_out(CONFIG, work)
    assert type(report) is reward_model.AwareEnsembleReport
    assert len(members) == 3
    assert report.tables["reward_annotators"]["votes"].sum() + report.gold_votes == (
        report.train_pairs
    )
    assert report.train_pairs < len(read_table(world.data, "preferences", "train"))


def test_the_report_card_reads_it_and_nothing_of_it_names_an_annotator(world, tmp_path):
    run(CONFIG, world, tmp_path / "out")
    names = [name.encode() for name in ("annotator", "reliability", "gold")]
    files = [path for path in (tmp_path / "out").rglob("*.json") if path.name != "tokenizer.json"]
    assert len(files) > 5
    assert not [path for path in files for name in names if name in path.read_bytes()]
    examined = replace(world, reward=tmp_path / "out")
    work = work_of("report_card", examined, tmp_path / "card")
    card = write_report_card(ReportCardConfig(samples=8, max_length=14), work).card
    assert len(card.members.accuracies) == 3
