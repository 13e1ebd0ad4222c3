"""Every query about our runs in MLflow."""

from collections.abc import Iterator, Sequence

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run, ViewType
from mlflow.exceptions import MlflowException

from rlhf_core.errors import UserError
from tasks.record import tags
from tasks.registry.refs import place_of

PAGE = 1000
NAME_LENGTH = 250  # MLflow's limit for the name of a run
FINISHED = "attributes.status = 'FINISHED'"
OLDEST_FIRST = ("attributes.start_time ASC",)
NEWEST_FIRST = ("attributes.start_time DESC",)


class Runs:
    """Reads the runs of pipelines and stages; changes nothing."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def find(self, run_id: str) -> Run | None:
        """The run with this id, even in MLflow's trash; None if it was deleted permanently."""
        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def find_active(self, run_id: str) -> Run | None:
        """The run with this id, unless it is in the trash."""
        run = self.find(run_id)
        return run if run is not None and run.info.lifecycle_stage == "active" else None

    def tags(self, run_id: str) -> dict[str, str]:
        """The tags of a run."""
        return dict(self._client.get_run(run_id).data.tags)

    def logged(self, run_id: str) -> set[tuple[str, int]]:
        """Name and step of every metric value that a run has."""
        names = self._client.get_run(run_id).data.metrics
        return {
            (name, m.step) for name in names for m in self._client.get_metric_history(run_id, name)
        }

    # ---- pipelines ----

    def pipeline(self, name: str) -> Run:
        """The pipeline run with this id, prefix of an id, or name.

        Raises: UserError if no run, or more than one, matches.
        """
        if not name.strip():
            raise UserError("the name of the run is empty; pass the name, or the id, of a run")
        if len(name) > NAME_LENGTH:
            raise UserError(
                f"no pipeline run has a name of {len(name)} characters; {NAME_LENGTH} are the most"
            )
        place = place_of(self._client.tracking_uri)
        experiments = [found.experiment_id for found in self._client.search_experiments()]
        found = self._search(experiments, _tagged(tags.STAGE, tags.PIPELINE))
        return _named(name, list(found), place)

    def last_pipeline(self, project: str) -> Run | None:
        """The newest finished run of a project that made a policy."""
        experiment = self._client.get_experiment_by_name(project)
        if experiment is None:
            return None
        # Of the runs with stages, only whole pipelines have a policy.
        policy = f"tags.`{tags.output_of('policy')}` LIKE 'models:/%'"
        condition = f"{FINISHED} and {_tagged(tags.STAGE, tags.PIPELINE)} and {policy}"
        return next(self._search([experiment.experiment_id], condition, NEWEST_FIRST), None)

    def of_flow_run(self, experiment: str, flow_run_id: str, kind: str) -> Run | None:
        """The pipeline run that a Prefect flow run started."""
        condition = f"{_tagged(tags.FLOW_RUN, flow_run_id)} and {_tagged(tags.STAGE, kind)}"
        return next(self._search([experiment], condition), None)

    def called_by(self, experiment: str, flow_run_id: str) -> Run | None:
        """The pipeline run that a flow run has called as a part of itself."""
        condition = f"{_tagged(tags.CALLER, flow_run_id)} and {_tagged(tags.STAGE, tags.PIPELINE)}"
        return next(self._search([experiment], condition, OLDEST_FIRST), None)

    # ---- stages ----

    def stages(self, experiment: str, pipeline: str, name: str = "") -> list[Run]:
        """The stages of a pipeline run, or those with one name, in the order in which they ran."""
        condition = _tagged(tags.PARENT_RUN, pipeline)
        condition += f" and {_tagged(tags.STAGE, name)}" if name else ""
        return list(self._search([experiment], condition, OLDEST_FIRST))

    def finished(self, experiment: str, key: str) -> list[Run]:
        """The finished stages with this key, newest first."""
        return list(self._search([experiment], f"{_tagged(tags.KEY, key)} and {FINISHED}"))

    def of_key(self, experiment: str, key: str) -> list[Run]:
        """The stages with this key, whatever came of them, newest first."""
        return list(self._search([experiment], _tagged(tags.KEY, key)))

    def of_snapshot(self, snapshot: str) -> list[Run]:
        """The runs of all projects that read a snapshot of votes, by its address."""
        experiments = [found.experiment_id for found in self._client.search_experiments()]
        return list(self._search(experiments, _tagged(tags.SNAPSHOT, snapshot), OLDEST_FIRST))

    def every_stage(self) -> Iterator[tuple[str, Run]]:
        """All runs of stages and the names of their experiments: those in the trash, and of
        experiments that were deleted, too."""
        names = {found.experiment_id: found.name for found in self._experiments()}
        # A pipeline's run is none; other runs without a stage have no such tag.
        condition = f"tags.`{tags.STAGE}` LIKE '%' and tags.`{tags.STAGE}` != '{tags.PIPELINE}'"
        if names:
            for run in self._search(list(names), condition, view=ViewType.ALL):
                yield names[run.info.experiment_id], run

    def _experiments(self) -> Iterator[Experiment]:
        token = None
        while True:
            page = self._client.search_experiments(
                view_type=ViewType.ALL, max_results=PAGE, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    # ---- judges ----

    def verdicts(self, experiment: str) -> list[Run]:
        """The runs that keep the verdicts of judges: one, or more if several began at once."""
        return list(self._search([experiment], _tagged(tags.STAGE, tags.VERDICTS), OLDEST_FIRST))

    # ---- people ----

    def feedback_report(self, experiment: str, snapshot: str) -> Run | None:
        """The finished run with the report on a snapshot of votes, by its address."""
        condition = f"{_tagged(tags.STAGE, tags.FEEDBACK_REPORT)} and {FINISHED}"
        condition += f" and {_tagged(tags.SNAPSHOT, snapshot)}"
        return next(self._search([experiment], condition), None)

    def queue_order(self, experiment: str) -> Run | None:
        """The run with what the order of a project's queue saves."""
        return next(self._search([experiment], _tagged(tags.STAGE, tags.QUEUE_ORDER)), None)

    def _search(
        self,
        experiments: list[str],
        condition: str,
        order: Sequence[str] = NEWEST_FIRST,
        view: int = ViewType.ACTIVE_ONLY,
    ) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs(
                experiments,
                condition,
                run_view_type=view,
                max_results=PAGE,
                order_by=list(order),
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return


def _tagged(name: str, value: str) -> str:
    return f"tags.`{name}` = '{value}'"


def _named(name: str, known: list[Run], place: str) -> Run:
    matches = [run for run in known if name in (run.info.run_id, run.info.run_name)]
    matches = matches or [run for run in known if run.info.run_id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(run.info.run_id[:12] for run in matches[:5])
        raise UserError(
            f"{len(matches)} runs match '{name}' (newest first: {ids}); use an id instead"
        )
    newest = ", ".join(f"{run.info.run_name} ({run.info.run_id[:8]})" for run in known[:5])
    hint = f"the newest are {newest}" if newest else "there are none yet: start one with `rlhf run`"
    raise UserError(f"no pipeline run matches '{name}' in {place}; {hint}")
