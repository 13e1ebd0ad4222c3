"""No long silence: whatever a stage does in a loop, it says how far it is each time round."""

from itertools import pairwise

import pandas as pd
import pytest
import torch
from tiny import CONFIGS, JUDGED, MODEL, World, change, run
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from rlhf_core.data import validation
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.data import DataConfig, LengthLimits, TableConfig
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.simulation import SimulationConfig
from rlhf_core.stages.evaluation import evaluate
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.work import Work

BLOCKS = MODEL.fresh.layers
# What may happen without a word: one micro-batch through the four networks of PPO, or two policies
# being loaded, each of which is tried on a text twice.
PASSES = 4


class Signs(MemoryLogger):
    """Counts the blocks of transformers that are called between two signs of life."""

    def __init__(self):
        super().__init__()
        self.blocks, self.most, self.said, self.after = 0, 0, "nothing", ""

    def progress(self, done, total, note=""):
        super().progress(done, total, note)
        self.blocks, self.said = 0, f"{done}/{total} {note}"

    def phase(self, what, done=0, total=0):
        super().phase(what, done, total)
        self.blocks, self.said = 0, f"{what} {done}/{total}"

    def count(self, module, _):
        if isinstance(module, GPT2Block):
            self.blocks += 1
            if self.blocks > self.most:
                self.most, self.after = self.blocks, self.said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("progress") / "world")


@pytest.fixture
def signs():
    log = Signs()
    hook = register_module_forward_pre_hook(log.count)
    yield log
    hook.remove()


def require_signs(log):
    assert log.most > 0
    assert log.most <= PASSES * BLOCKS, f"{log.most} blocks without a word after: {log.after}"
    whole = [(what, done, total) for what, done, total in log.phases if total]
    assert all(0 <= done < total for _, done, total in whole)
    # A part comes after the one before it, or is the first of its phase.
    for (what, done, _), (other, following, _) in pairwise(whole):
        assert following in (0, done + 1) if what == other else True


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_training_stage_never_works_long_without_a_word(world, tmp_path, signs, stage):
    run(change(CONFIGS[stage], micro_batch_size=1), world, tmp_path / "out", logger=signs)
    require_signs(signs)


def test_neither_does_the_evaluation(world, signs):
    models = {"sft": world.sft, "policy": world.sft, "reward": world.reward, "champion": world.sft}
    work = Work(
        inputs={**models, "data": world.data},
        sections=JUDGED,
        logger=signs,
    )
    evaluate(EvaluationConfig(prompts=4, samples_per_prompt=2, best_of=4), work)
    require_signs(signs)
    said = {what for what, *_ in signs.phases}
    assert said >= {"loading the models", "loading the policy", "loading the champion"}
    assert said >= {"scoring", "KL to SFT", "perplexity under SFT"}
    # 4 prompts, 4 answers of SFT to each, 3 side by side.
    tokens = [done for what, done, _ in signs.phases if what == "answers, batch 6 of 6"]
    assert tokens[0] == 0


def test_after_its_last_step_the_reward_model_says_what_it_still_does(world, tmp_path):
    class Order(MemoryLogger):
        """Has phases among the notes."""

        def phase(self, what, done=0, total=0):
            self.notes.append((what, done, total))

    log = Order()
    config = change(CONFIGS["reward_model"], micro_batch_size=5)
    run(config, world, tmp_path / "out", logger=log)
    last = max(i for i, (done, total, _) in enumerate(log.notes) if done == total)
    rest = log.notes[last + 1 :]
    names = list(dict.fromkeys(what.partition(",")[0] for what, *_ in rest))
    assert names == [
        "normaliser: loading the SFT policy",
        "normaliser: sampling",
        "normaliser: scoring",
        "held-out votes",
        "saving the model",
    ]
    # 8 samples, 3 side by side, of 8 tokens at most; 8 held-out pairs, 5 at a time.
    drawn = [item for item in rest if item[0] == "normaliser: sampling, batch 1 of 3"]
    assert drawn == [(drawn[0][0], token, 8) for token in range(len(drawn))]
    assert [item[1:] for item in rest if item[0] == "held-out votes"] == [(0, 2), (1, 2)]


def test_preparing_says_which_table_and_how_many_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "_BATCH", 7)
    rows = [(f"prompt {i}", f" good {i}", f" bad {i}") for i in range(20)]
    frame = pd.DataFrame(rows, columns=["prompt", "chosen", "rejected"])
    frame.to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    config = DataConfig(
        source="files",
        preferences=TableConfig(path=str(tmp_path / "pairs.jsonl")),
        prompts=TableConfig(path=str(tmp_path / "pairs.jsonl")),
        eval_fraction=0.3,
        simulation=SimulationConfig(),
    )
    log = MemoryLogger()
    limits = LengthLimits(prompt=9, sft=9, reward=9, response=9)
    sections = {"model": MODEL, "limits": limits}
    prepare_data(config, Work(outputs={"data": tmp_path / "out"}, sections=sections, logger=log))
    said = [what for what, *_ in log.phases]
    assert said[:3] == ["reading the preferences", "reading the prompts", "splitting by prompt"]
    # 20 prompts and 40 answers, 7 at a time.
    told = [item[1:] for item in log.phases if item[0] == "tokenising"]
    assert told == [(i, 9) for i in range(9)]
    assert {"writing the demonstrations", "writing the preferences"} <= set(said)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
