"""The documentation says what the code does: settings, metrics, links, examples, commands."""

import ast
import contextlib
import importlib.util
import inspect
import io
import pkgutil
import re
import tomllib
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
import yaml
from typer.main import get_command

from flows.__main__ import app
from flows.config import PipelineConfig
from flows.retrain import RetrainPlan
from rlhf_core import functional
from rlhf_core.data.formats import parse
from rlhf_core.data.sources import read_rows
from rlhf_core.doubts import doubts
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.fields import TABLE_KINDS
from rlhf_core.stages.table import STAGES as TABLE
from rlhf_core.stages.table import run_stage
from rlhf_core.work import Work

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]

TINY = """
model:
  fresh: {layers: 1, width: 16, heads: 2, context: 200, vocab_size: 300}
data:
  simulation: {prompts: 60, demonstrations: 40, preference_pairs: 40}
  eval_fraction: 0.3
sampling: {max_prompt_length: 40, max_new_tokens: 8}
sft: {max_length: 48, evaluations: 1}
reward_model: {max_length: 48, normalization_samples: 4, lora_rank: 2, members: 2}
report_card: {max_length: 200, min_slice_prompts: 1, samples: 8}
ppo: {iterations: 1, rollout_size: 4, batch_size: 4, epochs: 1, rewards: &parts [
  {source: reward_model}, {source: "rlhf_core.simulation:true_reward", weight: 0.5}]}
rloo: {iterations: 1, rollout_size: 4, batch_size: 4, epochs: 1, rewards: *parts}
grpo: {iterations: 1, rollout_size: 4, batch_size: 4, epochs: 1, rewards: *parts}
dpo: {max_length: 48}
tournament: {prompts: 10, true_reward: "rlhf_core.simulation:true_reward"}
evaluation: {prompts: 16, best_of: 2, true_reward: "rlhf_core.simulation:true_reward"}
"""


STAGES = [name for name in TABLE if name != "held_out"]  # it is reward_model on other votes


def ids(page):
    return str(page.relative_to(ROOT))


def fenced(text, language):
    """Info string and content of the fenced blocks of a language."""
    return re.findall(rf"^```({language}[^\n]*)\n(.*?)^```", text, re.M | re.S)


# ---- settings ----


def test_the_configuration_page_is_what_the_schema_gives():
    spec = importlib.util.spec_from_file_location("page", DOCS / "generate_configuration.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.render(), (
        "run .venv/bin/python docs/generate_configuration.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_yaml_example_is_a_config(page):
    for _, text in fenced(page.read_text(encoding="utf-8"), "yaml"):
        if text.startswith("# configs/retrain/"):
            RetrainPlan.model_validate(yaml.safe_load(text))
            continue
        # A part of a config stands for a model that reads long texts, as the fresh one does not.
        given = {"model": {"source": "gpt2"}, **yaml.safe_load(text)}
        assert doubts(PipelineConfig.model_validate(given).chosen) == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_setting_that_is_named_exists(page):
    sections = "|".join(PipelineConfig.model_fields)
    named = re.findall(
        rf"(?:--set |`)((?:{sections})\.[a-z_.]+)\b", page.read_text(encoding="utf-8")
    )
    for name in named:
        schema = PipelineConfig
        for part in name.split("."):
            assert part in getattr(schema, "model_fields", {}), f"there is no setting {name}"
            schema = schema.model_fields[part].annotation


# ---- metrics ----


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The names of all metrics of each stage, as a run of them on the smallest data logs them."""
    root = tmp_path_factory.mktemp("stages")
    settings = yaml.safe_load(TINY)
    for algorithm in ("ppo", "rloo", "grpo"):  # what adds a metric is on
        settings.setdefault(algorithm, {})["shaping"] = {"clip": 5}
    config = PipelineConfig.model_validate(settings)
    made = {kind: root / kind for kind in ("data", "sft", "reward", "policy")}
    made["champion"] = made["sft"]
    sections = {
        "model": config.model,
        "limits": config.length_limits,
        "sampling": config.sampling,
        "judge": config.judge,
    }
    loggers = {name: MemoryLogger() for name in STAGES}

    def report(name, section=None):
        spec = TABLE[name]
        # The policy of PPO, the first that is made, is the one that is evaluated.
        outputs = {
            kind: made[kind] if kind in made and not made[kind].exists() else root / name / kind
            for kind in spec.outputs
        }
        roles = {*spec.inputs, *spec.optional_inputs} & made.keys()
        work = Work(
            inputs={role: made[role] for role in roles},
            outputs=outputs,
            sections={key: sections[key] for key in spec.sections},
            logger=loggers[name],
        )
        section = section or (config.data if name == "prepare" else getattr(config, name))
        return run_stage(name, section, work)

    reports = {name: [report(name)] for name in STAGES}
    # Members and annotators add other metrics, and do not go together.
    aware = {"members": 1, "annotators": "aware"}
    reports["reward_model"] += [
        report("reward_model", config.reward_model.model_copy(update=aware))
    ]
    return {
        name: {general(key, stage=name) for _, values in loggers[name].history for key in values}
        | {general(f"summary/{key}", stage=name) for one in found for key in one.summary()}
        for name, found in reports.items()
    }


def general(name, *, stage=""):
    """The name of a metric as the pages write it: without parts of a reward, arms and bounds."""
    name = re.sub(r"^reward/(?!spread$).+", "reward/NAME", name)
    if stage not in ("evaluation", "report_card"):
        return name
    name = re.sub(r"_(low|high)$", "", name)
    name = re.sub(r"^summary/canary/.+", "summary/canary/KIND", name)
    name = re.sub(r"^summary/judge/canary/.+", "summary/judge/canary/KIND", name)
    name = re.sub(r"/sign_\w+", "/sign_KIND", name)
    pair = r"(win_rate|length_controlled_win_rate)"
    name = re.sub(rf"^summary/{pair}/.+", r"summary/\1/CANDIDATE_over_OPPONENT", name)
    difference = "summary/win_rate_difference/FIRST_minus_SECOND_over_OPPONENT"
    name = re.sub(r"^summary/win_rate_difference/.+", difference, name)
    return re.sub(r"^summary/(base|sft|policy|best_of_n|champion)/", "summary/ARM/", name)


def documented(page, heading):
    """The names in the first column of the tables below a heading."""
    section = re.split(rf"^## {heading}$", page.read_text(encoding="utf-8"), flags=re.M)[1]
    section = re.split(r"^## ", section, flags=re.M)[0]
    cells = re.findall(r"^\| (`.+?`) \|", section, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_metric_is_defined_and_every_definition_is_logged(logged, stage):
    assert documented(DOCS / "metrics.md", stage) == logged[stage]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_page_of_an_algorithm_explains_each_of_its_metrics(logged, stage):
    page = DOCS / "algorithms" / f"{stage}.md"
    assert documented(page, "Logged metrics") == logged[stage]


# ---- the function layer ----


def test_the_reference_lists_every_function():
    page = (DOCS / "functional.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(\.\./rlhf_core/functional/(\w+)\.py\) \|", page, re.M)
    found = [
        (name, module.name)
        for module in pkgutil.iter_modules(functional.__path__)
        if not module.name.startswith("_")
        for name, value in vars(
            importlib.import_module(f"{functional.__name__}.{module.name}")
        ).items()
        if not name.startswith("_") and is_part(value, f"{functional.__name__}.{module.name}")
    ]
    assert sorted(listed) == sorted(found)


def is_part(value, module):
    """Whether it is a function of that module, or a class with a state and not just a protocol."""
    if getattr(value, "__module__", "") != module:
        return False
    controller = hasattr(value, "update") and not getattr(value, "_is_protocol", False)
    return inspect.isfunction(value) or (inspect.isclass(value) and controller)


def test_the_notebook_example_prints_what_it_says():
    [(_, text)] = fenced((DOCS / "functional.md").read_text(encoding="utf-8"), "python")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(text, {})
    assert printed.getvalue().splitlines() == re.findall(r"^print\(.+\)  # (.+)$", text, re.M)


# ---- links and names ----


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for label, target in re.findall(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: nothing at {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: no heading {target}"
        if file.suffix == ".py" and re.fullmatch(r"`\w+`", label):
            assert label.strip("`") in names_in(file), f"{page.name}: no {label} in {path}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_picture_is_there(page):
    for path in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / path).is_file(), f"{page.name}: no picture {path}"


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in(file):
    """Functions, classes, methods and variables that a file defines."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_the_map_of_the_repository_is_true_and_complete():
    [(_, tree)] = fenced((ROOT / "README.md").read_text(encoding="utf-8"), "text map")
    listed, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        assert (ROOT / folder / name).exists(), f"the map lists {folder}{name}"
        listed.add(folder + name)
        folder = folder if line.startswith(" ") else name
    for package in ("flows", "tasks", "rlhf_core"):
        rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert {f"{package}/{room}/" for room in rooms} <= listed


@pytest.mark.parametrize("package", ["flows", "tasks", "rlhf_core"])
def test_no_room_is_an_attic(package):
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 13, f"{folder.relative_to(ROOT)} has {len(files)} modules"


def rooms():
    """The packages below flows, tasks and rlhf_core."""
    return {
        f"{package}/{path.parent.name}"
        for package in ("flows", "tasks", "rlhf_core")
        for path in (ROOT / package).glob("*/__init__.py")
    }


def test_the_rooms_of_the_architecture_are_those_that_there_are():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`([\w/]+/\w+)`\]\(", text, re.M)) == rooms()


def ways():
    """The steps of each way through the rooms: a symbol and its file."""
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## Three ways through the rooms\n")[1].split("\n## ")[0]
    return {
        title: re.findall(r"^\d+\. \[`(\w+)`\]\(\.\./([^)]+)\)", steps, re.M)
        for title, steps in re.findall(r"^### ([^\n]+)\n(.*?)(?=^### |\Z)", section, re.M | re.S)
    }


@pytest.mark.parametrize("way", ways())
def test_each_step_of_a_way_knows_its_neighbour(way):
    steps = ways()[way]
    assert len(steps) >= 9
    for (name, file), (other, to) in pairwise(steps):
        assert name in names_in(ROOT / file)
        assert other in names_in(ROOT / to)
        calls = re.search(rf"\b{other}\b", (ROOT / file).read_text(encoding="utf-8"))
        called = re.search(rf"\b{name}\b", (ROOT / to).read_text(encoding="utf-8"))
        assert calls or called, f"neither {name} in {file} nor {other} in {to} knows the other"


# ---- commands ----


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_and_option_exists(page):
    commands = get_command(app).commands
    for command, rest in re.findall(
        r"(?:^|`|\n *)rlhf ([a-z]+(?:-[a-z]+)*)\b([^`\n]*)", page.read_text(encoding="utf-8")
    ):
        assert command in commands, f"there is no command rlhf {command}"
        if command == "exec":  # the rest is another program's
            continue
        found = commands[command]
        if inner := getattr(found, "commands", {}):
            name, _, rest = rest.strip().partition(" ")
            if name in ("", "..."):  # the group as a whole
                continue
            assert name in inner, f"there is no command rlhf {command} {name}"
            found = inner[name]
        options = {option for parameter in found.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, f"rlhf {command}{rest}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_make_target_exists(page):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(encoding="utf-8"), re.M)
    assert set(named) <= set(targets)


# ---- data and dependencies ----


def test_every_example_of_a_data_format_is_read(tmp_path):
    examples = fenced((DOCS / "data.md").read_text(encoding="utf-8"), "(?:jsonl|csv)")
    assert len(examples) >= 8
    for info, text in examples:
        suffix, kind = info.split()
        assert kind in TABLE_KINDS
        file = tmp_path / f"example.{suffix}"
        file.write_text(text, encoding="utf-8")
        table = parse(read_rows(str(file), split="train", subset="", limit=0), kind, {})
        assert not table.faults
        assert not table.skipped
        assert not table.unread
        assert len(table.frame)


def test_no_two_files_of_tests_have_one_name():
    """The folders of the tests are no packages, so pytest could not import both."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = chain(*project["project"]["optional-dependencies"].values())
    wanted = [*project["project"]["dependencies"], *extras, *project["build-system"]["requires"]]
    names = {re.split(r"[<>=\[]", requirement)[0] for requirement in wanted}
    page = DOCS / "decisions" / "0001-dependencies.md"
    rows = re.findall(r"^\| `([\w-]+)` \| .+ \| .+ \|$", page.read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(names)


def test_every_dependency_is_pinned():
    """Those of the stack's image and of the browser tests have files of their own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *chain(*(extras[name] for name in ("demo", "gguf", "dev", "cluster"))),
    ]
    names = {
        re.split(r"[<>=\[]", requirement)[0].lower().replace("-", "_") for requirement in wanted
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("-", "_") for line in lines if "==" in line}
    assert names <= pinned


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
