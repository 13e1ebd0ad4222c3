"""Reward-model training on the toy world: praise is preferred."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core.backbone.directory import load_policy, read_card
from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.responses import lay_out
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import encode_pair, encode_prompt
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.errors import ConfigError, DataError, NumericsError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.seeding import generator
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages.reward_model import _sft_scores, scale_of, train_reward_model

CONFIG = RewardModelConfig(
    epochs=2,
    learning_rate=5e-3,
    batch_size=24,
    micro_batch_size=8,
    max_length=24,
    normalization_samples=32,
)
PAIRS = 102  # 96 votes and 6 ties


@pytest.fixture
def train(toy_work, tmp_path):
    def run(config=CONFIG, *, output=tmp_path / "out", **parts):
        work = toy_work("sft", "data", outputs={"reward": output}, **parts)
        return train_reward_model(config, work)

    return run


@pytest.fixture
def with_margins(prepared, tmp_path):
    """The toy preferences, every row with a margin, ties as well."""
    data = tmp_path / "margins"
    shutil.copytree(prepared, data)
    for split in ("train", "eval"):
        table = read_table(data, "preferences", split).assign(margin=0.3)
        write_table(table, data, "preferences", split)
    return data


def votes_of(data, split):
    """The prepared votes with their winners."""
    return with_winners(read_table(data, "preferences", split))


def as_votes(rows):
    """Prepared votes of rows with prompt, response_a, response_b and vote."""
    how = {"margin": 0.0, "annotator": "", "shown_first": "", "gold": False, "time": ""}
    return pd.DataFrame(rows).assign(id="x", source="", **how)


def change(**settings):
    return RewardModelConfig(**dict(CONFIG) | settings)


def logits(model, tokenizer, table, column):
    """Raw logits, one text at a time, of a plain sequence classifier."""
    with_grad = []
    for prompt, response in zip(table["prompt"], table[column], strict=True):
        ids, _, _ = encode_pair(prompt, response, tokenizer, 24)
        with_grad.append(model(torch.tensor([ids])).logits[0, 0])
    return torch.stack(with_grad)


def test_reward_model_learns_and_reports_what_plain_transformers_finds(train, prepared, tmp_path):
    report = train(change(epochs=4))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    table = votes_of(prepared, "eval")
    with torch.no_grad():
        chosen, rejected = (logits(plain, tokenizer, table, c) for c in ("chosen", "rejected"))
    tie = torch.tensor(table["tie"].tolist())
    gap = chosen - rejected
    assert report.accuracy == pytest.approx((gap[~tie] > 0).float().mean().item())
    assert report.accuracy > 0.9
    assert report.accuracy_low <= report.accuracy <= report.accuracy_high
    loss = torch.where(tie, -(logsigmoid(gap) + logsigmoid(-gap)) / 2, -logsigmoid(gap)).mean()
    assert report.held_out_loss == pytest.approx(loss.item(), rel=1e-4)
    assert (report.train_pairs, report.held_out_pairs, report.truncated) == (PAIRS, 34, 0)
    card = read_card(tmp_path / "out")
    assert (card["reward_mean"], card["reward_std"]) == (report.reward_mean, report.reward_std)
    shown = report.tables["reward_held_out"]
    normalised = (chosen - report.reward_mean) / report.reward_std
    assert shown["chosen_reward"].tolist() == pytest.approx(normalised.tolist(), abs=1e-4)
    assert set(report.figures) == {"reward_calibration", "reward_scores"}


def test_adapter_learns_and_is_merged_into_what_is_saved(train, prepared, tmp_path):
    report = train(change(epochs=4, lora_rank=4))
    assert report.accuracy > 0.9
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    table = votes_of(prepared, "eval")
    with torch.no_grad():
        chosen = logits(plain, tokenizer, table, "chosen")
    shown = report.tables["reward_held_out"]["chosen_reward"]
    normalised = (chosen - report.reward_mean) / report.reward_std
    assert shown.tolist() == pytest.approx(normalised.tolist(), abs=1e-4)


def test_longer_accuracy_by_hand(train, toy_sft, tmp_path, prepared):
    # Longer twice, shorter, as long, and a tie that does not count: (1 + 1 + 0 + 1/2) / 4.
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    rows = [(" is good and fine", " is", "a"), (" is", " is good", "b")]
    rows += [(" is", " is bad", "a")]
    rows += [(" is good", " is fine", "a"), (" is good", " is good and fine", "tie")]
    keys = ("response_a", "response_b", "vote")
    votes = [dict(zip(keys, row, strict=True)) | {"prompt": "the room"} for row in rows]
    write_table(as_votes(votes), data, "preferences", "eval")
    _, tokenizer = load_policy(toy_sft)
    assert len(tokenizer(" is good").input_ids) == len(tokenizer(" is fine").input_ids)
    assert train(data=data).longer_accuracy == pytest.approx(2.5 / 4)


def test_interval_draws_whole_prompts(train, prepared, tmp_path):
    # Twelve votes on one prompt that the model gets right, and the same twelve the wrong way round
    # on another: a draw of two prompts has accuracy 0, 1/2 or 1. Single votes would stay near 1/2.
    data = shutil.copytree(prepared, tmp_path / "data")
    pair = {"response_a": " is good and fine", "response_b": " is bad and dull"}
    rows = [{"prompt": "the room", "vote": "a"} | pair, {"prompt": "the film", "vote": "b"} | pair]
    write_table(as_votes(rows * 12), data, "preferences", "eval")
    report = train(change(epochs=4), data=data)
    assert (report.accuracy_low, report.accuracy, report.accuracy_high) == (0, 0.5, 1)


def test_samples_of_the_sft_policy_have_mean_0_and_standard_deviation_1(
    train, toy_sft, toy_sampling, prepared, tmp_path
):
    # Constants from 512 samples, checked on 1024 others: standard errors 0.044 and 0.031.
    report = train(change(epochs=1, normalization_samples=512))
    assert abs(report.reward_mean) > 0.3 or abs(report.reward_std - 1) > 0.3  # it has work to do
    policy, tokenizer = Policy.load(toy_sft, "cpu")
    prompts = read_table(prepared, "preferences", "train")["prompt"].unique()
    rows = [encode_prompt(prompt, tokenizer) for prompt in prompts] * (1024 // len(prompts) + 1)
    reward_model = ScalarModel.load(tmp_path / "out")
    answers = respond(policy, rows[:1024], toy_sampling, generator=generator(9, "fresh"))
    with torch.no_grad():
        scores = torch.cat([reward_model.scores(lay_out(*batch).packed) for batch in answers])
    assert scores.mean().item() == pytest.approx(0, abs=0.2)
    assert scores.std().item() == pytest.approx(1, abs=0.15)


LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "centred": {"center_coef": 0.5},
    "pointwise": {"loss": "pointwise_mse"},
}


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("micro_batch_size", [7, 200])
def test_first_loss_and_gradient_by_hand(
    train, toy_sft, with_margins, logger, settings, micro_batch_size
):
    whole = {"batch_size": 200, "epochs": 1, "micro_batch_size": micro_batch_size}
    train(change(**settings, **whole), data=with_margins)
    model = ScalarModel.from_policy(toy_sft, generator(0, "reward/head"))
    table, (_, tokenizer) = votes_of(with_margins, "train"), load_policy(toy_sft)
    chosen, rejected = (logits(model.model, tokenizer, table, c) for c in ("chosen", "rejected"))
    tie = torch.tensor(table["tie"].tolist())
    wrong = torch.where(tie, 0.5, settings.get("label_smoothing", 0.0))
    gap = chosen - rejected - torch.where(tie, 0.0, 0.3)  # nobody wins a tie by a margin
    if settings.get("loss") == "pointwise_mse":
        loss = ((chosen - (1 - tie / 2)) ** 2 + (rejected - tie / 2) ** 2).mean() / 2
    else:
        loss = (-(1 - wrong) * logsigmoid(gap) - wrong * logsigmoid(-gap)).mean()
        loss = loss + settings.get("center_coef", 0.0) * ((chosen + rejected) ** 2).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    right = (torch.sign(chosen - rejected) + 1) / 2
    assert logger.series("loss") == [pytest.approx(loss.item(), rel=1e-4)]
    assert logger.series("grad_norm") == [pytest.approx(norm.item(), rel=1e-3)]
    assert logger.series("accuracy") == [pytest.approx(right.mean().item())]


def test_micro_batches_do_not_change_the_trajectory(train):
    runs = []
    for micro in (1, 24):
        log = MemoryLogger()
        train(change(micro_batch_size=micro, center_coef=0.1), logger=log)
        names = ("loss", "grad_norm", "accuracy")
        runs.append(torch.tensor([x for name in names for x in log.series(name)]))
    assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)


def test_ties_pull_the_two_rewards_together(train, prepared, tmp_path):
    # The same pairs, once with their winners and once as ties.
    data = tmp_path / "ties"
    shutil.copytree(prepared, data)
    table = read_table(data, "preferences", "train")
    write_table(table.assign(vote="tie"), data, "preferences", "train")
    gaps = {}
    for name, source in (("votes", prepared), ("ties", data)):
        shown = train(data=source, output=tmp_path / name).tables["reward_held_out"]
        spread = read_card(tmp_path / name)["reward_std"]
        gaps[name] = ((shown["chosen_reward"] - shown["rejected_reward"]) * spread).abs().mean()
    assert gaps["ties"] < gaps["votes"] / 3


def test_pointwise_regression_brings_chosen_to_1_and_rejected_to_0(train):
    report = train(change(loss="pointwise_mse", epochs=12))
    shown = report.tables["reward_held_out"]
    raw = shown[["chosen_reward", "rejected_reward"]] * report.reward_std + report.reward_mean
    assert raw["chosen_reward"].median() == pytest.approx(1, abs=0.35)
    assert raw["rejected_reward"].median() == pytest.approx(0, abs=0.35)


def test_same_seed_same_numbers(train, tmp_path):
    def run(seed):
        log = MemoryLogger()
        report = train(seed=seed, logger=log)
        return log.history, report.summary()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_prompt_with_many_votes_is_asked_no_more_often(toy_sft, toy_reward, toy_sampling):
    model = ScalarModel.load(toy_reward)
    prompts = ["the room", "a film", "my bed"]

    def scores(asked):
        return _sft_scores(model, toy_sft, asked, change(), toy_sampling, 0, MemoryLogger())

    assert torch.equal(scores(prompts), scores(["the room"] * 9 + prompts + ["my bed"]))
    assert len(scores(prompts)) == 32


def test_held_out_ties_alone_say_nothing(train, prepared, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    table = read_table(data, "preferences", "eval").assign(vote="tie")
    write_table(table, data, "preferences", "eval")
    with pytest.raises(DataError, match="all ties"):
        train(data=data)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_preferences(train, prepared, tmp_path, split):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    (data / f"preferences.{split}.jsonl").write_text("")
    with pytest.raises(DataError, match="preferences have no rows"):
        train(data=data)


def test_texts_longer_than_the_model_are_refused_before_training(train, logger):
    with pytest.raises(ConfigError, match=r"reward_model\.max_length asks for texts of 41"):
        train(change(max_length=41))
    with pytest.raises(ConfigError, match=r"sampling\.max_prompt_length \+ max_new_tokens asks"):
        train(sampling=SamplingConfig(max_prompt_length=30, max_new_tokens=11))
    assert not logger.history


def test_loss_that_is_not_finite_stops_the_run(train, with_margins, tmp_path):
    path = with_margins / "preferences.train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["margin"] = math.inf
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(NumericsError, match="the reward-model loss is not finite"):
        train(data=with_margins)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("samples", "gap", "scale"),
    [
        ([1.0, 3.0], 2.0, 2**0.5),
        ([5.0, 5.0], 2.0, 1.0),  # all SFT samples are the same text
        ([5.0, 5.0 + 1e-6], 2.0, 1.0),  # but for rounding
        ([5.0, 5.001], 2.0, 1.0),  # a gap of 2 would become one of 2,800
        ([5.0, 5.001], 0.01, 0.001 / 2**0.5),  # the answers are no further apart
        ([5.0, 5.0], 0.0, 1.0),
    ],
)
def test_a_spread_is_a_scale_if_it_is_one_for_the_answers(samples, gap, scale, caplog):
    found = scale_of(torch.tensor(samples, dtype=torch.float64), torch.tensor([gap, -gap]))
    assert found == pytest.approx(scale)
    assert ("only centred and not scaled" in caplog.text) == (scale == 1.0)
