"""DPO on the toy world: its loss and gradient on plain transformers, and that it learns."""

import math
import shutil

import pytest
import torch
from plain import plain_logprobs, plain_policy
from pydantic import ValidationError
from tiny import first_gradients
from torch.nn.functional import logsigmoid

from rlhf_core.backbone.directory import load_policy, read_card
from rlhf_core.backbone.networks import Policy
from rlhf_core.data.encoding import encode_pair
from rlhf_core.data.pairs import encode_pairs, with_winners
from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.training import DPOConfig
from rlhf_core.stages.dpo import _accumulate, train_dpo
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import Recovery

CONFIG = DPOConfig(
    epochs=2, learning_rate=1e-3, batch_size=24, micro_batch_size=8, max_length=24, beta=0.2
)
PAIRS = 102  # 96 votes and 6 ties


def change(**settings):
    return DPOConfig(**dict(CONFIG) | settings)


@pytest.fixture
def train(toy_work, tmp_path):
    def run(config=CONFIG, *, output=tmp_path / "policy", **parts):
        return train_dpo(config, toy_work("data", "sft", outputs={"policy": output}, **parts))

    return run


def sums(model, tokenizer, table, column):
    """(N,) log-probability of each response of a column, one text at a time."""
    found = []
    for prompt, response in zip(table["prompt"], table[column], strict=True):
        ids, start, _ = encode_pair(prompt, response, tokenizer, 24)
        found.append(plain_logprobs(model, ids[:start], ids[start:]).sum())
    return torch.stack(found)


def loss_by_hand(rewards, ties, epsilon):
    """-(1 - ε)·log σ(d) - ε·log σ(-d), ε one half for a tie."""
    d, wrong = rewards[0] - rewards[1], torch.where(ties, 0.5, epsilon)
    return (-(1 - wrong) * logsigmoid(d) - wrong * logsigmoid(-d)).mean()


@pytest.mark.parametrize(("micro_batch_size", "label_smoothing"), [(7, 0.1), (200, 0.0)])
def test_first_update_by_hand(
    train, toy_sft, prepared, tmp_path, logger, label_smoothing, micro_batch_size
):
    # One batch holds all votes, so the update does not depend on their order.
    whole = {"batch_size": 200, "epochs": 1, "max_grad_norm": 1e6}
    config = change(**whole, micro_batch_size=micro_batch_size, label_smoothing=label_smoothing)
    train(config, recovery=Recovery(tmp_path / "checkpoints", every_seconds=0))

    policy, tokenizer = plain_policy(toy_sft), load_policy(toy_sft)[1]
    table = with_winners(read_table(prepared, "preferences", "train"))
    said = [sums(policy, tokenizer, table, column) for column in ("chosen", "rejected")]
    rewards = [0.2 * (x - x.detach()) for x in said]
    ties = torch.tensor(table["tie"].tolist())
    loss = loss_by_hand(rewards, ties, label_smoothing)
    loss.backward()
    gradients = first_gradients(tmp_path / "checkpoints", "policy")
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(gradients[f"model.{name}"], parameter.grad, rtol=1e-3, atol=1e-5)
    assert loss.item() == pytest.approx(math.log(2))
    assert logger.series("loss") == [pytest.approx(math.log(2), abs=1e-6)]
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    assert logger.series("grad_norm") == [pytest.approx(norm, rel=1e-3)]


def test_loss_and_gradient_by_hand_far_from_the_reference(toy_sft, prepared):
    policy, tokenizer = plain_policy(toy_sft), load_policy(toy_sft)[1]
    table = with_winners(read_table(prepared, "preferences", "train"))
    said = [sums(policy, tokenizer, table, column) for column in ("chosen", "rejected")]
    draws = torch.Generator().manual_seed(0)
    reference = torch.stack([x.detach() + torch.randn(PAIRS, generator=draws) for x in said], 1)
    rewards = [0.2 * (x - r) for x, r in zip(said, reference.unbind(1), strict=True)]
    loss = loss_by_hand(rewards, torch.tensor(table["tie"].tolist()), 0.1)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()

    config = change(label_smoothing=0.1)
    learner = Learner(Policy.load(toy_sft, "cpu")[0], config, 1)
    pairs = encode_pairs(table, tokenizer, 24).pairs
    found = _accumulate(learner, pairs, reference, config, Ranks(), lambda: None)
    gap = rewards[0] - rewards[1]
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((gap > 0).float().mean().item())
    assert found["margin"] == pytest.approx(gap.mean().item(), rel=1e-3, abs=1e-5)
    assert found["chosen_reward"] == pytest.approx(rewards[0].mean().item(), rel=1e-3, abs=1e-5)
    assert learner.step() == pytest.approx(norm, rel=1e-3)


LEARNS = {
    "all weights": {"learning_rate": 5e-4, "epochs": 5, "beta": 1.0},
    "LoRA": {"learning_rate": 3e-3, "epochs": 5, "lora_rank": 8},
}


@pytest.fixture
def new_answers(prepared, tmp_path):
    """Held-out votes on prompts that were seen, with answers that they were not seen with: what an
    adapter can know, as it leaves the embedding of a new word at random."""
    data = shutil.copytree(prepared, tmp_path / "new_answers")
    table = read_table(data, "preferences", "train")
    answers = ["response_a", "response_b", "vote"]
    table[answers] = table[answers].shift(37).fillna(table[answers]).astype(table[answers].dtypes)
    write_table(table.iloc[40:80], data, "preferences", "eval")
    return data


@pytest.mark.parametrize("settings", LEARNS.values(), ids=LEARNS)
def test_learns_and_reports_what_plain_transformers_finds(
    train, toy_sft, new_answers, tmp_path, settings
):
    config = change(**settings)
    report = train(config, data=new_answers)
    tokenizer = load_policy(toy_sft)[1]
    table = with_winners(read_table(new_answers, "preferences", "eval"))
    with torch.no_grad():
        rewards = [
            config.beta
            * (
                sums(plain_policy(tmp_path / "policy"), tokenizer, table, column)
                - sums(plain_policy(toy_sft), tokenizer, table, column)
            )
            for column in ("chosen", "rejected")
        ]
    ties, gap = torch.tensor(table["tie"].tolist()), rewards[0] - rewards[1]
    assert report.accuracy == pytest.approx((gap[~ties] > 0).float().mean().item())
    assert report.accuracy > 0.9
    assert report.accuracy_low <= report.accuracy <= report.accuracy_high
    close = {"rel": 1e-3, "abs": 1e-4}
    assert report.held_out_loss == pytest.approx(loss_by_hand(rewards, ties, 0.0).item(), **close)
    assert report.held_out_loss < 0.6
    assert report.margin == pytest.approx(gap.mean().item(), **close)
    assert report.chosen_reward == pytest.approx(rewards[0].mean().item(), **close)
    assert (report.train_pairs, report.held_out_pairs, report.truncated) == (PAIRS, 40, 0)
    assert set(report.figures) == {"dpo_training", "dpo_rewards"}
    assert read_card(tmp_path / "policy")["steps"] == 5 * config.epochs


def test_what_is_logged_at_every_step(train, logger):
    train()
    assert [step for step, _ in logger.history] == list(range(1, 11))
    assert logger.series("margin")[0] == pytest.approx(0, abs=1e-5)
    assert logger.series("accuracy")[-1] > 0.8
    assert logger.series("margin")[-1] > 0.05
    assert logger.series("loss")[-1] < math.log(2)


def test_a_higher_beta_stays_closer_to_the_reference(train, toy_sft, prepared, tmp_path):
    tokenizer = load_policy(toy_sft)[1]
    table = with_winners(read_table(prepared, "preferences", "train"))
    moved = {}
    for beta in (0.05, 5.0):
        train(change(beta=beta, schedule="constant"))
        with torch.no_grad():
            before, after = (
                sums(plain_policy(at), tokenizer, table, "rejected")
                for at in (toy_sft, tmp_path / "policy")
            )
        moved[beta] = (after - before).abs().mean()
    assert moved[5.0] < moved[0.05] / 2


def test_ties_pull_the_two_implicit_rewards_together(train, prepared, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    table = read_table(data, "preferences", "train").assign(vote="tie")
    write_table(table, data, "preferences", "train")
    assert abs(train(data=data).margin) < train().margin / 5


def test_same_seed_same_numbers(train):
    def run(seed):
        log = MemoryLogger()
        report = train(change(epochs=1), seed=seed, logger=log)
        return log.history, report.summary()

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0}, "greater than 0"),
        ({"label_smoothing": 0.5}, r"less than 0\.5"),
        ({"kl_coef": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(ValidationError, match=said):
        change(**settings)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_preferences(train, prepared, tmp_path, split):
    data = shutil.copytree(prepared, tmp_path / "data")
    (data / f"preferences.{split}.jsonl").write_text("")
    with pytest.raises(DataError, match="preferences have no rows"):
        train(data=data)


def test_what_is_refused_in_words(train, toy_reward, prepared, tmp_path, logger):
    with pytest.raises(ConfigError, match=r"dpo\.max_length asks for texts of 41"):
        train(change(max_length=41))
    with pytest.raises(ModelError, match="kind 'reward', but policy is needed"):
        train(sft=toy_reward)
    assert not logger.history
    data = shutil.copytree(prepared, tmp_path / "data")
    table = read_table(data, "preferences", "eval").assign(vote="tie")
    write_table(table, data, "preferences", "eval")
    with pytest.raises(DataError, match="all ties"):
        train(data=data)
