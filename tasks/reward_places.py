"""Where the functions that a config names as rewards may come from."""

import re
from pathlib import Path

from prefect.runtime import deployment

from rlhf_core.rewards.functions import RewardPlaces
from tasks.settings import Settings, read_settings


def reward_places(settings: Settings | None = None) -> RewardPlaces:
    """The trusted places of this process.

    A run of a deployment has the folder and the packages that the environment of its worker names:
    whoever starts it chooses its config and its working folder, and so these are not trusted. Any
    other run was started on this machine: its folder is that of the config, else the working one.
    """
    settings = settings or read_settings()
    folder = settings.config_folder
    if not folder and not deployment.id:
        folder = str(Path.cwd())
    names = [name for name in re.split(r"[,\s]+", settings.reward_packages) if name]
    return RewardPlaces(folder, tuple(names))
