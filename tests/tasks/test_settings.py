"""Settings come from the environment, and importing them changes nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import get_current_settings
from pydantic import SecretStr

from rlhf_core.errors import ConfigError
from rlhf_core.redaction import masked
from tasks.settings import (
    QUIET,
    SECRETS,
    Settings,
    StackSettings,
    apply_environment,
    read_settings,
)

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
        "RLHF_CLUSTER": "10.0.0.5:6379",
        "RLHF_CLUSTER_RETRIES": "5",
        "RLHF_CLUSTER_CPUS": "8",
        "RLHF_CLUSTER_OPEN": "true",
        "RLHF_REWARD_PACKAGES": "rules, judges",
        "RLHF_CONFIG_FOLDER": "/srv/configs",
        "RLHF_CHECKPOINT_SECONDS": "0.5",
        "RLHF_KEEP_WORK_DAYS": "30",
        "RLHF_BACKUP_DAYS": "90",
        "RLHF_OUTAGE_SECONDS": "10",
        "RLHF_PASSWORD": "secret",
        "RLHF_NOTIFY_WEBHOOK": "https://hooks.example.org/x",
        "RLHF_JUDGE_URL": "http://127.0.0.1:8000/v1/",
        "RLHF_JUDGE_KEY": "sk-of-the-judge",
        "RLHF_VLLM_URLS": "http://10.0.0.7:8000/, https://vllm.example.org",
        "RLHF_FEEDBACK_DATABASE": "postgresql+psycopg2://feedback:pw-of-it@db:5432/feedback",
        "RLHF_LABEL_URL": "https://label.example.org/",
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
    assert (settings.cluster, settings.cluster_open) == ("10.0.0.5:6379", True)
    assert (settings.cluster_retries, settings.cluster_cpus) == (5, 8)
    assert settings.training_device == "cpu"
    assert settings.reward_packages == "rules, judges"
    assert settings.config_folder == "/srv/configs"
    assert settings.checkpoint_seconds == 0.5
    assert settings.keep_work_days == 30
    assert settings.outage_seconds == 10
    assert settings.account == "rlhf:secret"
    assert settings.notify_webhook.get_secret_value() == "https://hooks.example.org/x"
    assert settings.judge_address == "http://127.0.0.1:8000/v1"
    assert settings.judge_key.get_secret_value() == "sk-of-the-judge"
    assert settings.vllm_addresses == ("http://10.0.0.7:8000", "https://vllm.example.org")
    assert settings.feedback_uri == given["RLHF_FEEDBACK_DATABASE"]
    assert settings.label_public_url == "https://label.example.org"
    assert "sk-of-the-judge" not in repr(settings)
    assert "pw-of-it" not in repr(settings)


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
    [
        ("RLHF_DEVICE", "gpu"),
        ("RLHF_PROCESSES", "0"),
        ("RLHF_STRATEGY", "zero"),
        *(("RLHF_CLUSTER", bad) for bad in ("head", "head:", ":6379", "head:x", "head:99999")),
        *(("RLHF_CLUSTER", bad) for bad in ("ray://head:10001", "a@head:6379", "head:6379/x")),
        ("RLHF_CLUSTER_RETRIES", "-1"),
        ("RLHF_CLUSTER_CPUS", "0"),
        ("RLHF_CHECKPOINT_SECONDS", "nan"),
        ("RLHF_OUTAGE_SECONDS", "inf"),
        ("RLHF_HOME", "~nosuch/home"),
        ("MLFLOW_TRACKING_URI", "http://[half"),
    ],
)
def test_a_bad_value_names_its_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(f"environment variable {name} is '{value}'")):
        read_settings()


@pytest.mark.parametrize(
    ("address", "others", "allowed"),
    [
        ("127.0.0.1:6379", {}, True),
        ("localhost:6379", {}, True),
        ("[::1]:6379", {}, True),
        ("10.0.0.5:6379", {}, False),
        ("127.example.org:6379", {}, False),
        ("10.0.0.5:6379", {"RLHF_CLUSTER_OPEN": "1"}, True),
        ("10.0.0.5:6379", {"RAY_AUTH_MODE": "token"}, True),
        ("10.0.0.5:6379", {"RAY_AUTH_MODE": "disabled"}, False),
    ],
)
def test_an_open_cluster_of_other_machines_is_refused(monkeypatch, address, others, allowed):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for name, value in {"RLHF_CLUSTER": address, **others}.items():
        monkeypatch.setenv(name, value)
    if allowed:
        assert read_settings().cluster == address
    else:
        with pytest.raises(ConfigError, match=r"RLHF_CLUSTER .*RAY_AUTH_MODE=token runs code"):
            read_settings()


def test_the_device_of_a_cluster_is_not_that_of_this_machine(monkeypatch):
    monkeypatch.setenv("RLHF_CLUSTER", "localhost:6379")
    monkeypatch.setenv("RLHF_PROCESSES", "16")
    for name in ("auto", "cpu", "cuda"):
        monkeypatch.setenv("RLHF_DEVICE", name)
        assert read_settings().training_device == name
    monkeypatch.setenv("RLHF_DEVICE", "cuda:1")
    with pytest.raises(ConfigError, match="a GPU of this machine, but RLHF_CLUSTER is set"):
        _ = read_settings().training_device


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_is_one_that_is_not_set(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    expected = read_settings()
    monkeypatch.setenv(name, "")
    assert read_settings() == expected


def test_an_empty_variable_gives_way_to_what_a_library_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"RLHF_HOME": "", "MLFLOW_TRACKING_URI": ""})
    apply_environment(Settings.model_validate({"RLHF_HOME": tmp_path}))
    assert os.environ["RLHF_HOME"] == str(tmp_path)
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow/mlflow.db"


def test_the_home_is_looked_for_upwards(monkeypatch, tmp_path):
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    (tmp_path / ".rlhf").mkdir()
    (tmp_path / "a" / ".rlhf").write_text("a file is no home")
    monkeypatch.chdir(below)
    assert read_settings().home == tmp_path / ".rlhf"
    (below / ".rlhf").mkdir()
    assert read_settings().home == below / ".rlhf"
    monkeypatch.setenv("RLHF_HOME", ".rlhf2")
    assert read_settings().home == below / ".rlhf2"


def test_the_home_of_another_user_is_passed_over(monkeypatch, tmp_path):
    (tmp_path / ".rlhf").mkdir()
    below = tmp_path / "mine"
    below.mkdir()
    monkeypatch.chdir(below)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert read_settings().home == below / ".rlhf"


@pytest.mark.parametrize("name", ["RLHF_MLFLOW_URL", "RLHF_PREFECT_URL"])
def test_a_link_carries_no_password(monkeypatch, name):
    monkeypatch.setenv(name, "https://user:secret@host:81/page/")
    settings = read_settings()
    links = {settings.mlflow_public_url, settings.prefect_public_url}
    assert "https://host:81/page" in links
    assert not any("secret" in link for link in links)


def test_every_secret_of_the_settings_is_masked_from_the_start(monkeypatch):
    for settings in (Settings, StackSettings):
        for name, field in settings.model_fields.items():
            if field.annotation is SecretStr:
                assert field.validation_alias in SECRETS, name
    for number, name in enumerate(SECRETS):
        monkeypatch.setenv(name, f"the-value-{number:03}")
    monkeypatch.setenv("RLHF_DEVICE", "tpu the-value-007 ftp://u:pw@h")
    with pytest.raises(ConfigError) as error:
        read_settings()
    assert "'tpu *** ftp://u:***@h'" in str(error.value)
    texts = [masked(f"<the-value-{number:03}>") for number in range(len(SECRETS))]
    assert texts == ["<***>"] * len(SECRETS)


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


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:8000/v1", "it is not an address that begins with http:// or https://"),
        ("https:///v1", "it is not an address"),
        ("https://me:sk-of-the-judge@example.org/v1", "put the key in RLHF_JUDGE_KEY"),
        ("https://example.org/v1?api-key=sk-of-the-judge", "put the key in RLHF_JUDGE_KEY"),
    ],
)
def test_the_address_of_a_judge_is_one_and_has_no_secret(monkeypatch, address, says):
    monkeypatch.setenv("RLHF_JUDGE_URL", address)
    with pytest.raises(ConfigError, match=says) as caught:
        read_settings()
    assert "sk-of-the-judge" not in str(caught.value)


@pytest.mark.parametrize(
    ("addresses", "says"),
    [
        ("10.0.0.7:8000", "10.0.0.7:8000 does not begin with http:// or https:// and a host"),
        ("http://a:1,ftp://b:2", "ftp://b:2 does not begin"),
        ("http://me:secret@a:1", "has a user or a query"),
        ("http://a:1?key=secret", "has a user or a query"),
        ("http://a:1/v1", "http://a:1/v1 has a path; leave out what follows host and port"),
        ("http://a:1,http://a:1/", "is there twice"),
    ],
)
def test_addresses_of_servers_that_sample_are_checked(monkeypatch, addresses, says):
    monkeypatch.setenv("RLHF_VLLM_URLS", addresses)
    with pytest.raises(ConfigError, match=f"RLHF_VLLM_URLS.*{re.escape(says)}"):
        read_settings()


def test_without_servers_an_engine_is_missed_by_name(monkeypatch):
    monkeypatch.setenv("RLHF_VLLM_URLS", " , ")
    with pytest.raises(ConfigError, match="RLHF_VLLM_URLS is not set where the stage runs; set"):
        _ = read_settings().vllm_addresses


def test_without_an_address_a_judge_is_missed_by_name(monkeypatch):
    monkeypatch.delenv("RLHF_JUDGE_URL", raising=False)
    with pytest.raises(ConfigError, match="RLHF_JUDGE_URL is not set where the stage runs; set it"):
        _ = read_settings().judge_address
