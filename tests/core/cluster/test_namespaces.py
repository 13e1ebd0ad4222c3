"""A Ray cluster of machines with an address, a network and a session folder of their own.

Each is a network namespace, which loopback hides nothing from: what binds to 127.0.0.1, or looks a
host name up, fails here as it does between machines. They share the disk, as ours have to.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / "stages"), str(Path(__file__).parent)]

import ray_nodes
import tiny
from jobs import job_of, measured, same, values

from rlhf_core.launch import launch
from rlhf_core.metrics import MemoryLogger


def missing():
    """Why this machine has no network namespaces for us; empty if it has."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "network namespaces need `ip` (iproute2) and `unshare` (util-linux)"
    probe = f"rlhf-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return f"no network namespace can be made: {made.stderr}" if made.returncode else ""


pytestmark = [
    pytest.mark.cluster,
    pytest.mark.faults,
    pytest.mark.skipif(not ray_nodes.RAY.exists(), reason="needs the extra `cluster`"),
    pytest.mark.skipif(bool(why := missing()), reason=why or "all is there"),
    pytest.mark.timeout(1200),
]
INTERFACES = ["cable-a", "cable-b"]  # each machine has names of its own
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-the-tests-of-namespaces-0123456789"}
DRIVER = """
import json, sys
from rlhf_core.launch import Job, launch
from rlhf_core.metrics import MemoryLogger
class Loud(MemoryLogger):
    def metrics(self, values, step):
        print(json.dumps({"step": step, "values": dict(values)}), flush=True)
    def phase(self, what, done=0, total=0):
        print(json.dumps({"phase": what}), flush=True)
report = launch(Job.model_validate_json(sys.argv[1]), Loud())
print(json.dumps({"summary": report.summary()}), flush=True)
"""


class Machines:
    """Two network namespaces with a cable between them."""

    def __init__(self):
        self.names = [f"rlhf-{os.getpid()}-{letter}" for letter in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        for name in self.names:
            self._ip("netns", "add", name)
        a, b = self.names
        cable = ("link", "add", INTERFACES[0], "netns", a, "type", "veth")
        self._ip(*cable, "peer", "name", INTERFACES[1], "netns", b)
        for name, address, own in zip(self.names, self.addresses, INTERFACES, strict=True):
            self._ip("-n", name, "address", "add", f"{address}/24", "dev", own)
            for interface in ("lo", own):
                self._ip("-n", name, "link", "set", interface, "up")

    def inside(self, number, hidden=None):
        """What starts a command on a machine; `hidden` is a folder that it has for itself."""
        hide = f'mount -t tmpfs none "{hidden}" && ' if hidden else ""
        command = f'hostname {self.names[number]} && {hide}exec "$@"'
        place = ("ip", "netns", "exec", self.names[number])
        return (*place, "unshare", "--mount", "--uts", "sh", "-c", command, "sh")

    def close(self):
        for name in self.names:
            self._ip("netns", "delete", name)

    @staticmethod
    def _ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("world") / "data"
    tiny.write_tables(data)
    return data


@pytest.fixture(scope="module")
def elastic(data, tmp_path_factory):
    """The same stage on two processes of this machine."""
    folder = tmp_path_factory.mktemp("elastic") / "sft"
    logger = MemoryLogger()
    report = launch(job_of(folder, inputs={"data": data}), logger)
    return folder, values(logger), report


@pytest.fixture(scope="module")
def cluster():
    """A head on the first machine, which computes, and a node on the second."""
    machines = Machines()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in TOKEN.items():
                patch.setenv(name, value)
            head = {"host": machines.addresses[0], "prefix": machines.inside(0), "cpus": 1}
            with ray_nodes.nodes(0, interface=INTERFACES[0], **head) as made:
                made.machines = machines
                made.second = start_second(made)
                made.wait()
                yield made
    finally:
        machines.close()


def start_second(cluster):
    prefix = cluster.machines.inside(1, hidden=cluster.folder)
    address = f"--node-ip-address={cluster.machines.addresses[1]}"
    return cluster.start(address, prefix=prefix, GLOO_SOCKET_IFNAME=INTERFACES[1])


def train(cluster, job, act=lambda: None, **variables):
    """The history and the report of a job that the first machine starts; `act` comes at step 5."""
    command = [*cluster.machines.inside(0), sys.executable, "-P", "-c", DRIVER]
    command.append(job.model_dump_json())
    environment = {**os.environ, **cluster.environment, **variables}
    history, times, summary = {}, {}, None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        for line in driver.stdout:
            said = json.loads(line)
            if "values" in said:
                history |= {(said["step"], name): v for name, v in said["values"].items()}
                if "noticed" in times:
                    times.setdefault("again", time.monotonic())
                if said["step"] == 5 and "acted" not in times:
                    act()
                    times["acted"] = time.monotonic()
            elif "starting again" in said.get("phase", ""):
                times.setdefault("noticed", time.monotonic())
            summary = said.get("summary", summary)
    assert driver.returncode == 0
    return history, summary, times


def test_equal_to_two_local_processes_to_the_bit(cluster, data, elastic, tmp_path):
    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address)
    begun = time.monotonic()
    history, summary, _ = train(cluster, job)
    measured("between namespaces", f"no fault: {time.monotonic() - begun:.0f} s in all")
    assert history == elastic[1]
    assert summary == elastic[2].summary()
    same(tmp_path / "a", elastic[0])


def test_a_machine_that_is_lost_and_replaced(cluster, data, elastic, tmp_path):
    def replace():
        cluster.kill(cluster.second)
        cluster.second = start_second(cluster)

    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address)
    history, summary, times = train(cluster, job, replace)
    seconds = (times[event] - times["acted"] for event in ("noticed", "again"))
    took = "noticed after {:.0f} s, at work again after {:.0f} s".format(*seconds)
    measured("between namespaces, a node is replaced at once", f"{took}; equal to the bit")
    assert history == elastic[1]
    assert summary == elastic[2].summary()
    same(tmp_path / "a", elastic[0])
