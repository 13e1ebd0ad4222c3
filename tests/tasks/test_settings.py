"""Settings come from the environment, and importing them changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import get_current_settings

from rlhf_core.errors import ConfigError
from tasks.settings import QUIET, Settings, apply_environment, read_settings

VARIABLES = [field.validation_alias for field in Settings.model_fields.values()]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_defaults_keep_everything_under_one_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = read_settings()
    assert settings.home == tmp_path / ".rlhf"
    assert settings.mlflow_uri == f"sqlite:///{tmp_path}/.rlhf/mlflow/mlflow.db"
    assert settings.artifact_root == tmp_path / ".rlhf" / "mlflow" / "artifacts"
    assert settings.prefect_api_url == ""
    assert list(tmp_path.iterdir()) == []


def test_each_variable_is_read(monkeypatch, tmp_path):
    given = {
        "RLHF_HOME": str(tmp_path / "a" / ".." / "b"),
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "PREFECT_API_URL": "http://prefect:4200/api",
        "RLHF_MLFLOW_URL": "https://mlflow.example.org/",
        "RLHF_PREFECT_URL": "https://prefect.example.org",
        "RLHF_DEVICE": "cpu",
        "RLHF_PROCESSES": "4",
        "RLHF_STRATEGY": "fsdp",
        "RLHF_CHECKPOINT_SECONDS": "0.5",
        "RLHF_KEEP_WORK_DAYS": "30",
        "RLHF_OUTAGE_SECONDS": "10",
        "RLHF_PASSWORD": "secret",
        "RLHF_NOTIFY_WEBHOOK": "https://hooks.example.org/x",
    }
    assert sorted(given) == sorted(VARIABLES)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = read_settings()
    assert settings.home == tmp_path / "b"
    assert settings.mlflow_uri == "http://mlflow:5000"
    assert settings.artifact_root is None
    assert settings.prefect_api_url == "http://prefect:4200/api"
    assert settings.mlflow_public_url == "https://mlflow.example.org"
    assert settings.prefect_public_url == "https://prefect.example.org"
    assert settings.device == "cpu"
    assert (settings.processes, settings.strategy) == (4, "fsdp")
    assert settings.checkpoint_seconds == 0.5
    assert settings.keep_work_days == 30
    assert settings.outage_seconds == 10
    assert settings.account == "rlhf:secret"
    assert settings.notify_webhook.get_secret_value() == "https://hooks.example.org/x"


def test_a_variable_of_a_similar_name_is_not_read(monkeypatch, tmp_path):
    expected = read_settings()
    for name in ("HOME", "home", "TRACKING_URI", "rlhf_home", "RLHF_TRACKING_URI", "DEVICE_NAME"):
        monkeypatch.setenv(name, str(tmp_path / "wrong"))
    assert read_settings() == expected


def test_what_is_given_by_hand_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_HOME", str(tmp_path / "environment"))
    assert Settings.model_validate({"RLHF_HOME": tmp_path / "hand"}).home == tmp_path / "hand"


@pytest.mark.parametrize(
    ("name", "value"),
    [("RLHF_DEVICE", "gpu"), ("RLHF_PROCESSES", "0"), ("RLHF_STRATEGY", "zero")],
)
def test_a_bad_value_names_its_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"environment variable {name} is '{value}'"):
        read_settings()


def test_a_device_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="torch finds"):
        _ = Settings.model_validate({"RLHF_DEVICE": "cuda:99"}).device


def test_auto_is_a_device_of_this_machine():
    import torch

    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert Settings.model_validate({"RLHF_DEVICE": "auto"}).device == expected


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [
        ("cpu", 3, "cpu"),
        ("auto", 1, "cuda"),
        ("auto", 2, "cuda"),
        ("cuda", 2, "cuda"),
        ("cuda:1", 1, "cuda:1"),
        ("cuda:1", 2, "RLHF_DEVICE is 'cuda:1'"),
        ("auto", 3, r"RLHF_PROCESSES is 3, .* finds 2 CUDA"),
    ],
)
def test_each_process_has_a_gpu_of_the_two(monkeypatch, device, processes, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = {"RLHF_DEVICE": device, "RLHF_PROCESSES": processes}
    settings = Settings.model_validate(given)
    if expected.startswith("RLHF"):
        with pytest.raises(ConfigError, match=expected):
            _ = settings.training_device
    else:
        assert settings.training_device == expected


def test_what_the_user_has_set_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"DO_NOT_TRACK": "1"})
    apply_environment(Settings.model_validate({"RLHF_HOME": tmp_path}))
    assert os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow/mlflow.db"


def test_importing_has_no_side_effects():
    code = (
        "import os, sys; before = dict(os.environ); import tasks.settings; "
        "heavy = {'torch', 'mlflow', 'prefect', 'transformers'} & set(sys.modules); "
        "assert dict(os.environ) == before and not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_every_variable_is_known_to_the_library_that_should_read_it():
    from huggingface_hub import constants
    from mlflow import environment_variables
    from mlflow.telemetry import utils as mlflow_telemetry

    known = get_current_settings().to_environment_variables()
    for name in QUIET:
        if name.startswith("PREFECT_"):
            assert name in known
        elif name.startswith("MLFLOW_"):
            assert hasattr(environment_variables, name)
    assert constants.HF_HUB_DISABLE_TELEMETRY
    assert mlflow_telemetry.is_telemetry_disabled()
    settings = get_current_settings()
    assert not settings.server.analytics_enabled
    assert not settings.server.ui.v2_enabled
    assert not settings.cloud.enable_orchestration_telemetry
    assert settings.server.ephemeral.startup_timeout_seconds == 120
