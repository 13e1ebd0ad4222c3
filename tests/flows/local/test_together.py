"""A program and one that it needs: they start in order, and end together and in order."""

import signal
import subprocess
import sys

import psutil
import pytest
from servers import free_port, wait_until

# Writes what happens to it into a file that both share, and answers on a port after a while.
NEEDED = """
import http.server, signal, sys, time
from pathlib import Path
said, port = Path(sys.argv[1]), int(sys.argv[2])

def say(what):
    with said.open("a") as file:
        file.write(what + "\\n")

def end(*_):
    say("needed ends")
    sys.exit(0)

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

signal.signal(signal.SIGTERM, end)
time.sleep(1)
say("needed is ready")
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
# Takes its time to end.
PROGRAM = """
import signal, sys, time
from pathlib import Path
said = Path(sys.argv[1])

def say(what):
    with said.open("a") as file:
        file.write(what + "\\n")

def end(*_):
    time.sleep(1)
    say("program ends")
    sys.exit(0)

signal.signal(signal.SIGTERM, end)
say("program starts")
time.sleep(float(sys.argv[2]))
sys.exit(7)
"""
ORDER = ["needed is ready", "program starts", "program ends", "needed ends"]


@pytest.fixture
def start(tmp_path):
    """Start both; what they say, the process that holds them, and the one that is needed."""
    said, started = tmp_path / "said", []
    said.touch()

    def make(seconds=60.0, needed=NEEDED):
        port = free_port()
        words = [sys.executable, "-c", needed, str(said), str(port)]
        program = [sys.executable, "-c", PROGRAM, str(said), str(seconds)]
        url = f"http://127.0.0.1:{port}/"
        command = [sys.executable, "-P", "-m", "flows.local.together", url, *words, "--", *program]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[0], lambda: said.read_text().splitlines()

    yield make
    for process in started:
        process.kill()
        process.communicate()


def children(process):
    found = psutil.Process(process.pid).children()
    return sorted(found, key=lambda child: child.create_time())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_program_before_what_it_needs(start, number):
    process, said = start()
    wait_until(lambda: "program starts" in said())
    process.send_signal(number)
    assert process.wait(20) == 0
    assert said() == ORDER


def test_what_the_program_needs_ends_when_it_has_ended(start):
    process, said = start(seconds=0.1)
    assert process.wait(20) == 7
    assert said() == ["needed is ready", "program starts", "needed ends"]


def test_the_program_ends_when_what_it_needs_is_gone(start):
    process, said = start()
    wait_until(lambda: "program starts" in said())
    children(process)[0].kill()
    assert process.wait(20) == 1
    assert said() == ORDER[:-1]
    assert "has ended (-9), so all ends here" in process.stderr.read()


def test_nothing_starts_without_what_it_needs(start):
    process, said = start(needed="raise SystemExit(3)")
    assert process.wait(20) == 1
    assert said() == []
    assert "has ended (3)" in process.stderr.read()


def test_a_signal_while_it_waits(start):
    process, said = start(needed="import time; time.sleep(60)")
    wait_until(lambda: children(process))
    process.terminate()
    assert process.wait(20) == 0
    assert said() == []
