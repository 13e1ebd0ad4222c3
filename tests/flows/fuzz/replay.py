"""Replays the fuzz with a seed, and counts what fell.

    python tests/flows/fuzz/replay.py --seed 1 --count 1000
    PYTHONPATH=ANOTHER/CHECKOUT python tests/flows/fuzz/replay.py --seed 1 --surface data

A case falls if it raises anything but our own errors, dies, runs for more than 10 s, takes more
than 2 GB, or prints a traceback, control characters or a page of text.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases import SURFACES, Case, generate

HERE = Path(__file__).parent
# Nothing outside this machine is asked, and nothing outside the folder is written.
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RLHF_DEVICE": "cpu", "NO_COLOR": "1"}


class Server:
    """The process of `server.py`, and a home for its commands."""

    def __init__(self, folder: Path, database: Path | None = None) -> None:
        home = folder / "home"
        (home / "mlflow").mkdir(parents=True)
        if database is not None:
            shutil.copy(database, home / "mlflow" / "mlflow.db")
        (folder / "cwd").mkdir()
        paths = [str(HERE.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        paths.reverse()  # another checkout comes first
        self.env = {**os.environ, **QUIET, "RLHF_HOME": str(home)}
        self.env["PYTHONPATH"] = os.pathsep.join(paths)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.env,
            cwd=folder / "cwd",
        )
        assert self._process.stdout is not None
        if "ready" not in self._process.stdout.readline():
            raise RuntimeError("the server of the fuzz did not start")

    def ask(self, case: Case) -> dict[str, Any]:
        """How a case ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


@contextmanager
def serving(folder: Path, database: Path | None = None) -> Iterator[Server]:
    """A server for the length of a block."""
    server = Server(folder, database)
    try:
        yield server
    finally:
        server.close()


def replay(
    server: Server, surface: str, seed: int, count: int, folder: Path
) -> Iterator[tuple[str, Case, dict[str, Any]]]:
    """Each case with its name and its outcome."""
    for name, case in generate(surface, seed, count, folder):
        yield name, case, server.ask(case)


def main() -> None:
    """Replay, print what fell and the table of counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300, help="cases of each surface")
    parser.add_argument("--surface", choices=SURFACES, action="append")
    parser.add_argument("--verbose", action="store_true", help="print what each fallen case said")
    parser.add_argument("--all", action="store_true", help="print what every case said")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        database = folder / "mlflow.db"
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=f"sqlite:///{database}").search_experiments()
        with serving(folder, database) as server:
            for surface in options.surface or SURFACES:
                fallen, slowest, largest = Counter[str](), 0.0, 0
                begin = time.monotonic()
                for name, case, found in replay(
                    server, surface, options.seed, options.count, folder
                ):
                    slowest, largest = max(slowest, found["seconds"]), max(largest, found["mb"])
                    if fault := found.get("fault"):
                        fallen[fault] += 1
                        print(f"{name}: {fault}", flush=True)
                        if options.verbose:
                            print(
                                json.dumps(case)[:600], found.get("text", found["said"]), sep="\n"
                            )
                    elif options.all:
                        print(f"{name}: {found['status']} {found['said'].strip()!r}")
                rows.append((surface, fallen, slowest, largest))
                print(f"{surface}: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"\nseed {options.seed}, {options.count} cases of each surface")
    for surface, fallen, slowest, largest in rows:
        print(f"{surface}: {fallen.total()} fell; slowest {slowest} s, largest {largest} MB")
        for fault, count in fallen.most_common():
            print(f"    {count:4}  {fault}")


if __name__ == "__main__":
    main()
