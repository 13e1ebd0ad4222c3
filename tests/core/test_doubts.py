"""Settings that are valid and train for nothing are told: setting, number, and what to do."""

import pytest

from rlhf_core.data.validation import TableSummary, Validation
from rlhf_core.doubts import Chosen, doubts
from rlhf_core.settings.data import DataConfig, TableConfig
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig, PPOConfig
from rlhf_core.settings.rewards import RewardTerm
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig

FILES = {"source": "files", "preferences": TableConfig(path="pairs.jsonl")}


def chosen(model=None, data=None, sampling=None, **trainings):
    return Chosen(
        ModelConfig(**(model or {"source": "gpt2"})),
        DataConfig(**(data or FILES)),
        SamplingConfig(**(sampling or {})),
        trainings or {"sft": SFTConfig(), "reward_model": RewardModelConfig(), "ppo": PPOConfig()},
    )


def validation(demonstrations=100, votes=200, prompts=50, **truncated):
    tables = {
        name: TableSummary(
            source="x", rows=n + 10, examples=n + 10, train=n, eval=10, eval_prompts=10, dropped={}
        )
        for name, n in (
            ("demonstrations", demonstrations),
            ("preferences", votes),
            ("prompts", prompts),
        )
    }
    counts = dict.fromkeys(("ties", "known_sides", "timed", "gold"), 0)
    return Validation(
        tables=tables,
        bad_rows=[],
        unread=[],
        **counts,
        contradictory_pairs=0,
        shared_prompts=0,
        lengths=[],
        truncated={name.replace("_", " "): n for name, n in truncated.items()},
        vocabulary=300,
    )


def test_the_defaults_raise_none():
    assert doubts(chosen()) == []
    assert doubts(chosen(), validation(prompts_over_256_tokens=29)) == []
    assert doubts(chosen(dpo=DPOConfig(), grpo=GRPOConfig()), validation()) == []


@pytest.mark.parametrize(
    ("stage", "section", "said"),
    [
        ("sft", SFTConfig(lora_alpha=16), "sft.lora_alpha is 16, but sft.lora_rank is 0"),
        ("ppo", PPOConfig(lora_layers=2), "ppo.lora_layers is 2, but ppo.lora_rank is 0"),
        ("ppo", PPOConfig(lora_rank=8, critic_learning_rate=1e-4), "ppo.learning_rate is 3e-06, a"),
        ("ppo", PPOConfig(lora_rank=8, learning_rate=1e-4), "ppo.critic_learning_rate is 1e-05, a"),
        ("sft", SFTConfig(lora_rank=8), "changes next to nothing; set it to about 1e-4"),
        (
            "dpo",
            DPOConfig(lora_rank=8),
            "dpo.learning_rate is 1e-06, a rate for training all weights",
        ),
        (
            "sft",
            SFTConfig(lora_rank=4, lora_alpha=1000, learning_rate=1e-4),
            "sft.lora_alpha is 1000 with lora_rank 4, so the adapter is scaled by 250",
        ),
        (
            "sft",
            SFTConfig(learning_rate=1e-30),
            "sft.learning_rate is 1e-30, which changes no weight",
        ),
        ("sft", SFTConfig(learning_rate=3), "sft.learning_rate is 3, which makes training diverge"),
        ("sft", SFTConfig(warmup_ratio=0.99), "sft.warmup_ratio is 0.99: the learning rate rises"),
        (
            "sft",
            SFTConfig(weight_decay=1000, learning_rate=1e-3),
            "sft.weight_decay is 1000: with learning_rate 0.001",
        ),
        (
            "ppo",
            PPOConfig(kl_coef=0, kl_control="fixed"),
            "ppo.kl_coef and ppo.kl_budget are 0: nothing holds the policy near SFT",
        ),
        ("ppo", PPOConfig(clip_range=1e-6), "ppo.clip_range is 1e-06, so an update changes"),
        ("ppo", PPOConfig(update_kl_limit=1e-9), "end after their first update"),
        ("grpo", GRPOConfig(keep_every=500), "grpo.keep_every is 500, more than iterations 100"),
        (
            "ppo",
            PPOConfig(iterations=1_000_000, epochs=1, batch_size=128),
            None,  # a million steps is the most that goes without a word
        ),
        (
            "ppo",
            PPOConfig(iterations=1_000_000),
            "ppo takes 16,000,000 steps, which at one a second are 185 days; lower ppo.iterations",
        ),
        (
            "ppo",
            PPOConfig(combine_rewards="min"),
            "ppo.combine_rewards is min, but ppo.rewards has a",
        ),
        (
            "ppo",
            PPOConfig(kl_control="fixed", kl_target=3),
            "ppo.kl_target has no effect with kl_control fixed",
        ),
        (
            "ppo",
            PPOConfig(gamma=0.9),
            "ppo.gamma is 0.9: of the reward at the end of a response of 64",
        ),
        ("ppo", PPOConfig(gamma=0.95), None),  # 0.95^63 is 0.04
        (
            "ppo",
            PPOConfig(gae_lambda=0),
            "ppo.gae_lambda is 0: a token learns only from the critic's",
        ),
        (
            "reward_model",
            RewardModelConfig(loss="pointwise_mse", center_coef=0.1),
            "reward_model.center_coef has no effect with loss pointwise_mse",
        ),
        ("ppo", PPOConfig(kl_coef=0, kl_control="fixed", kl_budget=10), None),
        (
            "ppo",
            PPOConfig(combine_rewards="min", rewards=(RewardTerm(), RewardTerm(source="a:b"))),
            None,
        ),
        ("sft", SFTConfig(lora_rank=8, learning_rate=1e-4), None),
    ],
)
def test_a_training_that_does_little_or_harm(stage, section, said):
    found = doubts(chosen(**{stage: section}))
    if said is None:
        assert found == []
    else:
        assert any(said in sentence for sentence in found), found
        assert all(not sentence.endswith(".") and "\n" not in sentence for sentence in found)


ONE, FOUR = RewardModelConfig(), RewardModelConfig(members=4, lora_rank=8, learning_rate=1e-4)


@pytest.mark.parametrize(
    ("reward_model", "settings", "said"),
    [
        (ONE, {"combine_members": "min"}, "combine_members is min, but reward_model.members is 1"),
        (FOUR, {"combine_members": "min"}, None),
        (FOUR, {"member_variance_coef": 2.0}, "has no effect with combine_members mean; set that"),
        (FOUR, {"combine_members": "mean_minus_variance", "member_variance_coef": 2.0}, None),
        (None, {"combine_members": "min"}, None),  # a registered model, which may have members
        (
            ONE,
            {"combine_members": "min", "rewards": (RewardTerm(source="models:/a/1"),)},
            None,
        ),
    ],
)
def test_members_that_are_not_there_or_not_asked(reward_model, settings, said):
    trainings = {"reward_model": reward_model} if reward_model else {}
    found = doubts(chosen(**trainings, ppo=PPOConfig(**settings)))
    assert [said in sentence for sentence in found] == ([True] if said else [])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"data": {**FILES, "source": "simulated"}},
            "data.source is simulated, so pairs.jsonl is not",
        ),
        (
            {"model": {"source": "gpt2", "fresh": FreshModelConfig(layers=9)}},
            "model.fresh has no effect, since model.source names a model",
        ),
        (
            {"sampling": {"temperature": 0.01}},
            "sampling.temperature is 0.01: responses are all but the",
        ),
        (
            {"sampling": {"temperature": 50}},
            "sampling.temperature is 50: responses are all but random",
        ),
    ],
)
def test_a_setting_that_is_not_used_as_meant(settings, said):
    (found,) = doubts(chosen(**settings))
    assert said in found


@pytest.mark.parametrize(
    ("trainings", "facts", "said"),
    [
        (
            {"sft": SFTConfig(batch_size=512, epochs=3)},
            {},
            "sft.batch_size is 512, more than the 100 demonstrations for training, so sft takes 3 "
            "steps in all; lower it, for example to 12",
        ),
        (
            {"reward_model": RewardModelConfig(batch_size=201)},
            {},
            "reward_model.batch_size is 201, more than the 200 votes for training, so reward_model "
            "takes 1 step in all; lower it, for example to 25",
        ),
        ({"reward_model": RewardModelConfig(batch_size=200)}, {}, None),
        (
            {"sft": SFTConfig(epochs=10_000)},
            {"demonstrations": 10_000},
            "sft takes 3,130,000 steps, which at one a second are 36 days; lower sft.epochs",
        ),
        (
            {"sft": SFTConfig(max_length=2)},
            {"demonstrations_over_2_tokens": 110},
            "sft.max_length is 2, which cuts 110 of 110 demonstrations: what is cut is not learnt; "
            "raise it, or shorten the texts",
        ),
        (
            {"dpo": DPOConfig(max_length=8)},
            {"preferences_over_8_tokens": 106},
            "dpo.max_length is 8, which cuts 106 of 210 preferences",
        ),
        ({"dpo": DPOConfig(max_length=8)}, {"preferences_over_8_tokens": 105}, None),
        (
            {"ppo": PPOConfig()},
            {"prompts_over_256_tokens": 31},
            "sampling.max_prompt_length is 256, but 31 of 60 prompts are longer: the policy does",
        ),
        (
            {"ppo": PPOConfig()},
            {"responses_over_64_tokens": 56},
            "sampling.max_new_tokens is 64, but 56 of 110 responses are longer: the policy cannot",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data(trainings, facts, said):
    found = doubts(chosen(**trainings), validation(**facts))
    if said is None:
        assert found == []
    else:
        assert len(found) == 1
        assert said in found[0]
