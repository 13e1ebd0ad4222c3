"""Asks people: pairs of a policy's answers go into the queue of annotators."""

from flows.pipeline_flow import pipeline_flow
from tasks.feedback.asking.ask import Asked, ask_people
from tasks.feedback.asking.config import AskConfig
from tasks.feedback.ordering.task import order_after_asking


@pipeline_flow("feedback")
def feedback(config: AskConfig) -> Asked:
    """Sample answers to prompts, and queue pairs of them for people.

    The answers are those of the champion, or of two versions. Votes on them are the preferences of
    a pipeline with `data.preferences.store`.
    """
    asked = ask_people(config)
    if not config.evaluation:  # whose order nobody may choose
        order_after_asking(config.project)
    return asked
