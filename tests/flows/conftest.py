"""What tests of single flows share: the small pipeline's config."""

from pathlib import Path

import pytest

from flows.config import PipelineConfig
from flows.loading import load_config

TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="session")
def tiny() -> PipelineConfig:
    """A pipeline of seconds that learns nothing."""
    return load_config(TINY, (), PipelineConfig)
