"""The tournament of checkpoints on the toy world, where a milestone is known to be the best."""

import logging
import shutil
import sys

import pytest
import torch

from rlhf_core.backbone.directory import add_facts, load_policy, save_model
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.digests import tree_digest
from rlhf_core.errors import NumericsError
from rlhf_core.evaluation.tournament import schedule
from rlhf_core.judges.judge import Cost, Verdict
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.judge import EndpointConfig, JudgeConfig
from rlhf_core.settings.model import FreshModelConfig, ModelConfig
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.settings.training import SFTConfig
from rlhf_core.stages import tournament
from rlhf_core.stages.sft import train_sft
from rlhf_core.stages.tournament import hold_tournament
from rlhf_core.work import Work

FRESH = ModelConfig(fresh=FreshModelConfig(layers=2, width=32, heads=2, context=40, vocab_size=340))
CONFIG = TournamentConfig(checkpoints=3, prompts=12, samples_per_prompt=2, verdicts=120)
BY_ENDPOINT = JudgeConfig(source="endpoint", endpoint=EndpointConfig(model="tiny"))

TRUTH = """
GOOD, BAD = {"good", "fine", "warm", "nice"}, {"bad", "cold", "dull", "poor"}
asked = []


def praise(prompts, responses):
    asked.extend(prompts)
    words = [r.split() for r in responses]
    return [float(bool(GOOD & set(r)) and not BAD & set(r)) for r in words]
"""


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(schedule, "RESAMPLES", 20)
    monkeypatch.setattr(tournament, "RESAMPLES", 200)


@pytest.fixture
def truth(tmp_path, monkeypatch):
    """A module with the truth: a good word and no bad one."""
    (tmp_path / "cup_truth.py").write_text(TRUTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cup_truth", raising=False)
    return "cup_truth:praise"


@pytest.fixture(scope="session")
def kind_policy(prepared, tmp_path_factory):
    """A policy that only praises: trained on the good demonstrations."""
    root = tmp_path_factory.mktemp("kind")
    data = root / "data"
    shutil.copytree(prepared, data)
    for split in ("train", "eval"):
        table = read_table(data, "demonstrations", split)
        draws = torch.Generator().manual_seed(0)
        words = ["good", "fine", "warm", "nice"]
        picked = torch.randint(4, (len(table), 2), generator=draws).tolist()
        table["response"] = [f" is {words[a]} and {words[b]}" for a, b in picked]
        write_table(table, data, "demonstrations", split)
    config = SFTConfig(epochs=8, learning_rate=1e-2, batch_size=24, max_length=32)
    work = Work(inputs={"data": data}, outputs={"sft": root / "made"}, sections={"model": FRESH})
    train_sft(config, work)
    return root / "made"


@pytest.fixture(scope="session")
def odd_policy(toy_sft, tmp_path_factory):
    """The SFT policy, disturbed."""
    model, tokenizer = load_policy(toy_sft)
    with torch.no_grad():
        weight = model.transformer.ln_f.weight
        weight.add_(0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    directory = tmp_path_factory.mktemp("models") / "odd"
    save_model(model, tokenizer, directory, kind="policy")
    add_facts(directory, {"iterations": 4})
    return directory


@pytest.fixture
def hold(toy_sft, odd_policy, toy_reward, prepared, toy_sampling, tmp_path):
    def hold(config, *, judge=None, judging=None, logger=None, output="policy", **inputs):
        roles = {"sft": toy_sft, "policy": odd_policy, "reward": toy_reward, "data": prepared}
        work = Work(
            inputs=roles | inputs,
            outputs={"policy": tmp_path / output},
            sections={"sampling": toy_sampling, "judge": judge or JudgeConfig(canary_prompts=2)},
            logger=logger or MemoryLogger(),
            judging=judging,
        )
        return hold_tournament(config, work)

    return hold


def change(**settings):
    return TournamentConfig(**dict(CONFIG) | settings)


def milestones(**directories):
    return {f"milestone.{name[1:]}": directory for name, directory in directories.items()}


def test_the_best_milestone_goes_on_and_is_copied(hold, truth, kind_policy, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "rlhf_core.stages.tournament")
    logger = MemoryLogger()
    report = hold(change(true_reward=truth), logger=logger, **milestones(n2=kind_policy))
    found = report.result
    assert [entrant.name for entrant in found.entrants] == ["sft", "milestone.2", "policy"]
    assert [entrant.iteration for entrant in found.entrants] == [0, 2, 4]
    assert found.chosen == found.strongest == "milestone.2"
    assert found.judge == "true_reward"
    assert found.over_last.value > 0
    assert tree_digest(tmp_path / "policy") == tree_digest(kind_policy)
    assert report.copies == {"policy": "milestone.2"}
    assert found.sentence() in caplog.text
    assert found.sentence() in report.page
    assert "instead of the last" in found.sentence()
    sft, best, last = found.entrants
    assert best.true_reward > sft.true_reward + 0.3
    assert sft.strength == (0, 0, 0)
    by_step = dict(logger.history)
    assert by_step[2]["tournament/strength"] == best.strength.value
    assert by_step[4]["tournament/strength"] == last.strength.value
    summary = report.summary()
    assert (summary["chosen_iteration"], summary["last_iteration"]) == (2, 4)
    assert summary["replaces_last"] == 1


def test_wins_of_the_tables_are_those_of_the_verdicts(hold, truth, kind_policy):
    report = hold(change(true_reward=truth), **milestones(n2=kind_policy))
    pairs, rows = report.tables["tournament_pairs"], report.tables["tournament_strengths"]
    assert pairs[["first_wins", "ties", "second_wins"]].to_numpy().sum() == report.result.verdicts
    assert report.result.verdicts <= 120
    for row in rows.to_dict("records"):
        first, second = pairs["first"] == row["name"], pairs["second"] == row["name"]
        won = pairs[first]["first_wins"].sum() + pairs[second]["second_wins"].sum()
        lost = pairs[first]["second_wins"].sum() + pairs[second]["first_wins"].sum()
        assert (row["wins"], row["losses"]) == (won, lost)
        assert row["ties"] == pairs[first | second]["ties"].sum()


def test_the_last_policy_may_win(hold, truth, kind_policy, odd_policy, tmp_path):
    report = hold(change(true_reward=truth), policy=kind_policy, **milestones(n2=odd_policy))
    assert report.result.chosen == "policy"
    assert report.result.over_last is None
    assert not (tmp_path / "policy").exists()
    assert report.copies == {}
    assert "The last policy goes on: it is the strongest of 2 checkpoints" in report.page


def test_held_out_prompts_are_not_asked(hold, truth, kind_policy, prepared):
    hold(change(true_reward=truth, prompts=1000), **milestones(n2=kind_policy))
    asked = set(sys.modules["cup_truth"].asked)
    train, held_out = (
        set(read_table(prepared, "prompts", split)["prompt"]) for split in ("train", "eval")
    )
    canaries = set(read_table(prepared, "demonstrations", "eval")["prompt"])
    assert train <= asked
    # The judge meets its canaries on held-out demonstrations, which choose nothing.
    assert len(asked - train) <= 2
    assert asked - train <= canaries & held_out


def test_a_milestone_that_is_the_last_policy_plays_once(hold, truth, kind_policy, odd_policy):
    config = change(true_reward=truth)
    found = hold(config, **milestones(n2=kind_policy, n4=odd_policy)).result
    assert [entrant.name for entrant in found.entrants] == ["sft", "milestone.2", "policy"]


def test_as_many_play_as_the_config_says(hold, truth, kind_policy, toy_sft):
    many = {f"milestone.{n}": kind_policy if n == 3 else toy_sft for n in range(1, 6)}
    found = hold(change(true_reward=truth, checkpoints=2), **many).result
    assert [entrant.name for entrant in found.entrants] == ["sft", "milestone.3", "policy"]
    config = change(true_reward=truth, checkpoints=0)
    everyone = hold(config, output="everyone", **many).result
    assert len(everyone.entrants) == 7


def test_without_a_milestone_the_last_policy_meets_sft_alone(hold, truth, caplog):
    found = hold(change(true_reward=truth)).result
    assert "there is no milestone" in caplog.text
    assert found.chosen == "policy"
    assert "no milestone was there to compare it with" in found.sentence()


def test_the_reward_model_decides_when_no_truth_is_known(hold, kind_policy, toy_reward):
    found = hold(CONFIG, **milestones(n2=kind_policy)).result
    assert found.judge == "reward_model"
    assert found.chosen == "milestone.2"
    assert found.entrant("sft").true_reward is None


def test_the_reward_model_may_decide_although_the_truth_is_known(hold, truth, kind_policy):
    judge = JudgeConfig(source="reward_model", canary_prompts=2)
    found = hold(change(true_reward=truth), judge=judge, **milestones(n2=kind_policy)).result
    assert found.judge == "reward_model"
    plain = hold(CONFIG, output="plain", **milestones(n2=kind_policy)).result
    assert [e.strength for e in found.entrants] == [e.strength for e in plain.entrants]


class Endpoint:
    """A judge that counts what it is asked, and stops once."""

    name = "tiny"

    def __init__(self, stop_after=None, silent=False):
        self.asked, self.stop_after, self.silent = [], stop_after, silent

    def __call__(self, pairs):
        found = []
        for pair in pairs:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                self.stop_after = None
                raise KeyboardInterrupt
            self.asked.append(pair)
            good = [sum(w in text for w in ("good", "fine", "warm", "nice")) for text in pair[1:]]
            winner = "a" if good[0] > good[1] else "b" if good[1] > good[0] else "tie"
            found.append(Verdict(None if self.silent else winner))
        return found


class Memory:
    """Judging that remembers each verdict as soon as it is there."""

    cost = Cost()

    def __init__(self, judge):
        self.judge, self.known = judge, {}

    def endpoint(self, config):
        return self.judge

    def remembered(self, judge, identity):
        def ask(pairs):
            for pair in pairs:
                if (identity, pair) not in self.known:
                    [self.known[identity, pair]] = judge([pair])
            return [self.known[identity, pair] for pair in pairs]

        ask.name = judge.name
        return ask


def test_a_tournament_that_was_stopped_asks_nothing_twice(hold, kind_policy):
    whole, stopped = Endpoint(), Endpoint(stop_after=70)
    inputs = milestones(n2=kind_policy)
    expected = hold(CONFIG, judge=BY_ENDPOINT, judging=Memory(whole), output="a", **inputs)
    memory = Memory(stopped)
    with pytest.raises(KeyboardInterrupt):
        hold(CONFIG, judge=BY_ENDPOINT, judging=memory, output="b", **inputs)
    assert len(stopped.asked) == 70
    again = hold(CONFIG, judge=BY_ENDPOINT, judging=memory, output="c", **inputs)
    assert again.result == expected.result
    assert stopped.asked == whole.asked
    assert len(set(stopped.asked)) == len(stopped.asked)


def test_a_judge_without_a_verdict_is_an_error_and_no_tie(hold, kind_policy):
    judging = Memory(Endpoint(silent=True))
    with pytest.raises(NumericsError, match="tiny gave no verdict in the tournament"):
        hold(CONFIG, judge=BY_ENDPOINT, judging=judging, **milestones(n2=kind_policy))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checkpoints": 1}, "checkpoints is 1, which is the last policy alone"),
        ({"checkpoints": 6, "verdicts": 419}, "less than 20 for each of the 21 pairs .* to 420"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        TournamentConfig(**settings)
