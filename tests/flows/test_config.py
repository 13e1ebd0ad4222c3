"""The config of a pipeline: what must fit between its sections, in YAML and in a form."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from flows.config import ALGORITHMS, PipelineConfig
from rlhf_core.doubts import doubts
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.stages.prepare import inspect
from rlhf_core.stages.table import algorithms

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_defaults_fit_together_with_a_hub_model():
    config = PipelineConfig(model={"source": "gpt2"})
    assert config.project == "demo"
    assert config.sft.reuse == config.reward_model.reuse == ""


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configs_are_valid(path):
    config = PipelineConfig.model_validate(yaml.safe_load(path.read_text()))
    assert PipelineConfig.model_validate_json(config.model_dump_json()) == config


def test_configs_are_found():
    assert "demo" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configs_raise_no_doubts(path):
    assert doubts(PipelineConfig.model_validate(yaml.safe_load(path.read_text())).chosen) == []


def test_the_demo_and_its_data_raise_no_doubts():
    (path,) = (path for path in CONFIGS if path.stem == "demo")
    config = PipelineConfig.model_validate(yaml.safe_load(path.read_text()))
    found = inspect(config.data, config.model, config.length_limits, config.seed)
    assert len(found.truncated) == 4
    assert doubts(config.chosen, found) == []


def test_the_report_counts_what_the_doubts_look_up():
    """The doubts find a count by its name: a limit that cuts everything is told for each name."""
    short = {
        "model": {"fresh": {"context": 64}},
        "data": {"simulation": {"prompts": 40, "demonstrations": 60, "preference_pairs": 60}},
        "sft": {"max_length": 2, "batch_size": 8},
        "reward_model": {"max_length": 2, "batch_size": 8},
        "sampling": {"max_prompt_length": 1, "max_new_tokens": 1},
    }
    config = PipelineConfig.model_validate(short)
    found = inspect(config.data, config.model, config.length_limits, config.seed)
    names = {sentence.partition(" ")[0] for sentence in doubts(config.chosen, found)}
    lengths = {"sft.max_length", "reward_model.max_length"}
    assert names == lengths | {"sampling.max_prompt_length", "sampling.max_new_tokens"}


def number_fields(schema, prefix=()):
    """The path of every setting that is a float."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from number_fields(field.annotation, (*prefix, name))
        elif field.annotation is float:
            yield (*prefix, name)


NUMBERS = list(number_fields(PipelineConfig))


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "'NaN'", "Infinity", "1e999"])
def test_no_setting_is_infinite_or_no_number(value):
    assert len(NUMBERS) > 40
    for path in NUMBERS:
        given = yaml.safe_load(value)
        for part in reversed(path):
            given = {part: given}
        with pytest.raises(ValidationError) as error:
            PipelineConfig.model_validate({"model": {"source": "gpt2"}, **given})
        assert error.value.errors()[0]["loc"] == path
    reward = {"ppo": {"rewards": [{"weight": yaml.safe_load(value)}]}}
    with pytest.raises(ValidationError, match="weight"):
        PipelineConfig.model_validate({"model": {"source": "gpt2"}, **reward})


@pytest.mark.parametrize(
    ("section", "name", "most"),
    [
        ("sft", "epochs", 10_000),
        ("reward_model", "epochs", 10_000),
        ("dpo", "epochs", 10_000),
        ("ppo", "epochs", 10_000),
        ("ppo", "iterations", 1_000_000),
        ("evaluation", "prompts", 1_000_000),
        ("evaluation", "samples_per_prompt", 10_000),
        ("evaluation", "best_of", 10_000),
    ],
)
def test_numbers_that_nobody_means_are_refused(section, name, most):
    given = {"model": {"source": "gpt2"}}
    PipelineConfig.model_validate({**given, section: {name: most}})
    for number in (most + 1, 10**9, 10**30):
        with pytest.raises(ValidationError, match=f"less than or equal to {most}"):
            PipelineConfig.model_validate({**given, section: {name: number}})


def test_a_seed_is_one_that_every_library_takes():
    PipelineConfig(model={"source": "gpt2"}, seed=2**63 - 1)
    for seed in (2**63, 2**64, 10**20):
        with pytest.raises(ValidationError, match="seed"):
            PipelineConfig(model={"source": "gpt2"}, seed=seed)


def test_a_project_s_name_is_short_enough_for_a_folder_and_a_model():
    PipelineConfig(model={"source": "gpt2"}, project="a" * 100)
    with pytest.raises(ValidationError, match="at most 100 characters"):
        PipelineConfig(model={"source": "gpt2"}, project="a" * 101)


FRESH = {"model": {"fresh": {"context": 64}}}
SHORT = {
    "sft": {"max_length": 64},
    "reward_model": {"max_length": 64},
    "sampling": {"max_prompt_length": 32, "max_new_tokens": 32},
}


def test_texts_may_fill_the_context_of_a_fresh_model():
    PipelineConfig.model_validate(FRESH | SHORT)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sft": {"max_length": 65}}, r"sft\.max_length is 65, .*context is 64"),
        ({"reward_model": {"max_length": 65}}, r"reward_model\.max_length is 65, .* 64"),
        ({"algorithm": "dpo", "dpo": {"max_length": 65}}, r"dpo\.max_length is 65, .* 64"),
        (
            {"sampling": {"max_prompt_length": 33, "max_new_tokens": 32}},
            r"sampling\.max_prompt_length \+ max_new_tokens is 65, .* 64",
        ),
    ],
)
def test_texts_longer_than_a_fresh_model(section, said):
    with pytest.raises(ValidationError, match=said):
        PipelineConfig.model_validate(FRESH | SHORT | section)
    # With a model that is there already, the stage asks the model.
    for other in ({"model": {"source": "gpt2"}}, {"sft": {"reuse": "models:/demo-sft/1"}}):
        merged = FRESH | SHORT | section
        for name, values in other.items():
            merged[name] = merged.get(name, {}) | values
        PipelineConfig.model_validate(merged)


def test_a_protected_column_has_to_be_kept_with_the_prompts():
    prompts = {"path": "prompts.jsonl", "keep": ["lang", "meta.topic"]}
    given = {"model": {"source": "gpt2"}, "promotion": {"protected": ["lang", "meta.topic"]}}
    files = {"source": "files", "demonstrations": {"path": "d.jsonl"}}
    files["preferences"] = {"path": "p.jsonl"}
    PipelineConfig.model_validate({**given, "data": {**files, "prompts": prompts}})
    prompts["keep"] = ["lang"]
    with pytest.raises(ValidationError, match=r"protected names meta\.topic, but data\.prompts"):
        PipelineConfig.model_validate({**given, "data": {**files, "prompts": prompts}})


def test_only_the_section_of_the_chosen_algorithm_has_to_fit():
    config = PipelineConfig.model_validate(FRESH | SHORT | {"dpo": {"max_length": 65}})
    assert config.policy == config.ppo
    short = SHORT | {"dpo": {"max_length": 64}}
    for algorithm in ("ppo", "rloo", "grpo", "dpo"):
        config = PipelineConfig.model_validate(FRESH | short | {"algorithm": algorithm})
        assert config.policy == getattr(config, algorithm)


def test_minibatch_larger_than_the_roll_out():
    settings = {"model": {"source": "gpt2"}, "ppo": {"batch_size": 64, "rollout_size": 32}}
    with pytest.raises(ValidationError, match=r"batch_size 64 is larger than .* 32") as error:
        PipelineConfig.model_validate(settings)
    assert [problem["loc"] for problem in error.value.errors()] == [("ppo",)]


@pytest.mark.parametrize("project", ["demo", "a", "7", "my-team-2"])
def test_project_names(project):
    assert PipelineConfig(project=project, model={"source": "gpt2"}).project == project


@pytest.mark.parametrize("project", ["", "Demo", "-demo", "demo-", "my_team", "a b", "a/b", "a\n"])
def test_names_that_a_registry_could_not_use(project):
    with pytest.raises(ValidationError, match="project"):
        PipelineConfig(project=project, model={"source": "gpt2"})


@pytest.mark.parametrize(
    "settings",
    [
        {"sede": 1},
        {"ppo": {"kl_coeff": 0.1}},
        {"model": {"fresh": {"depth": 2}}},
        {"sft": {"re_use": ""}},
    ],
)
def test_misspelt_settings_are_refused_at_every_level(settings):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        PipelineConfig.model_validate({"model": {"source": "gpt2"}} | settings)


def test_a_config_never_changes():
    config = PipelineConfig(model={"source": "gpt2"})
    with pytest.raises(ValidationError, match="frozen"):
        config.ppo.kl_coef = 1.0


def test_length_limits_are_those_of_the_stages():
    limits = PipelineConfig.model_validate(
        {
            "model": {"source": "gpt2"},
            "sft": {"max_length": 11},
            "reward_model": {"max_length": 12},
            "sampling": {"max_prompt_length": 13, "max_new_tokens": 14},
        }
    ).length_limits
    assert (limits.sft, limits.reward, limits.prompt, limits.response) == (11, 12, 13, 14)


def fields(schema):
    """Every field of every section: its name and its part of the schema."""
    for section in [schema, *schema["$defs"].values()]:
        for name, field in section.get("properties", {}).items():
            yield f"{section['title']}.{name}", field


def test_every_field_says_what_it_is_and_a_form_can_ask_for_it():
    # Prefect's form cannot submit a union, and shows a field by its description.
    found = dict(fields(PipelineConfig.model_json_schema()))
    assert len(found) > 80
    for name, field in found.items():
        assert field.get("description"), name
        assert not {"anyOf", "oneOf", "allOf"} & set(field), name
        assert "default" in field or "$ref" in field, name


def test_numbers_have_bounds():
    unbounded = [
        name
        for name, field in fields(PipelineConfig.model_json_schema())
        if field.get("type") in ("integer", "number")
        and not {"minimum", "exclusiveMinimum"} & set(field)
    ]
    # A weight and a stand-in for a score may have either sign.
    assert {name.partition(".")[2] for name in unbounded} == {"missing_eos_value", "weight"}


def test_the_form_names_a_field_as_yaml_does():
    definitions = PipelineConfig.model_json_schema()["$defs"]
    assert definitions["PPOConfig"]["properties"]["kl_coef"]["title"] == "kl_coef"


def test_a_seed_beyond_what_torch_takes_is_refused():
    assert PipelineConfig(model={"source": "gpt2"}, seed=2**63 - 1).seed == 2**63 - 1
    for seed in (2**63, 10**20, -1):
        with pytest.raises(ValidationError, match="seed"):
            PipelineConfig(model={"source": "gpt2"}, seed=seed)


# ---- tournament ----


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_a_tournament_chooses_how_often_a_policy_is_kept(algorithm):
    section = {"iterations": 30}
    config = PipelineConfig.model_validate(
        {"algorithm": algorithm, algorithm: section, "tournament": {"checkpoints": 6}}
    )
    assert config.policy.keep_every == 0
    assert config.optimised == config.policy.model_copy(update={"keep_every": 5})
    assert config.chosen.trainings[algorithm].keep_every == 5
    kept = {algorithm: {**section, "keep_every": 2}, "algorithm": algorithm}
    config = PipelineConfig.model_validate({**kept, "tournament": {"checkpoints": 6}})
    assert config.optimised.keep_every == 2
    assert PipelineConfig.model_validate(kept).optimised.keep_every == 2
    assert PipelineConfig(algorithm=algorithm).optimised.keep_every == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "dpo"}, "checkpoints is 6, but dpo keeps no policies along the way; set it"),
        ({"ppo": {"iterations": 5}}, "but ppo will keep 5 with iterations 5 and keep_every 0"),
        ({"ppo": {"iterations": 30, "keep_every": 10}}, "will keep 3 with iterations 30"),
    ],
)
def test_a_tournament_without_its_checkpoints_is_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        PipelineConfig.model_validate({**settings, "tournament": {"checkpoints": 6}})


def test_known_answers_of_the_store_have_one_name():
    store = {"source": "files", "preferences": {"store": "demo"}}
    settings = {"annotators": "aware", "gold_annotator": "truth"}
    with pytest.raises(ValidationError, match=r"are those of gold; remove\s+gold_annotator"):
        PipelineConfig.model_validate({"data": store, "reward_model": settings})
    PipelineConfig.model_validate(
        {"data": store, "reward_model": settings | {"annotators": "pooled"}}
    )
    files = {"source": "files", "preferences": {"path": "votes.jsonl"}}
    PipelineConfig.model_validate({"data": files, "reward_model": settings})


def test_the_truth_of_the_evaluation_is_that_of_the_tournament():
    truth = "rlhf_core.simulation:true_reward"
    config = PipelineConfig.model_validate({"evaluation": {"true_reward": truth}})
    assert config.contest.true_reward == truth
    own = config.model_copy(update={"tournament": TournamentConfig(true_reward="ours:truth")})
    assert own.contest.true_reward == "ours:truth"
    assert ("tournament.true_reward", "ours:truth") in own.reward_functions


def test_settings_load_without_torch():
    code = (
        "import sys, flows.config; "
        "print({'torch', 'transformers', 'pandas', 'numpy', 'mlflow', 'prefect'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_algorithms_of_the_config_are_those_of_the_table():
    assert [*ALGORITHMS] == algorithms()
