"""Prepared data as artifacts of the run that prepared them, verified on upload and download."""

import shutil
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rlhf_core.data import prepared
from rlhf_core.errors import DataError
from tasks.registry.files import staged
from tasks.registry.refs import DATA_FOLDER, DatasetRef


def store_dataset(client: MlflowClient, run_id: str, directory: Path) -> DatasetRef:
    """Store prepared data with a run, and verify the stored copy."""
    client.log_artifacts(run_id, str(directory), DATA_FOLDER)
    ref = DatasetRef(run_id=run_id, digest=prepared.digest(directory))
    with tempfile.TemporaryDirectory() as scratch:
        fetch_dataset(client, ref, Path(scratch) / DATA_FOLDER)
    return ref


def fetch_dataset(client: MlflowClient, ref: DatasetRef, to: Path) -> Path:
    """Write the prepared data to `to`, which must not exist yet.

    Raises: DataError if the run or its data do not exist, or do not match the digest.
    """
    with staged(to) as part, tempfile.TemporaryDirectory(dir=part.parent) as scratch:
        try:
            shutil.move(client.download_artifacts(ref.run_id, DATA_FOLDER, scratch), part)
        except (MlflowException, OSError) as error:
            raise DataError(
                f"there is no prepared data at {ref.uri} ({error}); run the prepare stage again"
            ) from error
        if (found := prepared.digest(part)) != ref.digest:
            raise DataError(
                f"the data at {ref.uri} is not what was stored: its digest is {found} and should "
                f"be {ref.digest}; run the prepare stage again"
            )
    return to
