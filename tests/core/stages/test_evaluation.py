"""Evaluation on the toy world: every number of the scorecard by another way."""

import importlib
import json
import math
import shutil
import sys

import pytest
import torch
from plain import plain_logprobs, plain_policy, plain_scores
from torch.testing import assert_close

from rlhf_core.backbone.base_model import base_of, load_base
from rlhf_core.backbone.directory import load_policy, save_model
from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.responses import lay_out, response_logprobs
from rlhf_core.backbone.sampling import respond
from rlhf_core.data.encoding import encode_prompt, encode_response
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.evaluation import answers as evaluation_answers
from rlhf_core.evaluation.answers import Answers
from rlhf_core.evaluation.comparison import best_of_each, compare, distinct_n, first_of_each
from rlhf_core.evaluation.scorecard import Arm
from rlhf_core.rewards.functions import load_function
from rlhf_core.seeding import generator
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages import evaluation as stage
from rlhf_core.stages.evaluation import evaluate
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.work import Work

CONFIG = EvaluationConfig(prompts=8, samples_per_prompt=3, best_of=5, sample_rows=4)

TRUTH = """
GOOD, BAD = {"good", "fine", "warm", "nice"}, {"bad", "cold", "dull", "poor"}


def praise(prompts, responses):
    assert all(isinstance(text, str) for text in [*prompts, *responses])
    return [sum((w in GOOD) - (w in BAD) for w in r.split()) for r in responses]


def too_few(prompts, responses):
    return [0.0]


def not_a_number(prompts, responses):
    return [float("nan")] * len(responses)


number = 3
"""


@pytest.fixture
def truth(tmp_path, monkeypatch):
    """An importable module with the truth of the toy world."""
    (tmp_path / "toy_truth.py").write_text(TRUTH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_truth", raising=False)
    return "toy_truth:praise"


@pytest.fixture(scope="session")
def toy_policy(toy_sft, tmp_path_factory):
    """The SFT policy with another head: it says other things."""
    model, tokenizer = load_policy(toy_sft)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = model.transformer.ln_f.weight
        weight.add_(0.3 * torch.randn(weight.shape, generator=draws))
    directory = tmp_path_factory.mktemp("models") / "policy"
    save_model(model, tokenizer, directory, kind="policy")
    return directory


@pytest.fixture(scope="session")
def foreign_policy(toy_corpus, tmp_path_factory):
    """A policy with a smaller vocabulary, so the same text is longer in its tokens."""
    fresh = FreshModelConfig(layers=1, width=16, heads=2, context=40, vocab_size=264)
    directory = tmp_path_factory.mktemp("models") / "foreign"
    save_model(*load_base(ModelConfig(fresh=fresh), toy_corpus, 5), directory, kind="policy")
    return directory


@pytest.fixture
def run(toy_sft, toy_policy, toy_reward, prepared, toy_sampling, logger):
    def run(config=CONFIG, *, sampling=toy_sampling, logger=logger, seed=0, **inputs):
        given = {"sft": toy_sft, "policy": toy_policy, "reward": toy_reward, "data": prepared}
        work = Work(
            inputs=given | inputs,
            sections={"sampling": sampling, "judge": JudgeConfig()},
            logger=logger,
            seed=seed,
        )
        return evaluate(config, work)

    return run


def change(**settings):
    return EvaluationConfig(**dict(CONFIG) | settings)


# --- measures by hand ---


def test_distinct_n_by_hand():
    # 5 words of which 3 differ; pairs within a text: (a b) (b a) | (a b), 2 of 3 differ.
    assert distinct_n(["a b a", "a c"], 1) == 3 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert distinct_n(["a a a a"], 2) == 1 / 3
    assert distinct_n(["a", ""], 2) == 0
    assert distinct_n([], 1) == 0


def answers(prompt, *, proxy, true=None):
    n = len(prompt)
    return Answers(
        texts=[""] * n,
        prompt=torch.tensor(prompt),
        tokens=torch.ones(n),
        proxy=torch.tensor(proxy),
        true=None if true is None else torch.tensor(true),
        kl=None,
        sft_logprob=torch.zeros(n),
    )


@pytest.mark.parametrize("with_truth", [True, False])
def test_win_rate_by_hand(with_truth):
    # Answer against answer: 3 > 1, 2 = 2, 0 < 5, 4 > 1: (2 + 1/2) / 4.
    ours, theirs = [3.0, 2.0, 0.0, 4.0], [1.0, 2.0, 5.0, 1.0]
    prompt, noise = [0, 0, 1, 1], [0.0] * 4
    pair = {
        "policy": answers(prompt, proxy=noise if with_truth else ours, true=ours),
        "sft": answers(prompt, proxy=[-x for x in ours] if with_truth else theirs, true=theirs),
    }
    if not with_truth:
        pair = {name: answers(prompt, proxy=a.proxy.tolist()) for name, a in pair.items()}
    found = compare(("policy", "sft"), pair, 0, ["x", "y"])
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.win_rate.value == 2.5 / 4
    # The prompts are drawn whole: their rates are 3/4 and 1/2, so no draw lies outside. But two of
    # them say little: the bounds are where the score test of 0.625 in 2 just rejects.
    for bound in (found.win_rate.low, found.win_rate.high):
        assert abs(bound - 0.625) == pytest.approx(1.959964 * (bound * (1 - bound) / 2) ** 0.5)
    assert found.judge == ("true_reward" if with_truth else "reward_model")


def test_comparison_takes_as_many_answers_as_both_have():
    pair = {
        "policy": answers([0, 0, 0, 1, 1, 1], proxy=[1.0, 9.0, 9.0, 1.0, 9.0, 9.0]),
        "best_of_n": answers([0, 1], proxy=[2.0, 0.0]),
    }
    found = compare(("policy", "best_of_n"), pair, 0, ["x", "y"])
    assert (found.wins, found.ties, found.losses) == (1, 0, 1)


def test_first_and_best_of_each_prompt():
    prompt = torch.tensor([0, 0, 0, 1, 1, 1])
    score = torch.tensor([1.0, 5.0, 9.0, 4.0, 4.0, 7.0])
    assert first_of_each(prompt, 2).tolist() == [0, 1, 3, 4]
    assert best_of_each(prompt, score, 2).tolist() == [1, 3]
    assert best_of_each(prompt, score, 3).tolist() == [2, 5]


# --- the whole stage ---


def test_every_number_of_an_arm_by_another_way(
    run, truth, toy_sft, toy_policy, toy_reward, prepared
):
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=5, temperature=0.8, batch_size=7)
    report = run(change(true_reward=truth), sampling=sampling)
    arm = report.scorecard.arm("policy")

    drawer, tokenizer = Policy.load(toy_policy, "cpu")
    policy, sft = plain_policy(toy_policy), plain_policy(toy_sft)
    prompts = read_table(prepared, "prompts", "eval")["prompt"].iloc[:8]
    rows = [encode_prompt(prompt, tokenizer) for prompt in prompts for _ in range(3)]
    drawn = respond(drawer, rows, sampling, generator=generator(0, "evaluation/policy"))
    said = [t[m].tolist() for _, r in drawn for t, m in zip(r.tokens, r.mask, strict=True)]
    assert {row[-1] == tokenizer.eos_token_id for row in said} == {True, False}

    @torch.no_grad()
    def logprob(model, prompt, tokens, temperature):
        return plain_logprobs(model, prompt, tokens, temperature).sum().item()

    pairs = list(zip(rows, said, strict=True))
    kl = [logprob(policy, *pair, 0.8) - logprob(sft, *pair, 0.8) for pair in pairs]
    nats = -sum(logprob(sft, *pair, 1.0) for pair in pairs)
    scores = plain_scores(toy_reward, pairs).tolist()
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
    rewards = importlib.import_module("toy_truth").praise(list(prompts), texts)
    count = sum(map(len, said))
    close = {"rel": 1e-4, "abs": 1e-4}
    assert arm.kl.value == pytest.approx(sum(kl) / 24, **close)
    assert arm.proxy_reward.value == pytest.approx(sum(scores) / 24, **close)
    assert arm.true_reward.value == pytest.approx(sum(rewards) / 24)
    assert arm.perplexity == pytest.approx(math.exp(nats / count), **close)
    assert arm.length == pytest.approx(count / 24)
    # Of one answer to each prompt, so that arms with fewer answers compare.
    assert arm.distinct_1 == distinct_n(texts[::3], 1)
    assert arm.distinct_2 == distinct_n(texts[::3], 2)
    for interval in (arm.kl, arm.proxy_reward, arm.true_reward):
        assert interval.low < interval.value < interval.high
    shown = report.tables["evaluation_samples"]
    first = shown[shown["arm"] == "policy"].iloc[1]
    assert first["response"] == texts[3]  # the first of three answers to the second prompt
    assert first["prompt"] == prompts.iloc[1]
    assert first["reward_model"] == pytest.approx(scores[3], abs=1e-3)
    assert first["true_reward"] == rewards[3]


def test_arms_comparisons_tables_and_figures(run, truth):
    report = run(change(true_reward=truth))
    names = [arm.name for arm in report.scorecard.arms]
    assert names == ["base", "sft", "policy", "best_of_n"]
    pairs = [(c.candidate, c.opponent, c.judge) for c in report.scorecard.comparisons]
    assert pairs == [
        ("policy", "sft", "true_reward"),
        ("best_of_n", "sft", "true_reward"),
        ("policy", "best_of_n", "true_reward"),
        ("sft", "base", "true_reward"),
    ]
    played = [c.wins + c.ties + c.losses for c in report.scorecard.comparisons]
    assert played == [8 * 3, 8, 8, 8 * 3]
    assert len(report.tables["evaluation_samples"]) == 4 * 4
    assert set(report.figures) == {
        "evaluation_arms",
        "evaluation_best_of_n",
        "evaluation_proxy_against_truth",
    }
    summary = report.summary()
    assert all(isinstance(value, float) for value in summary.values())
    arm = report.scorecard.arm("policy")
    assert summary["policy/kl_low"] == arm.kl.low
    assert summary["policy/distinct_2"] == arm.distinct_2
    assert summary["win_rate/policy_over_sft"] == report.scorecard.comparisons[0].win_rate.value


def test_without_a_truth_the_reward_model_judges(run):
    report = run()
    assert all(arm.true_reward is None for arm in report.scorecard.arms)
    assert {c.judge for c in report.scorecard.comparisons} == {"reward_model"}
    assert set(report.figures) == {"evaluation_arms", "evaluation_best_of_n"}
    assert not any("true_reward" in name for name in report.summary())


def test_the_curve_of_best_of_n_is_logged_by_n_and_ends_at_its_arm(run, truth, logger):
    report = run(change(true_reward=truth, samples_per_prompt=1, best_of=5))
    curve = {step: values for step, values in logger.history if "best_of_n/kl" in values}
    assert sorted(curve) == [1, 2, 3, 4, 5]
    best, sft = (report.scorecard.arm(name) for name in ("best_of_n", "sft"))
    pool = report.tables["evaluation_best_of_n"].set_index("number")
    assert curve[1]["best_of_n/proxy_gain"] == pytest.approx(0)
    assert curve[5]["best_of_n/kl"] == pytest.approx(best.kl.value)
    # The whole pool is the n of the arm; SFT's arm is one of its answers, so only near its mean.
    gained = best.proxy_reward.value - sft.proxy_reward.value
    assert curve[5]["best_of_n/proxy_gain"] == pytest.approx(gained, abs=0.5)
    for step, values in curve.items():
        assert values["best_of_n/truth_gain_low"] <= values["best_of_n/truth_gain"]
        assert pool["truth"][step] == values["best_of_n/truth_gain"]


def test_best_of_n_is_at_least_as_good_as_sft_and_costs_what_the_formula_says(run):
    # Of one pool: the best of 5 is at least the first of them, answer by answer.
    report = run(change(samples_per_prompt=1))
    sft, best = report.scorecard.arm("sft"), report.scorecard.arm("best_of_n")
    assert best.proxy_reward.value > sft.proxy_reward.value
    assert report.scorecard.comparison("best_of_n", "sft").losses == 0
    assert best.kl == pytest.approx([math.log(5) - 4 / 5] * 3)


def test_best_of_one_is_sft(run):
    report = run(change(samples_per_prompt=1, best_of=1))
    sft, best = report.scorecard.arm("sft"), report.scorecard.arm("best_of_n")
    assert best.model_dump(exclude={"name", "proxy_reward"}) == sft.model_dump(
        exclude={"name", "proxy_reward"}
    )
    assert best.proxy_reward.value == sft.proxy_reward.value


def test_best_of_may_be_smaller_than_the_samples(run):
    report = run(change(samples_per_prompt=4, best_of=2))
    assert [c.wins + c.ties + c.losses for c in report.scorecard.comparisons] == [32, 8, 8, 32]


def test_policy_with_the_weights_of_sft_is_no_better_at_no_kl(run, toy_sft):
    report = run(policy=toy_sft, champion=toy_sft)
    for name in ("sft", "policy", "champion"):
        assert report.scorecard.arm(name).kl == (0.0, 0.0, 0.0)
    rate = report.scorecard.comparison("policy", "sft").win_rate
    assert rate.low < 0.5 < rate.high
    # Each arm has draws of its own, so the same weights do not say the same.
    assert report.scorecard.comparison("policy", "champion").ties < 24


def test_champion_with_another_tokenizer_is_measured_by_its_texts(run, truth, foreign_policy):
    report = run(change(true_reward=truth), champion=foreign_policy)
    champion = report.scorecard.arm("champion")
    assert champion.kl is None
    assert not any(name.startswith("champion/kl") for name in report.summary())
    measured = (champion.proxy_reward.value, champion.perplexity, champion.length)
    assert all(math.isfinite(value) for value in measured)
    played = report.scorecard.comparison("policy", "champion")
    assert played.wins + played.ties + played.losses == 24
    assert Arm.model_validate_json(champion.model_dump_json()) == champion


@pytest.mark.parametrize(
    ("precision", "temperature", "of_sft", "of_policy"),
    [
        # float32: sampling knows what a text has under its own policy at its own temperature
        ("float32", 1.0, [], [("sft", 1.0)]),
        ("float32", 0.8, [("sft", 1.0)], [("sft", 0.8), ("sft", 1.0)]),
        ("bfloat16", 1.0, [("sft", 1.0)], [("policy", 1.0), ("sft", 1.0)]),
    ],
)
def test_no_text_is_read_twice_for_the_same_log_probability(
    run, toy_sampling, monkeypatch, precision, temperature, of_sft, of_policy
):
    readers, asked = {}, {}
    really, answer = evaluation_answers.response_logprobs, evaluation_answers.answer

    def named(bench, name, policy, tokenizer, k):
        readers[id(policy)] = name
        return answer(bench, name, policy, tokenizer, k)

    def counted(policy, rows, *, temperature):
        arm = list(readers.values())[-1]
        asked.setdefault((arm, id(rows)), []).append((readers[id(policy)], temperature))
        rows_kept.append(rows)
        return really(policy, rows, temperature=temperature)

    rows_kept = []  # so that no identity is used twice
    sampling = type(toy_sampling)(**dict(toy_sampling) | {"temperature": temperature})
    monkeypatch.setattr(stage, "answer", named)
    monkeypatch.setattr(evaluation_answers, "response_logprobs", counted)
    report = run(change(base=False, precision=precision), sampling=sampling)
    found = {"sft": [], "policy": []}
    for (arm, _), passes in asked.items():
        found[arm] = passes if not found[arm] else found[arm]
        assert passes == found[arm]  # of each batch
    assert found == {"sft": of_sft, "policy": of_policy}
    assert report.scorecard.arm("sft").kl == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_log_probabilities_of_sampling_are_those_of_reading_the_text(
    run, toy_sampling, toy_sft, toy_policy, monkeypatch, temperature
):
    arms, batches = {}, {}
    answer, respond = evaluation_answers.answer, evaluation_answers.respond_with_logprobs

    def named(bench, name, *others):
        batches[name] = []

        def kept(*arguments, **options):
            for batch, responses, drawn in respond(*arguments, **options):
                batches[name].append(lay_out(batch, responses))
                yield batch, responses, drawn

        monkeypatch.setattr(evaluation_answers, "respond_with_logprobs", kept)
        arms[name] = answer(bench, name, *others)
        return arms[name]

    monkeypatch.setattr(stage, "answer", named)
    sampling = type(toy_sampling)(**dict(toy_sampling) | {"temperature": temperature})
    run(change(base=False), sampling=sampling)
    policies = {"sft": Policy.load(toy_sft, "cpu")[0], "policy": Policy.load(toy_policy, "cpu")[0]}

    @torch.no_grad()
    def read(reader, arm, at):
        sums = (
            response_logprobs(policies[reader], b, temperature=at).sum(-1) for b in batches[arm]
        )
        return torch.cat(list(sums))

    for arm, said in arms.items():
        kl = read(arm, arm, temperature) - read("sft", arm, temperature)
        assert_close(said.kl, kl, rtol=0, atol=1e-4)
        assert_close(said.sft_logprob, read("sft", arm, 1.0), rtol=0, atol=1e-4)
    assert arms["policy"].kl.abs().max() > 0.1


def test_texts_of_another_tokenizer_are_cut_to_what_sft_can_read(run, toy_corpus, tmp_path):
    # 60 tokens of the champion's may be more than the 40 that SFT and reward model can read.
    fresh = FreshModelConfig(layers=1, width=16, heads=2, context=80, vocab_size=262)
    other = load_base(ModelConfig(fresh=fresh), toy_corpus, 5)
    save_model(*other, tmp_path / "long", kind="policy")
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=32)
    report = run(sampling=sampling, champion=tmp_path / "long")
    assert report.scorecard.arm("champion").length <= 40


def test_reward_model_with_another_tokenizer_reads_the_texts(
    run, foreign_policy, toy_policy, prepared, tmp_path
):
    other, theirs = tmp_path / "other", load_policy(foreign_policy)[1]
    scalar = ScalarModel.from_policy(foreign_policy, torch.Generator().manual_seed(3))
    scalar.mean, scalar.std = 0.2, 0.5
    scalar.save(theirs, other, kind="reward")
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=5)
    report = run(change(samples_per_prompt=1), sampling=sampling, reward=other)

    policy, ours = Policy.load(toy_policy, "cpu")
    prompts = read_table(prepared, "prompts", "eval")["prompt"].iloc[:8]
    rows = [encode_prompt(prompt, ours) for prompt in prompts]
    ((_, said),) = respond(policy, rows, sampling, generator=generator(0, "evaluation/policy"))
    assert set(said.finished.tolist()) == {True, False}
    texts = []
    for prompt, ids, end in zip(prompts, said.tokens, said.finished.tolist(), strict=True):
        text = ours.decode(ids, skip_special_tokens=True)
        response = encode_response(text, theirs)  # with an end, which an unfinished one has not
        texts.append((encode_prompt(prompt, theirs), response if end else response[:-1]))
    expected = plain_scores(other, texts).mean().item()
    assert report.scorecard.arm("policy").proxy_reward.value == pytest.approx(expected, abs=1e-4)


def test_same_seed_same_scorecard(run):
    assert run(seed=1).scorecard == run(seed=1).scorecard != run(seed=2).scorecard


def test_settings_bound_the_work(run):
    report = run(change(prompts=3, sample_rows=2))
    assert report.scorecard.comparison("policy", "best_of_n").wins <= 3
    assert len(report.tables["evaluation_samples"]) == 2 * 4


def test_every_setting_is_read(run, recording, truth, toy_sampling, toy_work, tmp_path):
    small = {"batch_size": 24, "max_length": 32, "normalization_samples": 8}
    members = RewardModelConfig(**small, lora_rank=2, members=2)
    train_reward_model(members, toy_work("sft", "data", outputs={"reward": tmp_path / "ensemble"}))
    config, seen = recording(change(true_reward=truth))
    sampling, seen_of_sampling = recording(toy_sampling)
    run(config, sampling=sampling, reward=tmp_path / "ensemble")
    assert set(EvaluationConfig.model_fields) <= seen
    of_roll_outs = {"engine", "max_importance", "max_engine_kl"}  # the evaluation has none
    assert set(SamplingConfig.model_fields) - of_roll_outs <= seen_of_sampling


# --- beside the win rates ---


def test_the_base_is_the_model_that_sft_started_from(run, toy_sft, truth):
    report = run(change(true_reward=truth))
    untrained, tokenizer = base_of(toy_sft)
    prompts = report.tables["evaluation_samples"]
    rows = [encode_prompt(prompt, tokenizer) for prompt in dict.fromkeys(prompts["prompt"])]
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=12, batch_size=64)
    every = [row for row in rows for _ in range(3)]
    drawn = respond(Policy(untrained), every, sampling, generator=generator(0, "evaluation/base"))
    texts = [
        tokenizer.decode(ids[mask], skip_special_tokens=True)
        for _, said in drawn
        for ids, mask in zip(said.tokens, said.mask, strict=True)
    ]
    shown = prompts[prompts["arm"] == "base"]["response"]
    assert shown.tolist() == texts[: 3 * len(rows) : 3]


def test_without_a_base_the_other_arms_say_the_same(run):
    with_base, without = run(), run(change(base=False))
    names = [arm.name for arm in without.scorecard.arms]
    assert names == ["sft", "policy", "best_of_n"]
    assert [with_base.scorecard.arm(name) for name in names] == list(without.scorecard.arms)
    assert "was not compared: evaluation.base is false" in without.scorecard.diagnosis.says


def test_an_sft_that_does_not_name_its_base_is_evaluated_without(run, toy_sft, tmp_path, caplog):
    older = shutil.copytree(toy_sft, tmp_path / "older")
    card = json.loads((older / "rlhf.json").read_text())
    del card["base"]
    (older / "rlhf.json").write_text(json.dumps(card))
    report = run(sft=older)
    assert report.scorecard.arm("base") is None
    assert "does not say which model it started from" in report.scorecard.diagnosis.says
    assert "without the base model" in caplog.text


def test_kept_columns_are_slices_of_the_points(run, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    table = read_table(data, "prompts", "eval")
    things = [prompt.split()[1] for prompt in table["prompt"]]
    kept = [
        {"short": str(len(thing) == 4), "one": "same", "first": "" if n else "yes"}
        for n, thing in enumerate(things)
    ]
    write_table(table.assign(kept=kept), data, "prompts", "eval")
    report = run(data=data)
    slices = {part.name: part.prompts for part in report.scorecard.slices}
    short = tuple(n for n, thing in enumerate(things) if len(thing) == 4)
    assert slices["short = True"] == short
    assert slices["first = yes"] == (0,)
    assert slices["first = (unknown)"] == tuple(range(1, 8))
    assert not any(part.column == "one" for part in report.scorecard.slices)
    shown = report.tables["evaluation_slices"].set_index(["slice", "candidate", "opponent"])
    match = report.scorecard.comparison("policy", "sft")
    mean = sum(match.points[n] for n in short) / len(short)
    row = shown.loc[("short = True", "policy", "sft")]
    assert row["win_rate"] == pytest.approx(mean)
    assert row["prompts"] == len(short)
    assert row["win_rate_low"] < mean < row["win_rate_high"]


def test_prompts_of_training_are_counted_as_leaks(run, prepared, tmp_path):
    assert run().scorecard.leaks.equal == 0
    data = shutil.copytree(prepared, tmp_path / "data")
    asked = read_table(data, "prompts", "eval")["prompt"].iloc[0]
    votes = read_table(data, "preferences", "train")
    votes.loc[0, "prompt"] = f"{asked} "
    write_table(votes, data, "preferences", "train")
    found = run(data=data)
    leaks = found.scorecard.leaks
    assert (leaks.prompts, leaks.equal, leaks.near) == (8, 1, 0)
    assert found.summary()["leaked_prompts"] == 1


def test_answers_that_were_not_ended_are_a_sign(run):
    report = run(sampling=SamplingConfig(max_prompt_length=8, max_new_tokens=2, batch_size=64))
    arm = report.scorecard.arm("policy")
    assert arm.signs["cut_off"].value > 0.8  # few end after a token
    assert run().scorecard.arm("policy").signs["cut_off"].value < 0.5
    assert arm.signs["refusal"].value == 0
    assert arm.signs["refusal"].high > 0  # eight prompts do not show that it never refuses
    assert report.summary()["policy/sign_cut_off"] == arm.signs["cut_off"].value
    shown = report.tables["evaluation_signs"]
    assert len(shown) == 11 * 4


# --- what is refused ---


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_module:f", "cannot be imported"),
        ("toy_truth:missing", "cannot be imported"),
        ("toy_truth", "cannot be imported"),
        (":f", "cannot be imported"),
        ("toy_truth:number", "is a int, not a function"),
    ],
)
def test_truth_that_cannot_be_imported(truth, path, said):
    with pytest.raises(ConfigError, match=rf"evaluation\.true_reward '{path}' .*{said}|{said}"):
        load_function(path, setting="evaluation.true_reward")


@pytest.mark.parametrize("name", ["too_few", "not_a_number"])
def test_truth_that_does_not_answer(run, truth, name):
    with pytest.raises(ConfigError, match="one finite number for each of the 40 responses"):
        run(change(true_reward=f"toy_truth:{name}"))


def test_no_held_out_prompts(run, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    (data / "prompts.eval.jsonl").write_text("")
    with pytest.raises(DataError, match="no held-out prompts"):
        run(data=data)


def test_policy_in_place_of_the_reward_model(run, toy_sft):
    with pytest.raises(ModelError, match="kind 'policy'"):
        run(reward=toy_sft)


def test_texts_longer_than_the_model(run):
    with pytest.raises(ConfigError, match=r"sampling\.max_prompt_length \+ max_new_tokens asks"):
        run(sampling=SamplingConfig(max_prompt_length=30, max_new_tokens=11))
