"""A base model that no reward model can be put on is refused before it is fine-tuned."""

import pytest

from rlhf_core.backbone.base_model import FreshModelConfig, ModelConfig, load_tokenizer
from rlhf_core.backbone.directory import save_model
from rlhf_core.errors import ModelError
from tasks.steps.reward_model import check_base_model
from tests.core.backbone.families import build


@pytest.fixture
def source(tmp_path):
    """A saved model of a family, as a source."""
    tokenizer = load_tokenizer(ModelConfig(fresh=FreshModelConfig(vocab_size=260)), ["a"])

    def saved(family):
        save_model(build(family), tokenizer, tmp_path / family, kind="policy")
        return ModelConfig(source=str(tmp_path / family))

    return saved


def test_family_with_a_classifier_passes(source):
    check_base_model.fn(source("llama"))


def test_family_without_one_passes_if_its_body_computes_the_right_states(source):
    check_base_model.fn(source("granite"))


def test_family_whose_body_does_not_is_refused(source):
    with pytest.raises(ModelError, match=r"FalconH1ForSequenceClassification.* NaN or infinity"):
        check_base_model.fn(source("falcon_h1"))
