"""Finds registered models and data as inputs of a stage, by address or by lineage."""

from collections.abc import Mapping

from prefect import task

from rlhf_core.errors import DataError, ModelError
from rlhf_core.settings.tournament import MILESTONE
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, ModelRef, run_of_data


@task(name="find-model", task_run_name="find {uri}")
def find_model(uri: str) -> ModelRef:
    """The version that a registry address currently refers to, to use instead of training."""
    return Record.open().store.resolve(uri)


@task(name="find-parent", task_run_name="find {role} of {model.name}")
def find_parent(uri: str, model: ModelRef, role: str) -> ModelRef:
    """The version at an address; for an empty address, the one that `model` was trained from.

    Raises: ModelError if there is none.
    """
    store = Record.open().store
    uri = uri or store.tags(model).get(tags.parent_of(role), "")
    if not uri:
        raise ModelError(
            f"{model.uri} was not trained from a {role} model: pass one as models:/NAME/3"
        )
    return store.resolve(uri)


@task(name="find-milestones", task_run_name="find milestones of {policy.name}")
def find_milestones(policy: ModelRef) -> dict[str, ModelRef]:
    """The milestones of the training that made a policy, by kind, as milestone.10.

    Raises: ModelError if there are none.
    """
    record = Record.open()
    run_id = record.store.tags(policy).get(tags.RUN)
    found = milestones_of(tags.models(_tags(record, run_id))) if run_id else {}
    found = {kind: ref for kind, ref in found.items() if record.store.exists(ref)}
    if not found:
        raise ModelError(
            f"the training of {policy.uri} kept no milestones: train it with keep_every, or name "
            "the last policy of a training that has some"
        )
    return found


def milestones_of(models: Mapping[str, ModelRef]) -> dict[str, ModelRef]:
    """The milestones among the outputs of a run."""
    return {kind: ref for kind, ref in models.items() if kind.startswith(MILESTONE)}


@task(name="find-data", task_run_name="find data")
def find_data(uri: str, model: ModelRef | None) -> DatasetRef:
    """The prepared data at `runs:/RUN/data`; for an empty address, the training data of `model`.

    Raises: DataError if there are none.
    """
    record = Record.open()
    if model is not None:
        uri = uri or _data_of(record, model)
    run_id = run_of_data(uri)
    run_tags = _tags(record, run_id) if run_id else {}
    if tags.outputs(run_tags).get(tags.DATA) != uri:
        raise DataError(
            f"there are no prepared data at '{uri}': pass runs:/RUN/data of a prepare stage"
        )
    return tags.dataset(run_tags)


def _data_of(record: Record, model: ModelRef) -> str:
    run_id = record.store.tags(model).get(tags.RUN)
    uri = _tags(record, run_id).get(tags.input_of(tags.DATA)) if run_id else None
    if uri is None:
        raise DataError(
            f"the training data of {model.uri} are unknown: pass data as runs:/RUN/data"
        )
    return uri


def _tags(record: Record, run_id: str) -> dict[str, str]:
    run = record.runs.find(run_id)
    if run is None:
        raise DataError(f"there is no MLflow run {run_id}: pass data as runs:/RUN/data")
    return dict(run.data.tags)
