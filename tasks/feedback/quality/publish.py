"""The report of a snapshot as an MLflow run: a page, tables, and numbers with their intervals."""

import json
import tempfile
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag

from rlhf_core.agreement.quality import Quality
from tasks.feedback.quality.examine import examine
from tasks.feedback.quality.page import PAGE, quality_page
from tasks.feedback.quality.tables import numbers, tables
from tasks.feedback.store.records import SnapshotInfo
from tasks.feedback.store.store import FeedbackProject
from tasks.record import tags
from tasks.record.describe import ensure_experiment, origin
from tasks.record.record import Record
from tasks.record.run import close_run_on_exit
from tasks.record.work_folder import remember_run, work_folder
from tasks.registry.refs import SnapshotRef

CONTEXT = "agreement"  # of the data set of a report, as MLflow shows it
SHORT = 16  # digits of a digest, as MLflow shows those of other data


def publish(project: FeedbackProject, snapshot: SnapshotInfo | str, record: Record) -> str:
    """The MLflow run with the report of a snapshot, made if there is none; its id.

    The run is in the experiment of the project's name. It has `report.html`, `quality.json`, a
    folder `tables/` and metrics `summary/…`; the snapshot is its data set. It is what everybody may
    see: nobody with under five votes by themselves, no small group.

    Args:
        snapshot: one, or its digest, the beginning of that, or `latest`.

    Raises: DataError when there is no such snapshot.
    """
    which = snapshot if isinstance(snapshot, str) else snapshot.digest
    info = project.snapshots.find(which)
    ref = SnapshotRef(project=project.name, digest=info.digest)
    experiment = ensure_experiment(record.client, project.name, record.settings)
    folder = record.settings.home / "work" / f"feedback-{info.digest[:SHORT]}"
    with work_folder(folder, kept=False):  # whoever else publishes it waits, and finds it
        found = record.runs.feedback_report(experiment, ref.uri)
        if found is not None:
            return str(found.info.run_id)
        quality = examine(project, info.digest).redacted()
        name = f"feedback-{info.digest[:SHORT]}"
        run_id = str(record.client.create_run(experiment, run_name=name).info.run_id)
        remember_run(folder, run_id)
        with close_run_on_exit(record.client, run_id), tempfile.TemporaryDirectory() as scratch:
            own = {tags.STAGE: tags.FEEDBACK_REPORT, tags.SNAPSHOT: ref.uri}
            record.add_tags(run_id, own | origin(0, record.settings))
            source = json.dumps({"feedback_project": project.name, "snapshot": info.digest})
            data = Dataset(f"feedback-{project.name}", info.digest[:SHORT], "feedback", source)
            context = InputTag(tags.DATA_CONTEXT, CONTEXT)
            record.client.log_inputs(run_id, datasets=[DatasetInput(data, [context])])
            _write(Path(scratch), quality)
            record.client.log_artifacts(run_id, scratch)
            record.add_numbers(run_id, {tags.SUMMARY + k: v for k, v in numbers(quality).items()})
        return run_id


def _write(folder: Path, quality: Quality) -> None:
    """The page, everything as JSON, and each table as JSON, Parquet and CSV."""
    (folder / PAGE).write_text(quality_page(quality), encoding="utf-8")
    content = json.dumps(quality.as_json(), ensure_ascii=False, indent=1)
    (folder / "quality.json").write_text(content, encoding="utf-8")
    place = folder / "tables"
    place.mkdir()
    for name, table in tables(quality).items():
        table.to_json(place / f"{name}.json", orient="records", indent=1, force_ascii=False)
        table.to_parquet(place / f"{name}.parquet", index=False)
        table.to_csv(place / f"{name}.csv", index=False)
