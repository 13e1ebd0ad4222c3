"""What `precision: auto` is in a run, on the machine that it began on and on another."""

import pytest

from rlhf_core.backbone.precision import machine
from rlhf_core.settings.data import DataConfig
from rlhf_core.settings.training import SFTConfig
from tasks.record import tags
from tasks.record.identity import Definition
from tasks.record.record import Record
from tasks.registry.refs import PipelineRun
from tasks.settings import Settings
from tasks.steps.precision import with_precision

AUTO = SFTConfig(precision="auto")


@pytest.fixture
def record(tmp_path):
    return Record.open(Settings.model_validate({"RLHF_HOME": tmp_path / "home"}))


@pytest.fixture
def run(record):
    experiment = record.client.create_experiment("demo")
    run_id = record.client.create_run(experiment).info.run_id
    return PipelineRun(project="demo", run_id=run_id, experiment_id=experiment, seed=0)


@pytest.fixture
def on(monkeypatch):
    """Makes this machine one with bfloat16, or one without."""

    def on(has):
        found = "avx512_bf16" if has else ""
        monkeypatch.setattr(machine, "native_bfloat16", lambda device: found)

    return on


@pytest.mark.parametrize(("has", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_decided_once_recorded_and_in_the_key(record, run, on, has, precision):
    on(has)
    found = with_precision(AUTO, record, run, trains=True)
    assert found == SFTConfig(precision=precision)
    assert record.runs.tags(run.run_id)[tags.AUTO_PRECISION] == precision
    keys = [
        Definition("sft", {"sft": config}, run, {}).key(record.store)
        for config in (found, SFTConfig(precision=precision))
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(("began", "kept"), [(True, "bfloat16"), (False, "float32")])
def test_a_run_that_goes_on_on_another_machine_keeps_its_type_and_says_so(
    record, run, on, caplog, began, kept
):
    on(began)
    first = with_precision(AUTO, record, run, trains=True)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    on(not began)
    assert with_precision(AUTO, record, run, trains=False) == first
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert f"this run began in {kept} and goes on in it" in warning


def test_what_a_person_chose_and_a_stage_without_a_precision_are_left_alone(record, run, on):
    on(True)
    for config in (SFTConfig(), SFTConfig(precision="bfloat16"), DataConfig(source="simulated")):
        assert with_precision(config, record, run, trains=False) is config
    assert tags.AUTO_PRECISION not in record.runs.tags(run.run_id)
