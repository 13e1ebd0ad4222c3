"""Describes a run in MLflow: its settings, origin, inputs and page."""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Param
from mlflow.exceptions import MlflowException

from rlhf_core.errors import ConfigError
from tasks.prefect.ui import PrefectRun
from tasks.record import tags
from tasks.record.identity import Definition, code_identity
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, ModelRef, Ref, SnapshotRef
from tasks.settings import Settings

CONFIG = "config.yaml"
DIGEST_LENGTH = 36  # MLflow's limit for the digest of a data set
PARAM_LENGTH = 6000  # MLflow's limit; config.yaml has the whole value


def describe(record: Record, run_id: str, what: Definition, own_tags: Mapping[str, str]) -> None:
    """Write the tags, settings and inputs of a stage to its run."""
    record.add_tags(run_id, own_tags)
    write_settings(record, run_id, what.content(), what.seed)
    _write_inputs(record, run_id, what.inputs, what.context)


def run_tags(what: Definition, key: str, settings: Settings) -> dict[str, str]:
    """The tags of a stage's run."""
    return {
        tags.PARENT_RUN: what.run.run_id,
        tags.STAGE: what.name,
        tags.KEY: key,
        **_stage_origin(what, settings),
        **_snapshot(what.inputs),
        **{tags.input_of(role): ref.uri for role, ref in what.inputs.items()},
    }


def _snapshot(inputs: Mapping[str, Ref]) -> dict[str, str]:
    """The tag of the votes that a stage reads, if it reads any from the store."""
    found = [ref for ref in inputs.values() if isinstance(ref, SnapshotRef)]
    return {tags.SNAPSHOT: found[0].uri} if found else {}


def version_tags(what: Definition, run_id: str, settings: Settings) -> dict[str, str]:
    """The tags of the versions that a stage's run registers."""
    models = {role: ref for role, ref in what.inputs.items() if isinstance(ref, ModelRef)}
    return {
        **_stage_origin(what, settings),
        **{tags.parent_of(role): ref.uri for role, ref in models.items()},
        tags.PIPELINE_RUN: what.run.run_id,
        tags.RUN: run_id,
    }


def _stage_origin(what: Definition, settings: Settings) -> dict[str, str]:
    digests = {ref.digest for ref in what.inputs.values() if isinstance(ref, DatasetRef)}
    data = {tags.DATA_DIGEST: ", ".join(sorted(digests))} if digests else {}
    return {**origin(what.seed, settings), **data}


def origin(seed: int, settings: Settings) -> dict[str, str]:
    """The tags for seed, code, machine and Prefect run."""
    prefect = PrefectRun.current()
    links = prefect.tags(settings.prefect_public_url) if prefect else {}
    machine = {tags.MACHINE: machine_type(settings)}
    return {tags.SEED: str(seed), **code_identity(), **machine, **links}


def machine_type(settings: Settings) -> str:
    """Processor and accelerators of this machine, e.g. `x86_64, 2 CPU cores, RLHF_DEVICE auto`."""
    cores = os.cpu_count() or 1
    # The driver's own list: asking torch would begin to use the accelerator.
    found = [path.read_text() for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    models = Counter(text.partition("Model:")[2].splitlines()[0].strip() for text in found)
    parts = [
        platform.machine(),
        f"{cores} CPU {'core' if cores == 1 else 'cores'}",
        *(f"{count} × {model}" for model, count in models.items()),
        f"RLHF_DEVICE {settings.device_name}",
    ]
    return ", ".join(parts)


def write_settings(record: Record, run_id: str, content: Mapping[str, Any], seed: int) -> None:
    """Write settings as `config.yaml` and as parameters, which a resumed run has already.

    Raises: ConfigError if the parameters of a resumed run differ.
    """
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    record.client.log_text(run_id, text, CONFIG)
    params = {**flatten(content), "seed": str(seed)}
    known = record.client.get_run(run_id).data.params
    if differing := sorted(name for name in known if params.get(name) != known[name]):
        raise ConfigError(
            f"the run {run_id} cannot be resumed, because it has another {differing[0]} "
            f"({known[differing[0]]}); delete it in MLflow to start from the beginning"
        )
    new = [Param(name, value) for name, value in params.items() if name not in known]
    record.client.log_batch(run_id, params=new)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to MLflow parameters like `ppo.kl_coef`; long values end in `…`."""
    flat: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        flat[prefix + name] = text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
    return flat


def _write_inputs(record: Record, run_id: str, inputs: Mapping[str, Ref], context: str) -> None:
    known = {model.model_id for model in record.client.get_run(run_id).inputs.model_inputs}
    data = [ref for ref in inputs.values() if isinstance(ref, DatasetRef | SnapshotRef)]
    model_tags = {
        role: record.store.tags(ref) for role, ref in inputs.items() if isinstance(ref, ModelRef)
    }
    found = model_tags.values()
    models = {own[tags.LOGGED_MODEL] for own in found if tags.LOGGED_MODEL in own}
    digests = {
        tags.input_digest_of(role): own[tags.DIGEST]
        for role, own in model_tags.items()
        if tags.DIGEST in own
    }
    record.add_tags(run_id, digests)
    record.client.log_inputs(
        run_id,
        datasets=[_dataset_input(ref, context) for ref in data],
        models=[LoggedModelInput(model) for model in sorted(models - known)],
    )


def _dataset_input(ref: DatasetRef | SnapshotRef, context: str) -> DatasetInput:
    source = json.dumps({"uri": ref.uri})
    if isinstance(ref, SnapshotRef):
        name, digest, kind = ref.project, ref.digest[:DIGEST_LENGTH], "preference_store"
    else:
        name, digest, kind = "prepared-data", ref.digest, "mlflow_run"
    dataset = Dataset(name, digest, source_type=kind, source=source)
    return DatasetInput(dataset, [InputTag(tags.DATA_CONTEXT, context)])


def ensure_experiment(client: MlflowClient, project: str, settings: Settings) -> str:
    """The id of the project's experiment, created if needed; safe for concurrent processes.

    Raises: ConfigError if the experiment was deleted.
    """
    found = client.get_experiment_by_name(project)
    if found is None:
        root = settings.artifact_root
        location = None if root is None else (root / project).as_uri()
        try:
            return str(client.create_experiment(project, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(project)
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(
            f"the MLflow experiment '{project}' was deleted; restore it in MLflow, or choose "
            "another project name"
        )
    return str(found.experiment_id)


def run_url(run_id: str, experiment_id: str, settings: Settings) -> str:
    """The page of an MLflow run, in the training view."""
    page = f"{settings.mlflow_public_url}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"{page}?workflowType=machine_learning"
