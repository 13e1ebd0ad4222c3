"""The options of `rlhf ask` as a config, whose problems are named as the options are."""

import threading
from typing import Any

from pydantic import ValidationError

from rlhf_core.errors import ConfigError
from tasks.feedback.asking.config import AskConfig
from tasks.settings import Settings

OPTIONS = {
    "project": "PROJECT",
    "policy": "--model",
    "file": "--from",
    "evaluation": "--eval",
    "votes_per_pair": "--votes",
    "then": "--then",
    "judge": "--judge",
    "judge.endpoint.model": "--judge-model",
    "router.sure": "--sure",
    "router.audit": "--audit",
}


def ask_config(**options: Any) -> AskConfig:
    """The config.

    Raises: ConfigError that names the option.
    """
    try:
        return AskConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        whole = ".".join(map(str, first["loc"]))
        named = OPTIONS.get(whole) or OPTIONS.get(field)
        where = named or (f"--{field.replace('_', '-')}" if field else "")
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {said}" if where else said) from None


def resume_for_ever(settings: Settings) -> None:
    """Resume runs as their pairs are answered, until the process is stopped."""
    from tasks.feedback.asking.votes import opened
    from tasks.feedback.asking.waiting import watch

    with opened(settings, make=True) as store:
        watch(store, settings, threading.Event())


def resume_by_hand(settings: Settings) -> list[str]:
    """Resume the runs whose pairs are answered, start what follows complete batches, and say how
    far the others are."""
    from tasks.feedback.asking.starting import start_ready
    from tasks.feedback.asking.votes import opened
    from tasks.feedback.asking.waiting import resume_ready, standings

    with opened(settings) as store:
        lines = start_ready(store)
        lines += [f"{flow_run} goes on" for flow_run in resume_ready(store, settings)]
        lines += [
            f"{found.flow_run} waits for the project {found.project}: {found.answered:,} of "
            f"{found.pairs:,} pairs are answered, {found.needed:,} are enough "
            f"(batch {found.name}, until {found.until:%Y-%m-%d %H:%M} UTC)"
            for found in standings(store)
        ]
    return lines or ["No run waits for people."]
