"""PPO on the toy world, where the reward model likes praise."""

import json
import logging
import shutil

import pytest
import torch
from plain import first_roll_out, plain_policy, plain_scores, plain_values
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import load_policy, read_card, save_model
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.errors import ConfigError, DataError, ModelError, NumericsError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.loop import PromptStream
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import PPOConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages.ppo import train_ppo
from rlhf_core.stages.reward_model import train_reward_model

CONFIG = PPOConfig(
    learning_rate=2e-3,
    critic_learning_rate=2e-3,
    schedule="constant",
    warmup_ratio=0,
    iterations=2,
    rollout_size=16,
    batch_size=8,
    micro_batch_size=8,
    epochs=2,
    kl_coef=0.1,
    kl_horizon=100,
    update_kl_limit=0,
)


def change(**settings):
    return PPOConfig(**dict(CONFIG) | settings)


@pytest.fixture
def train(toy_work, tmp_path):
    def run(config=CONFIG, *, output=tmp_path, **parts):
        outputs = {kind: output / kind for kind in ("policy", "critic", "milestones")}
        return train_ppo(config, toy_work(outputs=outputs, **parts))

    return run


@pytest.fixture
def copied_reward(toy_reward, tmp_path):
    return shutil.copytree(toy_reward, tmp_path / "copied-reward")


def series(config, train):
    log = MemoryLogger()
    train(config, logger=log)
    return log


# --- the update, against a second implementation in plain words ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_update_is_the_policy_gradient_of_a_second_implementation(
    train, toy_sft, toy_reward, prepared, logger, temperature
):
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=5, temperature=temperature)
    gamma, lam = 0.97, 0.9
    config = change(
        iterations=1, epochs=1, batch_size=16, gamma=gamma, gae_lambda=lam, value_clip_range=9
    )
    train(config, sampling=sampling)
    ((_, stats),) = logger.history

    texts, finished = first_roll_out("ppo", toy_sft, prepared, sampling, 16)
    policy, value_of = plain_policy(toy_sft), plain_values(toy_reward)
    assert 0 < finished.sum() < 16  # both kinds are here
    scores, advantages, returns, values, logprobs = [], [], [], [], []
    for (prompt, said), end in zip(texts, finished.tolist(), strict=True):
        ids = torch.tensor([prompt + said])
        value = value_of(ids)
        scores.append(value[-1].item())
        v = value[len(prompt) - 1 : -1].tolist()
        # The policy is its reference, so the KL term is 0 and the score is all there is.
        reward = [0.0] * len(said)
        reward[-1] = scores[-1] - (0.0 if end else 1.0)
        a, following = [0.0] * len(said), 0.0
        for t in reversed(range(len(said))):
            next_value = v[t + 1] if t + 1 < len(said) else 0.0
            following = reward[t] + gamma * next_value - v[t] + gamma * lam * following
            a[t] = following
        advantages += a
        values += v
        returns += [x + y for x, y in zip(a, v, strict=True)]
        at = (policy(ids).logits[0] / temperature).log_softmax(-1)
        logprobs += [at[len(prompt) + t - 1, token] for t, token in enumerate(said)]

    a, v, r = torch.tensor(advantages), torch.tensor(values), torch.tensor(returns)
    whitened = (a - a.mean()) / a.std()
    n = len(a)
    # At ratio 1 the clipped objective is Σ Â·log π / n to first order, and Σ Â / n = 0 in value.
    loss = -(whitened * torch.stack(logprobs)).sum() / n
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    close = {"rel": 1e-3, "abs": 1e-5}
    assert stats["policy/grad_norm"] == pytest.approx(norm, **close)
    assert stats["policy/loss"] == pytest.approx(0, abs=1e-5)
    assert stats["value/loss"] == pytest.approx(0.5 * ((v - r) ** 2).mean().item(), **close)
    assert stats["objective/score"] == pytest.approx(sum(scores) / 16, **close)
    assert stats["objective/score_std"] == pytest.approx(torch.tensor(scores).std().item(), **close)
    assert stats["response/length"] == pytest.approx(n / 16)
    assert stats["response/finished"] == pytest.approx(finished.float().mean().item())
    explained = 1 - ((r - v) ** 2).mean() / ((r - r.mean()) ** 2).mean()
    assert stats["value/explained_variance"] == pytest.approx(explained.item(), **close)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("micro_batch_size", [3, 16])
def test_ratio_is_1_and_kl_is_0_before_anything_has_moved(
    train, logger, temperature, micro_batch_size
):
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=12, temperature=temperature)
    one = {"iterations": 1, "epochs": 1, "batch_size": 16, "micro_batch_size": micro_batch_size}
    train(change(**one), sampling=sampling)
    ((_, stats),) = logger.history
    assert stats["objective/kl"] == 0
    assert stats["policy/approx_kl"] == 0
    assert stats["policy/clip_fraction"] == 0
    assert stats["value/clip_fraction"] == 0


def test_micro_batches_do_not_change_the_trajectory(train):
    base = {"rollout_size": 8, "batch_size": 8, "iterations": 3}
    one, eight = (series(change(**base, micro_batch_size=m), train).history for m in (1, 8))
    for (_, a), (_, b) in zip(one, eight, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_same_seed_same_metrics_to_the_last_bit(train, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        log = MemoryLogger()
        train(seed=seed, logger=log, output=tmp_path / name)
        runs[name] = log.history
    assert runs["a"] == runs["b"] != runs["c"]
    one, two = (load_policy(tmp_path / name / "policy")[0].state_dict() for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- the reward: what is logged is what was applied ---


@pytest.mark.parametrize("control", ["fixed", "adaptive"])
def test_coefficient_that_is_logged_is_the_one_applied(train, logger, control):
    # Means over the batch are linear, so reward = score - penalty·unfinished - β·KL holds for them.
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=5)
    settings = {"kl_control": control, "kl_coef": 0.3, "kl_target": 0.5, "iterations": 4}
    train(change(**settings, missing_eos_value=0.8), sampling=sampling)
    coefficients = []
    for _, stats in logger.history:
        unfinished = 1 - stats["response/finished"]
        paid = stats["objective/kl_coef"] * stats["objective/kl"]
        expected = stats["objective/score"] - 0.8 * unfinished - paid
        assert stats["objective/reward"] == pytest.approx(expected, abs=1e-5)
        coefficients.append(stats["objective/kl_coef"])
    assert any(stats["response/finished"] < 1 for _, stats in logger.history)
    assert max(abs(kl) for kl in logger.series("objective/kl")) > 0.1
    expected = [0.3]
    for kl in logger.series("objective/kl")[:-1]:
        error = min(max(kl / 0.5 - 1, -0.2), 0.2) if control == "adaptive" else 0
        expected.append(expected[-1] * (1 + error * 16 / 100))
    assert coefficients == pytest.approx(expected)
    assert (len(set(coefficients)) == 1) == (control == "fixed")


def test_score_of_an_unfinished_response_can_be_replaced(train, logger):
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=1)  # none can finish in time
    config = change(iterations=1, missing_eos="replace", missing_eos_value=-3.0)
    train(config, sampling=sampling)
    assert logger.series("response/finished") == [0.0]
    assert logger.series("objective/reward") == [pytest.approx(-3.0)]


def test_score_rises_when_kl_is_free_and_hardly_moves_when_it_is_dear(train):
    base = {"iterations": 10, "rollout_size": 24, "batch_size": 24, "kl_control": "fixed"}
    free = series(change(**base, kl_coef=0.0), train)
    dear = series(change(**base, kl_coef=1000.0), train)
    scores = free.series("objective/score")
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.5
    assert free.series("objective/kl")[-1] > 1
    assert abs(dear.series("objective/kl")[-1]) < free.series("objective/kl")[-1] / 5


def test_adapters_on_one_trunk_learn_too(train, toy_work, toy_sft, tmp_path):
    config = RewardModelConfig(
        epochs=2, learning_rate=2e-2, batch_size=24, max_length=32, lora_rank=4
    )
    train_reward_model(config, toy_work("sft", "data", outputs={"reward": tmp_path / "reward"}))
    rates = {"learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    free = {"kl_control": "fixed", "kl_coef": 0.0, "iterations": 12}
    config = change(**rates, **free, rollout_size=32, batch_size=32, lora_rank=4)
    log = MemoryLogger()
    train(config, reward=tmp_path / "reward", logger=log)
    scores = log.series("objective/score")
    assert sum(scores[-3:]) / 3 > sum(scores[:2]) / 2 + 0.4
    before, after = (plain_policy(at).state_dict() for at in (toy_sft, tmp_path / "policy"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed  # and of what has no adapter, nothing
    assert all(".attn." in name or ".mlp." in name for name in changed)


# --- stop rules ---


def test_run_stops_at_the_kl_budget(train, logger, tmp_path, caplog):
    config = change(iterations=12, kl_coef=0.0, kl_control="fixed", kl_budget=0.5)
    with caplog.at_level(logging.WARNING):
        report = train(config)
    kl = logger.series("objective/kl")
    assert kl[-1] > 0.5 >= max(kl[:-1])
    assert report.iterations == len(kl) < 12
    assert report.over_kl_budget == 1
    assert "over the KL budget of 0.5 nats" in caplog.text
    assert read_card(tmp_path / "policy")["iterations"] == len(kl)
    assert set(report.tables["ppo_samples"]["iteration"]) == {1, len(kl)}


def test_run_may_go_on_past_the_kl_budget(train, logger, caplog):
    config = change(
        iterations=6, kl_coef=0.0, kl_control="fixed", kl_budget=0.1, at_kl_budget="warn"
    )
    with caplog.at_level(logging.WARNING):
        assert train(config).iterations == 6
    over = sum(kl > 0.1 for kl in logger.series("objective/kl"))
    assert 0 < over == caplog.text.count("over the KL budget")


def test_epochs_end_when_the_policy_has_moved_too_far(train):
    fast = {"learning_rate": 0.02, "epochs": 6, "iterations": 1}
    (whole,) = series(change(**fast), train).series("optimizer/updates")
    assert whole == 6 * 2
    log = series(change(**fast, update_kl_limit=0.01), train)
    (cut,) = log.series("optimizer/updates")
    assert 1 <= cut < whole
    # The updates that were used had all stayed within the limit.
    assert log.series("policy/approx_kl")[0] < 1.5 * 0.01


@pytest.mark.parametrize(
    ("change_card", "said"),
    [
        ({"reward_std": 0.0}, "reward-model score"),
        ({"reward_mean": 1e300}, "reward-model score"),  # infinite in float32
    ],
)
def test_score_that_is_not_finite_is_named(train, copied_reward, tmp_path, change_card, said):
    card = json.loads((copied_reward / "rlhf.json").read_text())
    (copied_reward / "rlhf.json").write_text(json.dumps(card | change_card))
    with pytest.raises(NumericsError, match=f"the {said} is not finite"):
        train(reward=copied_reward)
    assert not (tmp_path / "policy").exists()


# --- what is left behind ---


def test_policy_and_critic_are_written_and_the_reference_is_left_alone(
    train, tmp_path, toy_sft, toy_reward
):
    report = train()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    before = load_policy(toy_sft)[0].state_dict()
    assert any(not torch.equal(plain[name], before[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in plain.values())
    assert read_card(tmp_path / "policy") == {
        "kind": "policy",
        "dtype": "float32",
        "iterations": 2,
        "chat": False,
    }
    card, reward_card = read_card(tmp_path / "critic"), read_card(toy_reward)
    assert card == reward_card | {"kind": "critic"}
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").state_dict()
    start = ScalarModel.load(toy_reward).model.state_dict()
    assert any(not torch.equal(critic[name], start[name]) for name in start)
    assert report.iterations == 2
    assert set(report.figures) == {"ppo_training", "ppo_frontier"}


def test_report_is_the_last_iteration(train, logger):
    report = train()
    last = logger.history[-1][1]
    assert report.score == last["objective/score"]
    assert report.kl == last["objective/kl"]
    assert report.kl_coef == last["objective/kl_coef"]
    assert report.response_length == last["response/length"]
    assert [step for step, _ in logger.history] == [1, 2]
    assert [note[:2] for note in logger.notes] == [(1, 2), (2, 2)]


def test_samples_are_the_first_texts_with_their_scores(
    train, toy_sft, toy_reward, prepared, toy_sampling
):
    table = train(change(iterations=1)).tables["ppo_samples"]
    tokenizer = load_policy(toy_sft)[1]
    texts, _ = first_roll_out("ppo", toy_sft, prepared, toy_sampling, 16)
    scores = plain_scores(toy_reward, texts).tolist()
    assert len(table) == 8
    for (_, shown), (prompt, said), score in zip(table.iterrows(), texts, scores, strict=False):
        assert shown["prompt"] == tokenizer.decode(prompt)
        assert shown["response"] == tokenizer.decode(said, skip_special_tokens=True)
        assert shown["score"] == pytest.approx(score, rel=1e-3, abs=1e-4)
        assert (shown["iteration"], shown["kl"]) == (1, 0.0)


def test_critic_learns_at_its_own_rate(train, logger):
    train(change(critic_learning_rate=1e-9, learning_rate=2e-3))
    assert logger.series("optimizer/critic_learning_rate") == [1e-9] * 2
    assert logger.series("optimizer/learning_rate") == [2e-3] * 2


def test_every_prompt_comes_once_before_any_comes_again():
    stream = PromptStream(10, 4, torch.Generator().manual_seed(0))
    batches = [next(stream) for _ in range(10)]
    assert all(len(batch) == 4 for batch in batches)
    order = [prompt for batch in batches for prompt in batch]
    rounds = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4


def test_roll_out_may_be_larger_than_the_prompts():
    batch = next(PromptStream(3, 8, torch.Generator().manual_seed(0)))
    assert all(2 <= batch.count(i) <= 3 for i in range(3))


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 17}, "batch_size 17 is larger than rollout_size 16"),
        ({"dual_clip": 0.5}, r"dual_clip 0\.5 must be above 1"),
        ({"kl_coef": 0.0}, r"kl_coef 0 cannot adapt; .* set kl_control to fixed"),
        ({"kl_horizon": 3.0}, r"kl_horizon 3 is too short .* raise it above 3\.2"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValidationError, match=said):
        change(**settings)
    if "kl_coef" in settings or "kl_horizon" in settings:
        change(**settings, kl_control="fixed")


def test_reward_model_with_another_tokenizer(train, tmp_path, toy_corpus):
    fresh = FreshModelConfig(layers=1, width=16, heads=2, vocab_size=270)
    model, tokenizer = load_base(ModelConfig(fresh=fresh), toy_corpus, 0)
    save_model(model, tokenizer, tmp_path / "base", kind="policy")
    scalar = ScalarModel.from_policy(tmp_path / "base", torch.Generator())
    scalar.save(tokenizer, tmp_path / "other", kind="reward")
    with pytest.raises(
        ConfigError, match="the reward model and the SFT policy have different tokenizers"
    ):
        train(reward=tmp_path / "other")


def test_policy_in_place_of_the_reward_model(train, toy_sft):
    with pytest.raises(ModelError, match="kind 'policy'"):
        train(reward=toy_sft)


def test_texts_longer_than_the_model(train):
    with pytest.raises(ConfigError, match=r"sampling\.max_prompt_length \+ max_new_tokens asks"):
        train(sampling=SamplingConfig(max_prompt_length=30, max_new_tokens=11))


def test_no_prompts(train, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    (data / "prompts.train.jsonl").write_text("")
    with pytest.raises(DataError, match="no prompts to train on"):
        train(data=data)


def test_a_llama_goes_through_the_same_loop(train, llama, tmp_path, logger):
    save_model(*llama, tmp_path / "base", kind="policy")
    scalar = ScalarModel.from_policy(tmp_path / "base", torch.Generator().manual_seed(0))
    scalar.save(llama[1], tmp_path / "reward", kind="reward")
    train(change(iterations=1), sft=tmp_path / "base", reward=tmp_path / "reward")
    assert logger.series("objective/kl") == [0.0]
    ids = torch.tensor([[20, 30, 40]])
    with torch.no_grad():
        moved = load_policy(tmp_path / "policy")[0](ids).logits
        assert not torch.allclose(moved, llama[0](ids).logits)
    assert moved.isfinite().all()
