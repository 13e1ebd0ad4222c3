"""A function that a config names is imported from a trusted place, or not at all."""

import sys
from pathlib import Path

import pytest

from rlhf_core.errors import ConfigError
from rlhf_core.rewards import functions
from rlhf_core.rewards.functions import RewardPlaces, load_function, source_file

MODULE = "def score(prompts, responses): return [{}.0] * len(responses)\n"


@pytest.fixture(autouse=True)
def _own_imports(monkeypatch, tmp_path):
    """Neither the path nor the modules of one test reach another."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(functions, "_reached", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("rules_"):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "configs").mkdir()
    return tmp_path / "configs"


def load(path: str, folder: Path | str = "", *packages: str):
    return load_function(
        path, setting="the reward", places=RewardPlaces((str(folder),) if folder else (), packages)
    )


def test_the_config_s_own_folder_is_trusted_from_any_working_folder(folder):
    (folder / "rules_own.py").write_text(MODULE.format(1))
    (folder / "rules_pack").mkdir()
    (folder / "rules_pack" / "inner.py").write_text(MODULE.format(2))
    assert load("rules_own:score", folder)(["p"], ["r"]) == [1.0]
    assert load("rules_pack.inner:score", folder)(["p"], ["r"]) == [2.0]
    assert source_file("rules_own", RewardPlaces((str(folder),))) == folder / "rules_own.py"


def test_the_simulation_is_trusted_everywhere_and_nothing_else_of_the_core():
    assert callable(load("rlhf_core.simulation:true_reward"))
    for module in ("rlhf_core.launch", "rlhf_core.simulations", "tasks.backup", "flows"):
        with pytest.raises(ConfigError, match="is not run"):
            load(f"{module}:f")


def test_a_listed_package_is_trusted_with_what_is_below_it_and_no_longer_name():
    assert load("json:dumps", "", "json") is not None
    assert load("json.decoder:scanstring", "", "json") is not None
    with pytest.raises(ConfigError, match="add json to RLHF_REWARD_PACKAGES"):
        load("json:dumps", "", "js")
    with pytest.raises(ConfigError, match="is not run"):
        load("json:dumps", "", "json.decoder")


def test_a_listed_package_may_lie_in_the_working_folder():
    Path("rules_listed.py").write_text(MODULE.format(3))
    assert load("rules_listed:score", "", "rules_listed")(["p"], ["r"]) == [3.0]


@pytest.mark.parametrize("folder_", ["", "configs"])
@pytest.mark.parametrize(
    "module", ["os", "subprocess", "shutil", "builtins", "torch", "pytest", "__main__", "sys"]
)
def test_a_package_of_python_s_or_of_the_environment_is_not(tmp_path, folder, folder_, module):
    reasons = rf"is not run: {module} is none of|cannot be imported: {module} is n"
    with pytest.raises(ConfigError, match=rf"^the reward '{module}:x' ({reasons})"):
        load(f"{module}:x", folder if folder_ else "")


def test_a_module_that_is_refused_is_not_run_nor_the_package_above_it(folder):
    bomb = "from pathlib import Path\nPath('ran').touch()\n"
    Path("rules_bomb.py").write_text(bomb)
    Path("rules_bombs").mkdir()
    Path("rules_bombs/__init__.py").write_text(bomb)
    Path("rules_bombs/inner.py").write_text(MODULE.format(1))
    for path in ("rules_bomb:score", "rules_bombs.inner:score"):
        with pytest.raises(ConfigError, match="is not run"):
            load(path, folder)
        assert source_file(path.partition(":")[0], RewardPlaces((str(folder),))) is None
    assert not Path("ran").exists()


def test_a_module_of_a_folder_below_is_not_one_of_the_folder(folder):
    site = folder / "venv" / "site-packages"
    site.mkdir(parents=True)
    (site / "rules_site.py").write_text(MODULE.format(1))
    sys.path.append(str(site))
    with pytest.raises(ConfigError, match="is not run"):
        load("rules_site:score", folder)


def test_a_module_named_like_a_package_of_python_s_does_not_stand_for_it(folder):
    (folder / "colorsys.py").write_text(MODULE.format(1))
    with pytest.raises(ConfigError, match=r"put it in .*, under a name of its own"):
        load("colorsys:score", folder)


def test_a_name_that_is_nowhere(folder):
    with pytest.raises(ConfigError, match=f"rules_none is neither in {folder}.* nor among the"):
        load("rules_none:score", folder)
    with pytest.raises(ConfigError, match="rules_none is not among the packages installed here"):
        load("rules_none:score")


def test_another_config_s_module_of_the_same_name_is_another_function(tmp_path):
    found = []
    for number in (1, 2):
        folder = tmp_path / f"configs-{number}"
        folder.mkdir()
        (folder / "rules_twice.py").write_text(MODULE.format(number))
        found.append(load("rules_twice:score", folder)(["p"], ["r"]))
    assert found == [[1.0], [2.0]]


def test_a_module_that_fails_says_why(folder):
    (folder / "rules_broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=r"the module fails .ZeroDivisionError: division by zero"):
        load("rules_broken:score", folder)


def test_a_caller_of_the_library_names_any_function():
    found = load_function("json:dumps", setting="the reward")
    assert found({}) == "{}"
