"""The class of a scalar model: a transformer body and a linear head `score`, for any decoder.

Where transformers has no sequence classifier for a family, its own generic one is put on the
family's body. A folder that such a model is saved to holds the body as `AutoModel` reads it, and
the head as `score.weight`.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rlhf_core.errors import ModelError


def classifiers(config: PreTrainedConfig) -> Any:
    """`AutoModelForSequenceClassification`, once it knows a class for this config.

    Raises: ModelError when the family is no decoder.
    """
    kind = type(config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        # Without `exist_ok` a class for a config of transformers' own is ignored.
        AutoModelForSequenceClassification.register(kind, _classifier(kind), exist_ok=True)
    return AutoModelForSequenceClassification


def on_body(body: PreTrainedModel) -> PreTrainedModel:
    """A classifier with one output and no trained head on the body of a family that has none.

    The body is loaded by itself, because transformers leaves buffers that are computed and not
    saved without a value when it loads a generic classifier.
    """
    body.config.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = classifiers(body.config).from_config(body.config)
    setattr(model, model.base_model_prefix, body)
    model.score = nn.Linear(model.score.in_features, 1, bias=False)
    return model


def has_classifier(config: PreTrainedConfig) -> bool:
    """Whether transformers itself has a sequence classifier for this config."""
    return config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def _classifier(kind: Any) -> type[PreTrainedModel]:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"models of type {kind.model_type} cannot score texts; use a decoder-only model "
            "(GPT-2, Llama, Qwen, SmolLM, Mistral, Gemma, ...)"
        )
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    # What the classes of a family have in common: its names, initialisation and attention.
    family = next(base for base in causal.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = causal.__name__.replace("CausalLM", "").replace("LMHeadModel", "").removesuffix("For")
    return type(
        f"{name}ForSequenceClassification",
        (GenericForSequenceClassification, family),
        # Transformers reads in the source of its module what a family supports.
        {
            "base_model_prefix": causal.base_model_prefix,
            "config_class": kind,
            "__module__": causal.__module__,
        },
    )
