"""Verdicts that are asked for once: kept in an MLflow run of the project, by content.

A line of JSON is a verdict under the digest of the question: prompt, answers in the order in which
they were shown, and the identity of the judge. Lines are first appended to a file of this machine,

    RLHF_HOME/judges/EXPERIMENT/IDENTITY/PART.jsonl

so that a process that is killed loses none, and the file becomes the artifact
`verdicts/IDENTITY/PART.jsonl` once it has many lines or is old. Parts have names of their own, so
several processes that write at once lose nothing, and what a killed process has left is uploaded
by the next.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Protocol

from mlflow.exceptions import MlflowException

from rlhf_core.data.prepared import canonical_prompt
from rlhf_core.judges.judge import Judge, Pair, Verdict, Winner
from rlhf_core.redaction import masked
from tasks.judges.meter import Meter
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.tracking import first_line

log = logging.getLogger(__name__)

FOLDER = "verdicts"  # of the artifacts
MOST_LINES, MOST_SECONDS = 200, 60.0  # of a part, before it is uploaded
_WINNERS: Mapping[str, Winner] = {"a": "a", "b": "b", "tie": "tie"}
_ABOUT = (
    "What judges behind endpoints said, by the digest of the question, so that nobody pays twice. "
    "Delete this run to have everything asked again."
)


class Streaming(Judge, Protocol):
    """A judge whose verdicts come one by one."""

    def stream(self, pairs: Sequence[Pair]) -> Generator[tuple[int, Verdict]]:
        """The number of each pair and its verdict."""


class Memory:
    """The verdicts of one judge in one project.

    Args:
        identity: of the judge: all that a verdict depends on beside the pair.
        experiment: of the project, in MLflow.
    """

    def __init__(self, record: Record, experiment: str, identity: str) -> None:
        self._record = record
        self._experiment = experiment
        self._identity = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._folder = record.settings.home / "judges" / experiment / self._identity
        self._known: dict[str, Verdict] | None = None
        self._part: IO[str] | None = None
        self._path = self._folder
        self._lines, self._begun = 0, 0.0

    def key(self, pair: Pair) -> str:
        """The digest of a question."""
        facts = [self._identity, canonical_prompt(pair.prompt), pair.a, pair.b]
        # Half of a surrogate pair, which UTF-8 cannot encode, is escaped by JSON.
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def find(self, pair: Pair) -> Verdict | None:
        """The verdict on a pair; None if it was not asked about, or not answered."""
        if self._known is None:
            self._known = self._load()
        return self._known.get(self.key(pair))

    def add(self, pair: Pair, verdict: Verdict) -> None:
        """Remember a verdict; one without a winner is not remembered."""
        if verdict.winner is None:
            return
        if self._known is None:
            self._known = self._load()
        self._known[self.key(pair)] = verdict
        line = {
            "key": self.key(pair),
            "winner": verdict.winner,
            "reason": masked(verdict.reason),
            "time": datetime.now(UTC).isoformat(timespec="microseconds"),
        }
        part = self._part or self._begin()
        part.write(json.dumps(line) + "\n")
        part.flush()
        self._lines += 1
        if self._lines >= MOST_LINES or time.monotonic() - self._begun >= MOST_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Upload what was added; if MLflow does not take it, it stays on this machine."""
        if self._part is not None:
            part, self._part = self._part, None
            with part:
                self._upload(self._path)

    # ---- files ----

    def _begin(self) -> IO[str]:
        """A new part, locked as long as this process has it open."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"{uuid.uuid4().hex}.jsonl"
        new = self._path.with_suffix(".new")
        part = new.open("a", encoding="utf-8")
        fcntl.flock(part, fcntl.LOCK_EX)
        new.rename(self._path)  # locked before another process can see it
        self._part, self._lines, self._begun = part, 0, time.monotonic()
        return part

    def _upload(self, path: Path) -> None:
        try:
            self._record.client.log_artifact(self._run(), str(path), f"{FOLDER}/{self._identity}")
            path.unlink()
        except (MlflowException, OSError) as error:
            log.warning(
                "verdicts of a judge could not be written to MLflow (%s); they stay in %s, and are "
                "written by the next stage with this judge",
                *(first_line(error), path),
            )

    def _run(self) -> str:
        """The run that keeps the verdicts, made if there is none."""
        client = self._record.client
        for run in self._record.runs.verdicts(self._experiment):
            return str(run.info.run_id)
        made = client.create_run(
            self._experiment,
            run_name="verdicts of judges",
            tags={tags.STAGE: tags.VERDICTS, tags.DESCRIPTION: _ABOUT},
        )
        client.set_terminated(made.info.run_id, "FINISHED")
        return str(made.info.run_id)

    def _load(self) -> dict[str, Verdict]:
        """All verdicts: of this machine and of MLflow; of several on a question the oldest."""
        lines = list(self._left_here())  # first: a part may move to MLflow meanwhile
        for run in self._record.runs.verdicts(self._experiment):
            place, run_id = f"{FOLDER}/{self._identity}", run.info.run_id
            if self._record.client.list_artifacts(run_id, place):
                with tempfile.TemporaryDirectory() as folder:
                    found = self._record.client.download_artifacts(run_id, place, folder)
                    for path in sorted(Path(found).glob("*.jsonl")):
                        lines += path.read_text(encoding="utf-8").splitlines()
        verdicts: dict[str, tuple[str, Verdict]] = {}
        for line in lines:
            with suppress(ValueError, LookupError, TypeError):  # cut off when a process was killed
                said = json.loads(line)
                verdict = Verdict(_WINNERS[said["winner"]], str(said["reason"]))
                when, key = str(said["time"]), str(said["key"])
                if key not in verdicts or when < verdicts[key][0]:
                    verdicts[key] = (when, verdict)
        return {key: verdict for key, (_, verdict) in verdicts.items()}

    def _left_here(self) -> Iterator[str]:
        """The lines of parts that were not uploaded; those of ended processes are uploaded now."""
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                with path.open("r+", encoding="utf-8") as part:
                    yield from part.read().splitlines()
                    with suppress(BlockingIOError):  # its process lives
                        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if path.exists() and os.path.samestat(path.stat(), os.fstat(part.fileno())):
                            self._upload(path)
            except FileNotFoundError:  # another process has just uploaded it
                continue


class RememberedJudge:
    """A judge that is asked about a pair once; verdicts are kept as they come."""

    def __init__(self, judge: Streaming, memory: Memory, meter: Meter) -> None:
        self.name = judge.name
        self._judge = judge
        self._memory = memory
        self._meter = meter

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair; an exception leaves those that came before it remembered."""
        found = [self._memory.find(pair) for pair in pairs]
        asked: dict[str, list[int]] = {}
        for number, verdict in enumerate(found):
            if verdict is None:
                asked.setdefault(self._memory.key(pairs[number]), []).append(number)
        self._meter.add(remembered=sum(verdict is not None for verdict in found))
        numbers = list(asked.values())
        try:
            with closing(self._judge.stream([pairs[same[0]] for same in numbers])) as stream:
                for position, verdict in stream:
                    self._memory.add(pairs[numbers[position][0]], verdict)
                    for number in numbers[position]:
                        found[number] = verdict
        finally:
            self._memory.flush()
        return [verdict for verdict in found if verdict is not None]
