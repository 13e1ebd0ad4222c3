"""An ensemble is one version: stored with its folders, fetched, served, loaded by plain code."""

import mlflow
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core.backbone.directory import load_saved_tokenizer
from rlhf_core.backbone.networks import ScalarModel, start_adapter
from rlhf_core.backbone.packing import pack
from rlhf_core.errors import ModelError
from rlhf_core.rewards.ensemble import Ensemble, average_head, average_of
from rlhf_core.rewards.models import load_reward_model
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.registry.files import check_files
from tasks.serving.export import export_servable

TEXTS = ["a fine room with a view", "the film was long"]


@pytest.fixture
def ensemble_dir(policy_dir, tmp_path):
    """Two members on the tiny policy."""
    trunk = ScalarModel.from_policy(policy_dir, torch.Generator().manual_seed(0))
    members = [trunk.with_new_head(torch.Generator().manual_seed(k)) for k in (1, 2)]
    for k, member in enumerate(members):
        start_adapter(member, f"m{k}", rank=2, alpha=8, seed=k, layers=1)
        with torch.no_grad():
            for parameter in member.learnable().values():
                parameter.add_(torch.full_like(parameter, 0.1 * (k + 1)))
        member.mean, member.std = 0.1 * k, 1.0 + k
    average = average_of(members, "average")
    average_head(average, members)
    tokenizer = load_saved_tokenizer(policy_dir)
    Ensemble(members).save(tokenizer, tmp_path / "made", average=average, base=policy_dir)
    return tmp_path / "made"


@pytest.fixture
def version(settings, ensemble_dir):
    record = Record.open(settings)
    experiment = ensure_experiment(record.client, "demo", record.settings)
    run_id = record.client.create_run(experiment).info.run_id
    return record.store, record.store.publish(ensemble_dir, "demo-reward", run_id=run_id, tags={})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@torch.no_grad()
def test_every_member_comes_back_from_the_registry(version, ensemble_dir, tmp_path):
    store, ref = version
    fetched = store.fetch(ref, tmp_path / "fetched")
    model, tokenizer = load_reward_model(fetched)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = load_reward_model(ensemble_dir)[0].member_scores(pack(rows, "cpu"))
    found = model.member_scores(pack(rows, "cpu"))
    assert torch.equal(found, expected)
    plain_tokenizer = AutoTokenizer.from_pretrained(fetched / "trunk")
    base = AutoModelForSequenceClassification.from_pretrained(fetched / "trunk", num_labels=1)
    second = PeftModel.from_pretrained(base, fetched / "members" / "2")
    for column, text in enumerate(TEXTS):
        logit = second(**plain_tokenizer(text, return_tensors="pt")).logits[0, 0]
        assert (logit.item() - 0.1) / 2 == pytest.approx(found[1, column].item(), abs=1e-5)


def test_what_is_served_is_the_weight_average(version, ensemble_dir, tmp_path):
    served = mlflow.pyfunc.load_model(str(export_servable(*version, tmp_path / "servable")))
    rewards = served.predict(pd.DataFrame({"prompt": TEXTS, "response": ["", ""]}))
    average, tokenizer = ScalarModel.load(ensemble_dir), load_saved_tokenizer(ensemble_dir)
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    with torch.no_grad():
        assert rewards == pytest.approx(average.scores(pack(rows, "cpu")).tolist(), abs=1e-5)


def test_a_pickle_in_the_folder_of_a_member_is_refused(ensemble_dir):
    check_files(ensemble_dir)
    (ensemble_dir / "members" / "1" / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"optimizer\.pt is a file that can run code"):
        check_files(ensemble_dir)
