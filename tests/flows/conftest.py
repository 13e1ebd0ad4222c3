"""What tests of single flows share: the small pipeline's config, and a home for a whole module."""

import shutil
from pathlib import Path

import pytest

from flows.config import PipelineConfig
from flows.loading import load_config
from tasks.settings import Settings

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="session")
def tiny() -> PipelineConfig:
    """A pipeline of seconds that learns nothing."""
    return load_config(TINY, (), PipelineConfig)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory, migrated_database, prefect_server) -> Settings:
    """One home for the module: later runs meet what earlier ones registered."""
    made = Settings.model_validate({"RLHF_HOME": tmp_path_factory.mktemp("shared") / "home"})
    (made.home / "mlflow").mkdir(parents=True)
    shutil.copy(migrated_database, made.home / "mlflow" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment().items():
            if not name.startswith("PREFECT_"):  # the session's server stays in use
                patch.setenv(name, value)
        yield made
