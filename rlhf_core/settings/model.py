"""The model that fine-tuning starts from, its number format, and how it is sampled."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.config import FileOrHub, Later, Section

Precision = Literal["float32", "bfloat16", "auto"]


class FreshModelConfig(Section):
    """A small GPT-2 with random weights and a byte-level BPE tokenizer trained on the data."""

    layers: int = Field(2, ge=1, le=1000, description="Transformer blocks")
    width: int = Field(128, ge=8, le=65_536, description="Hidden size; a multiple of `heads`")
    heads: int = Field(4, ge=1, le=1024, description="Attention heads")
    context: int = Field(512, ge=8, le=1_000_000, description="Longest text (tokens)")
    vocab_size: int = Field(
        1024, ge=260, le=1_000_000, description="Tokens in the vocabulary, at most"
    )


class ModelConfig(Section):
    """The model that fine-tuning starts from."""

    source: FileOrHub = Field(
        "",
        description="Hub id, local folder, .gguf file, or package:NAME/FILE for a file in a "
        "Python package; empty = a fresh model",
    )
    revision: str = Field("main", description="Branch, tag or commit of a hub model")
    fresh: FreshModelConfig = Field(
        default_factory=FreshModelConfig, description="Used when `source` is empty"
    )

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        width, heads = self.fresh.width, self.fresh.heads
        if not self.source and width % heads:
            raise ValueError(
                f"fresh.width {width} is not a multiple of fresh.heads {heads}; change one of them"
            )
        return self


class SamplingConfig(Section):
    """How responses are sampled: in reward normalisation, on-policy stages and evaluation."""

    max_prompt_length: int = Field(
        256,
        ge=1,
        description="Longest prompt (tokens); of longer ones whole turns are dropped first, from "
        "the oldest on, or a text loses its start",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest response (tokens)")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Divides the logits, in sampling and in the log-probabilities of samples",
    )
    batch_size: int = Field(128, ge=1, description="Prompts sampled in one batch")
    engine: Annotated[Literal["builtin", "vllm"], Later] = Field(
        "builtin",
        description="Who samples the roll-outs of PPO, RLOO and GRPO: the training itself, or the "
        "vLLM servers at RLHF_VLLM_URLS",
    )
    max_importance: Annotated[float, Later] = Field(
        2.0,
        ge=1,
        description="Cap of a token's weight π/π_engine in the policy loss; without vllm all are 1",
    )
    max_engine_kl: Annotated[float, Later] = Field(
        0.1,
        gt=0,
        description="Mean gap of the engine's log-probabilities to the policy's at which the run "
        "stops (nats a token)",
    )

    @property
    def in_process(self) -> Self:
        """The same without another engine, for whatever is no roll-out."""
        fields = type(self).model_fields
        names = ("engine", "max_importance", "max_engine_kl")
        return self.model_copy(update={name: fields[name].default for name in names})

    @property
    def max_length(self) -> int:
        """Longest prompt plus longest response (tokens)."""
        return self.max_prompt_length + self.max_new_tokens
