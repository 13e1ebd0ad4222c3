"""Which judge is asked about new pairs beside people."""

from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from rlhf_core.config import Section
from rlhf_core.settings.judge import PEOPLE, EndpointConfig, JudgeConfig


class AskJudgeConfig(Section):
    """A machine that answers new pairs beside people, in both orders, as one more annotator."""

    source: str = Field(
        "",
        max_length=500,
        description="empty = nobody; reward_model = the newest one of the project; "
        "models:/NAME/VERSION or models:/NAME@ALIAS = another in the registry; "
        "package.module:function = a Python function, as judge.source of the pipeline has it; "
        "endpoint = a model behind an OpenAI-compatible endpoint",
    )
    endpoint: EndpointConfig = Field(
        default_factory=EndpointConfig, description="Used when `source` is endpoint"
    )
    name: str = Field(
        "",
        max_length=150,
        pattern=r"^[^\x00-\x1f\x7f-\x9f]*$",
        description="The annotator is called judge:NAME; empty = the name of the model or of the "
        "function. Another question or model of the same name needs another one",
    )
    if_down: Literal["wait", "people"] = Field(
        "wait",
        description="What becomes of pairs when the judge fails midway: wait = they are in no "
        "queue until the same call has gone on; people = people answer them",
    )

    @model_validator(mode="after")
    def _is_a_machine(self) -> Self:
        if self.source == PEOPLE:
            raise ValueError(
                "people answer what the judge leaves them: set source to a model, a function or "
                "endpoint, or leave it empty"
            )
        try:
            self.as_judge()
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ValueError(said.replace(", endpoint or people", " or endpoint")) from None
        return self

    def as_judge(self, source: str = "") -> JudgeConfig:
        """The same as the judge of an evaluation.

        Args:
            source: the version that `source` stood for.
        """
        return JudgeConfig(source=source or self.source, endpoint=self.endpoint)
