"""A Ray cluster of several nodes on this machine: a raylet each, as `ray start` makes them."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class Nodes:
    """A head and others, each with one CPU unless said otherwise."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self._folder = folder
        self._running: list[subprocess.Popen] = []
        self._head = self.start("--head", f"--port={self.address.split(':')[1]}", prefix=prefix)
        self._wait()

    def start(self, *options, cpus=1, prefix=()):
        """Start a node; it is part of the cluster some seconds later."""
        where = () if "--head" in options else (f"--address={self.address}",)
        if "--head" in options:
            options += ("--include-dashboard=false", f"--temp-dir={self._folder}")
        command = [*prefix, str(RAY), "start", "--block", *where, *options]
        command += [
            f"--num-cpus={cpus}",
            "--disable-usage-stats",
            "--object-store-memory=100000000",
        ]
        with (self._folder.parent / f"node-{len(self._running)}.log").open("w") as log:
            environment = os.environ | ENVIRONMENT
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
        node.wait()

    def stop(self):
        for node in reversed(self._running):
            if node.poll() is None:
                self.kill(node)

    def _wait(self):
        host, port = self.address.split(":")
        for _ in range(600):
            with suppress(OSError):
                socket.create_connection((host, int(port)), 1).close()
                return
            assert self._head.poll() is None, "the head has ended"
            time.sleep(0.2)
        raise AssertionError("no head")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
