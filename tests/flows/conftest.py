"""What tests of single flows share: the small pipeline's config."""

from pathlib import Path

import pytest

from flows.cli.loading import load_config
from flows.config import PipelineConfig

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="session")
def tiny() -> PipelineConfig:
    """A pipeline of seconds that learns nothing."""
    return load_config(TINY, (), PipelineConfig)
