"""The page for annotators as a process of its own, and people who are signed in to it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tasks.feedback.page.shield import Address
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.store import FeedbackProject, Store

ROOT = Path(__file__).parents[3]
# planted where nobody who labels may find them again
PLANTED = (
    "zebra-policy",
    "run-7f3c9ab2",
    "heron-9",
    "source-of-mine",
    "licence-of-mine",
    "kept-me",
)


def pair(number: int, **more) -> NewPair:
    """A pair whose model, run, source and licence are to be kept from annotators."""
    return NewPair(
        f"Question {number}: why?",
        Answer(f"First answer to {number}.", model=f"models:/{PLANTED[0]}/3",
               sampling={"run": PLANTED[1], "name": PLANTED[2]}, source=PLANTED[3],
               licence=PLANTED[4]),
        Answer(f"Second answer to {number}.", model=f"models:/{PLANTED[0]}/4",
               sampling={"run": PLANTED[1]}, source=PLANTED[3]),
        source=PLANTED[3], licence=PLANTED[4], kept={"column": PLANTED[5]},
        **{"wanted": 1, **more},
    )  # fmt: skip


def signed_in(store: Store, project: FeedbackProject, name: str = "Ottoline") -> str:
    """The session of a new annotator, who has agreed to the text."""
    session = store.door.enter(project.people.invite(name=name))
    who, rules = store.door.who(session), project.rules
    project.people.agree(
        who.annotator, version=rules.consent_version, text=rules.consent, licence=rules.licence
    )
    return session


class LabelServer:
    """`python -m tasks.feedback.page.app`, which may be killed and started again."""

    def __init__(self, database: str, home: Path) -> None:
        self.database = database
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cookie = Address(self.url, self.port).cookie
        self._env = {
            **os.environ,
            "RLHF_FEEDBACK_DATABASE": database,
            "RLHF_LABEL_URL": self.url,
            "RLHF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }
        self._process: subprocess.Popen | None = None

    def start(self) -> "LabelServer":
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tasks.feedback.page.app", "--port", str(self.port)],
            env={**self._env, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return self
            except (urllib.error.URLError, OSError):
                assert self._process.poll() is None, "the server has ended"
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None
