"""Erases people whose erasure was asked for, and trains again what had learnt from them."""

from typing import Literal

from pydantic import Field

from flows.config import PipelineConfig
from flows.pipeline_flow import pipeline_flow
from flows.rlhf import PipelineResult, rlhf
from rlhf_core.config import Section
from tasks.feedback.erasure.retraining import Again, uses, with_new_versions
from tasks.feedback.erasure.task import erase, note_retraining, open_erasures, plan_retraining


class ErasureConfig(Section):
    """Go on with erasures that `rlhf erase` began, which are known by their numbers."""

    project: str = Field(
        "demo", min_length=1, max_length=100, description="Project of the preference store"
    )
    erasure: int = Field(
        0, ge=0, description="Number of an erasure; 0 = all of the project that are not finished"
    )
    retrain: Literal["used", "all", "none"] = Field(
        "used",
        description="Which pipelines are run again on the votes that are left: those with a "
        "version in use and the last one with a reward model, all, or none",
    )
    purge_models: bool = Field(
        False, description="Delete the files of the models that learnt from the person"
    )


@pipeline_flow("erasure")
def erasure(config: ErasureConfig) -> list[str]:
    """Erase, then train again. A run that was killed goes on where it stopped, as does another one.

    Returns: where the certificates are.
    """
    certificates = []
    for number in open_erasures(config.project, config.erasure):
        certificates.append(erase(number, config.purge_models))
        _train_again(number, config)
    return certificates


def _train_again(number: int, config: ErasureConfig) -> None:
    found = plan_retraining(number, config.retrain)
    new = note_retraining(number, list(found.notes))
    old = {version for again in found.again for version in again.made.values()}
    for again in found.again:
        settings = with_new_versions(again.settings, new)
        missing = uses(settings, old)
        if missing:
            said = f"{again.name} was not trained again: it uses {missing}, which was not either"
            note_retraining(number, [said])
            continue
        result = rlhf(PipelineConfig.model_validate(settings))
        new = note_retraining(
            number, [_said(again, result)], again, result.models, result.decision.promote
        )


def _said(again: Again, result: PipelineResult) -> str:
    verdict = "passed the gate" if result.decision.promote else "did not pass the gate"
    return f"{again.name} was trained again as {result.policy.uri}, which {verdict}"
