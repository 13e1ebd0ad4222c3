"""A Ray cluster of several nodes on this machine: a raylet each, as `ray start` makes them."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_raylet_start_wait_time_s": "60",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_worker_niceness": "0",  # else 15, and anything else comes first
}


class Nodes:
    """A head and others, each with one CPU unless said otherwise.

    Args:
        folder: of Ray's own files; its sockets want a short path.
        host: the address of the head.
        prefix: what starts the command of the head, as `ip netns exec`.
        cpus: of the head.
        interface: of the network between the nodes, as the head knows it.
    """

    def __init__(
        self, folder: Path, *, host="127.0.0.1", prefix=(), cpus=1, interface="lo"
    ) -> None:
        self.address = f"{host}:{free_port()}"
        self.environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": interface}
        self.folder = folder
        self._prefix = prefix
        self._running: list[subprocess.Popen] = []
        host = () if host == "127.0.0.1" else (f"--node-ip-address={host}",)
        port = self.address.rpartition(":")[2]
        self.head = self.start("--head", f"--port={port}", *host, cpus=cpus, prefix=prefix)
        self._wait()

    def start(self, *options, cpus=1, prefix=(), **variables):
        """Start a node; it is part of the cluster some seconds later."""
        where = () if "--head" in options else (f"--address={self.address}",)
        if "--head" in options:
            options += ("--include-dashboard=false", f"--temp-dir={self.folder}")
        # On a busy machine a raylet gives up after 15 s without its agent; no setting changes that.
        again = ("sh", "-c", 'until "$@"; do sleep 1; done', "sh")
        command = [*prefix, *again, str(RAY), "start", "--block", *where, *options]
        command += [
            f"--num-cpus={cpus}",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
        ]
        with self._log(len(self._running)).open("w") as log:
            environment = os.environ | self.environment | variables
            node = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._running.append(node)
        return node

    def kill(self, node):
        """Lose a node at once, with all that runs on it."""
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def ranks(self):
        """The processes of Ray that train here: their logs are in the folder of this cluster."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with suppress(psutil.Error):
                if any("RayTrainWorker" in part for part in process.info["cmdline"] or ()):
                    logs = [file.path for file in process.open_files()]
                    found += [process] * any(log.startswith(f"{self.folder}/") for log in logs)
        return found

    def stop(self):
        for node in reversed(self._running):
            if node.poll() is None:
                self.kill(node)

    def wait(self):
        """Return when all nodes that were started are part of the cluster."""
        for number, node in enumerate(self._running):
            for _ in range(1500):
                said = self._log(number).read_text()
                if node.poll() is None and "will now block forever" not in said:
                    time.sleep(0.2)
                    continue
                break
            assert "will now block forever" in said, said

    def _log(self, number):
        return self.folder.parent / f"node-{number}.log"

    def _wait(self):
        host, port = self.address.split(":")
        probe = f"import socket; socket.create_connection(('{host}', {port}), 1)"
        for _ in range(600):
            command = [*self._prefix, sys.executable, "-c", probe]
            if subprocess.run(command, capture_output=True).returncode == 0:
                return
            assert self.head.poll() is None, "the head has ended"
            time.sleep(0.2)
        raise AssertionError("no head")


@contextmanager
def nodes(count=2, *, cpus=0, **options):
    """A head, that computes nothing unless said otherwise, and nodes of one CPU each."""
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        (inside := Path(folder) / "r").mkdir()
        made = Nodes(inside, cpus=cpus, **options)
        try:
            made.others = []
            for _ in range(count):  # two at once would take the same names for their sockets
                made.others.append(made.start())
                made.wait()
            yield made
        finally:
            made.stop()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
