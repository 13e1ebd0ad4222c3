"""One row with three votes, from its file to the loss of the reward model, each number by hand."""

import json
from math import exp, log

import pytest
import torch
from tiny import MODEL

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import save_model
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.data.encoding import encode_pair
from rlhf_core.data.pairs import encode_pairs
from rlhf_core.data.prepared import read_table
from rlhf_core.seeding import generator
from rlhf_core.settings.data import DataConfig, LengthLimits, TableConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.stages.reward_model import accumulate
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.work import Work

MARGIN = 0.25
ROW = {
    "id": "p1",
    "prompt": "the room",
    "response_a": " is good and warm",
    "response_b": " is bad",
    "margin": MARGIN,
    "votes": [
        {"annotator": "ann", "vote": "a", "shown_first": "b", "time": "2026-03-01T12:30"},
        {"annotator": "bob", "vote": "b"},
        {"annotator": "cyd", "vote": "tie"},
    ],
}
HELD_OUT = {"prompt": "a bed", "response_a": " is warm", "response_b": " is cold", "vote": "a"}


@pytest.fixture
def prepared(tmp_path):
    """The prepared tables of the row, with a held-out one beside it."""
    for name, row in (("train", ROW), ("eval", HELD_OUT)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    paths = {"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "eval.jsonl")}
    report = prepare_data(
        DataConfig(source="files", preferences=TableConfig(**paths)),
        Work(
            outputs={"data": tmp_path / "data"},
            sections={
                "model": MODEL,
                "limits": LengthLimits(prompt=16, sft=32, reward=32, response=16),
            },
        ),
    )
    assert (report.validation.known_sides, report.validation.timed) == (1, 1)
    return tmp_path / "data"


@pytest.fixture
def reward_model(tmp_path):
    """A network with random weights that are large enough for its rewards to differ."""
    model, tokenizer = load_base(MODEL, [ROW["prompt"] + ROW["response_a"]], 0)
    save_model(model, tokenizer, tmp_path / "sft", kind="policy")
    network = ScalarModel.from_policy(tmp_path / "sft", generator(0, "head"))
    with torch.no_grad():
        network.model.score.weight.mul_(4)
    return network, tokenizer


def sigmoid(x):
    return 1 / (1 + exp(-x))


def test_what_each_vote_of_a_row_contributes(prepared, reward_model):
    # 1. A vote is a row, with its sides where they were.
    same = {"id": "p1", "prompt": "the room"}
    same |= {"response_a": " is good and warm", "response_b": " is bad"}
    same |= {"gold": False, "margin": MARGIN, "source": "train.jsonl"}
    unknown = {"shown_first": "", "time": ""}
    table = read_table(prepared, "preferences", "train")
    assert table.to_dict("records") == [
        same | {"annotator": "ann", "vote": "a", "shown_first": "b", "time": "2026-03-01T12:30"},
        same | unknown | {"annotator": "bob", "vote": "b"},
        same | unknown | {"annotator": "cyd", "vote": "tie"},
    ]
    # Each answer won once, so both are demonstrations; the tie adds none.
    shown = read_table(prepared, "demonstrations", "train")
    assert shown["response"].tolist() == [" is good and warm", " is bad"]

    # 2. The winner of a vote is its chosen text, whichever side it was on or was shown first.
    network, tokenizer = reward_model
    good, bad = (
        encode_pair(ROW["prompt"], ROW[side], tokenizer, 32)[0]
        for side in ("response_a", "response_b")
    )
    pairs = encode_pairs(table, tokenizer, 32).pairs
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (good, bad),
        (bad, good),
        (good, bad),
    ]
    assert [(pair.tie, pair.margin) for pair in pairs] == [
        (False, MARGIN),
        (False, MARGIN),
        (True, 0.0),
    ]

    # 3. Its loss, from the two rewards of plain transformers. A tie is half a vote either way.
    with torch.no_grad():
        a, b = (network.model(torch.tensor([ids])).logits.item() for ids in (good, bad))
    assert abs(a - b) > 0.3
    by_hand = [
        -log(sigmoid(a - b - MARGIN)),
        -log(sigmoid(b - a - MARGIN)),
        -log(sigmoid(a - b)) / 2 - log(sigmoid(b - a)) / 2,
    ]
    config = RewardModelConfig(learning_rate=1e-3, batch_size=3, micro_batch_size=2, max_length=32)

    def loss(votes):
        learner = Learner(network, config, 1)
        return accumulate(learner, votes, config, Ranks(), lambda: None)["loss"]

    for pair, expected in zip(pairs, by_hand, strict=True):
        assert loss([pair]) == pytest.approx(expected, rel=1e-5)
    assert len({round(x, 3) for x in by_hand}) == 3
    assert loss(pairs) == pytest.approx(sum(by_hand) / 3, rel=1e-5)
