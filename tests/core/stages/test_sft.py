"""Supervised fine-tuning on the toy world."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_core.backbone.base_model import base_of, load_base
from rlhf_core.backbone.directory import load_policy, read_card, save_model
from rlhf_core.data.encoding import encode_pair
from rlhf_core.data.prepared import read_table, training_texts, write_table
from rlhf_core.errors import ConfigError, DataError, ModelError, NumericsError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.model import ModelConfig
from rlhf_core.settings.training import SFTConfig
from rlhf_core.stages.sft import perplexity, require_learnt, train_sft

CONFIG = SFTConfig(
    epochs=2, learning_rate=1e-2, batch_size=24, micro_batch_size=4, max_length=24, evaluations=4
)


@pytest.fixture
def train(toy_work, tmp_path):
    def run(config=CONFIG, *, output=tmp_path / "out", **parts):
        return train_sft(config, toy_work("data", outputs={"sft": output}, **parts))

    return run


def change(config, **settings):
    return SFTConfig(**dict(config) | settings)


@torch.no_grad()
def mean_nll(model, tokenizer, table, *, with_prompt=False, max_length=24):
    """Nats a token over a table, one text at a time: what the stage should find."""
    total = tokens = 0
    for prompt, response in zip(table["prompt"], table["response"], strict=True):
        ids, in_prompt, _ = encode_pair(prompt, response, tokenizer, max_length)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1 if with_prompt else in_prompt, len(ids)):
            total -= logprobs[place - 1, ids[place]].item()
            tokens += 1
    return total / tokens


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def demonstrations(directory, split, rows):
    frame = pd.DataFrame([{"id": str(i), **row} for i, row in enumerate(rows)])
    write_table(frame, directory, "demonstrations", split)


def test_held_out_loss_falls_and_the_report_says_what_was_kept(
    train, toy_model, prepared, tmp_path, logger
):
    report = train()
    held_out = logger.series("held_out/loss")
    assert len(held_out) == 4
    assert held_out[-1] < held_out[0] - 0.5
    policy, tokenizer = load_policy(tmp_path / "out")
    recomputed = mean_nll(policy, tokenizer, read_table(prepared, "demonstrations", "eval"))
    assert report.held_out_loss == pytest.approx(recomputed, rel=1e-5)
    assert report.held_out_perplexity == pytest.approx(math.exp(recomputed), rel=1e-5)
    assert (report.steps, report.train_examples, report.truncated) == (8, 96, 0)
    assert read_card(tmp_path / "out") == {
        "kind": "policy",
        "dtype": "float32",
        "step": 8,
        "chat": False,
        "base": {"model": toy_model.model_dump(), "seed": 0},
    }
    assert report.summary() == {
        name: getattr(report, name)
        for name in (
            "held_out_loss",
            "held_out_perplexity",
            "best_step",
            "steps",
            "train_examples",
            "truncated",
        )
    }


def test_the_base_can_be_made_again_from_what_sft_says(toy_sft, toy_model, prepared):
    corpus = training_texts(read_table(prepared, "demonstrations", "train"))
    expected, tokenizer = load_base(toy_model, corpus, 0)
    found, same = base_of(toy_sft)
    assert same.get_vocab() == tokenizer.get_vocab()
    assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("with_prompt", [False, True])
def test_first_loss_is_that_of_the_base_model(train, toy_model, prepared, logger, with_prompt):
    # One batch holds all demonstrations, so the first loss does not depend on the order.
    train(change(CONFIG, batch_size=96, epochs=1, train_on_prompt=with_prompt))
    table = read_table(prepared, "demonstrations", "train")
    base, tokenizer = load_base(toy_model, training_texts(table), 0)
    expected = mean_nll(base, tokenizer, table, with_prompt=with_prompt)
    assert logger.series("loss") == [pytest.approx(expected, rel=1e-5)]


def test_best_weights_are_kept_and_not_the_last(train, tmp_path, logger):
    # Training says "good" and evaluation "bad": at first both gain from learning the form of an
    # answer, later every step towards "good" is one away from "bad".
    data = tmp_path / "contrary"
    data.mkdir()
    for split, word in (("train", "good"), ("eval", "bad")):
        demonstrations(data, split, [{"prompt": "the room", "response": f" is {word}"}] * 24)
    config = change(CONFIG, epochs=16, schedule="constant", evaluations=16)
    report = train(config, data=data)
    held_out = logger.series("held_out/loss")
    assert 1 < report.best_step < report.steps == 16
    assert report.held_out_loss == min(held_out) == held_out[report.best_step - 1]
    assert held_out[-1] > min(held_out) + 0.1
    kept = mean_nll(*load_policy(tmp_path / "out"), read_table(data, "demonstrations", "eval"))
    assert kept == pytest.approx(min(held_out), rel=1e-5)


def test_micro_batches_do_not_change_the_trajectory(train):
    runs = []
    for micro in (1, 99):
        log = MemoryLogger()
        train(change(CONFIG, micro_batch_size=micro), logger=log)
        names = ("loss", "grad_norm", "held_out/loss")
        runs.append(torch.tensor([x for name in names for x in log.series(name)]))
    assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)


def test_adapter_learns_and_lies_beside_the_whole_model(train, toy_sft, tmp_path, logger):
    policy = ModelConfig(source=str(toy_sft))
    fresh = load_policy(toy_sft)[0].state_dict()
    report = train(change(CONFIG, lora_rank=4), model=policy)
    held_out = logger.series("held_out/loss")
    assert report.held_out_loss == min(held_out)
    merged = weights(tmp_path / "out")
    assert any(not torch.equal(fresh[name], merged[name]) for name in fresh)
    # Only what stands beside a linear layer has moved.
    for name in ("transformer.wte.weight", "transformer.ln_f.weight", "transformer.wpe.weight"):
        assert torch.equal(fresh[name], merged[name])


def test_same_seed_same_weights(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(output=tmp_path / name, seed=seed)
    one, two, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_order_depends_on_the_seed_where_the_model_does_not(train, tmp_path, toy_sft):
    policy = ModelConfig(source=str(toy_sft))
    for name, seed in (("a", 1), ("b", 2)):
        train(output=tmp_path / name, seed=seed, model=policy)
    one, two = (weights(tmp_path / name) for name in "ab")
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_a_llama_is_fine_tuned_from_a_folder(train, llama, tmp_path, prepared, logger):
    save_model(*llama, tmp_path / "base", kind="policy")
    config = change(CONFIG, batch_size=96, epochs=4, evaluations=2)
    report = train(config, model=ModelConfig(source=str(tmp_path / "base")))
    expected = mean_nll(*llama, read_table(prepared, "demonstrations", "train"))
    assert logger.series("loss")[0] == pytest.approx(expected, rel=1e-5)
    policy = load_policy(tmp_path / "out")
    kept = mean_nll(*policy, read_table(prepared, "demonstrations", "eval"))
    assert report.held_out_loss == pytest.approx(kept, rel=1e-5)
    assert kept < expected


def test_what_is_logged_at_every_step(train, logger):
    train()
    steps = [step for step, values in logger.history if "loss" in values]
    assert steps == list(range(1, 9))
    # Warm-up of 5 % of 8 steps is none, so the first step has the whole rate.
    rates = [1e-2 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert logger.series("learning_rate") == pytest.approx(rates)
    assert [step for step, values in logger.history if "held_out/loss" in values] == [2, 4, 6, 8]
    perplexities = [math.exp(loss) for loss in logger.series("held_out/loss")]
    assert logger.series("held_out/perplexity") == pytest.approx(perplexities)
    assert [(done, total) for done, total, _ in logger.notes] == [(i, 8) for i in range(1, 9)]


def test_more_evaluations_than_steps_are_as_many_as_steps(train, logger):
    train(change(CONFIG, batch_size=96, evaluations=50))
    assert len(logger.series("held_out/loss")) == 2


def test_long_texts_are_counted(train):
    assert train(change(CONFIG, epochs=1, max_length=6)).truncated > 0


@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_demonstrations(train, prepared, tmp_path, split):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    (data / f"demonstrations.{split}.jsonl").write_text("")
    with pytest.raises(DataError, match="demonstrations have no rows"):
        train(data=data)


def test_texts_longer_than_the_model(train):
    with pytest.raises(ConfigError, match=r"sft\.max_length asks for texts of 41 tokens"):
        train(change(CONFIG, max_length=41))


def test_weights_that_are_not_finite_are_refused_at_load(train, tmp_path, gpt2):
    model, tokenizer = gpt2
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    save_model(model, tokenizer, tmp_path / "broken", kind="policy")
    with pytest.raises(ModelError, match=r"c_fc\.weight has a value that is not finite"):
        train(model=ModelConfig(source=str(tmp_path / "broken")))
    assert not (tmp_path / "out").exists()


def test_training_that_blows_up_stops_with_the_name_of_what_is_not_finite(train, tmp_path):
    with pytest.raises(NumericsError, match="the SFT loss is not finite"):
        train(change(CONFIG, learning_rate=1e30))


def test_saved_config_is_one_that_transformers_reads(train, tmp_path):
    train()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    for settings in (config, generation):
        assert settings["pad_token_id"] != settings["eos_token_id"]


# --- losses that are no numbers ---


def test_perplexity_beyond_a_float_is_infinite():
    assert perplexity(2.0) == pytest.approx(math.e**2)
    assert perplexity(710.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_a_run_that_diverged_says_so(caplog):
    require_learnt([(2, math.nan), (4, 3.0)])
    assert not caplog.records
    require_learnt([(2, 28447.0), (4, math.inf)])
    assert "28447 nats a token" in caplog.text
    with pytest.raises(NumericsError, match=r"never finite \(nan at step 4\).* sft.learning_rate"):
        require_learnt([(2, math.inf), (4, math.nan)])


def test_the_day_of_the_data_is_written_into_the_template(train, prepared, tmp_path, toy_sft):
    data, base = tmp_path / "data", tmp_path / "base"
    shutil.copytree(prepared, data)
    (data / "validation.json").write_text('{"template_date": "2001-02-03"}')
    model, tokenizer = load_policy(toy_sft)
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}{{ messages[0]['content'] }}"
    save_model(model, tokenizer, base, kind="policy")
    short = CONFIG.model_copy(update={"epochs": 1})
    train(short, inputs={"data": data}, sections={"model": ModelConfig(source=str(base))})
    saved = load_policy(tmp_path / "out")[1]
    chat = [{"role": "user", "content": "!"}]
    assert saved.apply_chat_template(chat, tokenize=False) == "2001-02-03!"
