"""The server that a run has started for itself: it comes back, or the run ends and says why."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from servers import wait_until

TINY = Path(__file__).parents[1] / "tiny.yaml"
# A service that is ready once it has made a file, and one that never starts twice.
KEPT = """
import sys, time
from pathlib import Path
from flows.local.keeper import Keeper
from flows.local.supervisor import Service, ServiceError, Supervisor

home, code = Path(sys.argv[1]), sys.argv[2]
service = Service("toy", [sys.executable, "-c", code, str(home)], {},
                  lambda: "" if (home / "ready").exists() else "it is starting")
try:
    with Supervisor(home, ("toy",)) as group:
        group.start(service)
        with Keeper(group, service, lambda text: print(text, flush=True)) as keeper:
            group.until_ready(service)
            keeper.watch()
            print("working", flush=True)
            time.sleep(float(sys.argv[3]))
    print("done", flush=True)
except ServiceError as error:
    print("ServiceError:", error, flush=True)
"""
STARTS = """
import sys, time
from pathlib import Path
home = Path(sys.argv[1])
(home / "ready").touch()
time.sleep(600)
"""
ONCE = """
import sys, time
from pathlib import Path
home = Path(sys.argv[1])
if (home / "ready").exists():
    print("the database is broken")
    raise SystemExit(3)
(home / "ready").touch()
time.sleep(600)
"""


def kept(home: Path, code: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", KEPT, str(home), code, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    return process


def kill_service(process: subprocess.Popen) -> None:
    (toy,) = [
        child for child in psutil.Process(process.pid).children() if child.cmdline()[1:2] == ["-c"]
    ]
    toy.kill()


def test_a_service_that_is_killed_is_started_again_and_said(tmp_path):
    process = kept(tmp_path, STARTS, 3)
    kill_service(process)
    output = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert output == [
        "toy ended (SIGKILL); this run depends on it, so it is being restarted.",
        "toy is running again.",
        "done",
    ]


def test_one_that_does_not_come_up_ends_the_work_with_the_end_of_its_log(tmp_path):
    """As somebody who stops the run would: a training has its SIGTERM, and saves."""
    process = kept(tmp_path, ONCE, 600)
    kill_service(process)
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - began < 30
    assert output.count("so it is being restarted.") == 3
    assert "toy cannot be restarted: the run is being stopped." in output


@pytest.mark.integration
def test_a_run_whose_prefect_server_is_killed_is_completed(tmp_path):
    home, output = tmp_path / "home", tmp_path / "output"
    more = ("--set", "ppo.iterations=20")
    with output.open("w") as log:
        run = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhf_command", "run", str(TINY), *more],
            env={**os.environ, "RLHF_HOME": str(home)},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: "sft: " in output.read_text() or run.poll() is not None, 240)
        assert run.poll() is None, output.read_text()
        (server,) = (
            child
            for child in psutil.Process(run.pid).children()
            if "tasks.servers.prefect_app" in child.cmdline()
        )
        server.kill()
        assert run.wait(300) == 0, output.read_text()
    finally:
        run.kill()
    said = output.read_text()
    assert said.count("prefect-of-run ended (SIGKILL)") == 1
    assert said.count("prefect-of-run is running again.") == 1
    assert "promoted" in said
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        states = database.execute("select name, state_type from flow_run").fetchall()
    assert states == [("tiny#1", "COMPLETED")]
