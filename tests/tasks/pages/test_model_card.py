"""The model card of a policy: Hugging Face's own parser reads it, and it says what is known."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from recorded_runs import scorecard

from tasks.lineage.records import Material, Saw
from tasks.pages.model_card import description, model_card
from tasks.registry.refs import ModelRef

POLICY = ModelRef(name="p-policy", version=3)
HOSTILE = "| a |\n\n# b <script>alert(1)</script> [c](https://evil.example) `d`"


@pytest.fixture
def facts(recorded):
    found, _ = recorded(card=scorecard())
    return replace(found, models={"policy": POLICY, "sft": ModelRef(name="p-sft", version=2)})


def loaded(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    return ModelCard.load(path)


def test_the_metadata_are_those_of_hugging_face(facts, tmp_path):
    facts.params.update(
        {
            "model.source": "HuggingFaceTB/SmolLM2-135M",
            "data.demonstrations.path": "trl-lib/tldr",
            "data.preferences.path": "/home/ada/votes.jsonl",
        }
    )
    card = loaded(model_card(facts, POLICY), tmp_path)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert card.data.datasets == ["trl-lib/tldr"]  # a file of one machine is no data set
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["rlhf", "ppo", "rlhf-pipeline"]
    assert card.data.license is None  # nobody said
    results = {result.metric_name: result for result in card.data.eval_results}
    win = results["Win rate over SFT"]
    assert (win.metric_value, win.metric_args["low"], win.metric_args["high"]) == (0.75, 0.55, 0.95)
    assert win.metric_args["judge"] == "an endpoint"
    assert results["Win rate over SFT at equal length"].metric_value == 0.65
    assert results["Length (tokens)"].metric_value == 20.0
    assert card.data.model_name == "p-policy version 3"


def test_nothing_is_invented_about_a_fresh_model(facts, tmp_path):
    card = loaded(model_card(facts, POLICY), tmp_path)
    assert card.data.base_model is None
    assert card.data.datasets is None


def test_the_text_has_the_facts_of_the_page(facts, tmp_path):
    text = loaded(model_card(facts, POLICY), tmp_path).text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# p-policy, version 3",
        "## Intended use",
        "## Training and data",
        "## Evaluation",
        "## Promotion",
        "## Limits and known doubts",
        "## More",
    ]
    for part in (
        "models:/p-policy/3 was not promoted",
        "| new policy over SFT | 75 % (55 % to 95 %) |",
        "| length | 41 tokens | at most 40 |  | FAIL |",
        "- FAIL: not approved by Ada",
        "Diagnosis: The reward model is at fault.",
        "prefers a known-bad answer (padded)",
        "`models:/p-sft/2`",
        facts.url,
    ):
        assert part in text, part


def test_texts_of_others_stay_in_their_place(facts, tmp_path):
    facts.params["model.source"] = HOSTILE
    text = loaded(model_card(replace(facts, project=HOSTILE), POLICY), tmp_path).text
    assert "<script>" not in text
    assert "\n# b" not in text
    assert "[c](" not in text
    assert "\\| a \\|" in text


def test_what_it_saw_is_counted_and_nobody_is_named(facts, tmp_path):
    material = Material(
        tables={"votes": 1200, "prompts": 0},
        annotators={"p-7f3a": {"votes": 1000}, "p-0001": {"votes": 200}},
        sources={HOSTILE: {"votes": 1200}},
        licences={"CC BY 4.0": {"votes": 1200}},
    )
    seen = Saw(
        ref=POLICY, kind="policy", state="registered", at=None, aliases=(), run_id="",
        trained=material, base_models=("gpt2",), unknown=("runs:/1/data: it is gone",),
    )  # fmt: skip
    text = loaded(model_card(facts, POLICY, seen), tmp_path).text
    section = text.partition("## What it saw")[2].partition("\n## ")[0]
    assert "| Trained on | 1,200 votes; by 2 annotators |" in section
    assert "| Licences | CC BY 4.0 (1,200) |" in section
    assert "- Not known: runs:/1/data: it is gone" in section
    assert "p-7f3a" not in text
    assert "<script>" not in text
    assert "## What it saw" not in loaded(model_card(facts, POLICY), tmp_path).text


def test_a_run_without_anything_has_a_card_too(recorded, tmp_path):
    facts, _ = recorded(decision=None)
    card = loaded(model_card(facts, POLICY), tmp_path)
    assert card.data.eval_results is None
    assert "## Evaluation" not in card.text


def test_the_description_is_short_and_leads_to_the_rest(facts):
    text = description(facts, POLICY)
    assert text.startswith("**models:/p-policy/3 was not promoted")
    assert "README.md" in text
    assert facts.page_url in text
    assert len(text) < 5000
