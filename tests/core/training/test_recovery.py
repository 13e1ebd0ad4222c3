"""Which run it is: what may not change between a checkpoint and its continuation, and what may."""

import shutil

import pandas as pd
import pytest
import torch
from pydantic import Field

from rlhf_core.backbone.directory import save_model
from rlhf_core.config import Section
from rlhf_core.data.prepared import write_table
from rlhf_core.errors import CheckpointError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.model import ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_core.settings.rewards import RewardTerm
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig
from rlhf_core.training.order import Batches
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import Recovery, run_identity

SECTIONS = [SFTConfig, RewardModelConfig, PPOConfig, RLOOConfig, GRPOConfig, DPOConfig]
SECTIONS += [SamplingConfig, ModelConfig]


@pytest.fixture
def inputs(saved, prepared, tmp_path):
    """A model, prepared data and a file."""
    (tmp_path / "file").write_text("one")
    data = shutil.copytree(prepared, tmp_path / "data")
    return {"sft": saved, "data": data, "rules": tmp_path / "file"}


def run_of(config, inputs=(), *, stage="sft", seed=0):
    return run_identity(stage, seed, {"section": config}, dict(inputs))


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (RewardTerm(weight=0.25), *value)
    return value.model_copy(update={name: other(v) for name, v in list(value)[:1]})


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_setting_is_part_of_the_run(section):
    config = section()
    before = run_of(config)
    for name in section.model_fields:
        changed = config.model_copy(update={name: other(getattr(config, name))})
        after = run_of(changed)
        differing = {key for key in before | after if before.get(key) != after.get(key)}
        assert differing, name
        assert all(key.startswith(f"section.{name}") for key in differing)


def test_settings_of_settings_are_named_by_their_path():
    class Inner(Section):
        depth: int = Field(3, description="…")

    class Outer(Section):
        inner: Inner = Field(default_factory=Inner, description="…")

    assert run_of(Outer())["section.inner.depth"] == "3"


def test_stage_and_seed_are_part_of_it():
    config = SFTConfig()
    assert run_of(config) == run_of(SFTConfig())
    assert run_of(config) != run_of(config, seed=1)
    assert run_of(config) != run_of(config, stage="dpo")


def differing(inputs, change):
    before = run_of(SFTConfig(), inputs)
    change()
    after = run_of(SFTConfig(), inputs)
    return {key for key in before | after if before.get(key) != after.get(key)}


def test_weights_of_the_model_are_part_of_it(inputs, causal):
    def change():
        with torch.no_grad():
            causal[0].get_input_embeddings().weight[5, 5] += 1e-3
        save_model(*causal, inputs["sft"], kind="policy")

    assert differing(inputs, change) == {"digest of sft"}


def test_rows_of_the_data_are_part_of_it(inputs):
    def change():
        frame = pd.DataFrame([{"id": "x", "prompt": "another"}])
        write_table(frame, inputs["data"], "prompts", "train")

    assert differing(inputs, change) == {"digest of data"}


def test_content_of_a_file_is_part_of_it(inputs):
    assert differing(inputs, lambda: inputs["rules"].write_text("two")) == {"digest of rules"}


def test_where_the_inputs_lie_is_not_part_of_it(inputs, tmp_path):
    moved = {
        name: (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / f"moved-{name}")
        for name, path in inputs.items()
    }
    assert run_of(SFTConfig(), inputs) == run_of(SFTConfig(), moved)


def batches():
    return Batches(6, 2, 2, torch.Generator().manual_seed(0))


def open_session(folder, position, seed=0):
    return Recovery(folder, every_seconds=0).open(
        MemoryLogger(),
        identity=run_identity("sft", seed, {"sft": SFTConfig()}, {}),
        learners={},
        positions={"batches": position},
        ranks=Ranks(),
    )


def test_session_that_recovery_opens_goes_on_from_what_it_kept(tmp_path):
    ours, theirs = batches(), batches()
    with open_session(tmp_path, ours) as session:
        next(ours)
        session.safe_point()
    with open_session(tmp_path, theirs) as session:
        assert session.resume()
    assert list(theirs) == list(ours)


def test_another_run_is_refused_by_what_differs(tmp_path):
    with open_session(tmp_path, batches()) as session:
        session.safe_point()
    with (
        open_session(tmp_path, batches(), seed=7) as session,
        pytest.raises(CheckpointError, match="seed was 0 and is now 7"),
    ):
        session.resume()


def test_without_a_folder_nothing_is_kept():
    with open_session(None, batches()) as session:
        session.safe_point()
        assert not session.resume()
