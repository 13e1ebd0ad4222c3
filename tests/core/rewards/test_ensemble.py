"""Ensembles of reward models, against plain transformers and peft on each text alone."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from rlhf_core.backbone import packing
from rlhf_core.backbone.directory import load_saved_tokenizer, read_card, save_model
from rlhf_core.backbone.networks import Policy, ScalarModel, load_as_adapter, start_adapter
from rlhf_core.backbone.packing import pack
from rlhf_core.errors import ModelError
from rlhf_core.rewards.ensemble import Ensemble, average_head, average_of
from rlhf_core.rewards.models import (
    load_on_trunk,
    load_reward_model,
    score_texts,
    scores_and_spread,
)
from rlhf_core.settings.rewards import MemberSection

TEXTS = [[20, 30, 40, 50, 60], [70, 80], [70, 80, 90, 100], [110, 120, 130]]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SCALES = [(-0.2, 1.5), (0.4, 0.5), (3.0, 2.0)]  # mean and standard deviation of each member
COMBINATIONS = ("mean", "min", "mean_minus_variance", "weight_average")
# peft 0.19 reads a property that transformers 5.17 has renamed; we do not call this class ourselves
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def how(combination, coef=1.0):
    return MemberSection(combine_members=combination, member_variance_coef=coef)


def teach(network, seed):
    """Move whatever the network learns."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.learnable().values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draws)


@pytest.fixture(params=[0, 1], ids=["every block", "last block"])
def ensemble(request, saved):
    """Three members on the saved policy, as if they had been trained."""
    trunk = ScalarModel.from_policy(saved, torch.Generator().manual_seed(1))
    members = []
    for number, (mean, std) in enumerate(SCALES):
        member = trunk.with_new_head(torch.Generator().manual_seed(number))
        start_adapter(member, f"m{number}", rank=2, alpha=8, seed=number, layers=request.param)
        teach(member, number)
        member.mean, member.std = mean, std
        members.append(member)
    return Ensemble(members)


@pytest.fixture
def stored(ensemble, saved, causal, tmp_path):
    """Where the ensemble lies."""
    average = average_of(ensemble.members, "average")
    average_head(average, ensemble.members)
    average.mean, average.std = 0.25, 1.25
    ensemble.save(causal[1], tmp_path / "ensemble", average=average, base=saved)
    return tmp_path / "ensemble"


def with_peft(directory, member):
    """A member as plain code loads it."""
    base = AutoModelForSequenceClassification.from_pretrained(directory / "trunk", num_labels=1)
    return PeftModel.from_pretrained(base, directory / "members" / str(member))


def alone(model, mean, std):
    raw = torch.cat([model(torch.tensor([text])).logits[0] for text in TEXTS])
    return (raw - mean) / std


@PEFT_WARNS
@torch.no_grad()
def test_plain_code_loads_each_member_and_finds_its_scores(ensemble, stored):
    expected = ensemble.member_scores(pack(TEXTS, "cpu"))
    facts = read_card(stored)["members"]
    assert [(m["reward_mean"], m["reward_std"]) for m in facts] == SCALES
    for number, fact in enumerate(facts, start=1):
        found = alone(with_peft(stored, number), fact["reward_mean"], fact["reward_std"])
        assert_close(found, expected[number - 1], **CLOSE)
    assert expected.std(0).min() > 0.01  # they differ


@PEFT_WARNS
@torch.no_grad()
def test_the_directory_itself_is_the_mean_of_the_merged_weights(stored):
    merged = [with_peft(stored, number).merge_and_unload().state_dict() for number in (1, 2, 3)]
    whole = AutoModelForSequenceClassification.from_pretrained(stored)
    for name, weight in whole.state_dict().items():
        if name != "score.weight":
            expected = torch.stack([state[name] for state in merged]).mean(0)
            assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    # The head in units of each member's standard deviation, times the mean of these.
    stds = [std for _, std in SCALES]
    units = [state["score.weight"] / std for state, std in zip(merged, stds, strict=True)]
    assert_close(whole.score.weight, sum(stds) / 3 * torch.stack(units).mean(0), **CLOSE)
    assert any((merged[0][name] - merged[1][name]).abs().max() > 0.1 for name in merged[0])


@torch.no_grad()
def test_it_is_a_reward_model_for_whoever_knows_no_members(stored):
    single = ScalarModel.load(stored)
    averaged, _ = load_reward_model(stored, members=how("weight_average"))
    assert (single.mean, single.std) == (0.25, 1.25)
    plain = AutoModelForSequenceClassification.from_pretrained(stored)
    assert_close(single.scores(pack(TEXTS, "cpu")), alone(plain, 0.25, 1.25), **CLOSE)
    # As an adapter of K times the rank it says the same as with merged weights.
    assert_close(averaged.scores(pack(TEXTS, "cpu")), alone(plain, 0.25, 1.25), **CLOSE)


@torch.no_grad()
def test_combinations_by_hand(ensemble, stored):
    members = ensemble.member_scores(pack(TEXTS, "cpu"))
    a, b, c = members
    mean = (a + b + c) / 3
    variance = ((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 3
    expected = {
        "mean": mean,
        "min": torch.minimum(torch.minimum(a, b), c),
        "mean_minus_variance": mean - 0.7 * variance,
    }
    for combination, scores in expected.items():
        model, _ = load_reward_model(stored, members=how(combination, 0.7))
        found, spread = scores_and_spread(model, pack(TEXTS, "cpu"))
        assert_close(found, scores, **CLOSE)
        assert_close(spread, variance.sqrt(), **CLOSE)
        assert_close(model.scores(pack(TEXTS, "cpu")), found)
        assert_close(model.member_scores(pack(TEXTS, "cpu")), members, **CLOSE)
    by_default, tokenizer = load_reward_model(stored)
    assert_close(by_default.scores(pack(TEXTS, "cpu")), mean, **CLOSE)
    found = score_texts(by_default, tokenizer, ["a", "b"], ["the room", "is"], max_length=16)
    assert found.shape == (3, 2)


@torch.no_grad()
def test_last_states_are_what_the_heads_read_on_average(ensemble):
    packed = pack(TEXTS, "cpu")
    states = [member.hidden(packed)[packed.last()] for member in ensemble.members]
    assert_close(ensemble.last_states(packed), torch.stack(states).mean(0))


@pytest.mark.parametrize("combination", COMBINATIONS)
@torch.no_grad()
def test_on_the_trunk_of_a_policy_it_says_the_same_and_changes_nothing(
    stored, saved, causal, combination
):
    expected, _ = load_reward_model(stored, members=how(combination))
    policy = Policy(causal[0])
    start_adapter(policy, "policy", rank=2, alpha=8, seed=0, layers=1)
    teach(policy, 7)
    before = policy.hidden(pack(TEXTS, "cpu"))
    found = load_on_trunk(stored, saved, policy.model, "reward", members=how(combination))
    assert found.model is policy.model
    packed = pack(TEXTS, "cpu")
    assert_close(found.scores(packed), expected.scores(packed), **CLOSE)
    assert_close(found.member_scores(packed), expected.member_scores(packed), **CLOSE)
    assert torch.equal(policy.hidden(packed), before)
    critic = load_as_adapter(stored, saved, policy.model, "critic", "float32")
    assert_close(critic.scores(packed), ScalarModel.load(stored).scores(packed), **CLOSE)


def test_an_ensemble_of_another_base_is_not_put_on_a_trunk(stored, causal, tmp_path):
    with torch.no_grad():
        causal[0].get_input_embeddings().weight.add_(0.1)
    save_model(*causal, tmp_path / "other", kind="policy")
    assert load_on_trunk(stored, tmp_path / "other", causal[0], "reward") is None


@pytest.mark.parametrize("ensemble", [1], indirect=True)
@torch.no_grad()
def test_what_lies_below_the_adapters_is_computed_once_for_all_members(stored):
    model, _ = load_reward_model(stored)
    calls = {0: 0, 1: 0}
    _, stack = packing.blocks(model.model.base_model)
    for number, block in enumerate(stack):

        def count(*_, number=number):
            calls[number] += 1

        block.register_forward_hook(count)
    model.member_scores(pack(TEXTS, "cpu"))
    assert calls == {0: 1, 1: 3}


def damage_card(directory):
    card = json.loads((directory / "rlhf.json").read_text())
    card["members"][1]["reward_std"] = 0
    (directory / "rlhf.json").write_text(json.dumps(card))


def lose_the_trunk(directory):
    shutil.rmtree(directory / "trunk")


def lose_a_member(directory):
    shutil.rmtree(directory / "members" / "3")


def lose_a_head(directory):
    config = directory / "members" / "2" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": None}))


@pytest.mark.parametrize("ensemble", [1], indirect=True)
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage_card, "its card does not have the mean and the spread of each member"),
        (lose_the_trunk, "the folder trunk of its members is missing"),
        (lose_a_member, "cannot read an adapter from"),
        (lose_a_head, "score.weight does not fit"),
    ],
)
def test_a_damaged_ensemble_is_refused(stored, harm, said):
    harm(stored)
    with pytest.raises(ModelError, match=said):
        load_reward_model(stored)


@pytest.mark.parametrize("ensemble", [1], indirect=True)
def test_the_trunk_by_itself_is_no_reward_model(stored):
    with pytest.raises(ModelError, match="kind 'trunk', but reward is needed"):
        load_reward_model(stored / "trunk")
    assert (
        load_saved_tokenizer(stored / "trunk").eos_token == load_saved_tokenizer(stored).eos_token
    )


def test_weight_average_needs_its_model(ensemble):
    with pytest.raises(ValueError, match="mean weights"):
        Ensemble(ensemble.members, how=how("weight_average"))
