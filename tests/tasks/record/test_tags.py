"""The tags of MLflow are spelt in one module, and are read back as they were written."""

import ast
import re
from pathlib import Path

import pytest

import flows
import tasks
from rlhf_core.errors import ModelError
from tasks.record import tags
from tasks.registry.refs import DatasetRef, ModelRef

VOCABULARY = Path(tags.__file__)
FAMILIES = (r"^(input|output|parent)\.", r"^summary/", r"tags\.`?[A-Za-z]")
# Those that are ordinary words, and names of other things too, count only where tags are meant.
WORDS = {"stage", "seed", "error", "resumed", "promoted", "reasons", "candidate", "approved"}
WORDS |= {"digest", "run_id", "kind", "replaced"}
WRITES = {"set_tag", "delete_tag", "set_model_version_tag", "delete_model_version_tag", "RunTag"}
WRITES |= {"InputTag", "remove_tag", "set_logged_model_tags"}
NAMES = {
    value
    for name, value in vars(tags).items()
    if name.isupper() and isinstance(value, str) and not name.startswith("_")
}
NAMES -= {tags.PIPELINE, tags.ERASURE, tags.WAITING, tags.NOBODY}  # values
NAMES -= {tags.DATA, tags.RESULT, tags.SUMMARY}
UNMISTAKABLE = "|".join([*FAMILIES, *(rf"\b{re.escape(name)}\b" for name in NAMES - WORDS)])


def modules() -> list[Path]:
    roots = [Path(package.__file__).parent for package in (tasks, flows)]
    return [path for root in roots for path in root.rglob("*.py") if path != VOCABULARY]


def spelt(source: str) -> list[str]:
    """What a module spells of the tags, as `line: text`."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        if re.search(UNMISTAKABLE, node.value)
    ]
    found += [
        (node.lineno, node.value)
        for place in ast.walk(tree)
        for node in _keys(place)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"[\w.]+", node.value)  # and not a sentence, as a value may be
    ]
    return [f"{line}: {text}" for line, text in sorted(set(found))]


def _keys(node: ast.AST) -> list[ast.expr | None]:
    """The expressions in a place where the name of a tag belongs."""
    match node:
        case ast.Subscript(value=of, slice=key) if _are_tags(of):
            return [key]
        case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[of]) if _are_tags(of):
            return [key]
        case ast.Call(func=ast.Attribute(value=of, attr="get" | "pop"), args=[key, *_]) if (
            _are_tags(of)
        ):
            return [key]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if (
            name in WRITES
        ):
            return list(args)
        case ast.Call(func=ast.Attribute(attr="add_tags"), args=[*_, ast.Dict(keys=keys)]):
            return keys
        case ast.keyword(arg="tags", value=ast.Dict(keys=keys)):
            return keys
        case ast.Assign(targets=[of], value=ast.Dict(keys=keys)) if _are_tags(of):
            return keys
        case ast.AugAssign(target=of, value=ast.Dict(keys=keys)) if _are_tags(of):
            return keys
    return []


def _are_tags(node: ast.expr) -> bool:
    return ast.unparse(node).removesuffix("()").rpartition(".")[2].endswith("tags")


def test_no_other_module_spells_a_tag():
    found = {
        f"{path}:{text}" for path in modules() for text in spelt(path.read_text(encoding="utf-8"))
    }
    assert len(modules()) > 70
    assert found == set()


@pytest.mark.parametrize(
    "line",
    [
        "x = found.data.tags['stage']",
        "x = self._tags().get('run_id', '')",
        "x = 'error' in run.data.tags",
        "client.set_tag(run_id, 'resumed', '1')",
        "tags = [RunTag('approved', 'x')]",
        "record.add_tags(run_id, {'promoted': 'true'})",
        "store.publish(path, name, tags={'kind': 'sft'})",
        "tags = {**tags, 'seed': '0'}",
        "tags |= {'error': ''}",
        "x = {'stage_key': key}",
        "x = f'output.{kind}'",
        "x = f'tags.stage = {name}'",
        "x = f'attributes.status = 1 and tags.`stage` = 2'",
        "x = 'mlflow.parentRunId'",
    ],
)
def test_one_that_did_would_be_found(line):
    assert len(spelt(line)) >= 1


@pytest.mark.parametrize(
    "line", ["'''The tags.'''", "x = {'stage': 1}", "x = tags[tags.STAGE]", "x = 'seed'"]
)
def test_words_in_other_places_are_free(line):
    assert spelt(line) == []


def test_two_tags_never_have_the_same_name():
    values = [v for k, v in vars(tags).items() if k.isupper() and isinstance(v, str)]
    assert len(values) == len(set(values))


def test_outputs_are_read_as_they_were_written():
    run = "0123456789abcdef" * 2
    written = {
        tags.output_of("sft"): "models:/demo-sft/3",
        tags.output_of(tags.DATA): f"runs:/{run}/data",
        tags.DATA_DIGEST: "fedcba9876543210",
        tags.input_of("sft"): "models:/demo-sft/2",
        tags.STAGE: "sft",
    }
    assert tags.outputs(written) == {"sft": "models:/demo-sft/3", "data": f"runs:/{run}/data"}
    assert tags.models(written) == {"sft": ModelRef(name="demo-sft", version=3)}
    assert tags.dataset(written) == DatasetRef(run_id=run, digest="fedcba9876543210")
    assert tags.outputs({}) == tags.models({}) == {}


@pytest.mark.parametrize("ref", [None, ModelRef(name="demo-policy", version=12)])
def test_a_version_that_there_may_not_be_is_read_back(ref):
    assert tags.version_of(tags.name_of(ref)) == ref


def test_what_names_no_version_is_refused():
    with pytest.raises(ModelError, match="'champion' is not a version of a model"):
        tags.version_of("champion")


def test_names_on_disk_are_those_of_earlier_releases():
    """Runs and versions that are there are found by these."""
    assert (tags.STAGE, tags.KEY, tags.CACHED_FROM) == ("stage", "stage_key", "cached_from")
    assert (tags.PARENT_RUN, tags.FLOW_RUN) == ("mlflow.parentRunId", "prefect.flow_run_id")
    assert (tags.output_of("a"), tags.input_of("a"), tags.parent_of("a")) == (
        "output.a",
        "input.a",
        "parent.a",
    )


@pytest.mark.parametrize(
    ("call", "place"),
    [
        ("connect", "tasks/record/record.py"),
        ("MlflowModelStore", "tasks/record/record.py"),
        ("Runs", "tasks/record/record.py"),
        ("search_runs", "tasks/record/runs.py"),
        ("search_model_versions", "tasks/registry/model_store.py"),
    ],
)
def test_what_reaches_mlflow_is_made_in_one_place(call, place):
    calling = {
        path.relative_to(Path(tasks.__file__).parents[1]).as_posix()
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] == call
        and ast.unparse(node.func) not in ("sqlite3.connect", "self.engine.connect", "free.connect")
    }
    assert calling == {place}
