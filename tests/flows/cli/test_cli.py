"""The command as a user meets it: exit status, one sentence for each mistake, no traceback.

What starts no run is called in this process; runs are real processes.
"""

import json
import os
import platform
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.__main__ import app
from flows.cli.printing import responses_as_text

TINY = Path(__file__).parents[1] / "tiny.yaml"
SERVERS = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RLHF_MLFLOW_URL", "RLHF_PREFECT_URL")


@pytest.fixture
def rlhf(tmp_path, monkeypatch):
    """Calls the command in this process, in a folder and with a home of its own."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    for name in SERVERS:
        os.environ.pop(name, None)
    os.environ.update({"RLHF_HOME": str(tmp_path / "home"), "COLUMNS": "200"})
    (tmp_path / "tiny.yaml").write_text(TINY.read_text())

    def call(*arguments, stdin="", **variables):
        os.environ.update(variables)
        return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)

    yield call
    os.environ.clear()
    os.environ.update(before)


def sentence(result) -> str:
    """What was said about a mistake; one sentence, status 2, nothing on standard output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def prefect_address(prefect_server):
    from prefect.settings import PREFECT_API_URL

    return {"PREFECT_API_URL": PREFECT_API_URL.value()}


# ---- help ----


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys; import flows.__main__;"
        "heavy = {'torch', 'transformers', 'mlflow', 'prefect', 'pandas', 'matplotlib'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows", "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 4  # 0.4 s of work; the rest is for a busy machine
    for command in ("run", "up", "deploy", "generate", "compare", "validate", "export", "config"):
        assert re.search(rf"│ {command} ", done.stdout)


def test_the_version_is_said_without_a_server_or_torch():
    code = (
        "import sys; from flows.__main__ import app\n"
        "try: app(['--version'])\n"
        "finally: print({'torch', 'mlflow', 'prefect'} & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    python = platform.python_version()
    assert done.stdout.startswith(f"rlhf {version('rlhf-pipeline')} (Python {python}, torch ")


@pytest.mark.parametrize(
    "command",
    [
        *("run", "up", "deploy", "generate", "compare", "overoptimisation"),
        *("validate", "export", "config"),
    ],
)
def test_every_command_explains_itself_with_an_example(rlhf, command):
    result = rlhf(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"rlhf {command}" in result.stdout.rpartition("Example")[2]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", (), "my.yaml is empty: write settings"),
        ("a: [", (), "my.yaml:1: this is not valid YAML"),
        ("seed: 1\nseed: 2\n", (), "my.yaml:2: 'seed' is a duplicate of line 1"),
        ("ppo:\n  kl_coeff: 1\n", (), "my.yaml:2: there is no setting 'ppo.kl_coeff'. Did you"),
        ("ppo:\n  kl_coef: high\n", (), "my.yaml:2: ppo.kl_coef must be a valid number"),
        ("ppo:\n  kl_coef: -1\n", (), "my.yaml:2: ppo.kl_coef must be greater than or equal to 0"),
        ("seed: 1", ("ppo.klcoef=1",), "--set ppo.klcoef=1: there is no setting 'ppo.klcoef'"),
        ("seed: 1", ("ppo",), "--set ppo: write it as section.key=value"),
        ("seed: 1", ("ppo.epochs=0",), "--set ppo.epochs=0: ppo.epochs must be greater"),
        ("sft: {max_length: 99}\nmodel: {fresh: {context: 64}}", (), "sft.max_length is 99, but"),
    ],
)
@pytest.mark.parametrize("command", ["run", "validate", "config"])
def test_a_mistake_in_the_config(rlhf, command, text, overrides, expected):
    Path("my.yaml").write_text(text)
    options = [part for override in overrides for part in ("--set", override)]
    assert expected in sentence(rlhf(command, "my.yaml", *options))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "tinny.yaml"), "tinny.yaml: no such file. Did you mean tiny.yaml?"),
        (("run", "."), "is a folder: pass a YAML file in it."),
        (("run",), "Missing argument"),
        (("runn", "tiny.yaml"), "No such command 'runn'"),
        (("up", "--prefect-port", "0"), "Invalid value for '--prefect-port'"),
        (("deploy",), "No Prefect server is running here: start `rlhf up`, or set PREFECT_API"),
        (("generate", "--model", "models:/x/1", "a"), "there is no model 'x'"),
        (("generate", "--model", "models:/x@champion", "a"), "no model is registered yet"),
        (("generate", "--model", "models:/x", "a"), "write models:/name/3 or models:/name@ch"),
        (("generate", "--model", "./nowhere", "a"), "there is no model folder nowhere"),
        (("generate", "--model", "./nowhere"), "There is no prompt: pass it as an argument"),
        (("generate", "--samples", "0", "a"), "Invalid value for '--samples'"),
        (("compare", "a", "b"), "no pipeline run matches 'a'"),
        (("overoptimisation", "a", "b"), "no pipeline run matches 'a'"),
        (("export", "models:/x/1", "there"), "there is no model 'x'"),
        (("validate", "tiny.yaml", "--set", "data.source=files"), "data."),
    ],
)
def test_a_mistake_in_the_call(rlhf, arguments, expected):
    assert expected in sentence(rlhf(*arguments))


@pytest.mark.parametrize("command", [("run", "tiny.yaml"), ("compare", "a", "b")])
@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:1", "The MLflow server at http://127.0.0.1:1"),
        (
            "RLHF_HOME",
            "/dev/null/home",
            "RLHF_HOME cannot be used: /dev/null/home cannot be written",
        ),
        ("RLHF_DEVICE", "tpu", "the environment variable RLHF_DEVICE is 'tpu'"),
    ],
)
def test_a_mistake_in_the_environment(rlhf, command, variable, value, expected):
    assert expected in sentence(rlhf(*command, **{variable: value}))


def test_a_prefect_server_that_does_not_answer(rlhf):
    said = sentence(rlhf("run", "tiny.yaml", PREFECT_API_URL="http://127.0.0.1:1/api"))
    assert "The Prefect server at http://127.0.0.1:1/api does not respond" in said
    assert "set PREFECT_API_URL to its address" in said


def test_something_else_that_answers_is_not_taken_for_a_server(rlhf):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"http://127.0.0.1:{other.getsockname()[1]}"
        code = "import socket, sys; s = socket.socket(fileno=0); c, _ = s.accept(); c.sendall(b'?')"
        answering = subprocess.Popen([sys.executable, "-c", code], stdin=other.fileno())
        said = sentence(rlhf("compare", "a", "b", MLFLOW_TRACKING_URI=address))
        answering.kill()
        answering.wait()
    assert f"The MLflow server at {address} does not respond" in said


def test_deploying_a_folder_without_configs_names_it(rlhf, prefect_address):
    Path("empty").mkdir()
    assert "empty has no .yaml file" in sentence(rlhf("deploy", "empty", **prefect_address))


def test_output_to_a_full_disk():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run(
            [sys.executable, "-m", "flows", "config", str(TINY)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "rlhf: The disk is full (" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupted_while_reading_prompts():
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from flows.__main__ import app; "
            "print('ready', flush=True); sys.argv = ['rlhf', 'generate']; app()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "rlhf: Interrupted.\n")


# ---- what works ----


def test_it_can_be_told_which_response_is_to_which_prompt():
    responses = [["quiet\n> and", ""], ["long", "dull"]]
    assert responses_as_text(["the hotel\nin Rome", "the film"], responses) == (
        "> the hotel\n> in Rome\n[1] quiet\n    > and\n[2] \n\n> the film\n[1] long\n[2] dull"
    )
    # A single response to each needs no number, and to a single prompt nothing at all.
    assert responses_as_text(["a", "b"], [["c"], ["d\ne"]]) == "> a\n    c\n\n> b\n    d\n    e"
    assert responses_as_text(["a"], [["b\n  c"]]) == "b\n  c"
    assert responses_as_text(["a"], [["b", "c"]]) == "> a\n[1] b\n[2] c"


def test_config_prints_a_config_that_means_the_same(rlhf):
    first = rlhf("config", "tiny.yaml", "--set", "ppo.kl_coef=1e-3")
    assert first.exit_code == 0
    assert yaml.safe_load(first.stdout)["ppo"]["kl_coef"] == 0.001
    Path("whole.yaml").write_text(first.stdout)
    assert rlhf("config", "whole.yaml").stdout == first.stdout


def test_validate_prints_the_report_and_the_plan_and_trains_nothing(rlhf, tmp_path):
    result = rlhf("validate", "tiny.yaml", "--no-probe", "--set", "evaluation.prompts=3")
    assert result.exit_code == 0, result.output
    assert re.search(r"demonstrations │ simulated\s+│\s+200 │", result.stdout)
    assert "0 prompts shared by training and evaluation" in result.stdout
    steps = dict(re.findall(r"│ (sft|reward_model|ppo) +│ +(\d+) │", result.stdout))
    rows = re.findall(
        r"│ (?:demonstrations|preferences) +│ simulated +│ +\d+ │ +(\d+) │", result.stdout
    )
    demonstrations, votes = map(int, rows)
    expected = {"sft": -(-demonstrations // 32), "reward_model": -(-votes // 32), "ppo": 2}
    assert {name: int(number) for name, number in steps.items()} == expected
    # 400 tokens and 96 places of width 32, a block of 12·32² + 13·32, a norm of 2·32; a head of 32.
    policy = 400 * 32 + 96 * 32 + 12 * 32**2 + 13 * 32 + 64
    for learnt in (f"policy: all {policy:,}", f"reward model: all {policy + 32:,}"):
        assert learnt in result.stdout
    assert "Decision: 3 held-out prompts, 1 answer to each" in result.stdout
    assert "Warning: No policy can be promoted: 3 held-out prompts cannot show" in result.stdout
    assert not (tmp_path / "home").exists()


def test_validate_and_config_need_no_server_and_make_nothing(rlhf, tmp_path):
    away = {
        "MLFLOW_TRACKING_URI": "http://me:secret@127.0.0.1:1",
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
    }
    assert rlhf("config", "tiny.yaml", **away).exit_code == 0
    result = rlhf("validate", "tiny.yaml", "--no-probe", "--set", "sft.reuse=models:/x/1", **away)
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("Not checked: models:/x/1, because the MLflow server at http://me:***@")
    assert "secret" not in result.output
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["judge.source=endpoint", "judge.endpoint.model=m"], "RLHF_JUDGE_URL is not set where"),
        (["judge.source=no_such_module:f"], "judge.source 'no_such_module:f' cannot be imported"),
        (["judge.source=endpoint"], "endpoint.model must name its model"),
    ],
)
def test_validate_names_a_judge_that_cannot_work(rlhf, settings, said):
    overrides = [word for setting in settings for word in ("--set", setting)]
    assert said in sentence(rlhf("validate", "tiny.yaml", *overrides))


def test_validate_says_what_an_endpoint_is_asked(rlhf):
    overrides = ("--set", "judge.source=endpoint", "--set", "judge.endpoint.model=m")
    result = rlhf(
        "validate", "tiny.yaml", "--no-probe", *overrides, RLHF_JUDGE_URL="http://127.0.0.1:1/v1"
    )
    assert result.exit_code == 0, result.output
    assert "Judge: at most " in result.stdout
    assert " requests to m, two for each of " in result.stdout


def test_validate_looks_whether_it_can_write_an_estimate_before_it_makes_one(rlhf):
    said = sentence(rlhf("validate", "tiny.yaml", "--json", "no/such.json"))
    assert "--json no/such.json: it cannot be written" in said
    said = sentence(rlhf("validate", "tiny.yaml", "--no-probe", "--json", "a.json"))
    assert "--no-probe makes none" in said
    assert not Path("a.json").exists()


def test_validate_runs_in_a_process_of_its_own_without_prefect(tmp_path):
    code = (
        "import sys; from flows.__main__ import app\n"
        "try: app(['validate', '--no-probe', sys.argv[1]])\n"
        "finally: print({'prefect', 'mlflow'} & {*sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(TINY)],
        capture_output=True,
        text=True,
        env={**os.environ, "RLHF_HOME": str(tmp_path / "home")},
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "set()")


def test_a_config_runs_from_another_folder_with_its_data_and_its_function(rlhf, tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "rules_of_test_cli.py").write_text(
        "def score(p, r): return [float(len(t)) for t in r]"
    )
    rows = [
        {"prompt": f"Say {n}.", "chosen": f" It is {n}.", "rejected": " No."} for n in range(40)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = TINY.read_text().replace("rlhf_core.simulation:true_reward", "rules_of_test_cli:score")
    data = "data: {source: files, preferences: {path: pairs.jsonl}, eval_fraction: 0.3}\n"
    (folder / "my.yaml").write_text(re.sub(r"data:\n.*\n", data, text))
    result = rlhf("validate", "configs/my.yaml", "--no-probe")
    assert result.exit_code == 0, result.output
    Path("pairs.jsonl").write_text("")
    Path("other.yaml").write_text((folder / "my.yaml").read_text())
    assert "rules_of_test_cli is neither in" in sentence(rlhf("validate", "other.yaml"))


# ---- runs ----


def start(*arguments: str, home: Path, **variables: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key not in SERVERS}
    return subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments],
        env={**environment, "RLHF_HOME": str(home), "COLUMNS": "200", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The home, the output and the errors of a run that went well."""
    home = tmp_path_factory.mktemp("finished") / "home"
    process = start("run", str(TINY), "--set", "seed=3", home=home)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return home, output, errors


def rows(home: Path, database: str, query: str) -> list[tuple]:
    with sqlite3.connect(home / database) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.integration
def test_a_run_ends_with_its_table_and_says_little_else(finished):
    _, output, errors = finished
    assert output.startswith("# tiny, seed 3: models:/tiny-policy/1 ")
    for line in ("| true reward |", "| KL to SFT", "| win rate over SFT", "Registered: `models:/"):
        assert line in output
    # Prefect's server has ended with the run: the last link leads to MLflow.
    assert re.findall(r"http\S+", output)[-1].startswith("http://127.0.0.1:5000/#/experiments/")
    assert "start `rlhf up`" in output.splitlines()[-2]
    steps = [line for line in errors.splitlines() if re.match(r"\w+: \d+/\d+ ", line)]
    assert {line.partition(":")[0] for line in steps} >= {"prepare", "sft", "ppo", "evaluation"}
    assert "prefect" not in errors.replace("Prefect: started for this run", "")
    assert "Traceback" not in errors


@pytest.mark.integration
def test_both_histories_stay_under_the_home(finished):
    home, _, _ = finished
    assert rows(home, "prefect/prefect.db", "select name, state_name from flow_run") == [
        ("tiny#1", "Completed")
    ]
    statuses = rows(home, "mlflow/mlflow.db", "select distinct status from runs")
    assert statuses == [("FINISHED",)]


@pytest.mark.integration
def test_what_was_registered_generates(rlhf, finished):
    def generate(*options, stdin=""):
        model = ("--model", "models:/tiny-policy/1", "--max-new-tokens", 5)
        result = rlhf("generate", *model, *options, stdin=stdin, RLHF_HOME=str(finished[0]))
        assert result.exit_code == 0, result.output
        return result.stdout

    greedy = generate("--temperature", 0, "the hotel", "the film")
    assert generate("--temperature", 0, stdin="the hotel\n\nthe film\n") == greedy
    assert generate("--chat", "--temperature", 0, "--samples", 2, "the hotel") != greedy
    alone = generate("--temperature", 0, "the hotel")
    as_json = generate("--temperature", 0, "--samples", 2, "--json", "the hotel", "the film")
    told = [json.loads(line) for line in as_json.splitlines()]
    assert [(t["prompt"], t["sample"]) for t in told] == [
        (prompt, sample) for prompt in ("the hotel", "the film") for sample in (1, 2)
    ]
    assert {t["response"] for t in told[:2]} == {alone.removesuffix("\n")}
    lines = greedy.splitlines()
    assert [line for line in lines if line.startswith(">")] == ["> the hotel", "> the film"]


@pytest.mark.integration
def test_a_run_compares_with_itself(rlhf, finished, tmp_path):
    name, page = "tiny#1", tmp_path / "compared" / "page.html"
    shown = rlhf("compare", name, name, "--output", page, RLHF_HOME=str(finished[0]))
    assert shown.exit_code == 0, shown.output
    assert re.match(r"Nothing differs .*: \d+ settings, 8 stages and \d+ metrics ", shown.stdout)
    assert len(shown.stdout.splitlines()) == 5
    assert "compare-runs?runs=" in shown.stdout
    assert shown.stdout.splitlines()[-1] == f"Written: {page}"
    assert "Nothing differs between the two runs." in page.read_text(encoding="utf-8")
    everything = rlhf("compare", name, name, "--all", "--output", page).stdout
    assert "evaluation summary/win_rate/policy_over_best_of_n" in everything
    assert "ppo.kl_coef" in everything
    data = json.loads(rlhf("compare", name, name, "--json").stdout)
    assert data["params"] == []
    assert {row["stage"] for row in data["metrics"]} >= {"sft", "reward_model", "ppo"}


@pytest.mark.integration
def test_the_page_of_a_run_is_written_again(rlhf, finished, tmp_path):
    page = tmp_path / "reports" / "tiny.html"
    shown = rlhf("report", "tiny#1", "--output", page, RLHF_HOME=str(finished[0]))
    assert shown.exit_code == 0, shown.output
    said, written = shown.stdout.splitlines()
    assert said.startswith("models:/tiny-policy/1 ")
    assert written == f"Written: {page}"
    assert said.partition(".")[0] in page.read_text(encoding="utf-8")
    assert "no pipeline run matches 'nobody'" in sentence(rlhf("report", "nobody"))


@pytest.mark.integration
def test_the_chart_of_a_run_has_its_policy_and_best_of_n(rlhf, finished, tmp_path):
    shown = rlhf("overoptimisation", "tiny#1", RLHF_HOME=str(finished[0]))
    assert shown.exit_code == 0, shown.output
    assert "trained policy, reward model (proxy)" in shown.stdout
    assert "best of n, reward model (proxy)" in shown.stdout
    assert (tmp_path / "overoptimisation.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "overoptimisation.csv").read_text()
    assert ",on_policy," in table
    assert ",best_of_n," in table
    unknown = rlhf("overoptimisation", "tiny#1", "--output", "chart.txt")
    assert "chart.txt is no name of a picture" in sentence(unknown)


@pytest.mark.integration
def test_a_model_is_exported_for_mlflow(rlhf, finished, tmp_path):
    result = rlhf("export", "models:/tiny-policy/1", "servable", RLHF_HOME=str(finished[0]))
    assert result.exit_code == 0, result.output
    assert "mlflow models serve -m servable" in result.stdout
    assert (tmp_path / "servable" / "MLmodel").is_file()
    assert "not empty" in sentence(rlhf("export", "models:/tiny-policy/1", "servable"))


@pytest.mark.integration
def test_a_run_that_fails_says_one_sentence(finished, prefect_address):
    home, _, _ = finished
    missing = ("data.source=files", "data.preferences.path=nowhere.jsonl")
    options = [part for setting in missing for part in ("--set", setting)]
    process = start("run", str(TINY), *options, home=home, **prefect_address)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert output == ""
    lines = [line for line in errors.splitlines() if "prepare: " not in line]
    assert [line.partition(":")[0] for line in lines] == ["MLflow", "Prefect", "rlhf"]
    assert "nowhere.jsonl" in lines[-1]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
)
def test_a_run_that_is_stopped_says_so_and_can_go_on(finished, number, status, said):
    """The second time goes on with what the first has left."""
    home, _, _ = finished
    process = start("run", str(TINY), "--set", "sft.epochs=1000", home=home)
    lines = []
    while not any("sft: " in line for line in lines):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C in a terminal does: to the whole group
    else:
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "")
    sentence = f"rlhf: {said}; repeat the command to resume from the last checkpoint."
    assert errors.splitlines()[-1] == sentence
    assert "Traceback" not in errors
    newest = "select state_name from flow_run order by created desc limit 1"
    assert rows(home, "prefect/prefect.db", newest) == [("Crashed",)]
    killed = "select name from runs where status = 'KILLED' and name like 'sft%'"
    assert rows(home, "mlflow/mlflow.db", killed) == [("sft-seed-0",)]
    # Other tests leave runs of this name in the home.
    pipeline = "select status from runs where name like 'tiny#%' order by start_time desc limit 1"
    assert rows(home, "mlflow/mlflow.db", pipeline) == [("KILLED",)]
    resumed = rows(home, "mlflow/mlflow.db", "select value from tags where key = 'resumed'")
    # The second time the pipeline's run has gone on, and that of SFT.
    assert resumed == ([] if number == signal.SIGINT else [("1",), ("1",)])
    doubled = "select count(*) from metrics group by run_uuid, key, step having count(*) > 1"
    assert rows(home, "mlflow/mlflow.db", doubled) == []
    mark = f"RLHF_HOME={home}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert mark not in entry.read_bytes().split(b"\0")
        except OSError:
            continue


def test_a_config_is_read_before_prefect_and_mlflow_know_where_their_servers_are():
    """They read the environment at import, and `rlhf run` has a server of its own by then."""
    code = "import sys, flows.config, flows.__main__; print({'prefect', 'mlflow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_command_that_trains_keeps_its_memory():
    code = (
        "import os; from flows.local import allocator; allocator.keep_memory(); "
        "print(os.environ.get({name!r}))"
    )
    name = "THP_MEM_ALLOC_ENABLE"
    environment = {key: value for key, value in os.environ.items() if key != name}
    done = subprocess.run(
        [sys.executable, "-c", code.format(name=name)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    glibc = platform.libc_ver()[0] == "glibc"
    assert done.stdout.strip() == ("1" if glibc else "None")
