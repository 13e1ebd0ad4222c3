"""Deployments: every flow as a form in the Prefect UI, with the values of a preset (a YAML file).

`rlhf deploy` registers the list of deployments, and `rlhf deploy --write` writes the same list to a
`prefect.yaml` for `prefect deploy --all`. A deployment stores nothing of the machine that deploys:
a worker imports the flows from the package that is installed where it runs.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path
from typing import Any, Final, NamedTuple, cast, get_type_hints
from uuid import UUID

import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitCreate,
    WorkPoolCreate,
    WorkPoolUpdate,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, VersionInfo
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from flows import stages
from flows.cli.loading import config_files, describe, load_config
from flows.config import PipelineConfig
from flows.erasure import erasure
from flows.feedback import feedback
from flows.local.find import OWNER, POOL
from flows.retrain import RetrainConfig, RetrainPlan, retrain
from flows.rlhf import rlhf
from flows.sweep import sweep
from rlhf_core.config import Section
from rlhf_core.errors import ConfigError
from tasks.prefect.accelerator import LIMIT

VERSION = version("rlhf-pipeline")
VERSION_TYPE = "prefect:simple"  # else Prefect looks for a git repository around us
FIRST_PRESET = "demo"
RETRAIN = "retrain"  # a folder beside the presets
# What a run may not choose. Command and environment are then those of the worker, and the process
# starts in an empty directory: in a user's folder Prefect would import the files there and install
# the dependencies of its pyproject.toml.
FIXED: Final = ("command", "env", "working_dir")
NIGHTLY: Final = {"cron": "0 3 * * *", "timezone": "UTC", "slug": "nightly", "active": False}
SCHEDULE_FIELDS: Final = {"schedule", "active", "max_scheduled_runs", "parameters", "slug"}

HEAD = """\
# Every flow as a deployment: prefect deploy --all
#
# Written by `rlhf deploy --write`. `prefect deploy` cannot create the work pool and the limit, as
# `rlhf deploy` does; create them with:
#
#     prefect work-pool create rlhf --type process
#     prefect gcl create rlhf-accelerator --limit 1
"""


class Deployment(NamedTuple):
    """A flow and the initial values of its form."""

    flow: Flow[..., Any]
    name: str
    about: str
    form: Section
    tags: list[str]

    @property
    def full_name(self) -> str:
        """`flow/deployment`, as Prefect writes it."""
        return f"{self.flow.name}/{self.name}"

    @property
    def as_dict(self) -> dict[str, Any]:
        """The deployment as an entry of `prefect.yaml`."""
        return {
            "name": self.name,
            "description": self.about,
            "version": VERSION,
            "version_type": VERSION_TYPE,
            "tags": self.tags,
            "entrypoint": f"{self.flow.fn.__module__}:{self.flow.fn.__name__}",
            "work_pool": {"name": POOL},
            "concurrency_limit": {"limit": 1, "collision_strategy": "ENQUEUE"},
            "schedules": [dict(NIGHTLY)] if self.flow is retrain else [],
            "parameters": {"config": self.form.model_dump(mode="json")},
        }


def deployments(folder: Path, owner: str = OWNER) -> list[Deployment]:
    """The deployments: the pipeline and retraining once per preset, every other flow once.

    The forms of the other flows start with the values of the preset `demo`, else of the first one.
    A file `retrain/PRESET.yaml` in the folder says what retraining a preset has besides.

    Args:
        folder: its YAML files are the presets.
        owner: shown as a tag.

    Raises: ConfigError if the folder has no config, or one of them is invalid.
    """
    files = config_files(folder)
    presets = {file.stem: load_config(file, (), PipelineConfig) for file in files}
    first = FIRST_PRESET if FIRST_PRESET in presets else files[0].stem
    forms: list[tuple[Flow[..., Any], str, str, Section]] = [
        *((rlhf, file.stem, describe(file), presets[file.stem]) for file in files),
        *((flow, first, _about(flow), form) for flow, form in _single_forms(presets[first])),
        *((retrain, n, _about(retrain), form) for n, form in _retrainings(folder, presets)),
    ]
    return [
        Deployment(flow, name, about, form, tags=["rlhf", presets[name].project, f"owner:{owner}"])
        for flow, name, about, form in forms
    ]


def deploy(folder: Path, *, working_dir: str = "", owner: str = OWNER) -> list[str]:
    """Register every deployment of `folder`, the work pool and the concurrency limit.

    All files are read before anything is registered. Changes that people made in the UI are kept:
    schedules, and whether a deployment is paused.

    Args:
        working_dir: where `folder` lies on the worker, so that the relative paths in its files,
            which stay as they are written, start there; empty leaves it to the worker.

    Returns: the names, as `flow/deployment`.

    Raises: ConfigError, as `deployments` does.
    """
    declared = deployments(folder, owner)
    with get_client(sync_client=True) as client:
        _make_pool(client)
        _make_limit(client)
        for deployment in declared:
            _register(client, deployment, working_dir)
    return [deployment.full_name for deployment in declared]


def prefect_yaml(folder: Path, owner: str = OWNER) -> str:
    """The deployments as the content of a file for `prefect deploy --all`."""
    entries = [deployment.as_dict for deployment in deployments(folder, owner)]
    configs = [entry["parameters"]["config"] for entry in entries]
    for config in configs:
        if "pipeline" in config:  # equal objects become one, which YAML writes as an alias
            config["pipeline"] = configs[configs.index(config["pipeline"])]
    content = {"pull": [], "deployments": entries}
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return HEAD + text


def _retrainings(
    folder: Path, presets: Mapping[str, PipelineConfig]
) -> Iterator[tuple[str, RetrainConfig]]:
    """The form of `retrain` for each preset."""
    plans = {file.stem: file for file in sorted((folder / RETRAIN).glob("*.yaml"))}
    if lost := plans.keys() - presets.keys():
        name = min(lost)
        raise ConfigError(
            f"{plans[name]} is about the preset '{name}', which is not there: name it after one of "
            f"{', '.join(presets)}"
        )
    for name, pipeline in presets.items():
        plan = load_config(plans[name], (), RetrainPlan) if name in plans else RetrainPlan()
        try:
            yield name, RetrainConfig(**dict(plan), pipeline=pipeline)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{plans.get(name, name)}: {said}") from None


def _single_forms(preset: PipelineConfig) -> Iterator[tuple[Flow[..., Any], Section]]:
    """The single flows with the values of a preset, on the models of its first run."""
    made = f"models:/{preset.project}-"
    inputs: dict[Flow[..., Any], dict[str, Any]] = {
        stages.prepare: {"lengths": preset.length_limits},
        stages.sft: {},
        stages.reward_model: {"sft": f"{made}sft/1", "data": ""},
        stages.held_out: {"sft": f"{made}sft/1", "data": "", "held_out": preset.reward_model},
        stages.report_card: {"reward_model": f"{made}reward/1", "sft": "", "data": ""},
        stages.policy: {"reward_model": f"{made}reward/1", "sft": "", "data": ""},
        stages.tournament: {
            "policy": f"{made}policy/1",
            "sft": "",
            "reward_model": "",
            "data": "",
            "tournament": preset.contest,
        },
        stages.evaluation: {
            "policy": f"{made}policy@champion",
            "sft": "",
            "reward_model": "",
            "data": "",
        },
        # Its judge is an annotator, and not who compares the policies of a pipeline.
        feedback: {"data": "", "evaluation": False, "judge": {}},
        erasure: {},
        sweep: {"pipeline": preset, "grid": {"ppo.kl_coef": [0.05, 0.1, 0.2]}},
    }
    sections = preset.model_dump(exclude={"sft": {"reuse"}, "reward_model": {"reuse"}})
    for flow, addresses in inputs.items():
        form: type[Section] = get_type_hints(flow.fn)["config"]
        values = sections | addresses
        yield flow, form.model_validate({n: values[n] for n in form.model_fields if n in values})


def _about(flow: Flow[..., Any]) -> str:
    """The docstring of a flow without its Args, Returns and Raises: the text above its form."""
    paragraphs = cleandoc(flow.fn.__doc__ or "").split("\n\n")
    return "\n\n".join(p for p in paragraphs if not p.startswith(("Args:", "Returns:", "Raises:")))


def _make_pool(client: SyncPrefectClient) -> None:
    new = closed(ProcessWorker.get_default_base_job_template())
    try:
        pool = client.create_work_pool(
            WorkPoolCreate(name=POOL, type="process", base_job_template=new)
        )
    except ObjectAlreadyExists:
        pool = client.read_work_pool(POOL)
    template = closed(pool.base_job_template)
    if template != pool.base_job_template:
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


def closed(template: Mapping[str, Any]) -> dict[str, Any]:
    """A work pool's job template in which a run chooses neither its command nor its environment.

    Prefect's own template lets anyone who starts a run replace both through job variables. Only the
    working folder remains a variable. Other changes that people made are kept.
    """
    job = dict(template["job_configuration"])
    properties = dict(template["variables"]["properties"])
    for name in FIXED:
        if re.search(r"\{\{\s*" + name + r"\s*\}\}", str(job.get(name))):
            del job[name]
    for name in ("command", "env"):  # the flow itself changes to `working_dir`
        properties.pop(name, None)
    variables = template["variables"] | {"properties": properties, "additionalProperties": False}
    return {**template, "job_configuration": job, "variables": variables}


def _make_limit(client: SyncPrefectClient) -> None:
    with suppress(ObjectAlreadyExists):  # people may have raised it to their number of accelerators
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))


def _register(client: SyncPrefectClient, declared: Deployment, working_dir: str) -> None:
    try:
        known = client.read_deployment_by_name(declared.full_name)
    except ObjectNotFound:
        known = None
    entry = declared.as_dict
    deployment = RunnerDeployment.from_flow(
        declared.flow,
        schedules=_schedules(entry["schedules"], known),
        paused=known is not None and known.paused,
        concurrency_limit=ConcurrencyLimitConfig(**entry["concurrency_limit"]),
        work_pool_name=POOL,
        job_variables={"working_dir": working_dir} if working_dir else {},
        entrypoint_type=EntrypointType.MODULE_PATH,
        **{key: entry[key] for key in ("name", "description", "version", "tags", "parameters")},
    )
    deployment.entrypoint = entry["entrypoint"]
    made = cast(
        UUID, deployment.apply(version_info=VersionInfo(type=VERSION_TYPE, version=VERSION))
    )
    # Prefect accepts a misspelt parameter, on which the run would then crash without a message.
    schema = parameter_schema(declared.flow).model_dump_for_openapi()
    strict = DeploymentUpdate(parameter_openapi_schema={**schema, "additionalProperties": False})
    client.update_deployment(made, strict)


def _schedules(
    declared: list[dict[str, Any]], known: DeploymentResponse | None
) -> list[DeploymentScheduleCreate]:
    """The schedules on the server, which people may have changed, and the missing ones."""
    kept = [
        DeploymentScheduleCreate.model_validate(schedule.model_dump(include=SCHEDULE_FIELDS))
        for schedule in (known.schedules if known else [])
    ]
    known_slugs = {schedule.slug for schedule in kept}
    return kept + [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=new["cron"], timezone=new["timezone"]),
            active=new["active"],
            slug=new["slug"],
        )
        for new in declared
        if new["slug"] not in known_slugs
    ]


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text as a YAML block."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
