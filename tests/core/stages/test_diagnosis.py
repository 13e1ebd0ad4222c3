"""Each fault is planted in a pipeline of small models and named; where nobody can tell, that is
said."""

import itertools
import random
import shutil
import sys

import pandas as pd
import pytest
import torch

from rlhf_core.backbone.directory import load_policy, load_saved_tokenizer, save_model
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.data.prepared import SPLITS, read_table, write_table
from rlhf_core.evaluation.diagnosis import diagnose
from rlhf_core.evaluation.scorecard import Comparison
from rlhf_core.functional.ranking import win_rate
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.training import SFTConfig
from rlhf_core.stages.evaluation import evaluate
from rlhf_core.stages.sft import train_sft
from rlhf_core.work import Work

CONFIG = EvaluationConfig(samples_per_prompt=2, best_of=4, true_reward="toy_worth:worth")
SAMPLING = SamplingConfig(max_prompt_length=14, max_new_tokens=12, batch_size=256)

WORTH_OF = '''
GOOD, BAD = {"good", "fine", "warm", "nice"}, {"bad", "cold", "dull", "poor"}


def worth(prompts, responses):
    """An opinion is worth more than letters, and praise more than blame."""
    words = [{*response.split()} for response in responses]
    return [3 * bool(w & (GOOD | BAD)) + len(w & GOOD) - len(w & BAD) for w in words]
'''


@pytest.fixture(autouse=True)
def truth(tmp_path, monkeypatch):
    (tmp_path / "toy_worth.py").write_text(WORTH_OF)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_worth", raising=False)


@pytest.fixture(scope="session")
def asked(prepared, tmp_path_factory):
    """The toy data with 96 prompts to answer."""
    directory = tmp_path_factory.mktemp("asked") / "data"
    shutil.copytree(prepared, directory)
    things = ("room", "film", "phone", "hotel", "bed", "song", "book", "meal")
    which = ("my", "our", "his", "her", "its", "your", "that", "one", "any", "each", "no", "some")
    prompts = [" ".join(words) for words in itertools.product(which, things)]
    rows = pd.DataFrame([{"id": prompt, "prompt": prompt} for prompt in prompts])
    write_table(rows, directory, "prompts", "eval")
    return directory


def imitated(prepared, toy_model, output, respond):
    """A policy that was fine-tuned on the toy prompts with other responses."""
    data = shutil.copytree(prepared, output / "data")
    draws = random.Random(0)
    for split in SPLITS:
        table = read_table(data, "demonstrations", split)
        said = [respond(draws) for _ in range(len(table))]
        write_table(table.assign(response=said), data, "demonstrations", split)
    config = SFTConfig(epochs=12, learning_rate=1e-2, batch_size=24, max_length=32)
    sections = {"model": toy_model}
    train_sft(config, Work(inputs={"data": data}, outputs={"sft": output / "m"}, sections=sections))
    return output / "m"


@pytest.fixture(scope="session")
def praising(prepared, toy_model, tmp_path_factory):
    """A policy that learnt what the reward model and the truth like."""

    def praise(draws):
        return f" is very {draws.choice(['good', 'fine'])} and {draws.choice(['warm', 'nice'])}"

    return imitated(prepared, toy_model, tmp_path_factory.mktemp("praising"), praise)


@pytest.fixture(scope="session")
def lettered(prepared, toy_model, tmp_path_factory):
    """SFT on demonstrations that say nothing."""

    def letters(draws):
        return " " + " ".join(draws.choice("qxzjvk") for _ in range(4))

    return imitated(prepared, toy_model, tmp_path_factory.mktemp("lettered"), letters)


@pytest.fixture
def found(asked, toy_sft, toy_reward, praising):
    def found(config=CONFIG, judge=None, **inputs):
        given = {"sft": toy_sft, "policy": praising, "reward": toy_reward, "data": asked} | inputs
        sections = {"sampling": SAMPLING, "judge": judge or JudgeConfig()}
        return evaluate(config, Work(inputs=given, sections=sections)).scorecard.diagnosis

    return found


def test_a_sound_pipeline_has_no_fault(found):
    diagnosis = found()
    assert diagnosis.fault == "none", diagnosis.says
    for beats in ("SFT beats the base model", "Best-of-n beats SFT", "The policy beats SFT"):
        assert f"{beats}: it wins 0." in diagnosis.says
    assert "at equal length" in diagnosis.says


def test_a_reward_model_that_is_noise_is_named(found, toy_sft, tmp_path):
    noise = ScalarModel.from_policy(toy_sft, torch.Generator().manual_seed(0))
    noise.mean, noise.std = 0.0, 1.0
    noise.save(load_saved_tokenizer(toy_sft), tmp_path / "noise", kind="reward")
    diagnosis = found(reward=tmp_path / "noise", policy=toy_sft)
    assert diagnosis.fault == "reward_model", diagnosis.says
    assert "Best-of-n does not beat SFT: it wins 0." in diagnosis.says
    assert "the reward model is at fault" in diagnosis.says


def test_a_policy_training_that_did_nothing_is_named(found, toy_sft):
    diagnosis = found(policy=toy_sft)
    assert diagnosis.fault == "policy_training"
    assert "The policy does not beat SFT: it wins 0." in diagnosis.says
    assert "The policy beats SFT less often than best-of-n does" in diagnosis.says


def test_a_policy_training_that_broke_the_policy_is_named(found, toy_sft, tmp_path):
    model, tokenizer = load_policy(toy_sft)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = model.transformer.ln_f.weight
        weight.add_(2 * torch.randn(weight.shape, generator=draws))
    save_model(model, tokenizer, tmp_path / "broken", kind="policy")
    diagnosis = found(policy=tmp_path / "broken")
    assert diagnosis.fault == "policy_training"
    assert "The policy is worse than SFT" in diagnosis.says


def test_demonstrations_that_say_nothing_are_named(found, lettered, praising):
    for policy in (lettered, praising):  # whatever became of it later
        diagnosis = found(sft=lettered, policy=policy)
        assert diagnosis.fault == "demonstrations"
        assert "SFT does not beat the base model" in diagnosis.says


def test_a_reward_model_is_no_judge_of_itself(found, toy_sft):
    diagnosis = found(judge=JudgeConfig(source="reward_model"), config=change(true_reward=""))
    assert diagnosis.fault == "unknown"
    assert "cannot show whether the reward model is right" in diagnosis.says


def test_with_few_prompts_nobody_can_tell(found, toy_sft):
    diagnosis = found(config=change(prompts=6), policy=toy_sft)
    assert diagnosis.fault == "unknown"
    assert "Whether the policy beats SFT cannot be told" in diagnosis.says
    assert "6 held-out prompts are too few" in diagnosis.says


def change(**settings):
    return EvaluationConfig(**dict(CONFIG) | settings)


# --- the rules, from win rates ---


def beaten(candidate, opponent, share, prompts=200, judge="j"):
    won = round(share * prompts)
    return Comparison(
        candidate=candidate,
        opponent=opponent,
        judge=judge,
        wins=won,
        ties=0,
        losses=prompts - won,
        prompts=prompts,
        win_rate=win_rate(won, 0, prompts - won),
    )


def fault(base=0.8, best=0.8, policy=0.8, *, best_of=8, prompts=200, judge="j"):
    shares = {("sft", "base"): base, ("best_of_n", "sft"): best, ("policy", "sft"): policy}
    matches = tuple(
        beaten(*pair, share, prompts, judge) for pair, share in shares.items() if share is not None
    )
    return diagnose(matches, best_of=best_of, no_base="no reason" if base is None else "").fault


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "none"),
        ({"base": 0.5}, "demonstrations"),
        ({"base": 0.5, "best": 0.5, "policy": 0.5}, "demonstrations"),
        ({"best": 0.5}, "reward_model"),
        ({"best": 0.5, "policy": 0.5}, "reward_model"),
        ({"policy": 0.5}, "policy_training"),
        ({"policy": 0.2}, "policy_training"),
        ({"base": None, "policy": 0.5}, "policy_training"),
        ({"base": None}, "none"),
        # Wilson's bounds of 0.5 in 20 are 0.30 and 0.70: it may well be worth it.
        ({"policy": 0.5, "prompts": 20}, "unknown"),
        ({"best": 0.5, "policy": 0.9, "prompts": 20}, "none"),  # the policy shows it
        ({"base": 0.6, "prompts": 20}, "unknown"),
        ({"best": 0.6, "policy": 0.3, "prompts": 20}, "unknown"),
        # One of one is SFT itself, which says nothing about the reward model.
        ({"best": 0.5, "best_of": 1}, "none"),
        ({"best": 0.5, "policy": 0.5, "best_of": 1}, "unknown"),
        ({"judge": "reward_model"}, "unknown"),
        ({"judge": "reward_model", "policy": 0.5}, "policy_training"),
        ({"judge": "reward_model", "base": 0.5}, "demonstrations"),
    ],
)
def test_the_first_fault_is_named(given, named):
    assert fault(**given) == named


@pytest.mark.parametrize(
    ("share", "prompts", "named"),
    [  # with Wilson's bounds
        (0.49, 200, "policy_training"),  # 0.42 to 0.56
        (0.56, 200, "policy_training"),  # 0.49 to 0.63
        (0.58, 200, "none"),  # 0.51 to 0.65
        (0.49, 100, "policy_training"),  # 0.39 to 0.59
        (0.56, 100, "unknown"),  # 0.46 to 0.653
        (0.58, 100, "unknown"),  # 0.48 to 0.67
    ],
)
def test_a_step_fails_only_if_a_worthwhile_win_rate_is_excluded(share, prompts, named):
    assert fault(policy=share, prompts=prompts) == named


def test_nothing_to_compare_is_unknown():
    assert diagnose((), best_of=8).fault == "unknown"
