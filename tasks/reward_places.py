"""Where the functions that a config names as rewards may come from."""

import re
import sys
import sysconfig
from pathlib import Path

from rlhf_core.rewards.functions import RewardPlaces
from tasks.settings import Settings, read_settings

INSTALLED = ("stdlib", "platstdlib", "purelib", "platlib")  # folders of Python and of packages


def reward_places(settings: Settings | None = None) -> RewardPlaces:
    """The trusted places of this process.

    A run of a deployment has the folder and the packages that the environment of its worker names:
    whoever starts it chooses its config and its working folder, and so these are not trusted. A run
    of the command has the folder of its config. A program that calls a flow without either has its
    own modules: those of the working folder and of its path, apart from installed packages.
    """
    settings = settings or read_settings()
    names = tuple(name for name in re.split(r"[,\s]+", settings.reward_packages) if name)
    if settings.config_folder:
        return RewardPlaces((settings.config_folder,), names)
    return RewardPlaces(() if _is_deployed() else _of_this_program(), names)


def _is_deployed() -> bool:
    """Whether this process executes a run of a deployment. Without Prefect loaded it does not."""
    if "prefect" not in sys.modules:
        return False
    from prefect.runtime import deployment

    return bool(deployment.id)


def _of_this_program() -> tuple[str, ...]:
    installed = [Path(sysconfig.get_path(name)) for name in INSTALLED]
    own = [
        entry
        for entry in sys.path
        if Path(entry).is_dir() and not any(Path(entry).is_relative_to(path) for path in installed)
    ]
    return tuple(dict.fromkeys([str(Path.cwd()), *own]))
