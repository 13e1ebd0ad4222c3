"""What is registered already, as an input of a stage: by address, or by what it came from."""

import re
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from prefect import task

from rlhf_core.errors import DataError, ModelError
from tasks.record.tracking import connect
from tasks.registry.model_store import DATA_FOLDER, DatasetRef, MlflowModelStore, ModelRef
from tasks.settings import read_settings

_DATA_URI = re.compile(rf"runs:/([0-9a-f]{{32}})/{DATA_FOLDER}")


@task(name="find-parent", task_run_name="find {role} of {model.name}")
def find_parent(uri: str, model: ModelRef, role: Literal["sft", "reward"]) -> ModelRef:
    """The version at an address; for an empty one, that which `model` was made from.

    Raises: ModelError when there is none.
    """
    store = MlflowModelStore(connect(read_settings()))
    uri = uri or store.tags(model).get(f"parent.{role}", "")
    if not uri:
        raise ModelError(f"{model.uri} was made from no {role} model: name one as models:/NAME/3")
    return store.resolve(uri)


@task(name="find-data", task_run_name="find data")
def find_data(uri: str, model: ModelRef) -> DatasetRef:
    """The prepared data at `runs:/RUN/data`; for an empty address, those that `model` learnt from.

    Raises: DataError when there are none.
    """
    client = connect(read_settings())
    uri = uri or _data_of(client, model)
    match = _DATA_URI.fullmatch(uri)
    tags = _run(client, match[1]).data.tags if match else {}
    if match is None or tags.get("output.data") != uri:
        raise DataError(f"'{uri}' has no prepared data: write runs:/RUN/data of a prepare stage")
    return DatasetRef(run_id=match[1], digest=tags["data_digest"])


def _data_of(client: MlflowClient, model: ModelRef) -> str:
    run_id = MlflowModelStore(client).tags(model).get("run_id", "")
    uri = _run(client, run_id).data.tags.get("input.data") if run_id else None
    if uri is None:
        raise DataError(
            f"it is not known what {model.uri} learnt from: name data as runs:/RUN/data"
        )
    return str(uri)


def _run(client: MlflowClient, run_id: str) -> Run:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise DataError(f"there is no MLflow run {run_id}: name data as runs:/RUN/data") from None
