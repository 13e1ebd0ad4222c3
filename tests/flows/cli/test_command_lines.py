"""Command lines as a hostile or a tired user types them: a sentence and status 2, no traceback.

None of them starts a run or a server. A server's address in them answers nothing.
"""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.__main__ import app

TINY = Path(__file__).parents[1] / "tiny.yaml"
LONG, ESCAPE, SURROGATE = "a" * 5000, "\x1b[31mred", "\udc80"  # the last is no character
NAMES = ("", " ", "\t", LONG, ESCAPE, SURROGATE, "nobody", "../x", "a/b", "💥", "%s", "';--")
URIS = (
    *("", " ", "models:/", "models:/x", "models:/x/0", "models:/x/-1", "models:/x@", "models:/x/1"),
    *("models:/../x/1", f"models:/{LONG}/1", "models:/x/99999999999999999999", "models:/x/1/2"),
    *("runs:/x/model", "./nowhere", LONG, ESCAPE, SURROGATE, "http://me:secret@127.0.0.1:1/x"),
)
FILES = (
    *("", " ", ".", "none.yaml", "~nosuch/x.yaml", LONG, f"{LONG}.yaml", ESCAPE, SURROGATE),
    *("tiny.yaml/x", "http://me:secret@127.0.0.1:1/x.yaml"),
)
SETTINGS = (
    *("", " ", "=", "a", "=1", "a=", ".=1", "a..b=1", "ppo=1", "ppo.epochs=0", "ppo.epochs=1e9"),
    *("ppo.epochs=nan", "ppo.kl_coef=nan", "ppo.kl_coef=.nan", "ppo.kl_coef=.inf", "seed=-1"),
    *("seed=100000000000000000000", "seed=1.5", f"project={LONG}", "project=", "project=A b"),
    *("ppo.kl_coef=[", "ppo.kl_coef={", "ppo.kl_coef=&a", "ppo.kl_coef=!!python/name:os.system"),
    *(
        "ppo.kl_coef=2001-99-99",
        "model.fresh.heads=7",
        "sft.max_length=2000",
        "sft.epochs=1000000000",
    ),
    *("sft.reuse=x", "sft.reuse=models:/x/1", "reward_model.reuse=models:/x@best"),
    *("ppo.rewards=[]", "ppo.rewards=[{source: os}]", "ppo.rewards=[{source: 'os:getcwd'}]"),
    *("ppo.rewards=[{source: 'models:/x/1'}]", "ppo.rewards=[{source: 'no_such:f'}]"),
    *("evaluation.true_reward=os:getcwd", "evaluation.true_reward=x", "algorithm=sarsa"),
    *("data.source=files", "data={source: files, preferences: {path: none.jsonl}}"),
    "data={source: files, preferences: {path: 'https://me:secret@127.0.0.1:1/x.csv'}}",
    "model.source=https://me:secret@127.0.0.1:1/x",
    *("__class__=1", "model.__init__=1", "data.fields=1", "ppo.rewards.0.weight=1"),
)
LINES: list[tuple[str, ...]] = [
    *((command, name) for command in ("promote", "resume", "rollback") for name in NAMES),
    *(("compare", name, "nobody") for name in NAMES),
    *(("compare", "nobody", name) for name in ("", " ")),
    *(("overoptimisation", name) for name in NAMES),
    *(("generate", "--model", uri, "A text") for uri in URIS),
    *(("export", uri, "there") for uri in URIS),
    *(("export", "models:/x/1", folder) for folder in ("", " ", LONG, ".")),
    *((command, file) for command in ("validate", "config", "run") for file in FILES),
    *(("validate", "tiny.yaml", "--set", setting) for setting in SETTINGS),
    *(("config", "tiny.yaml", "--set", setting) for setting in ("", "a", "ppo.kl_coef=nan")),
    *(("backup", folder) for folder in ("", " ")),
    *(("restore", folder) for folder in ("", " ", "none", ".", LONG, "tiny.yaml")),
    *(("deploy", folder) for folder in ("", " ")),
    *(("exec", program) for program in ("", " ", "no-such-program", LONG, "/dev/null")),
    *(("up", "--configs", folder) for folder in ("", " ")),
    *(("up", option, port) for option in ("--prefect-port", "--mlflow-port", "--label-port")
      for port in ("", "0", "-1", "70000", "x", "1e3", "nan")),
    *(("generate", option, value, "A text") for option in ("--samples", "--max-new-tokens")
      for value in ("", "0", "-1", "x", "1.5", "nan")),
    *(("generate", "--temperature", value, "A text") for value in ("", "-1", "nan", "inf", "x")),
    *(("generate", "--seed", value, "A text") for value in ("", "-1", "x", str(10**30))),
    *(("rollback", "tiny", "--to", value) for value in ("", "0", "-1", "x", "1.5", "9" * 30)),
    *(("sweep", "tiny.yaml", "--grid", grid) for grid in ("", " ")),
    *(("sweep", "tiny.yaml", "--grid", "seed=1", "--seeds", n) for n in ("", "0", "-1", "x")),
    *((word,) for word in ("", "runn", "--no-such", "-x", "validate", "promote", "compare")),
    ("validate", "tiny.yaml", "extra"),
    ("promote", "a", "b"),
    ("run", "tiny.yaml", "--force", ""),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    (folder / "tiny.yaml").write_text(TINY.read_text())
    return folder


@pytest.fixture
def rlhf(place, settings, monkeypatch):
    """Calls the command in this process, in a home with an empty database."""
    before = dict(os.environ)
    monkeypatch.chdir(place)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RLHF_MLFLOW_URL", "RLHF_PREFECT_URL"):
        os.environ.pop(name, None)
    os.environ.update({"RLHF_HOME": str(settings.home), "COLUMNS": "200"})
    yield lambda *arguments: CliRunner().invoke(app, list(arguments), input="")
    os.environ.clear()
    os.environ.update(before)


def shown(arguments):
    return " ".join(repr(argument[:40]) for argument in arguments)


def test_there_are_many():
    assert len(LINES) == len(set(LINES)) > 200


@pytest.mark.parametrize("arguments", LINES, ids=shown)
def test_a_bad_command_line_gets_one_sentence(rlhf, place, arguments):
    before = sorted(place.iterdir())
    result = rlhf(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert "secret" not in result.output
    assert len(result.stderr) > 10
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "1e999"])
def test_a_temperature_is_a_number(rlhf, value):
    result = rlhf("generate", "--temperature", value, "A text")
    assert "Invalid value for '--temperature'" in result.stderr


@pytest.mark.parametrize("command", ["promote", "resume", "rollback", "compare", "export"])
def test_an_empty_name_is_not_the_only_one(rlhf, command):
    """As typed by a script whose variable is not set; the argument is named."""
    result = rlhf(command, "", *(["x"] if command in ("compare", "export") else []))
    assert "is empty: pass a value, and check the shell variables in the command." in result.stderr
