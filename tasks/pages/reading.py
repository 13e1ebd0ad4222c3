"""Reads what the stages of a run left in MLflow; what cannot be read is noted, not raised."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mlflow.entities import Run
from pydantic import BaseModel

from tasks.pages.texts import shown
from tasks.record import tags
from tasks.record.record import Record

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Row = dict[str, Any]

LARGEST = 20_000_000  # bytes of a table that is read
LARGEST_FIGURE = 300_000  # of a picture that is put into a page
FIGURES = 8  # of a stage
_RESULT = "result.json"


class Reader:
    """Reads artifacts and curves, and keeps a list of what it could not read."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.missing: list[str] = []

    def attempt(self, what: str, read: Callable[[], T]) -> T | None:
        """What `read` returns; None, with a note, if that fails."""
        try:
            return read()
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.missing.append(f"{what} ({shown(lines[0], 200)})")
            return None

    def kept(self, run: Run, kind: type[M], what: str) -> M | None:
        """The result that a stage kept; None if it kept none."""
        uri = tags.outputs(run.data.tags).get(tags.RESULT)
        if uri is None:
            return None
        text = self.attempt(what, lambda: self._content(tags.run_of(uri), _RESULT).decode())
        return None if text is None else self.attempt(what, lambda: kind.model_validate_json(text))

    def table(self, run: Run, name: str) -> list[Row]:
        """The rows of a table of a stage; none if there is no such table."""
        path = f"tables/{name}.json"
        if path not in self.paths(run, "tables"):
            return []
        return self.attempt(f"the table {name}", lambda: self._rows(run, path)) or []

    def figures(self, run: Run) -> dict[str, bytes]:
        """The pictures of a stage by name, as PNG; large ones are noted instead."""
        found = {}
        for path, size in list(self.paths(run, "figures").items())[:FIGURES]:
            if size > LARGEST_FIGURE:
                self.missing.append(f"{path}, which is too large for a page: see its run in MLflow")
                continue
            png = self.attempt(path, lambda path=path: self._content(run.info.run_id, path))  # type: ignore[misc]
            if png is not None:
                found[Path(path).stem] = png
        return found

    def paths(self, run: Run, folder: str) -> dict[str, int]:
        """The artifacts in a folder of a run, with their sizes in bytes."""
        client = self.record.client
        found = self.attempt(
            f"the {folder} of a stage", lambda: client.list_artifacts(run.info.run_id, folder)
        )
        return {file.path: file.file_size or 0 for file in found or [] if not file.is_dir}

    def history(self, run: Run, metric: str) -> list[tuple[float, float]]:
        """Step and value of every finite point of a curve, the last value of each step."""
        if metric not in run.data.metrics:
            return []
        client = self.record.client
        points = self.attempt(
            f"the curve {metric}", lambda: client.get_metric_history(run.info.run_id, metric)
        )
        by_step = {p.step: p.value for p in points or [] if p.value == p.value}
        return [(float(step), value) for step, value in sorted(by_step.items())]

    def _rows(self, run: Run, path: str) -> list[Row]:
        size = self.paths(run, "tables")[path]
        if size > LARGEST:
            raise ValueError(f"it has {size:,} bytes, and {LARGEST:,} are read")
        content = json.loads(self._content(run.info.run_id, path))
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def _content(self, run_id: str, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            local = self.record.client.download_artifacts(run_id, path, folder)
            return Path(local).read_bytes()
