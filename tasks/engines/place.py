"""The servers that the settings and the environment name, for a stage or before one."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from rlhf_core.engines.client import EnginePlace
from rlhf_core.settings.model import SamplingConfig
from tasks.settings import Settings

FACTORY = "tasks.engines.vllm:VllmClient"
WEIGHTS = "weights"  # the folder in a work folder


def engine_place(
    sections: Mapping[str, BaseModel], settings: Settings, folder: Path
) -> EnginePlace | None:
    """Where the servers of a stage are; None if the training samples itself.

    Args:
        folder: where the stage works, which the servers see too.

    Raises: ConfigError when the environment names no server.
    """
    sampling = [s for s in sections.values() if isinstance(s, SamplingConfig)]
    if not any(section.engine == "vllm" for section in sampling):
        return None
    addresses = settings.vllm_addresses
    return EnginePlace(factory=FACTORY, addresses=addresses, folder=folder / WEIGHTS)


def try_engine(sampling: SamplingConfig, settings: Settings) -> None:
    """Ask the servers whether they can do what a run will need.

    Raises: ConfigError when the environment names none; EngineError when one cannot.
    """
    if (place := engine_place({"sampling": sampling}, settings, settings.home)) is not None:
        place.client().check(sampling.max_length)
