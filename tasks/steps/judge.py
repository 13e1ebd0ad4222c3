"""The judge of a config, looked at before anything is trained."""

import logging

from prefect import task

from rlhf_core.rewards.functions import load_function
from rlhf_core.settings.judge import ENDPOINT, PEOPLE, JudgeConfig
from tasks.judges.judging import try_endpoint
from tasks.record.record import Record
from tasks.reward_places import reward_places
from tasks.settings import read_settings

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
    elif config.source == PEOPLE:
        from tasks.feedback.asking.batches import nobody_to_ask  # its database takes a second

        if sentence := nobody_to_ask(config.people, project, read_settings()):
            log.warning("%s", sentence)
