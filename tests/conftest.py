"""What the tests of tasks and flows share: MLflow stores, one Prefect server, one Postgres."""

import os
import shutil
from collections.abc import Iterator

import pytest
from postgres_server import postgres as postgres

from tasks.settings import QUIET, Settings

# Read by the libraries at import, so before anything else: no telemetry, no device but the CPU, and
# none of the servers that whoever runs the tests may use otherwise.
for _field in Settings.model_fields.values():
    os.environ.pop(str(_field.validation_alias), None)
os.environ.update(QUIET, RLHF_DEVICE="cpu")
if "PYTEST_XDIST_WORKER" in os.environ:  # several share the cores, and threads that wait spin
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Tests that take minutes run on demand."""
    if not os.environ.get("RLHF_FAULTS"):
        for item in items:
            if item.get_closest_marker("faults"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: set RLHF_FAULTS=1"))


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory):
    """An empty MLflow database with all its tables: making one takes seconds, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def settings(tmp_path, migrated_database) -> Settings:
    """A fresh home with a fresh MLflow on SQLite."""
    made = Settings.model_validate({"RLHF_HOME": tmp_path / "home"})
    (made.home / "mlflow").mkdir(parents=True)
    shutil.copy(migrated_database, made.home / "mlflow" / "mlflow.db")
    return made


@pytest.fixture
def home(settings, monkeypatch):
    """The same, for code that reads its settings from the environment."""
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    return settings.home


@pytest.fixture(scope="session")
def prefect_server():
    """One Prefect server for the session; flows do not wait for their heartbeats."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory, migrated_database, prefect_server) -> Iterator[Settings]:
    """One home for the module: later runs meet what earlier ones registered."""
    made = Settings.model_validate({"RLHF_HOME": tmp_path_factory.mktemp("shared") / "home"})
    (made.home / "mlflow").mkdir(parents=True)
    shutil.copy(migrated_database, made.home / "mlflow" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment().items():
            if not name.startswith("PREFECT_"):  # the session's server stays in use
                patch.setenv(name, value)
        yield made
