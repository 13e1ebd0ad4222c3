"""The code of a stage: what it imports is a part of it, and nothing else is."""

import json
import shutil
import subprocess
import sys

import pytest

from rlhf_core.config import identifying
from rlhf_core.settings.model import SamplingConfig
from tasks.record import identity
from tasks.record.identity import STARTS, closure, stage_code

STAGES = ("prepare", "sft", "reward_model", "ppo", "rloo", "grpo", "dpo", "evaluation", "promotion")
# Functions of the core that settings may name.
TRUTH = {"evaluation": {"true_reward": "rlhf_core.simulation:true_reward"}}


@pytest.fixture
def core(tmp_path, monkeypatch):
    """A copy of the core that may be changed."""
    copy = tmp_path / "rlhf_core"
    shutil.copytree(identity.ROOT, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(identity, "ROOT", copy)
    closure.cache_clear()
    yield copy
    closure.cache_clear()


def codes(settings=None) -> dict[str, str]:
    closure.cache_clear()
    return {stage: stage_code(stage, settings or {}) for stage in STAGES}


def changed(core, path, settings=None) -> set[str]:
    """The stages that are others once a comment has come into a file."""
    before = codes(settings)
    with (core / path).open("a") as file:
        file.write("# a comment\n")
    after = codes(settings)
    return {stage for stage in STAGES if before[stage] != after[stage]}


TRAINED = {"sft", "reward_model", "ppo", "rloo", "grpo", "dpo"}


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("stages/evaluation.py", {"evaluation"}),
        ("promotion/rules.py", {"promotion"}),
        ("stages/sft.py", {"sft"}),
        ("stages/ppo.py", {"ppo"}),
        ("onpolicy/update.py", {"ppo", "rloo", "grpo"}),
        ("functional/losses.py", TRAINED),
        ("functional/logprobs.py", TRAINED | {"evaluation"}),
        ("backbone/packing.py", set(STAGES) - {"promotion"}),
        ("launch.py", set()),
        ("__init__.py", set(STAGES)),
    ],
)
def test_a_change_makes_those_stages_others_that_run_it(core, path, stages):
    assert changed(core, path) == stages


def test_a_new_file_that_nobody_imports_changes_nothing(core):
    before = codes()
    (core / "stages" / "report_card.py").write_text("import rlhf_core.stages.sft\n")
    assert codes() == before


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_an_import_really_loads_is_in_it(stage):
    """Python's own answer; functions may import more when they are called."""
    start = STARTS.get(stage, f"rlhf_core.stages.{stage}")
    code = (
        f"import json, sys, {start}; print(json.dumps([m.__file__ for n, m in sys.modules.items() "
        "if n.partition('.')[0] == 'rlhf_core']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded <= {str(path) for path in closure(start)}
    assert 3 * len(closure(start)) < 2 * len(list(identity.ROOT.rglob("*.py")))


def test_a_stage_that_nobody_knows_has_the_whole_core(core):
    before = stage_code("toy", {})
    (core / "launch.py").write_text("")
    assert stage_code("toy", {}) != before


def test_a_function_of_the_core_that_settings_name_is_a_part(core):
    assert "evaluation" not in changed(core, "simulation/truth.py")
    assert "evaluation" in changed(core, "simulation/truth.py", TRUTH)


def test_a_function_of_the_user_that_settings_name_is_a_part(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    rules = tmp_path / "rules_of_test_identity.py"
    settings = {"ppo": {"rewards": [{"source": "rules_of_test_identity:polite", "weight": 1.0}]}}
    absent = stage_code("ppo", settings)
    rules.write_text("def polite(prompts, responses): return [0.0] * len(prompts)\n")
    first = stage_code("ppo", settings)
    rules.write_text("def polite(prompts, responses): return [1.0] * len(prompts)\n")
    second = stage_code("ppo", settings)
    assert len({absent, first, second, stage_code("ppo", {})}) == 3  # absent is as if not named
    assert stage_code("ppo", {}) == absent


def test_a_function_of_the_working_folder_is_a_part_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    settings = {"ppo": {"rewards": [{"source": "rules_of_the_working_folder:polite"}]}}
    without = stage_code("ppo", settings)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules_of_the_working_folder.py").write_text("def polite(p, r): return [0.0]\n")
    assert stage_code("ppo", settings) != without


def test_settings_that_came_later_are_in_the_key_only_when_they_are_changed():
    before = {"max_prompt_length": 256, "max_new_tokens": 64, "temperature": 1.0}
    before |= {"batch_size": 128}
    assert identifying(SamplingConfig()) == before  # what a key was made of without them
    assert identifying(SamplingConfig(engine="vllm")) == {**before, "engine": "vllm"}
    changed = SamplingConfig(engine="vllm", max_importance=3.0)
    assert identifying(changed.in_process) == before
    assert changed.model_dump() == {**before, **changed.model_dump()}  # recorded in any case


def test_other_releases_of_the_libraries_are_other_code(monkeypatch):
    before = codes()
    monkeypatch.setattr(identity, "version", lambda name: f"9.9 of {name}")
    assert all(before[stage] != code for stage, code in codes().items())
