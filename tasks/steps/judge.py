"""The judge of a config, looked at before anything is trained."""

import logging
from contextlib import suppress

from prefect import task

from rlhf_core.errors import DataError
from rlhf_core.judges.config import ENDPOINT, PEOPLE, JudgeConfig, PeopleConfig
from rlhf_core.rewards.functions import load_function
from tasks.judges.judging import try_endpoint
from tasks.record.record import Record
from tasks.reward_places import reward_places
from tasks.settings import Settings, read_settings

log = logging.getLogger(__name__)


@task(name="check-judge", task_run_name="check the judge")
def check_judge(config: JudgeConfig, project: str = "") -> None:
    """Find out whether the judge can work, which otherwise fails after hours of training.

    An endpoint is asked one easy question; of people it is asked whether there are any.

    Args:
        project: of the run, whose people are asked unless the config names another.

    Raises: ModelError for a model that does not exist, ConfigError for a function that may not or
        cannot be imported, and for an endpoint that has no address, refuses, or does not answer;
        StoreError for a preference store that cannot be used.
    """
    if config.is_function:
        load_function(config.source, setting="judge.source", places=reward_places())
    elif config.is_registered:
        Record.open().store.resolve(config.source)
    elif config.source == ENDPOINT:
        try_endpoint(config.endpoint, read_settings())
    elif config.source == PEOPLE and (sentence := nobody_to_ask(config.people, project)):
        log.warning("%s", sentence)


def nobody_to_ask(config: PeopleConfig, project: str, settings: Settings | None = None) -> str:
    """What is to be done before anybody can judge; empty if there is somebody.

    Raises: StoreError for a preference store that cannot be used.
    """
    from tasks.feedback.asking.batches import annotators
    from tasks.feedback.asking.votes import opened

    settings = settings or read_settings()
    name = config.project or project
    found = 0
    with suppress(DataError), opened(settings) as store:  # there is no store, or no such project
        found = annotators(store.project(name))
    if found >= config.votes_per_pair:
        return ""
    return (
        f"judge.people asks {config.votes_per_pair} about each pair, and the feedback project "
        f"'{name}' has {found} annotators: invite people to {settings.label_public_url}"
    )
