"""What prepared data hold, from the small file beside them or else from the tables themselves."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException

from rlhf_core.data.origins.counts import FILE, Count, Origins, count_tables
from rlhf_core.errors import DataError
from tasks.lineage.graph import Graph, StageRun
from tasks.registry.refs import DATA_FOLDER, SnapshotRef

NEEDED = ("validation.json", "preferences.train.jsonl", "preferences.eval.jsonl")


@dataclass(frozen=True)
class DataSet:
    """Prepared data, and what is known of their rows."""

    uri: str
    digest: str
    snapshot: str = ""  # of votes, feedback:/project/digest
    run: StageRun | None = None
    origins: Origins | None = None
    unknown: str = ""  # why there are no origins

    @property
    def feedback_project(self) -> str:
        """The project of the preference store that its votes are from; empty for files."""
        return SnapshotRef.parse(self.snapshot).project if self.snapshot else ""

    def counts(self) -> Iterator[Count]:
        """Its rows, by everything that is counted."""
        yield from self.origins.counts if self.origins is not None else ()


class DataSets:
    """Data sets by address, each read once; equal tables of earlier versions are read once, too."""

    def __init__(self, graph: Graph, progress: Callable[[str], None] = lambda _: None) -> None:
        self._graph, self._progress = graph, progress
        self._prepared = graph.prepared()
        self._by_digest: dict[str, str] = {}
        for uri, run in self._prepared.items():
            self._by_digest.setdefault(run.data_digest, uri)
        self._known: dict[str, DataSet] = {}
        self._old: dict[str, Origins] = {}

    def all(self) -> list[DataSet]:
        """Every data set that a run has prepared."""
        return [self.at(uri) for uri in self._prepared]

    def at(self, uri: str, digest: str = "") -> DataSet:
        """The data at an address; if nothing is known of it, others with the same digest."""
        if uri not in self._known:
            self._known[uri] = self._find(uri, digest)
        return self._known[uri]

    def _find(self, uri: str, digest: str) -> DataSet:
        run = self._prepared.get(uri)
        if run is None:
            other = self._by_digest.get(digest) if digest else None
            if other is not None:
                return self.at(other)
            why = "the run that prepared them was deleted for good"
            return DataSet(uri or f"data {digest or 'without address'}", digest, unknown=why)
        self._progress(uri)
        try:
            origins = self._origins(run)
        except (MlflowException, DataError, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            why = run.erased or lines[0]
            return DataSet(uri, run.data_digest, run.snapshot, run, None, why)
        return DataSet(uri, run.data_digest, run.snapshot, run, origins)

    def _origins(self, run: StageRun) -> Origins:
        client = self._graph.record.client
        there = {Path(file.path).name for file in client.list_artifacts(run.run_id, DATA_FOLDER)}
        if not there:
            raise DataError("the files of the data are gone from MLflow")
        if FILE not in there and run.data_digest in self._old:
            return self._old[run.data_digest]
        with tempfile.TemporaryDirectory() as folder:

            def fetch(name: str) -> Path:
                path = f"{DATA_FOLDER}/{name}"
                return Path(client.download_artifacts(run.run_id, path, folder))

            if FILE in there:
                return Origins.read(fetch(FILE))
            if missing := [name for name in NEEDED if name not in there]:
                raise DataError(f"the file {missing[0]} of the data is gone from MLflow")
            for name in NEEDED:
                path = fetch(name)
            found = count_tables(path.parent)
        self._old[run.data_digest] = found
        return found


def data_of(run: StageRun | None, digest: str) -> tuple[str, str]:
    """Address and digest of the data that a run read, or that the tags of a version name."""
    if run is not None and run.data:
        return run.data, run.data_digest
    return "", digest
