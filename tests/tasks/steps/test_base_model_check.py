"""A base model that no reward model can be put on is refused before it is fine-tuned."""

import pytest

from rlhf_core.backbone.base_model import load_tokenizer
from rlhf_core.backbone.directory import save_model
from rlhf_core.errors import ModelError
from rlhf_core.settings.model import FreshModelConfig, ModelConfig
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


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_decoder_passes_with_or_without_a_classifier_in_transformers(source, family):
    check_base_model.fn(source(family))


def test_family_whose_classifier_has_no_scalar_head_is_refused(source):
    with pytest.raises(ModelError, match=r"CTRLForSequenceClassification has no scalar head"):
        check_base_model.fn(source("ctrl"))
