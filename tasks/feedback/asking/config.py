"""What `rlhf ask` and the flow `feedback` are told: whose answers people compare, and to what."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf_core.config import FileOrHub, Section
from rlhf_core.labelling.router import RouterConfig
from tasks.feedback.routing.config import AskJudgeConfig

DEPLOYMENT = r"^([^/\s][^/]*/[^/]*[^/\s])?$"
_VERSION = r"models:/[A-Za-z0-9][A-Za-z0-9._-]*(/[1-9][0-9]*|@[A-Za-z0-9_-]+)"


class AskConfig(Section):
    """Sample answers to prompts, and queue pairs of them for people."""

    project: str = Field(
        "demo",
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        max_length=100,
        description="Project of the preference store; it is made if there is none",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**63 - 1,
        description="Draws the prompts and the answers; the same call asks for the same pairs",
    )
    policy: str = Field(
        "",
        pattern=rf"^({_VERSION})?$",
        description="Who answers: models:/NAME/VERSION or models:/NAME@ALIAS; empty = the champion "
        "of the project",
    )
    against: str = Field(
        "",
        pattern=rf"^({_VERSION})?$",
        description="Another version, whose answers meet those of the first; empty = the answers "
        "of one policy meet each other",
    )
    prompts: int = Field(
        100, ge=1, le=1_000_000, description="Prompts to answer, drawn by the seed"
    )
    data: str = Field(
        "",
        pattern=r"^(runs:/[0-9a-f]{32}/data)?$",
        description="Prepared data with the prompts: runs:/RUN_ID/data; empty = those that the "
        "policy was trained on. Only their training side is asked about",
    )
    file: FileOrHub = Field(
        "", description="A file or data set with prompts of your own; empty = those of `data`"
    )
    evaluation: bool = Field(
        False,
        description="Ask about the held-out prompts, to compare two versions; these votes are in "
        "no training",
    )
    answers: int = Field(2, ge=1, le=100, description="Answers of a policy to each prompt")
    pairs: Literal["all", "ring"] = Field(
        "all",
        description="Which answers to a prompt meet: all, or in a ring each the next one; with "
        "`against`, all of one with all of the other, or the n-th with the n-th",
    )
    max_new_tokens: int = Field(
        0, ge=0, le=1_000_000, description="Longest answer (tokens); 0 = as in its training"
    )
    temperature: float = Field(
        0.0, ge=0, le=100, description="Sampling temperature; 0 = as in its training"
    )
    votes_per_pair: int = Field(
        0, ge=0, le=1000, description="People asked about each pair; 0 = as the project's rules say"
    )
    priority: int = Field(0, ge=-1000, le=1000, description="Place in the queue: lower is sooner")
    enough: float = Field(
        1.0, gt=0, le=1, description="Share of the pairs that completes the batch when answered"
    )
    enough_pairs: int = Field(
        0,
        ge=0,
        le=100_000_000,
        description="Or so many of them, if that is less (pairs; 0 = the share alone)",
    )
    days: float = Field(
        7.0,
        gt=0,
        le=3650,
        description="After this time the batch is complete with what is answered (days)",
    )
    then: str = Field(
        "",
        pattern=DEPLOYMENT,
        max_length=200,
        description="Deployment that is run once the batch is complete, as retrain/demo; empty = "
        "none",
    )
    source: str = Field(
        "",
        max_length=300,
        description="Where prompts and answers come from; empty = said by itself",
    )
    licence: str = Field(
        "", max_length=300, description="Licence of prompts and answers, kept with each pair"
    )

    judge: AskJudgeConfig = Field(
        default_factory=AskJudgeConfig,
        description="A machine that answers each new pair beside people; by default none",
    )
    router: RouterConfig = Field(
        default_factory=RouterConfig,
        description="Which of its answers stand alone, where there is a judge",
    )

    @model_validator(mode="after")
    def _there_are_pairs(self) -> Self:
        if not self.against and self.answers < 2:
            raise ValueError(
                "one answer to a prompt meets no other: set answers to 2 or more, or against to "
                "another version"
            )
        if self.evaluation and not self.against:
            raise ValueError(
                "evaluation is for comparing two versions on the held-out prompts: set against, or "
                "leave evaluation out"
            )
        if self.evaluation and self.file:
            raise ValueError(
                "evaluation takes the held-out prompts of the data, and file others: set one of "
                "them"
            )
        if self.evaluation and self.then:
            raise ValueError(
                "votes on held-out prompts are in no training: leave `then` out, or evaluation"
            )
        if self.evaluation and self.judge.source:
            raise ValueError(
                "evaluation asks people alone, and judge is for pairs to train on: leave one of "
                "them out; judge.source of a pipeline compares policies"
            )
        return self
