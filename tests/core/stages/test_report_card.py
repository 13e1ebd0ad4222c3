"""The report card on the toy world: its numbers by another way, and what may be missing."""

import math
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from plain import plain_scores
from scipy import stats
from tiny import World, work_of
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer

from rlhf_core.backbone.directory import read_card
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.data.encoding import encode_pair
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.evaluation.card.findings import findings, verdict
from rlhf_core.rewards.canaries import KINDS
from rlhf_core.rewards.models import load_reward_model, score_texts
from rlhf_core.settings.evaluation import ReportCardConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages.report_card import _draw, write_report_card
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.work import Work

CONFIG = ReportCardConfig(samples=24, min_slice_prompts=5, max_length=24)


@pytest.fixture
def examine(toy_work):
    def run(config=CONFIG, **parts):
        return write_report_card(config, toy_work("reward", "data", "sft", outputs={}, **parts))

    return run


@pytest.fixture(scope="module")
def report(prepared, toy_sft, toy_reward, toy_sampling):
    inputs = {"reward": toy_reward, "data": prepared, "sft": toy_sft}
    return write_report_card(CONFIG, Work(inputs=inputs, sections={"sampling": toy_sampling}))


def change(**settings):
    return ReportCardConfig(**dict(CONFIG) | settings)


@pytest.fixture
def with_votes(prepared, tmp_path):
    """The toy data with other held-out votes."""

    def write(rows):
        data = shutil.copytree(prepared, tmp_path / "data")
        how = {"annotator": "", "shown_first": "", "source": "", "time": ""}
        frame = pd.DataFrame(rows, columns=["prompt", "response_a", "response_b", "vote"])
        frame = frame.assign(id="x", gold=False, margin=0.0, **how)
        write_table(frame, data, "preferences", "eval")
        return data

    return write


def kinds(card):
    return {(finding.kind, finding.says) for finding in findings(card)}


def said(card, kind):
    return " ".join(says for found, says in kinds(card) if found == kind)


# ---- the numbers ----


def test_the_numbers_are_those_of_plain_transformers(report, prepared, toy_reward):
    card = report.card
    tokenizer = AutoTokenizer.from_pretrained(toy_reward)
    votes = with_winners(read_table(prepared, "preferences", "eval"))

    def scores(column):
        rows = []
        for prompt, response in zip(votes["prompt"], votes[column], strict=True):
            ids, start, _ = encode_pair(prompt, response, tokenizer, 24)
            rows.append((ids[:start], ids[start:]))
        return plain_scores(toy_reward, rows)

    gap = scores("chosen") - scores("rejected")
    tie = torch.tensor(votes["tie"].tolist())
    assert card.accuracy.share.value == pytest.approx((gap[~tie] > 0).float().mean().item())
    assert (card.votes, card.ties) == (int((~tie).sum()), int(tie.sum()))
    logits = gap * read_card(toy_reward)["reward_std"]
    loss = torch.where(tie, -(logsigmoid(logits) + logsigmoid(-logits)) / 2, -logsigmoid(logits))
    assert card.log_loss.value == pytest.approx(loss.mean().item(), rel=1e-3)
    assert card.log_loss.low is None  # eight prompts
    assert {canary.kind for canary in card.canaries} <= set(KINDS)
    assert card.canaries_against == "chosen answer of a held-out vote"
    assert card.agreement is None


def test_the_accuracy_is_the_one_of_the_training_and_so_are_its_bounds(toy_work, tmp_path):
    config = RewardModelConfig(
        epochs=1, learning_rate=5e-3, batch_size=24, max_length=24, normalization_samples=16
    )
    output = tmp_path / "reward"
    trained = train_reward_model(config, toy_work("sft", "data", outputs={"reward": output}))
    work = toy_work("reward", "data", "sft", outputs={}, reward=output)
    card = write_report_card(CONFIG, work).card
    names = ("accuracy", "accuracy_low", "accuracy_high")
    assert card.accuracy.share == tuple(pytest.approx(getattr(trained, name)) for name in names)
    assert card.longer.share.value == pytest.approx(trained.longer_accuracy)
    assert card.log_loss.value == pytest.approx(trained.held_out_loss, rel=1e-4)
    assert card.calibration_error.value == pytest.approx(trained.calibration_error, abs=1e-4)


def test_two_cards_are_the_same(report, examine):
    assert examine().card == report.card


def test_the_report_has_tables_plots_and_a_page(report):
    assert set(report.tables) == {"report_card_slices", "report_card_canaries"}
    assert set(report.figures) == {
        "report_card_reliability",
        "report_card_slices",
        "report_card_canaries",
    }
    page = report.page
    assert page.startswith(f"# Report card of the reward model\n\n**{verdict(report.card)}**")
    for title in ("What is good", "Held-out votes", "Reliability", "Slices", "Canaries"):
        assert f"## {title}" in page
    assert report.result == type(report.card).model_validate_json(report.card.model_dump_json())
    numbers = report.summary()
    assert numbers["accuracy"] == report.card.accuracy.share.value
    assert all(map(math.isfinite, numbers.values()))
    assert numbers["worst_canary"] == max(c.beats_real.value for c in report.card.canaries)


def test_a_slice_of_the_users_own_column(prepared, examine, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    votes = read_table(data, "preferences", "eval")
    kept = [{"thing": prompt.split()[1][0]} for prompt in votes["prompt"]]
    write_table(votes.assign(kept=kept), data, "preferences", "eval")
    card = examine(change(min_slice_prompts=1), data=data).card
    found = {part.value: part.accuracy.votes for part in card.slices if part.column == "thing"}
    decided = votes[votes["vote"] != "tie"]["prompt"]
    assert found == decided.map(lambda prompt: prompt.split()[1][0]).value_counts().to_dict()


# ---- bad cases ----


def test_without_held_out_votes_the_rest_of_the_card_is_there(examine, with_votes):
    report = examine(data=with_votes([]))
    card = report.card
    assert card.accuracy is card.log_loss is card.calibration_error is card.quality is None
    assert card.canaries_against == "sample of the SFT policy"
    assert card.canaries
    assert "Nobody can tell" in verdict(card)
    assert "No held-out vote has a winner" in report.page
    assert "accuracy" not in report.summary()


def test_only_ties_are_no_winner(examine, with_votes):
    card = examine(data=with_votes([("my room", " is good", " is fine", "tie")] * 3)).card
    assert (card.votes, card.ties, card.accuracy) == (0, 3, None)
    assert "(3 ties)" in said(card, "unknown")


def test_one_prompt_says_that_it_cannot_tell(examine, with_votes):
    rows = [("my room", " is good", f" is {word} and bad", "a") for word in ("bad", "cold", "dull")]
    report = examine(data=with_votes(rows))
    card = report.card
    assert card.accuracy.share.high - card.accuracy.share.low > 0.5
    assert "rests on 1 prompt" in said(card, "unknown")
    assert "(interval unknown)" in report.page
    assert card.slices == ()


def test_texts_that_are_the_same_are_left_out_and_counted(examine, with_votes):
    long = " is good" * 30
    rows = [("my room", f"{long} good", f"{long} bad", "a"), ("my bed", " is good", " is bad", "a")]
    card = examine(data=with_votes(rows)).card
    assert (card.votes, card.same_after_cut) == (1, 1)


def test_a_constant_reward_model_is_no_better_than_chance(toy_reward, examine, tmp_path):
    model = ScalarModel.load(toy_reward)
    with torch.no_grad():
        model.head.weight.zero_()
    tokenizer = AutoTokenizer.from_pretrained(toy_reward)
    model.mean, model.std = 0.0, 1.0
    model.save(tokenizer, tmp_path / "constant", kind="reward")
    report = examine(reward=tmp_path / "constant")
    card = report.card
    assert card.accuracy.share.value == 0.5
    assert card.accuracy.share.low < 0.5 < card.accuracy.share.high
    assert card.length_correlation is None
    assert "no better than chance" in said(card, "doubt")
    assert "one length or one reward" in said(card, "unknown")


def test_a_reward_for_length_is_seen_on_votes_and_on_samples(
    report, examine, prepared, tmp_path, monkeypatch
):
    data = shutil.copytree(prepared, tmp_path / "data")
    write_table(read_table(data, "prompts", "train"), data, "prompts", "eval")

    def lengths(self, packed):
        return packed.lengths.float()[None]

    monkeypatch.setattr(ScalarModel, "member_scores", lengths)
    found = examine(data=data).card
    assert found.accuracy.share.value == found.longer.share.value  # it is that rule
    assert found.length_correlation.value > 0.8  # rewards count the prompt as well
    assert "longer answers get the better reward" in said(found, "doubt")
    # The toy world has eight held-out prompts, which are too few to tell.
    assert report.card.length_correlation.low is None
    assert "too few prompts to tell" in said(report.card, "unknown")


def test_several_votes_on_a_pair_are_asked_once_and_have_a_ceiling(examine, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    votes = read_table(data, "preferences", "eval")
    swapped = votes.assign(
        response_a=votes["response_b"],
        response_b=votes["response_a"],
        vote=votes["vote"].map({"a": "b", "b": "a", "tie": "tie"}),
        annotator="y",
    )
    write_table(pd.concat([votes, swapped]), data, "preferences", "eval")
    once, twice = examine().card, examine(data=data).card
    assert twice.accuracy.share.value == pytest.approx(once.accuracy.share.value)
    assert twice.votes == 2 * once.votes
    assert twice.agreement.pairwise.share.value == 1.0
    assert twice.log_loss.value == pytest.approx(once.log_loss.value, abs=1e-5)


def test_of_too_many_votes_whole_prompts_are_drawn():
    table = pd.DataFrame({"prompt": [f"p{i % 10}" for i in range(100)], "n": range(100)})
    drawn = _draw(table, 35, seed=0)
    assert drawn["prompt"].value_counts().tolist() == [10, 10, 10]
    assert drawn["n"].is_monotonic_increasing
    assert len(_draw(table, 5, seed=0)) == 10  # one prompt at least
    assert _draw(table, 100, seed=0) is table


def test_a_leak_is_said_with_the_accuracy_on_the_others(examine, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    votes = read_table(data, "preferences", "eval")
    train = read_table(data, "preferences", "train")
    write_table(pd.concat([train, votes.head(7)]), data, "preferences", "train")
    card = examine(data=data).card
    assert card.leaks.equal_prompts >= 1
    assert card.leaks.votes >= 7
    assert card.elsewhere.votes < card.votes
    assert "word for word or nearly" in said(card, "doubt")


def test_the_interval_of_a_slice_is_at_least_scipys(report):
    for part in report.card.slices:
        share, prompts = part.accuracy.share, part.accuracy.prompts
        won = round(share.value * prompts)
        if won in (0, prompts):
            wilson = stats.binomtest(won, prompts).proportion_ci(method="wilson")
            assert share.high - share.low >= 0.99 * (wilson.high - wilson.low)


# ---- an ensemble ----


def test_an_ensemble_is_examined_by_its_mean_with_its_members_beside(tmp_path):
    world = World.build(tmp_path / "world")
    made = replace(world, reward=world.ensemble)
    card = write_report_card(CONFIG, work_of("report_card", made, tmp_path / "out")).card
    model, tokenizer = load_reward_model(world.ensemble)
    votes = with_winners(read_table(world.data, "preferences", "eval"))
    votes = votes[~votes["tie"]]
    chosen, rejected = (
        score_texts(model, tokenizer, list(votes["prompt"]), list(votes[column]), max_length=24)
        for column in ("chosen", "rejected")
    )
    right = chosen > rejected  # (K, N)
    assert [own.share.value for own in card.members.accuracies] == pytest.approx(
        right.float().mean(1).tolist()
    )
    differ = (right != right[0]).any(0).float().mean().item()
    assert card.members.disagreement.share.value == pytest.approx(differ)
    mean = (chosen.mean(0) > rejected.mean(0)).float().mean().item()
    assert card.accuracy.share.value == pytest.approx(mean)
    assert f"Its {len(right)} members are right on" in said(card, "good")
    # In logits by the mean of the members' standard deviations.
    stds = [member["reward_std"] for member in read_card(world.ensemble)["members"]]
    sure = torch.sigmoid((chosen - rejected).mean(0).abs() * sum(stds) / len(stds))
    assert card.confidence == pytest.approx(sure.mean().item(), rel=1e-4)
