"""The rows of a trial: so many, and first the longest that will meet in the run."""

import shutil

import pandas as pd
import pytest

from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.estimate.trial import Trial
from rlhf_core.seeding import generator
from rlhf_core.settings.training import RewardModelConfig, SFTConfig
from rlhf_core.training.order import Batches
from tasks.estimate.rows import less_data

ROWS = 200


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"id": str(n), "prompt": f"{n} is", "response": "x" * (n * 37 % 101), "source": ""}
        for n in range(ROWS)
    ]
    for split in ("train", "eval"):
        frame = pd.DataFrame(rows)
        for name in ("system", "annotator", "licence"):
            frame[name] = ""
        write_table(frame, folder, "demonstrations", split)
    return folder


def cut(data, config, stage, train=24, held_out=10, tried=None):
    to = data.parent / "less"
    shutil.rmtree(to, ignore_errors=True)
    rows = {("demonstrations", "train"): train, ("demonstrations", "eval"): held_out}
    less_data(data, to, Trial(config=tried or config, rows=rows), stage, config, seed=3)
    return read_table(to, "demonstrations", "train"), read_table(to, "demonstrations", "eval")


def test_a_trial_has_as_many_rows_as_it_needs(data):
    config = SFTConfig(batch_size=8, micro_batch_size=4)
    train, held_out = cut(data, config, "sft")
    assert (len(train), len(held_out)) == (24, 10)
    train, held_out = cut(data, config, "sft", train=ROWS, held_out=10**6)
    assert (len(train), len(held_out)) == (ROWS, ROWS)


def test_the_first_micro_batch_is_the_longest_of_the_run(data):
    config = SFTConfig(batch_size=8, micro_batch_size=4)
    table = read_table(data, "demonstrations", "train")
    sizes = (table["prompt"].str.len() + table["response"].str.len()).tolist()
    # by hand: the order that SFT takes rows in, eight a step, four at once
    order = [row for batch in Batches(ROWS, 8, 1, generator(3, "sft/order")) for row in batch]
    heaviest = max(sum(sizes[r] for r in order[n : n + 4]) for n in range(0, ROWS, 4))
    less, _ = cut(data, config, "sft")
    first = next(Batches(24, 8, 1, generator(3, "sft/order")))[:4]
    met = less.iloc[first]
    assert int((met["prompt"].str.len() + met["response"].str.len()).sum()) == heaviest
    drawn = cut(data, RewardModelConfig(lora_rank=2, members=2), "reward_model")[0]
    assert set(drawn["id"]) < set(table["id"])
