"""Paths of a config start from its file, those of the command line from the working folder."""

from pathlib import Path

import pytest

from flows.cli.loading import load_config
from flows.cli.paths import folder_of
from flows.config import PipelineConfig
from flows.sweep import as_sweep
from rlhf_core.errors import ConfigError

CONFIG = """
data:
  source: files
  preferences: {path: PATH, eval_path: EVAL}
model: {source: MODEL}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of configs that is not the working folder."""
    (tmp_path / "here").mkdir()
    (tmp_path / "configs" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "configs"


def load(folder: Path, path="hub/set", evaluation="", model="gpt2", *overrides: str):
    text = CONFIG.replace("PATH", path).replace("EVAL", evaluation or '""').replace("MODEL", model)
    (folder / "my.yaml").write_text(text)
    return load_config(folder / "my.yaml", overrides, PipelineConfig, anchor=True)


def test_a_path_that_is_there_is_made_absolute(folder):
    (folder / "data" / "pairs.jsonl").touch()
    (folder / "saved").mkdir()
    (folder.parent / "models" / "mine").mkdir(parents=True)
    config = load(folder, "data/pairs.jsonl", "saved", "../models/mine")
    assert config.data.preferences.path == str(folder / "data" / "pairs.jsonl")
    assert config.data.preferences.eval_path == str(folder / "saved")
    assert config.model.source == str(folder.parent / "models" / "mine")
    again = load_config(folder / "my.yaml", (), PipelineConfig)
    assert again.data.preferences.path == "data/pairs.jsonl"  # as written, for a deployment


@pytest.mark.parametrize("path", ["pairs.jsonl", "a/b/c", "./pairs", "x.csv.gz"])
def test_a_file_that_is_not_there_is_looked_for_beside_the_config(folder, path):
    assert load(folder, path).data.preferences.path == str(folder / path)


@pytest.mark.parametrize("path", ["org/name", "name", "/abs/pairs.jsonl", "~/pairs.jsonl"])
def test_a_hub_id_an_absolute_path_and_a_home_stay(folder, path):
    assert load(folder, path).data.preferences.path == path


@pytest.mark.parametrize("source", ["gpt2", "org/name", "package:llm/model.gguf", '""'])
def test_a_model_that_is_no_path_stays(folder, source):
    assert load(folder, model=source).model.source == source.strip('"')


@pytest.mark.parametrize("path", ["pairs.jsonl", "org/name"])
def test_a_path_of_the_working_folder_is_not_taken_for_one_of_the_config_s(folder, path):
    (Path.cwd() / path).parent.mkdir(exist_ok=True)
    Path(path).touch()
    with pytest.raises(ConfigError) as error:
        load(folder, path)
    said = str(error.value)
    assert said.startswith(f"{folder}/my.yaml: data.preferences.path is '{path}', which is in the")
    assert f"write ../here/{path}, or an absolute path" in said


def test_a_path_of_the_command_line_starts_here(folder):
    Path("mine.jsonl").touch()
    (folder / "mine.jsonl").touch()
    here = str(Path.cwd() / "mine.jsonl")
    assert load(folder, "x.csv", "", "gpt2", "data.preferences.path=mine.jsonl") != load(folder)
    for override in ("data.preferences.path=mine.jsonl", "data.preferences={path: mine.jsonl}"):
        assert load(folder, "x.csv", "", "gpt2", override).data.preferences.path == here
    config = load(folder, "mine.jsonl")
    (point,) = as_sweep(config, ["data.preferences.path=mine.jsonl"], 1).points()
    assert point.config.data.preferences.path == here
    assert config.data.preferences.path == str(folder / "mine.jsonl")


def test_a_printed_config_means_the_same_anywhere(folder, tmp_path):
    (folder / "pairs.jsonl").touch()
    config = load(folder, "pairs.jsonl")
    moved = tmp_path / "moved.json"
    moved.write_text(config.model_dump_json())
    assert load_config(moved, (), PipelineConfig, anchor=True) == config


@pytest.mark.parametrize("path", ["/dev/stdin", "/proc/self/fd/0", "/dev/fd/63"])
def test_a_config_that_is_no_file_starts_in_the_working_folder(folder, path):
    assert folder_of(Path(path)) == Path.cwd()
    assert folder_of(Path("my.yaml")) == Path.cwd()
    assert folder_of(Path("../configs/my.yaml")) == folder


def test_a_name_that_no_disk_takes_is_left_to_whoever_reads_it(folder):
    assert load(folder, "x" * 5000).data.preferences.path == "x" * 5000
